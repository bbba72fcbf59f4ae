"""What the engine multiplies for each format that is not integers: which kernel layout, and how it is filled.

    ternary            integers of 2 bits: -1, 0, 1 are three of their four levels
    binary             a table of two bytes where a processor has masks of bits; elsewhere integers of
                       2 bits, which take twice the memory and half the time
    nf4, fp4, mxfp4    a table of bytes: fp4's levels are whole numbers of halves, so nothing is lost; NF4's
                       are rounded to 1/127 of the largest
    codebook1 .. 6     a table of bytes, a table per row up to 4 bits: entries are rounded to 1/127 of the
                       largest. Where a processor cannot look up 64 of them at once, codes of 6 bits are
                       looked up while they are laid out, to the same integers of 8 bits
    sparse             integers of 8 or 4 bits without those that are zero; dense weights are first rounded
                       to int8 in blocks of 32. Where a processor has no instruction that expands bytes,
                       those of 4 bits keep their zeros, as putting them in place takes four times as
                       long as reading them; the pattern 2:4 needs no such instruction
    all others         their expansion, rounded to int8 in blocks of 32

An entry of a table is rounded once, and it is rounded as finely as inputs are (127 steps to either side).
Sparse integers of 2 and 3 bits are stored with their zeros, which is no longer than a mask and the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.format import (
    TABLES,
    Codebook,
    Dense,
    Format,
    Hashed,
    Integers,
    Levels,
    Shape,
    Sparse,
    parse_format,
    words,
)
from onecard.kernels import cpu, layout
from onecard.kernels.expand import Arrays, expand, floats, group_scales, kept_places, unpack
from onecard.kernels.structs import PATTERN, SPARSE, TABLE, Matrix

ROUNDED_BLOCK = 32
LOOKED_UP = Integers(8, None, scale="bf16")
TWO_BITS = {
    "ternary": np.array([1, 2, 3, 2], np.uint8),  # the fourth code stands for zero
    "binary": np.array([1, 3], np.uint8),
}
"""Code to integer of 2 bits, 2 above its number."""
MASKED = "this processor has no instruction that puts bytes where a mask says"
ZERO = 128  # what a byte of a table stands above its number


def form(format: Format, shape: Shape, stored: Shape) -> Matrix:
    """The kernel layout of a matrix of `shape`, rows of a stored one in `format`."""
    match format:
        case Levels(table, group, scale) if table in TWO_BITS and (
            table == "ternary" or not masks()
        ):
            return layout.integers(shape, Integers(2, group, scale=scale))
        case Levels(group=group) if group != 16:
            return layout.table(shape, format.bits, group, _dtype(format), own=False)
        case Codebook(bits, _, per_row) if _has_table(format):
            if bits == 6 and not looks_far():
                return layout.integers(shape, LOOKED_UP)
            return layout.table(shape, bits, None, "bf16", own=per_row)
        case Sparse():
            dense = _dense(format, shape)
            if dense.bits not in (4, 8):
                return dense
            if format.pattern == "2:4":
                return layout.pattern(dense)
            if dense.bits == 4 and not expands():
                return dense
            slots = min(format.slots(stored), shape[0] * shape[1])
            return min(dense, layout.sparse(dense, slots), key=layout.size)
    return layout.rounded(shape, ROUNDED_BLOCK)


def expands() -> bool:
    """Whether stored bytes are put where a mask says by one instruction, in the class that is in use."""
    return cpu.isa() in ("avx512bf16", "amx")


def looks_far() -> bool:
    """Whether one instruction looks up 64 entries in the class that is in use."""
    return cpu.isa() in ("avx512bf16", "amx", "dotprod")


def masks() -> bool:
    """Whether a bit for each byte is a register of its own in the class that is in use."""
    return cpu.isa() in ("avx512", "avx512bf16", "amx")


def widened(format: Format) -> str:
    """What a format saves in the file and not in time, and why; nothing where it is read as it is stored."""
    shape = (4096, 4096)
    match format:
        case Integers(bits) if bits > 4:
            laid, why = layout.integers(shape, format), "integers are read with 2, 3, 4 or 8 bits"
        case Levels("binary"):
            laid, why = (
                form(format, shape, shape),
                "this processor has no masks of bits, two are quicker",
            )
        case Levels():
            laid, why = form(format, shape, shape), "a table has a scale for 32 weights or more"
        case Codebook(vector=1):
            far = "64 entries" if looks_far() else "32 entries"
            laid, why = form(format, shape, shape), f"a shuffle looks up {far}, or 16 of each row"
        case Codebook():
            laid, why = form(format, shape, shape), "a shuffle looks up single bytes, not vectors"
        case Hashed():
            laid, why = form(format, shape, shape), "shared numbers lie all over the memory"
        case Sparse():
            laid, why = form(format, shape, shape), MASKED
            if laid.kind == SPARSE and not expands():
                return f"as many bytes are read, in the time of reading the zeros as well: {why}"
        case _:
            return ""
    stored, read = (8 * size / (4096 * 4096) for size in (format.bytes(shape), layout.size(laid)))
    if read < 1.25 * stored:
        return ""
    return f"{stored:.2f} bits per weight in the file, {read:.2f} where it is multiplied: {why}"


def not_time(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Notes for a report on the formats whose bytes saved are not all time."""
    told = ((name, widened(parse_format(name))) for name in names)
    return tuple((f"not all of it is time: {name}", said) for name, said in told if said)


@np.errstate(over="ignore", invalid="ignore")
def fill(
    matrix: Matrix,
    parts: Arrays,
    rows: Any,
    stored: Shape,
    format: Format,
    out: layout.Bytes,
    threads: int,
) -> None:
    """Lays out `rows` (an index) of the stored matrix as `form` says; integers and dense ones as well.

    BadRequest where damaged scales or tables are no numbers.
    """
    columns = stored[1]
    if isinstance(format, Integers):
        words_, scale = (
            np.ascontiguousarray(parts[f"weight_{n}"][rows]) for n in ("packed", "scale")
        )
        zero = None
        if format.zero_point:
            along = np.ascontiguousarray(parts["weight_zero_point"].T)
            u = unpack(along, format.bits, stored[0]).astype(np.int16) - 2 ** (format.bits - 1)
            zero = np.ascontiguousarray(u.astype(np.int8).T[rows])
        layout.fill_integers(matrix, words_, scale, zero, format, out, threads)
    elif isinstance(format, Dense):
        layout.fill_dense(matrix, np.ascontiguousarray(parts["weight"][rows]), out, threads)
    elif isinstance(format, Levels) and format.table in TWO_BITS and not matrix.kind:
        codes = TWO_BITS[format.table][unpack(parts["weight_packed"][rows], format.bits, columns)]
        inner = Integers(2, format.group, scale=format.scale)
        scale = np.ascontiguousarray(parts["weight_scale"][rows])
        layout.fill_integers(matrix, packed(codes, 2, threads), scale, None, inner, out, threads)
    elif matrix.kind == TABLE and isinstance(format, Levels):
        entries, unit = _levels(format)
        scale = _rounded_to(group_scales(parts, format)[rows] * np.float32(unit), _dtype(format))
        codes = np.ascontiguousarray(unpack(parts["weight_packed"][rows], format.bits, columns))
        layout.fill_table(matrix, codes, scale, entries, out, threads)
    elif isinstance(format, Codebook) and _has_table(format):
        table = floats(parts["weight_table"], format.scale)[:, :, 0]
        if format.per_row:
            table = table[rows]
        codes = np.ascontiguousarray(unpack(parts["weight_packed"][rows], format.bits, columns))
        step = _rounded_to(np.abs(table).max(1, keepdims=True) / np.float32(127), "bf16", up=True)
        size = floats(step, "bf16")
        steps = np.rint(table / np.where(size > 0, size, np.float32(1))) + ZERO
        scale = np.ascontiguousarray(np.broadcast_to(step, (len(codes), 1)))
        entries = steps.astype(np.uint8)
        if matrix.kind:
            layout.fill_table(matrix, codes, scale, entries, out, threads)
        else:
            looked = packed(entries[0][codes], 8, threads)
            layout.fill_integers(matrix, looked, scale, None, LOOKED_UP, out, threads)
    elif isinstance(format, Sparse):
        _fill_sparse(matrix, parts, rows, stored, format, out, threads)
    else:
        dense = np.ascontiguousarray(expand(parts, stored, format)[rows])
        layout.fill_dense(matrix, dense, out, threads)


def packed(codes: layout.Bytes, bits: int, threads: int) -> NDArray[np.int32]:
    """Codes [rows, columns] from 0 on as words."""
    rows, columns = codes.shape
    q = (codes ^ np.uint8(2 ** (bits - 1))).view(np.int8)  # the sign of `bits` bits
    q = (q << np.int8(8 - bits)) >> np.int8(8 - bits)
    found = np.empty((rows, words(columns, bits)), np.int32)
    cpu.pack(q.ctypes.data, rows, columns, bits, found.ctypes.data, threads)
    return found


def _has_table(format: Codebook) -> bool:
    """Whether its codes are few enough to be looked up."""
    return format.vector == 1 and format.bits <= (4 if format.per_row else 6)


def _dtype(format: Levels) -> str:
    """Of the scales in the layout: halves and 127ths of fp16 would not be what they were."""
    kind = TABLES[format.table].scale
    return "bf16" if kind == "e8m0" else {"fp16": "fp32"}.get(format.scale, format.scale)


def _levels(format: Levels) -> tuple[layout.Bytes, float]:
    """The bytes [1, 2**bits] of a table, and what one step of them is."""
    levels = np.zeros(2**format.bits, np.float32)
    levels[: len(TABLES[format.table].levels)] = TABLES[format.table].levels
    unit = 1.0 if format.table == "binary" else 0.5 if "fp4" in format.table else 1 / 127
    return (np.rint(levels / np.float32(unit)) + ZERO).astype(np.uint8)[None], unit


def _rounded_to(x: NDArray[np.float32], dtype: str, up: bool = False) -> NDArray[Any]:
    """Numbers in the layout's dtype: to nearest, ties to even, or magnitudes up (bf16 alone). NaN stays NaN:
    rounded up, the largest of its bits would become those of a zero."""
    if dtype != "bf16":
        return np.ascontiguousarray(x.astype(layout.ARRAYS[dtype]))
    bits = np.ascontiguousarray(x).view(np.uint32)
    more = np.uint32(0xFFFF) if up else np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    more = np.where(np.isnan(x), np.uint32(0), more)
    found: NDArray[Any] = ((bits + more) >> np.uint32(16)).astype(np.uint16)
    return found


def _dense(format: Sparse, shape: Shape) -> Matrix:
    if isinstance(format.inner, Integers):
        return layout.integers(shape, format.inner)
    return layout.rounded(shape, ROUNDED_BLOCK)


def _fill_sparse(
    matrix: Matrix,
    parts: Arrays,
    rows: Any,
    stored: Shape,
    format: Sparse,
    out: layout.Bytes,
    threads: int,
) -> None:
    dense = _dense(format, (matrix.rows, matrix.columns))
    target = out
    smaller = matrix.kind in (SPARSE, PATTERN)
    if smaller:
        memory = np.empty(layout.size(dense) + layout.LINE, np.uint8)
        begin = -memory.ctypes.data % layout.LINE
        target = memory[begin : begin + layout.size(dense)]
    if isinstance(format.inner, Integers):
        inner = format.inner
        kept = kept_places(parts, stored, format)
        codes = np.full(stored, 2 ** (inner.bits - 1), np.uint8)
        codes[kept] = unpack(parts["weight_packed"][None], inner.bits, format.slots(stored))[0]
        scale = np.ascontiguousarray(parts["weight_scale"][rows])
        bits = dense.bits
        codes = codes[rows] + np.uint8(2 ** (bits - 1) - 2 ** (inner.bits - 1))
        wide = Integers(bits, inner.group, scale=inner.scale)
        laid = packed(codes, bits, threads)
        layout.fill_integers(dense, laid, scale, None, wide, target, threads)
    else:
        weight = np.ascontiguousarray(expand(parts, stored, format)[rows])
        layout.fill_dense(dense, weight, target, threads)
    if smaller:
        layout.fill_sparse(matrix, target, out, threads)
