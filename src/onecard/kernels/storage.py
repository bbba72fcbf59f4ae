"""Matrices into formats, in plain PyTorch, and back: one function for each kind of storage.

`hold_*` stores what a pass has chosen (codes, tables, masks, factors); `round_to_*` chooses by rounding
to nearest. Reading back is kernels/expand.py's. Integers have their own place (kernels/reference.py,
natively kernels/convert.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onecard.core.errors import FailedWork
from onecard.core.format import (
    TABLES,
    Codebook,
    Dense,
    Float8,
    Format,
    Hashed,
    Integers,
    Levels,
    LowRank,
    Shape,
    Sparse,
    Weight,
    parse_pattern,
)
from onecard.kernels import expand, reference
from onecard.kernels.reference import DTYPES

FP8_MOST = 448.0
BITS = {torch.bfloat16: (torch.int16, np.uint16), torch.float8_e4m3fn: (torch.uint8, np.uint8)}


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor as NumPy has it: bf16 and fp8 as their bits."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in BITS:
        like, seen = BITS[tensor.dtype]
        return tensor.view(like).numpy().view(seen)
    return tensor.numpy()


def to_dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [rows, columns] that a Weight of any format stands for."""
    if weight.format.dense:
        return weight.parts["weight"].to(dtype)
    if isinstance(weight.format, Integers):
        return reference.to_dense(weight, dtype)
    parts = {name: as_numpy(part) for name, part in weight.parts.items()}
    device = next(iter(weight.parts.values())).device
    return torch.from_numpy(expand.expand(parts, weight.shape, weight.format)).to(device, dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] from 0 to 2**bits - 1 -> int32 [rows, words]."""
    return reference.pack(codes.to(torch.int16) - 2 ** (bits - 1), bits)


# Levels -----------------------------------------------------------------------------------------


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Indices of the levels nearest to x, the lower one halfway; `levels` in any order."""
    order = torch.argsort(levels, stable=True)
    rising = levels[order]
    distinct = torch.cat((rising.new_ones(1, dtype=torch.bool), rising[1:] > rising[:-1]))
    order, rising = order[distinct], rising[distinct]
    return order[torch.bucketize(x, (rising[1:] + rising[:-1]) / 2)]


def level_scale(most: Tensor, format: Levels) -> tuple[dict[str, Tensor], Tensor]:
    """The stored parts of the scales that map a largest magnitude [rows, groups] to the top level, and
    these scales in float32. A group of zeros gets the smallest scale above zero, or 1.

    mxfp4 takes the power of two that the OCP MX specification does: 2**(floor(log2 most) - 2).
    """
    table = TABLES[format.table]
    if table.scale == "e8m0":
        exponent = torch.frexp(most.float()).exponent - 1 - 2
        exponent = torch.where(most > 0, exponent, 0).clamp(-127, 127)
        stored = (exponent + 127).to(torch.uint8)
        return {"weight_scale": stored}, torch.ldexp(torch.ones_like(most), exponent)
    if table.scale == "e4m3":
        whole = (most.max() / (table.top * FP8_MOST)).float()
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
        eighth = (most / table.top / whole).clamp(max=FP8_MOST).to(torch.float8_e4m3fn)
        scale = eighth.float() * whole
        return {"weight_scale": eighth, "weight_global": whole.reshape(1)}, scale
    held = (most / table.top).to(DTYPES[format.scale])
    held = torch.where(held.float() > 0, held, torch.ones_like(held))
    return {"weight_scale": held}, held.float()


def group_top(w: Tensor, format: Levels) -> Tensor:
    """What the top level stands for in each group [rows, groups]: its largest magnitude; for ternary
    (BitNet b1.58, arXiv 2402.17764) and binary (XNOR-Net, arXiv 1603.05279) its mean magnitude."""
    blocks = w.float().unflatten(1, (format.groups((w.shape[0], w.shape[1])), -1)).abs()
    if format.table in ("ternary", "binary"):
        return blocks.mean(-1)
    return blocks.amax(-1)


def round_to_levels(w: Tensor, format: Levels) -> Weight:
    """w [rows, columns] to the nearest levels under the scales of `group_top`."""
    _require_finite(w)
    scales, scale = level_scale(group_top(w, format), format)
    blocks = w.float().unflatten(1, (scale.shape[1], -1))
    levels = torch.tensor(TABLES[format.table].levels)
    steps = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]
    return hold_levels(nearest_level(blocks / steps, levels).flatten(1), scales, format)


def hold_levels(codes: Tensor, scales: dict[str, Tensor], format: Levels) -> Weight:
    """Codes [rows, columns] into the format's table; `scales` as `level_scale` gives them."""
    shape = (codes.shape[0], codes.shape[1])
    return Weight(format, shape, {"weight_packed": pack(codes, format.bits), **scales})


# Floats of 8 bits ---------------------------------------------------------------------------------


def round_to_float8(w: Tensor, format: Float8) -> Weight:
    """w [rows, columns] scaled so that the largest magnitude of a row, tensor or block becomes 448."""
    _require_finite(w)
    rows, columns = w.shape
    w = w.float()
    if format.per == "block":
        down, across = -(-rows // 128), -(-columns // 128)
        padded = torch.nn.functional.pad(w.abs(), (0, across * 128 - columns, 0, down * 128 - rows))
        most = padded.view(down, 128, across, 128).amax((1, 3))
    else:
        most = w.abs().amax(1, keepdim=True) if format.per == "row" else w.abs().amax().reshape(1)
    scale = (most / FP8_MOST).to(DTYPES[format.scale])
    scale = torch.where(scale.float() > 0, scale, torch.ones_like(scale))
    wide = scale.float()
    if format.per == "block":
        wide = wide.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    eighth = (w / wide).clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
    return Weight(format, (rows, columns), {"weight": eighth, "weight_scale": scale})


# Codebooks, hashing -------------------------------------------------------------------------------


def hold_codebook(codes: Tensor, table: Tensor, format: Codebook) -> Weight:
    """Codes [rows, columns / vector] into a table [1 or rows, 2**bits, vector]."""
    parts = {
        "weight_packed": pack(codes, format.bits),
        "weight_table": table.to(DTYPES[format.scale]).contiguous(),
    }
    return Weight(format, (codes.shape[0], codes.shape[1] * format.vector), parts)


def hold_hashed(shared: Tensor, shape: Shape, format: Hashed) -> Weight:
    """Shared numbers [ceil(rows * columns / factor)]."""
    return Weight(format, shape, {"weight_shared": shared.to(DTYPES[format.scale])})


def round_to_hashed(w: Tensor, format: Hashed) -> Weight:
    """Each shared number is the mean of the (signed) weights that meet in it: the least squares."""
    shape = (w.shape[0], w.shape[1])
    size = format.parts(shape)["weight_shared"][1][0]
    bucket, sign = (torch.from_numpy(x).flatten() for x in expand.hashed(shape, size))
    total = torch.zeros(size).index_add_(0, bucket, w.float().flatten() * sign)
    count = torch.zeros(size).index_add_(0, bucket, torch.ones_like(sign))
    return hold_hashed(total / count.clamp(min=1), shape, format)


# Sparse -------------------------------------------------------------------------------------------


def sparse_format(zero: Tensor, inner: Format, pattern: str | None = None) -> Sparse:
    """The format of a matrix whose weights are zero where `zero` [rows, columns] is set; one that is all
    zeros keeps a few of them. A pattern that the zeros do not follow is a FailedWork."""
    if pattern is None:
        return Sparse(inner, min(int(zero.sum()) / zero.numel(), 0.9999))
    kept, of = parse_pattern(pattern)
    if int((~zero).unflatten(1, (-1, of)).sum(-1).max()) > kept:
        raise FailedWork(f"a matrix holds more than {kept} weights in a run of {of}")
    return Sparse(inner, pattern=pattern)


def stored_mask(zero: Tensor, format: Sparse) -> Tensor:
    """bool [rows, columns]: the stored places, as many as there are slots. Where fewer weights are not
    zero the first zeros of the matrix, or of their run of a pattern, fill up."""
    mask = ~zero
    if format.pattern is None:
        missing = format.slots((mask.shape[0], mask.shape[1])) - int(mask.sum())
        free = torch.nonzero(zero.flatten())[:missing, 0]
        mask.view(-1)[free] = True
        return mask
    kept, of = parse_pattern(format.pattern)
    runs = mask.unflatten(1, (-1, of))
    first = torch.argsort(runs.to(torch.int8), dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(runs).scatter_(-1, first, True).flatten(1)


def _packed_mask(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=1, bitorder="little"))


def hold_sparse(w: Tensor, dtype: torch.dtype, pattern: str | None = None) -> Weight:
    """w [rows, columns] by its weights that are not zero, as numbers of `dtype`."""
    w = w.to(dtype)
    format = sparse_format(w == 0, Dense(reference.NAMES[dtype]), pattern)
    mask = stored_mask(w == 0, format)
    parts = {"weight_mask": _packed_mask(mask), "weight_values": w[mask]}
    return Weight(format, (w.shape[0], w.shape[1]), parts)


def hold_sparse_integers(
    codes: Tensor, scale: Tensor, zero: Tensor, inner: Integers, pattern: str | None = None
) -> Weight:
    """Codes [rows, columns] and scales [rows, groups] by those that are not under `zero`, whose codes
    do not matter."""
    format = sparse_format(zero, inner, pattern)
    mask = stored_mask(zero, format)
    kept = torch.where(zero, 0, codes.to(torch.int16))[mask]
    parts = {
        "weight_mask": _packed_mask(mask),
        "weight_packed": reference.pack(kept[None], inner.bits)[0],
        "weight_scale": scale.to(DTYPES[inner.scale]),
    }
    return Weight(format, (codes.shape[0], codes.shape[1]), parts)


def round_to_sparse(w: Tensor, inner: Integers, pattern: str | None = None) -> Weight:
    """w [rows, columns] with its zeros kept and the rest rounded to nearest integers."""
    blocks = reference.grouped(w, inner)
    scale, zero = reference.grid(blocks, inner)
    codes = reference.encode(blocks, scale[..., None], zero[..., None], inner).flatten(1)
    return hold_sparse_integers(codes, scale, w == 0, inner, pattern)


# Factors ------------------------------------------------------------------------------------------


def hold_lowrank(left: Weight, right: Weight, rest: Weight | None = None) -> Weight:
    """left [rows, rank] @ right [rank, columns], and a remainder of the product's shape."""
    format = LowRank(left.shape[1], right.format, rest.format if rest else None)
    shape = (left.shape[0], right.shape[1])
    found = {"left_": left, "right_": right, **({"rest_": rest} if rest else {})}
    for prefix, (own, size) in format.pieces(shape).items():
        piece = found[prefix]
        if piece.format != own or tuple(piece.shape) != size:
            raise ValueError(f"{prefix}{piece.format.name} {piece.shape} is not {own.name} {size}")
    parts = {prefix + n: part for prefix, piece in found.items() for n, part in piece.parts.items()}
    return Weight(format, shape, parts)


def held_in(w: Tensor, format: Format) -> Weight:
    """w [rows, columns] in a format, each number rounded to nearest; of a sparse format the zeros stay."""
    match format:
        case Integers():
            return reference.round_to_nearest(w, format)
        case Levels():
            return round_to_levels(w, format)
        case Float8():
            return round_to_float8(w, format)
        case Hashed():
            return round_to_hashed(w, format)
        case Sparse(inner=Integers() as inner):
            return round_to_sparse(w, inner, format.pattern)
        case Sparse():
            return hold_sparse(w, DTYPES[str(format.inner.dense)], format.pattern)
    if format.dense:
        return reference.from_dense(w.to(DTYPES[format.dense]))
    raise NotImplementedError(f"rounding to {format.name} is no single step")


def rescaled(format: Format, dtype: torch.dtype) -> Format:
    """A format with its scales and dense parts in the dtype of a model."""
    name = reference.NAMES[dtype]
    if isinstance(format, Sparse) and format.inner.dense:
        return replace(format, inner=Dense(name))
    return format.scaled(name)


def _require_finite(w: Tensor) -> None:
    if not bool(torch.isfinite(w).all()):
        bad = int((~torch.isfinite(w)).sum())
        raise FailedWork(
            f"{bad} of {w.numel()} weights {list(w.shape)} are NaN or infinite",
            do="check the checkpoint, or the pass that wrote these weights",
        )
