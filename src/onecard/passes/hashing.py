"""The hashing trick: the place of a weight decides, by a hash, which of a few shared numbers it is.

    W'_ij = sign(i, j) s[bucket(i, j)]        rows * in / factor numbers s, no codes at all

Nothing about W decides who shares, so a trained matrix keeps about 1 / factor of its power: this is a
format to be trained in, and what a network is given before training. The numbers that come closest are
the signed means of those who meet; with the statistics, those that minimize tr((W - W') H (W - W')^T)
(sharing.py). The signs make it unbiased: over hashes the mean of W' x with s = sum of sign * w is W x.

Chen et al., Compressing Neural Networks with the Hashing Trick, arXiv 1504.04788.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import Hashed
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert, expand, storage
from onecard.passes.base import BlockPass
from onecard.passes.lowrank import error_row, require_finite
from onecard.passes.sharing import least_squares


@dataclass(frozen=True)
class Hash(BlockPass):
    """Settings: how many weights share a number, whether inputs weigh, steps of the fit."""

    factor: int = 8
    weigh: bool = True
    steps: int = 30

    key = "hash"
    title = "hashing trick"
    paper = "Chen et al., Compressing Neural Networks with the Hashing Trick, arXiv 1504.04788"

    def __post_init__(self) -> None:
        Hashed(self.factor)
        if not 1 <= self.steps <= 1000:
            raise BadRequest(f"hash.steps is {self.steps}", do="1 to 1000 steps")

    @property
    def keeps_zeros(self) -> bool:
        return False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN}) if self.weigh else frozenset()

    def format_of(self, columns: int) -> Hashed:
        return Hashed(self.factor)

    def check(self, spec: Spec) -> None:
        pass

    def site_bytes(self, rows: int, columns: int) -> int:
        return 40 * rows * columns

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian if self.weigh else None
        for name, linear in site.linears.items():
            where, w = f"{site.block}.{name}", linear.matrix()
            require_finite(w, where)
            format = self.format_of(w.shape[1]).scaled(site.stored)
            held = storage.round_to_hashed(w, format)
            if hessian is not None and bool(hessian.diagonal().any()):
                start = held.parts["weight_shared"].float()
                buckets = Buckets(linear.shape, len(start))
                fitted = least_squares(buckets, w, hessian, start, self.steps)
                held = storage.hold_hashed(fitted, linear.shape, format)
            linear.replace(held)
            yield Row(where, "format", format.name)
            yield error_row(where, w, convert.to_dense(held), hessian)
        if self.weigh and not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


class Buckets:
    """Who shares what: bucket and sign of every weight of a matrix."""

    alone = False

    def __init__(self, shape: tuple[int, int], size: int) -> None:
        bucket, sign = expand.hashed(shape, size)
        self.bucket, self.sign = torch.from_numpy(bucket), torch.from_numpy(sign)

    def read(self, x: Tensor, own: slice) -> Tensor:
        return x[self.bucket[own]] * self.sign[own]

    def add(self, d: Tensor, own: slice, into: Tensor) -> None:
        into.index_add_(0, self.bucket[own].flatten(), (d * self.sign[own]).flatten())
