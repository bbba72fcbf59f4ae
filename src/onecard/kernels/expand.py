"""Every format read back in plain NumPy: what a stored matrix stands for, without torch.

It is the oracle of the native kernels, the reference of torch's side (kernels/storage.py) and the way of
the engine to a format that it has no kernel for. Numbers that NumPy has no type for come as their bits:
bf16 as uint16, fp8 (e4m3, no infinities) as uint8.

The hash of `Hashed`, in 32 bits (the finalizer of MurmurHash3 over the place of a weight):

    x = row * 0x9e3779b1 + column;  x ^= x >> 16;  x *= 0x85ebca6b;  x ^= x >> 13;  x *= 0xc2b2ae35
    x ^= x >> 16;  bucket = x * size >> 32;  sign = -1 where x is odd
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest
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
    parse_pattern,
    words,
)

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]


@np.errstate(over="ignore", invalid="ignore")
def expand(parts: Arrays, shape: Shape, format: Format) -> Floats:
    """The matrix [rows, columns] in float32. BadRequest where the parts contradict each other.

    What damaged scales make infinite is found by those who lay it out, by the matrix's name.
    """
    rows, columns = shape
    match format:
        case Dense(dtype):
            return floats(parts["weight"], dtype)
        case Integers(bits, scale=dtype):
            u = unpack(parts["weight_packed"], bits, columns).astype(np.float32)
            if format.zero_point:
                along = np.ascontiguousarray(parts["weight_zero_point"].T)
                u -= spread(unpack(along, bits, rows).T.astype(np.float32), columns)
            else:
                u -= 2 ** (bits - 1)
            return u * spread(floats(parts["weight_scale"], dtype), columns)
        case Levels(table, bits=bits):
            levels = np.zeros(2**bits, np.float32)
            levels[: len(TABLES[table].levels)] = TABLES[table].levels
            codes = unpack(parts["weight_packed"], bits, columns)
            return levels[codes] * spread(group_scales(parts, format), columns)
        case Float8(per, dtype):
            w, scale = floats(parts["weight"], "fp8"), floats(parts["weight_scale"], dtype)
            if per == "block":
                scale = scale.repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]
            return w * scale
        case Codebook(bits, vector, per_row, dtype):
            entries = floats(parts["weight_table"], dtype)
            codes = unpack(parts["weight_packed"], bits, columns // vector)
            row = np.arange(rows if per_row else 1)[:, None] * per_row
            return np.ascontiguousarray(entries[row, codes].reshape(rows, columns))
        case Sparse():
            return _sparse(parts, shape, format)
        case LowRank():
            dense = {
                prefix: expand({n: parts[prefix + n] for n in own.parts(size)}, size, own)
                for prefix, (own, size) in format.pieces(shape).items()
            }
            product: Floats = dense["left_"] @ dense["right_"]
            return product + dense["rest_"] if "rest_" in dense else product
        case Hashed(_, dtype):
            bucket, sign = hashed(shape, parts["weight_shared"].shape[0])
            return floats(parts["weight_shared"], dtype)[bucket] * sign
    raise NotImplementedError(format.name)


def kept_places(parts: Arrays, shape: Shape, format: Sparse) -> NDArray[np.bool_]:
    """The mask [rows, columns] of a sparse matrix, which keeps as many as there are values, where it may."""
    rows, columns = shape
    kept = mask(parts["weight_mask"], columns)
    count, slots = int(kept.sum()), format.slots(shape)
    seen = f"{count} weights in its mask and {slots} values" if count != slots else ""
    if format.pattern and not seen:
        most, of = parse_pattern(format.pattern)
        found = int(kept.reshape(rows, columns // of, of).sum(2).max())
        seen = f"{found} of {of} neighbours" if found > most else ""
    if seen:
        raise BadRequest(
            f"a matrix [{rows}, {columns}] stored as {format.name} keeps {seen}",
            do="the file is damaged: fetch it again",
        )
    return kept


def _sparse(parts: Arrays, shape: Shape, format: Sparse) -> Floats:
    columns = shape[1]
    kept = kept_places(parts, shape, format)
    out = np.zeros(shape, np.float32)
    if isinstance(format.inner, Integers):
        bits, groups = format.inner.bits, format.inner.groups(shape)
        u = unpack(parts["weight_packed"][None], bits, format.slots(shape))[0].astype(np.float32)
        scale = floats(parts["weight_scale"], format.inner.scale)
        row, column = np.nonzero(kept)
        out[row, column] = (u - np.float32(2 ** (bits - 1))) * scale[
            row, column * groups // columns
        ]
    else:
        out[kept] = floats(parts["weight_values"], str(format.inner.dense))
    return out


def group_scales(parts: Arrays, format: Levels) -> Floats:
    """The scale of each group [rows, groups]."""
    kind, stored = TABLES[format.table].scale, parts["weight_scale"]
    if kind == "e8m0":
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    if kind == "e4m3":
        return floats(stored, "fp8") * parts["weight_global"].astype(np.float32)
    return floats(stored, format.scale)


def spread(values: Floats, columns: int) -> Floats:
    """One number per group [rows, groups] -> one per column [rows, columns]."""
    return np.repeat(values, columns // values.shape[1], axis=1)


def mask(packed: NDArray[np.uint8], columns: int) -> NDArray[np.bool_]:
    """uint8 [rows, ceil(columns / 8)] -> bool [rows, columns]."""
    return np.unpackbits(packed, axis=1, bitorder="little", count=columns).astype(bool)


def unpack(packed: NDArray[np.int32], bits: int, count: int) -> NDArray[np.uint8]:
    """int32 [rows, words] -> codes [rows, count] from 0 to 2**bits - 1."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return octets[:, :count]
    if 8 % bits == 0:
        lanes = [(octets >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        found: NDArray[np.uint8] = np.stack(lanes, -1).reshape(len(packed), -1)[:, :count]
        return found
    lane = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    lane = lane.reshape(len(packed), count, bits)
    return np.packbits(lane, axis=2, bitorder="little")[..., 0]


def pack(q: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Integers [rows, count] of `bits` bits and a sign -> int32 [rows, words], as formats pack them."""
    rows, count = q.shape
    u = (q.view(np.uint8) + np.uint8(2 ** (bits - 1))) & np.uint8(2**bits - 1)
    out = np.zeros((rows, 4 * words(count, bits)), np.uint8)
    if bits == 8:
        out[:, :count] = u
    else:
        lane = np.unpackbits(u[..., None], axis=2, bitorder="little")[..., :bits]
        octets = np.packbits(lane.reshape(rows, -1), axis=1, bitorder="little")
        out[:, : octets.shape[1]] = octets
    return out.view(np.int32)


def hashed(shape: Shape, size: int) -> tuple[NDArray[np.int64], Floats]:
    """(bucket below `size`, sign) of every weight [rows, columns]."""
    rows, columns = shape
    row = np.arange(rows, dtype=np.uint32)[:, None] * np.uint32(0x9E3779B1)
    x: NDArray[Any] = row + np.arange(columns, dtype=np.uint32)
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x *= np.uint32(0xC2B2AE35)
    x = x ^ (x >> np.uint32(16))
    bucket = (x.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)
    sign = 1 - 2 * (x & np.uint32(1)).astype(np.float32)
    return bucket.astype(np.int64), sign


def _e4m3() -> Floats:
    """The value of each byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f and 0xff are NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6))
    value[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte & 0x80, -value, value).astype(np.float32)


E4M3 = _e4m3()


def floats(array: NDArray[Any], dtype: str) -> Floats:
    """Stored numbers as float32."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "fp8":
        return E4M3[array]
    return array.astype(np.float32)
