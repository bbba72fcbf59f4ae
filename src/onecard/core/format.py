"""Formats: how a matrix is stored. A format is a row: a name, its parts, exact bytes for a shape.

How the numbers were chosen is a pass's business, what multiplies them a kernel's. A matrix has shape
[out, in]. Integer formats follow compressed-tensors' pack-quantized layout:

    weight_packed      int32 [out, ceil(in * bits / 32)]       q + 2**(bits-1), dense, low bits first
    weight_scale       float [out, in / group]
    weight_zero_point  int32 [ceil(out * bits / 32), in / group]   packed along out, same offset
    weight_shape       int64 [2]

and a value is (q - zero) * scale with q in [-2**(bits-1), 2**(bits-1) - 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecard.core.errors import BadRequest, nearest

DTYPE_BYTES = {
    "fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
DENSE = ("fp32", "fp16", "bf16")
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """One storage format. `group=None` is one group per output row (per channel)."""

    bits: int
    dense: str | None = None
    group: int | None = None
    zero_point: bool = False
    scale: str = "bf16"

    @property
    def name(self) -> str:
        """`bf16`, `int4-g128`, `int8-row`, `int4-g32-zp`."""
        if self.dense:
            return self.dense
        group = f"g{self.group}" if self.group else "row"
        return f"int{self.bits}-{group}" + ("-zp" if self.zero_point else "")

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def groups(self, shape: tuple[int, int]) -> int:
        """Groups per row. Raises BadRequest when the group size does not divide the row."""
        if self.group is None:
            return 1
        if shape[1] % self.group:
            raise BadRequest(
                f"groups of {self.group} do not divide a row of {shape[1]} weights",
                do=f"sizes that do: {_divisors(shape[1])}, or one group per row (group: null)",
            )
        return shape[1] // self.group

    def parts(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """name -> (dtype, shape) of every array that holds a matrix of `shape` [out, in]."""
        rows, columns = shape
        if self.dense:
            return {"weight": (self.dense, shape)}
        groups = self.groups(shape)
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("int32", (rows, words(columns, self.bits))),
            "weight_scale": (self.scale, (rows, groups)),
            "weight_shape": ("int64", (2,)),
        }
        if self.zero_point:
            parts["weight_zero_point"] = ("int32", (words(rows, self.bits), groups))
        return parts

    def bytes(self, shape: tuple[int, int]) -> int:
        """Exact bytes of a stored matrix of `shape` [out, in]."""
        return sum(
            DTYPE_BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.parts(shape).values()
        )

    def for_row(self, columns: int) -> Format:
        """This format with the largest shipped group that divides a row and is not above its own."""
        if self.dense or self.group is None or columns % self.group == 0:
            return self
        fitting = [g for g in GROUPS if g < self.group and columns % g == 0]
        return replace(self, group=max(fitting, default=None))


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [out, in] held in a format; `parts` are the framework's arrays, named as stored."""

    format: Format
    shape: tuple[int, int]
    parts: Mapping[str, Any]


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` values of `bits` bits, packed densely."""
    return -(-count * bits // 32)


def dense(dtype: str) -> Format:
    """The dense format of a dtype name (`fp32`, `fp16`, `bf16`)."""
    if dtype not in DENSE:
        raise BadRequest(f"there is no dense format {dtype!r}", do=nearest(dtype, DENSE))
    return Format(bits=8 * DTYPE_BYTES[dtype], dense=dtype)


def integers(
    bits: int, group: int | None = 128, zero_point: bool = False, scale: str = "bf16"
) -> Format:
    """Integers of 2 to 8 bits in groups along the input. Raises BadRequest out of range."""
    if not 2 <= bits <= 8:
        raise BadRequest(f"{bits} bits were asked for", do="integer formats have 2 to 8 bits")
    if group is not None and group not in GROUPS:
        raise BadRequest(
            f"groups of {group} were asked for",
            do=f"group sizes are {', '.join(map(str, GROUPS))}, or null for one per row",
        )
    return Format(bits=bits, group=group, zero_point=zero_point, scale=scale)


def parse_format(name: str) -> Format:
    """The format of a name as `Format.name` writes it."""
    if name in DENSE:
        return dense(name)
    match = re.fullmatch(r"int([0-9]+)-(?:g([0-9]+)|row)(-zp)?", name)
    if not match:
        raise BadRequest(f"there is no format {name!r}", do="examples: bf16, int4-g128, int8-row")
    return integers(int(match[1]), int(match[2]) if match[2] else None, bool(match[3]))


def _divisors(size: int) -> str:
    fitting = [str(g) for g in GROUPS if size % g == 0]
    return ", ".join(fitting) if fitting else "none of " + ", ".join(map(str, GROUPS))
