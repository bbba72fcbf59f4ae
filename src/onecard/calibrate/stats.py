"""What is remembered of a site's inputs X [tokens, in]: one set of statistics for all its linears.

    hessian   2 X^T X / n       [in, in]   (the second derivative of the mean squared output error)
    norm      sqrt(sum x^2)     [in]
    absmax    max |x|           [in]
    mean      sum x / n         [in]
    zeros     how often x = 0   [in]
    cross     2 Y^T X / n       [in, in]   (Y: the inputs that the uncompressed model has there)
    sample    some rows of X    [some, in] (every token, every second, every fourth ... from the first on)

n counts tokens. Batches may come in any cut; a batch without tokens (an expert nobody was sent to)
changes nothing. Sums are float32. Inputs in bfloat16 are multiplied as they are, with float32 sums,
which is exact per product and uses the matrix units where there are some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

HESSIAN, NORM, ABSMAX, MEAN, ZEROS = "hessian", "norm", "absmax", "mean", "zeros"
CROSS, ORIGINAL, SAMPLE = "cross", "original", "sample"
"""`original` is no statistic: the pass wants to see each block whole, beside the uncompressed one."""
PANEL = 1024
SAMPLED_TOKENS = 512
"""Rows of a sample, at most."""


class Statistics:
    """Running statistics of one site; only those in `needs` are collected."""

    def __init__(self, size: int, needs: Iterable[str]) -> None:
        self.size, self.needs, self.count = size, frozenset(needs), 0
        self._products = torch.zeros(size, size) if HESSIAN in self.needs else None
        self._squares = torch.zeros(size) if NORM in self.needs else None
        self._absmax = torch.zeros(size) if ABSMAX in self.needs else None
        self._sum = torch.zeros(size) if MEAN in self.needs else None
        self._zeros = torch.zeros(size) if ZEROS in self.needs else None
        self._cross = torch.zeros(size, size) if CROSS in self.needs else None
        self._sample = torch.zeros(0, size) if SAMPLE in self.needs else None
        self._stride = 1

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [..., in], and for the cross products those of the uncompressed model."""
        x = x.detach().flatten(0, -2).cpu()
        if not x.shape[0]:
            return
        if self._sample is not None:
            self._add_sample(self._sample, x)
        self.count += x.shape[0]
        if self._products is not None:
            _add_products(self._products, x)
        if self._squares is not None:
            self._squares += x.float().square().sum(0)
        if self._absmax is not None:
            self._absmax = torch.maximum(self._absmax, x.abs().amax(0).float())
        if self._sum is not None:
            self._sum += x.float().sum(0)
        if self._zeros is not None:
            self._zeros += (x == 0).sum(0)

        if self._cross is not None:
            assert original is not None
            self._cross.addmm_(original.detach().flatten(0, -2).float().T, x.float())

    def _add_sample(self, sample: Tensor, x: Tensor) -> None:
        """Tokens whose number is a multiple of the stride, which doubles when they are too many."""
        sample = torch.cat((sample, x[-self.count % self._stride :: self._stride].float()))
        while sample.shape[0] > SAMPLED_TOKENS:
            sample, self._stride = sample[::2], 2 * self._stride
        self._sample = sample.clone()

    def divide(self, s: Tensor) -> None:
        """The statistics of the inputs divided by s [in], channel by channel."""
        if self._products is not None:
            self._products /= s[:, None]
            self._products /= s
        if self._squares is not None:
            self._squares /= s.square()
        if self._absmax is not None:
            self._absmax /= s
        if self._sum is not None:
            self._sum /= s
        if self._cross is not None:
            self._cross /= s[:, None]
            self._cross /= s
        if self._sample is not None:
            self._sample /= s

    @property
    def hessian(self) -> Tensor:
        """2 X^T X / n; zeros when no token came."""
        assert self._products is not None, "no pass asked for the Hessian"
        h = self._products * (2.0 / max(self.count, 1))
        for start in range(0, self.size, 512):  # below the diagonal, mirror what is above it
            end = min(start + 512, self.size)
            h[end:, start:end] = h[start:end, end:].T
            corner = h[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return h

    @property
    def cross(self) -> Tensor:
        """2 Y^T X / n; zeros when no token came."""
        assert self._cross is not None, "no pass asked for cross products"
        return self._cross * (2.0 / max(self.count, 1))

    @property
    def sample(self) -> Tensor:
        assert self._sample is not None, "no pass asked for a sample"
        return self._sample

    @property
    def norm(self) -> Tensor:
        if self._squares is not None:
            return self._squares.sqrt()
        assert self._products is not None, "no pass asked for norms"
        return self._products.diagonal().sqrt()

    @property
    def absmax(self) -> Tensor:
        assert self._absmax is not None, "no pass asked for absolute maxima"
        return self._absmax

    @property
    def mean(self) -> Tensor:
        assert self._sum is not None, "no pass asked for means"
        return self._sum / max(self.count, 1)

    @property
    def zeros(self) -> Tensor:
        assert self._zeros is not None, "no pass asked for zeros"
        return self._zeros


def _add_products(products: Tensor, x: Tensor) -> None:
    """products += X^T X, in panels on and above the diagonal (the rest is its mirror image)."""
    precision = multiply_in_bfloat16() if x.dtype == torch.bfloat16 else nullcontext()
    x = x.float()
    with precision:
        for start in range(0, x.shape[1], PANEL):
            end = min(start + PANEL, x.shape[1])
            panel = x[:, start:end].T
            products[start:end, start:].addmm_(panel, x[:, start:])


@contextmanager
def multiply_in_bfloat16() -> Iterator[None]:
    """float32 matrix products round their factors to bfloat16 and sum in float32, on the matrix units."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
