"""The three things with numbers in them: Linear, Embedding, Normalize.

A Linear holds a Weight in some format; the format decides how it multiplies, and its `inputs` how what
it reads is rounded before (core/scheme.py). Parts are registered under their stored names, so a state
dict is what lies on disk. Nothing is initialized: a network is built on the meta device and filled from
a checkpoint, or by `initialize` in model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.core.format import Dense, Format, Weight
from onecard.core.scheme import Inputs, Scheme
from onecard.core.spec import Norm
from onecard.kernels import convert, reference


class Matrix(nn.Module):
    """A matrix [out, in] held as a Weight; `inputs` says how what it multiplies is rounded."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.format: Format = Dense(reference.NAMES[dtype])
        self.inputs: Inputs | None = None
        self.weight: Tensor | None = nn.Parameter(torch.empty(shape, dtype=dtype))

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

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.format, self.inputs)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix it stands for, [out, in]."""
        return convert.to_dense(self.held(), dtype)


class Linear(Matrix):
    """y = x W^T + b with W [out, in] held as a Weight, x perhaps rounded."""

    input_scale: Tensor | None

    def __init__(self, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.register_buffer("input_scale", None)
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype)) if bias else None

    def round(self, inputs: Inputs | None, scale: Tensor | None = None) -> None:
        """Round inputs from now on; `scale` [1] where it is stored."""
        self.inputs, self.input_scale = inputs, scale

    def read(self, x: Tensor) -> Tensor:
        """x as it is multiplied."""
        return (
            x if self.inputs is None else reference.round_inputs(x, self.inputs, self.input_scale)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.format.dense:
            assert self.weight is not None
            return F.linear(x, self.weight.to(x.dtype), bias)
        return F.linear(x, self.matrix(x.dtype), bias)


class Embedding(Matrix):
    """Rows of a table [vocabulary, width], dense or symmetric integers, which come in dtype `compute`."""

    def __init__(self, count: int, width: int, dtype: torch.dtype) -> None:
        super().__init__((count, width), dtype)
        self.compute = dtype

    @property
    def dtype(self) -> torch.dtype:
        """What rows come in."""
        return self.weight.dtype if self.format.dense and self.weight is not None else self.compute

    def replace(self, weight: Weight) -> None:
        self.compute = self.dtype
        super().replace(weight)

    def forward(self, ids: Tensor) -> Tensor:
        if self.format.dense and self.weight is not None:
            return F.embedding(ids, self.weight)
        flat, parts = ids.flatten(), self.held().parts
        own = {"weight_packed": parts["weight_packed"][flat],
               "weight_scale": parts["weight_scale"][flat],
               "weight_shape": parts["weight_shape"]}  # fmt: skip
        rows = Weight(self.format, (len(flat), self.shape[1]), own)
        return convert.to_dense(rows, self.compute).view(*ids.shape, self.shape[1])


class Normalize(nn.Module):
    """RMS or layer norm as its Norm row says."""

    def __init__(self, width: int, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype)) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return reference.norm(x, self.weight, self.bias, self.norm)
