"""The three things with numbers in them: Linear, Embedding, Normalize.

A Linear holds a Weight in some format; the format decides how it multiplies. Parts are registered
under their stored names, so a state dict is what lies on disk. Nothing is initialized: a network is
built on the meta device and filled from a checkpoint, or by `initialize` in model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.core.format import Dense, Format, Weight
from onecard.core.spec import Norm
from onecard.kernels import convert, reference


class Linear(nn.Module):
    """y = x W^T + b with W [out, in] held as a Weight."""

    def __init__(self, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.format: Format = Dense(reference.NAMES[dtype])
        self.weight: Tensor | None = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype)) if bias else None

    def held(self) -> Weight:
        """The weight as it is held now."""
        parts = {name: getattr(self, name) for name in self.format.parts(self.shape)}
        return Weight(self.format, self.shape, parts)

    def replace(self, weight: Weight) -> None:
        """Hold another Weight of the same shape."""
        if tuple(weight.shape) != tuple(self.shape):
            raise ValueError(f"a weight of {weight.shape} cannot replace one of {self.shape}")
        for name in self.format.parts(self.shape):
            delattr(self, name)
        self.format = weight.format
        for name, part in weight.parts.items():
            if weight.format.dense:
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
            else:
                self.register_buffer(name, part)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix it stands for, [out, in]."""
        return convert.to_dense(self.held(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.format.dense:
            assert self.weight is not None
            return F.linear(x, self.weight.to(x.dtype), bias)
        return F.linear(x, self.matrix(x.dtype), bias)


class Embedding(nn.Module):
    """Rows of a table [vocabulary, width]."""

    def __init__(self, count: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Normalize(nn.Module):
    """RMS or layer norm as its Norm row says."""

    def __init__(self, width: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype)) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return reference.norm(x, self.weight, self.bias, self.norm)
