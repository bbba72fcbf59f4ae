"""Grids: how a latent matrix becomes the one that multiplies, with a gradient, and how that is stored.

    Dense            W, times the mask of what was not zero
    Integers         s (clamp(round(W / s) + z) - z), s and z as they came
    Levels, Float8   s * (nearest level of W / s), s as it came
    Sparse           the inner grid under the stored mask
    Codebook         C[codes], the codes as they came: the gradient of an entry is the sum of those of the
                     weights that share it (Han et al., Deep Compression, arXiv 1510.00149)
    Hashed           likewise, with signs (Chen et al., arXiv 1504.04788)
    LowRank          grid(L) grid(R) + grid(rest), each with a latent of its own

A rounding has the gradient of the identity (straight-through, arXiv 1308.3432), cut off where a grid ends.
What a packed grid gives is exactly what it stores; dense numbers learn in float32 and are rounded to
the dtype they had when they are stored.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onecard.core.format import (
    TABLES,
    Codebook,
    Float8,
    Hashed,
    Integers,
    Levels,
    LowRank,
    Sparse,
    Weight,
)
from onecard.kernels import convert, expand, reference, storage
from onecard.kernels.reference import DTYPES


class Grid(nn.Module):
    """What a latent matrix [out, in] becomes. Its own parameters, if any, are learned with it."""

    latent: ClassVar[bool] = True
    """False: it has parameters of its own and looks at no latent matrix."""

    def forward(self, w: Tensor) -> Tensor:
        """The matrix that multiplies, float32, with a gradient to w."""
        raise NotImplementedError

    def store(self, w: Tensor) -> Weight:
        """`forward(w)` as it is stored."""
        raise NotImplementedError

    def settle(self, w: Tensor) -> None:
        """Keep w in its range, behind an update."""


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, through: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight(value: Tensor, through: Tensor) -> Tensor:
    """`value` with the gradient of `through`."""
    return _Straight.apply(value.detach(), through)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a dtype holds it, float32, with the gradient of x."""
    return straight(x.to(dtype).float(), x)


class FreeGrid(Grid):
    """Any number where the stored matrix is not zero; stored in the dtype it had."""

    keep: Tensor | None

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.dtype = stored.dtype
        keep = stored != 0
        self.register_buffer("keep", None if bool(keep.all()) else keep)

    def forward(self, w: Tensor) -> Tensor:
        return w if self.keep is None else w * self.keep

    def store(self, w: Tensor) -> Weight:
        return reference.from_dense(self(w).to(self.dtype))


class IntegerGrid(Grid):
    """The integer grid a matrix is stored on: scales and zero points [out, groups] stay.

    `zeros`: weights that are zero stay so.
    """

    keep: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, held: Weight, zeros: bool = False) -> None:
        super().__init__()
        assert isinstance(held.format, Integers)
        self.format = held.format
        q, scale, zero = reference.codes(held)
        self.register_buffer("scale", scale[..., None])
        self.register_buffer("zero", zero[..., None])
        keep = reference.grouped(q.float(), self.format) != self.zero
        self.register_buffer("keep", keep.flatten(1) if zeros else None)

    def codes(self, w: Tensor) -> Tensor:
        """Integers [out, groups, size], as floats, with the straight-through gradient."""
        low, high = self.format.levels
        t = (reference.grouped(w, self.format) / self.scale + self.zero).clamp(low, high)
        return straight(torch.round(t), t)

    def forward(self, w: Tensor) -> Tensor:
        values = ((self.codes(w) - self.zero) * self.scale).flatten(1)
        return values if self.keep is None else values * self.keep

    def store(self, w: Tensor) -> Weight:
        q = self.codes(w)
        if self.keep is not None:
            kept = reference.grouped(self.keep, self.format)
            q = torch.where(kept, q, self.zero)
        return reference.hold(q.flatten(1), self.scale[..., 0], self.zero[..., 0], self.format)


class ScaledGrid(Grid):
    """Levels or floats of 8 bits under the scales [out, in] a matrix is stored with."""

    scale: Tensor

    def __init__(self, held: Weight) -> None:
        super().__init__()
        self.held = held
        format, (rows, columns) = held.format, held.shape
        if isinstance(format, Levels):
            parts = {name: storage.as_numpy(part) for name, part in held.parts.items()}
            scale = torch.from_numpy(expand.spread(expand.group_scales(parts, format), columns))
            levels = torch.tensor(TABLES[format.table].levels)
        else:
            assert isinstance(format, Float8)
            scale = held.parts["weight_scale"].float()
            if format.per == "block":
                scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[
                    :, :columns
                ]
            levels = torch.tensor([-storage.FP8_MOST, storage.FP8_MOST])
        self.register_buffer("scale", scale.clone())
        self.register_buffer("levels", levels)

    def nearest(self, w: Tensor) -> Tensor:
        """Indices of levels, or floats of 8 bits, of w / scale."""
        t = w.detach() / torch.where(self.scale != 0, self.scale, torch.ones_like(self.scale))
        if isinstance(self.held.format, Levels):
            return storage.nearest_level(t, self.levels)  # type: ignore[arg-type]
        return t.clamp(-storage.FP8_MOST, storage.FP8_MOST).to(torch.float8_e4m3fn)

    def forward(self, w: Tensor) -> Tensor:
        found = self.nearest(w)
        values = self.levels[found] if isinstance(self.held.format, Levels) else found.float()  # type: ignore[index]
        ends = self.scale * self.levels.min(), self.scale * self.levels.max()  # type: ignore[operator, union-attr]
        return straight(values * self.scale, w.clamp(*ends))

    def store(self, w: Tensor) -> Weight:
        found, held = self.nearest(w), self.held
        if isinstance(held.format, Levels):
            packed = storage.pack(found, held.format.bits)
            return Weight(held.format, held.shape, {**held.parts, "weight_packed": packed})
        return Weight(held.format, held.shape, {**held.parts, "weight": found})


class SparseGrid(Grid):
    """The stored mask stays; between its bits any number, or integers on their scales."""

    mask: Tensor
    scale: Tensor

    def __init__(self, held: Weight) -> None:
        super().__init__()
        self.held, columns = held, held.shape[1]
        assert isinstance(held.format, Sparse)
        self.inner = held.format.inner
        mask = expand.mask(storage.as_numpy(held.parts["weight_mask"]), columns)
        self.register_buffer("mask", torch.from_numpy(mask))
        if isinstance(self.inner, Integers):
            scale = held.parts["weight_scale"].float()
            self.register_buffer("scale", scale.repeat_interleave(columns // scale.shape[1], 1))

    def codes(self, w: Tensor) -> Tensor:
        assert isinstance(self.inner, Integers)
        low, high = self.inner.levels
        t = (w / self.scale).clamp(low, high)
        return straight(torch.round(t), t)

    def forward(self, w: Tensor) -> Tensor:
        if isinstance(self.inner, Integers):
            w = self.codes(w) * self.scale
        return w * self.mask

    def store(self, w: Tensor) -> Weight:
        if isinstance(self.inner, Integers):
            codes = self.codes(w)[self.mask]
            new = {"weight_packed": reference.pack(codes[None], self.inner.bits)[0]}
        else:
            new = {"weight_values": w[self.mask].to(DTYPES[str(self.inner.dense)])}
        return Weight(self.held.format, self.held.shape, {**self.held.parts, **new})


class SharedGrid(Grid):
    """Shared numbers are learned, which weight takes which stays: codebooks and hashed matrices."""

    latent = False
    index: Tensor
    sign: Tensor | None

    def __init__(self, held: Weight) -> None:
        super().__init__()
        self.held, format, (rows, columns) = held, held.format, held.shape
        self.part = "weight_table" if isinstance(format, Codebook) else "weight_shared"
        stored = held.parts[self.part]
        self.dtype = stored.dtype
        self.shared = nn.Parameter(stored.float())
        sign = None
        if isinstance(format, Codebook):
            packed = storage.as_numpy(held.parts["weight_packed"])
            codes = torch.from_numpy(expand.unpack(packed, format.bits, columns // format.vector))
            row = torch.arange(rows)[:, None] * (2**format.bits if format.per_row else 0)
            first = (row + codes) * format.vector
            index = (first[..., None] + torch.arange(format.vector)).flatten(1)
        else:
            assert isinstance(format, Hashed)
            index, sign = map(torch.from_numpy, expand.hashed(held.shape, stored.shape[0]))
        self.register_buffer("index", index)
        self.register_buffer("sign", sign)

    def forward(self, w: Tensor) -> Tensor:
        values = in_dtype(self.shared, self.dtype).flatten()[self.index]
        return values if self.sign is None else values * self.sign

    def store(self, w: Tensor) -> Weight:
        new = self.shared.detach().to(self.dtype)
        return Weight(self.held.format, self.held.shape, {**self.held.parts, self.part: new})


class LowRankGrid(Grid):
    """Two factors and perhaps a remainder, each a latent matrix on its own grid."""

    latent = False

    def __init__(self, held: Weight) -> None:
        super().__init__()
        self.held = held
        assert isinstance(held.format, LowRank)
        for prefix in held.format.pieces(held.shape):
            piece = held.piece(prefix)
            own = grid_of(piece)
            self.add_module(f"{prefix}grid", own)
            if own.latent:
                self.register_parameter(prefix, nn.Parameter(convert.to_dense(piece).clone()))

    def piece(self, prefix: str) -> tuple[Grid, Tensor]:
        own = self.get_submodule(f"{prefix}grid")
        assert isinstance(own, Grid)
        return own, getattr(self, prefix, torch.empty(0))

    def forward(self, w: Tensor) -> Tensor:
        assert isinstance(self.held.format, LowRank)
        found = {}
        for prefix in self.held.format.pieces(self.held.shape):
            own, latent = self.piece(prefix)
            found[prefix] = (
                own(latent) if not isinstance(own, FreeGrid) else in_dtype(own(latent), own.dtype)
            )
        product = found["left_"] @ found["right_"]
        return product + found["rest_"] if "rest_" in found else product

    def store(self, w: Tensor) -> Weight:
        assert isinstance(self.held.format, LowRank)
        parts: dict[str, Tensor] = {}
        for prefix in self.held.format.pieces(self.held.shape):
            own, latent = self.piece(prefix)
            parts |= {prefix + name: part for name, part in own.store(latent).parts.items()}
        return Weight(self.held.format, self.held.shape, parts)


def grid_of(held: Weight, zeros: bool = False) -> Grid:
    """The grid of a matrix as it is stored. `zeros`: those among integers stay."""
    match held.format:
        case Integers():
            return IntegerGrid(held, zeros)
        case Levels() | Float8():
            return ScaledGrid(held)
        case Sparse():
            return SparseGrid(held)
        case Codebook() | Hashed():
            return SharedGrid(held)
        case LowRank():
            return LowRankGrid(held)
    return FreeGrid(held.parts["weight"])
