"""The kernel layout: matrices as checkpoints store them become tiles that the engine multiplies.

csrc/onecard.h defines it, csrc/layout.cpp writes it; `parts` reads it back in plain NumPy and is what
the native side is tested against. No torch: bf16 numbers are uint16.

    stored integers   2, 3, 4, 8 bits stay; 5, 6, 7 become 8. Groups of 32, 64, 128 become blocks; a
                      row with one scale becomes blocks of 128 (or 64, 32, if they hold the row)
    dense             fp32 and bf16 stay; fp16 becomes fp32, or bf16 where that loses nothing

What the other formats become is told in forms.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import GROUPS, Integers, words
from onecard.kernels import cpu, structs
from onecard.kernels.structs import Matrix

Bytes = NDArray[np.uint8]
TILE = 16  # rows
LINE = 64  # bytes
ARRAYS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
NAMES = {code: name for name, code in cpu.CODES.items()}


def integers(shape: tuple[int, int], format: Integers) -> Matrix:
    """The description of a stored integer matrix [rows, columns] in the kernel layout."""
    rows, columns = shape
    bits = 8 if format.bits > 4 else format.bits
    return _matrix(
        rows, columns, bits, _block(columns, format.group), format.scale, format.zero_point
    )


def rounded(shape: tuple[int, int], block: int, scale: str = "bf16") -> Matrix:
    """The description of a dense matrix that is to be rounded to int8 in blocks."""
    return _matrix(*shape, 8, block, scale, False)


def dense(shape: tuple[int, int], dtype: str) -> Matrix:
    """The description of a dense matrix."""
    return _matrix(*shape, 0, 0, dtype, False)


def table(shape: tuple[int, int], bits: int, group: int | None, scale: str, own: bool) -> Matrix:
    """The description of a matrix of codes into a table, or into a table per row (`own`)."""
    found = _matrix(*shape, bits, _block(shape[1], group), scale, False)
    found.kind = structs.TABLES if own else structs.TABLE
    return found


def sparse(dense: Matrix, slots: int) -> Matrix:
    """The description of the same integers (8 or 4 bits, no zero point) without those that are zero."""
    found = Matrix.from_buffer_copy(dense)
    found.kind, found.slots = structs.SPARSE, slots
    return found


def pattern(dense: Matrix) -> Matrix:
    """The same where at most two of four neighbours in a row are not zero."""
    found = Matrix.from_buffer_copy(dense)
    found.kind = structs.PATTERN
    return found


def _block(columns: int, group: int | None) -> int:
    return group or next((g for g in GROUPS if columns <= g), GROUPS[-1])


def _matrix(rows: int, columns: int, bits: int, block: int, dtype: str, zero: bool) -> Matrix:
    return Matrix(
        rows=rows, columns=columns, bits=bits, block=block, dtype=cpu.CODES[dtype],
        zero_point=int(zero),
    )  # fmt: skip


def size(matrix: Matrix) -> int:
    """Exact bytes of the layout. Raises BadRequest for a description that makes no sense."""
    found = int(cpu.library().oc_layout_bytes(ctypes.byref(matrix)))
    if found < 0:
        raise BadRequest(f"there is no kernel layout of {described(matrix)}")
    return found


def described(matrix: Matrix) -> str:
    dtype = NAMES.get(matrix.dtype, matrix.dtype)
    kind = f"{matrix.bits}-bit blocks of {matrix.block}, " if matrix.bits else ""
    if matrix.kind:
        name = ("", "table", "table per row", "sparse", "2:4")[matrix.kind % 5]
        kind = f"{name}, {kind}"
    return f"[{matrix.rows}, {matrix.columns}] {kind}{dtype}"


# Writing: `out` is contiguous, `size(matrix)` bytes, aligned to 64 --------------------------------


def fill_integers(
    matrix: Matrix, packed: NDArray[np.int32], scale: NDArray[Any], zero: NDArray[np.int8] | None,
    format: Integers, out: Bytes, threads: int,
) -> None:  # fmt: skip
    """From words [rows, words], scales and zero points [rows, groups]; bf16 scales are uint16."""
    shape = (matrix.rows, matrix.columns)
    groups = (matrix.rows, format.groups(shape))
    _fits(packed, np.int32, (matrix.rows, words(matrix.columns, format.bits)))
    _fits(scale, ARRAYS[format.scale], groups)
    if zero is not None:
        _fits(zero, np.int8, groups)
    _room(matrix, out)
    _finite(cpu.library().oc_layout_integers(
        ctypes.byref(matrix), packed.ctypes.data, format.bits, scale.ctypes.data,
        None if zero is None else zero.ctypes.data, format.group or matrix.columns, threads,
        out.ctypes.data,
    ), matrix, "scales")  # fmt: skip


def fill_dense(matrix: Matrix, weight: NDArray[Any], out: Bytes, threads: int) -> None:
    """From a row-major matrix: dense, or rounded where the description has bits."""
    _fits(weight, weight.dtype, (matrix.rows, matrix.columns))
    dtype = next(name for name, kind in ARRAYS.items() if weight.dtype == kind)
    native = cpu.library()
    fill = native.oc_layout_quantize if matrix.bits else native.oc_layout_dense
    _room(matrix, out)
    _finite(
        fill(ctypes.byref(matrix), weight.ctypes.data, cpu.CODES[dtype], threads, out.ctypes.data),
        matrix,
        "weights",
    )


def fill_table(
    matrix: Matrix, codes: Bytes, scale: NDArray[Any], entries: Bytes, out: Bytes, threads: int
) -> None:
    """From codes [rows, columns], scales [rows, groups] and the table [1 or rows, 2**bits] of bytes."""
    _fits(codes, np.uint8, (matrix.rows, matrix.columns))
    _fits(scale, ARRAYS[NAMES[matrix.dtype]], (matrix.rows, scale.shape[1]))
    own = matrix.kind == structs.TABLES
    _fits(entries, np.uint8, (matrix.rows if own else 1, 2**matrix.bits))
    _room(matrix, out)
    _finite(cpu.library().oc_layout_table(
        ctypes.byref(matrix), codes.ctypes.data, scale.ctypes.data,
        matrix.columns // scale.shape[1], entries.ctypes.data, threads, out.ctypes.data,
    ), matrix, "scales")  # fmt: skip


def fill_sparse(matrix: Matrix, dense: Bytes, out: Bytes, threads: int) -> None:
    """From the layout of the same integers with their zeros."""
    plain = Matrix.from_buffer_copy(matrix)
    plain.kind, plain.slots = structs.PLAIN, 0
    _fits(dense, np.uint8, (size(plain),))
    _room(matrix, out)
    _finite(cpu.library().oc_layout_sparse(
        ctypes.byref(matrix), dense.ctypes.data, threads, out.ctypes.data,
    ), matrix, "weights")  # fmt: skip


def checksum(data: Bytes, threads: int) -> int:
    """The 64-bit sum of csrc/onecard.h over contiguous bytes."""
    found = ctypes.c_uint64()
    address = data.ctypes.data if data.size else None
    result = cpu.library().oc_checksum(address, data.size, threads, ctypes.byref(found))
    if result:
        raise FailedWork(f"the checksum of {data.size} bytes could not be taken")
    return found.value


def to_bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 as the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return rounded


def exactly_bf16(weight: NDArray[Any]) -> bool:
    """Whether every number of an fp16 or fp32 array is one of bf16 too."""
    flat, step = weight.reshape(-1), 1 << 16
    for begin in range(0, flat.size, step):
        piece = flat[begin : begin + step].astype(np.float32)
        if (piece.view(np.uint32) & 0xFFFF).any():
            return False
    return True


def _fits(array: NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"{array.dtype} {array.shape} is not a contiguous {dtype} {shape}")


def _room(matrix: Matrix, out: Bytes) -> None:
    _fits(out, np.uint8, (size(matrix),))
    if out.ctypes.data % LINE or not out.flags.writeable:
        raise ValueError("the layout goes to writeable memory aligned to 64 bytes")


def _finite(result: int, matrix: Matrix, what: str) -> None:
    if result < 0:
        raise BadRequest(f"{described(matrix)} cannot be laid out from this")
    if result:
        raise BadRequest(
            f"a matrix {described(matrix)} holds {result} {what} that are NaN or infinite",
            do="the checkpoint is damaged or was trained into overflow: fetch it again",
        )


# Reading back -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What lies in a layout, padding included: u, scale and zero [rows to 16, columns to a block].

    A value is (u - zero) * scale in float32; of a dense layout only `scale` counts, u is 1.
    """

    u: NDArray[np.float32]
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]

    def values(self, rows: int, columns: int) -> NDArray[np.float32]:
        w: NDArray[np.float32] = (self.u - self.zero) * self.scale
        return w[:rows, :columns]


def parts(matrix: Matrix, data: Bytes) -> Parts:
    """The plain inverse of everything above."""
    tiles = -(-matrix.rows // TILE)
    data = data.reshape(tiles, -1)
    dtype = NAMES[matrix.dtype]
    if not matrix.bits:
        stored, _ = _cut(data, matrix.columns * TILE, dtype)
        w = _rows(floats(stored, dtype).reshape(tiles, matrix.columns, TILE))
        return Parts(np.ones_like(w), w, np.zeros_like(w))
    bits, block = matrix.bits, matrix.block
    blocks = -(-matrix.columns // block)
    stored, data = _cut(data, blocks * TILE, dtype)
    scale = floats(stored, dtype).reshape(tiles, blocks, TILE)
    zero = np.full_like(scale, 2 ** (bits - 1))
    if matrix.zero_point:
        stored, data = _cut(data, blocks * TILE, "uint8")
        zero = stored.astype(np.float32).reshape(tiles, blocks, TILE)
    codes = data.reshape(tiles * blocks, -1)
    u = _lines(codes, bits).reshape(tiles, blocks * block, TILE).astype(np.float32)
    spread = (np.repeat(x, block, axis=1) for x in (scale, zero))
    return Parts(_rows(u), *map(_rows, spread))


def _lines(codes: Bytes, bits: int) -> Bytes:
    """Lines of 64 bytes [n, bytes] -> u [n, columns, 16]; byte 4 r + j belongs to row r."""
    lines = codes.reshape(len(codes), -1, TILE, 4)  # [n, line, row, j]
    if bits == 3:
        a, b, c = (lines[:, i::3] for i in range(3))
        pieces = [x >> shift & 7 for x in (a, b, c) for shift in (0, 3)]
        pieces += [a >> 6 | b >> 4 & 4, b >> 7 | c >> 5 & 6]
    else:
        pieces = [lines >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
    u = np.stack(pieces, 2)  # [n, line, i, row, j]
    return u.transpose(0, 1, 2, 4, 3).reshape(len(codes), -1, TILE)


def _cut(data: Bytes, count: int, dtype: str) -> tuple[NDArray[Any], Bytes]:
    """The first numbers of each tile, and what follows them at a multiple of 64 bytes."""
    kind = np.dtype(ARRAYS.get(dtype, np.uint8))
    end = count * kind.itemsize
    return np.ascontiguousarray(data[:, :end]).view(kind), data[:, -(-end // LINE) * LINE :]


def _rows(tiles: NDArray[np.float32]) -> NDArray[np.float32]:
    """[tiles, columns, 16] -> [rows, columns]"""
    return tiles.transpose(0, 2, 1).reshape(-1, tiles.shape[1])


def floats(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored numbers (bf16 as uint16) as float32."""
    if dtype == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
