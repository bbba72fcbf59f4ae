"""Formats: how a matrix is stored. A format is a row: a name, its parts, exact bytes for a shape.

How the numbers were chosen is a pass's business, what multiplies them a kernel's. A matrix W has shape
[rows, columns] = [out, in]; a group is a run of columns of one row that share a scale.

    Dense      bf16                   weight
    Integers   int4-g128, int8-row    (q - zero) * scale, q from -2**(bits-1)      compressed-tensors' layout
               int4-g128-zp
    Levels     nf4-g64, ternary-row   table[code] * scale
    Float8     fp8-row, fp8-tensor    e4m3 * scale
    Codebook   codebook3, codebook3-row, codebook8x4      table[code], 4 columns at once in the last
    Sparse     sparse0.5(int4-g128)   a bit per weight, and the weights whose bit is set
               sparse2:4(bf16)
    LowRank    lowrank64(bf16)        left @ right, plus a remainder
               lowrank64(int8-row)+int4-g128
    Hashed     hashed8                sign(i, j) * shared[bucket(i, j)]

Codes of `bits` bits are packed densely into words of 32, low bits first. Integers:

    weight_packed      int32 [rows, ceil(columns * bits / 32)]     q + 2**(bits-1)
    weight_scale       float [rows, groups]
    weight_zero_point  int32 [ceil(rows * bits / 32), groups]      packed along the rows, same offset
    weight_shape       int64 [2]

The parts of the others are told at their `parts`; kernels/expand.py reads every one of them in plain
NumPy. The dtype of scales and tables is the model's own (`scaled`) and no part of a name.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecard.core.errors import BadRequest, nearest

DTYPE_BYTES = {
    "fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
DENSE = ("fp32", "fp16", "bf16")
GROUPS = (32, 64, 128)

Shape = tuple[int, int]
Parts = dict[str, tuple[str, tuple[int, ...]]]

# The levels are those of the papers: NF4 arXiv 2305.14314 (appendix E), FP4 is e2m1 (OCP MX 1.0).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Levels by code, and how a group is scaled: by a float, by a power of two in a byte (`e8m0`), or
    by an fp8 number times one float32 per matrix (`e4m3`)."""

    bits: int
    levels: tuple[float, ...]
    scale: str = "float"
    group: int | None = None  # the only one that it has, None: any

    @property
    def top(self) -> float:
        """The largest magnitude: a group's scale is its largest weight over this."""
        return max(abs(level) for level in self.levels)


TABLES = {
    "nf4": Table(4, NF4),
    "fp4": Table(4, (*FP4, *(-x for x in FP4))),
    "mxfp4": Table(4, (*FP4, *(-x for x in FP4)), "e8m0", 32),
    "nvfp4": Table(4, (*FP4, *(-x for x in FP4)), "e4m3", 16),
    "ternary": Table(2, (-1.0, 0.0, 1.0)),
    "binary": Table(1, (-1.0, 1.0)),
}


class Format(ABC):
    """One storage format."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As `parse_format` reads it."""

    @abstractmethod
    def parts(self, shape: Shape) -> Parts:
        """name -> (dtype, shape) of every array that holds a matrix of `shape` [rows, columns]."""

    @property
    def dense(self) -> str | None:
        """The dtype of a dense format, None for any other."""
        return None

    def bytes(self, shape: Shape) -> int:
        """Exact bytes of a stored matrix of `shape`."""
        return sum(
            DTYPE_BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.parts(shape).values()
        )

    def for_row(self, columns: int) -> Format:
        """This format with the largest shipped group that divides a row and is not above its own."""
        return self

    def scaled(self, dtype: str) -> Format:
        """This format with its scales or tables stored in a dtype."""
        return self


@dataclass(frozen=True)
class Dense(Format):
    """The numbers themselves: weight [rows, columns]."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DENSE:
            raise BadRequest(
                f"there is no dense format {self.dtype!r}", do=nearest(self.dtype, DENSE)
            )

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def dense(self) -> str | None:
        return self.dtype

    def parts(self, shape: Shape) -> Parts:
        return {"weight": (self.dtype, shape)}


class Grouped(Format):
    """A format whose rows are cut into groups; `group=None` is one group per row."""

    group: int | None

    def groups(self, shape: Shape) -> int:
        """Groups per row. Raises BadRequest when the group size does not divide the row."""
        if self.group is None:
            return 1
        if shape[1] % self.group:
            raise BadRequest(
                f"groups of {self.group} do not divide a row of {shape[1]} weights",
                do=self._instead(shape[1]),
            )
        return shape[1] // self.group

    def _instead(self, columns: int) -> str:
        return f"sizes that do: {_divisors(columns)}, or one group per row (group: null)"


@dataclass(frozen=True)
class Integers(Grouped):
    """Integers of 2 to 8 bits, symmetric or with a zero point."""

    bits: int
    group: int | None = 128
    zero_point: bool = False
    scale: str = "bf16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise BadRequest(
                f"{self.bits} bits were asked for", do="integer formats have 2 to 8 bits"
            )
        _check_group(self.group)

    @property
    def name(self) -> str:
        return f"int{self.bits}-{_spelled(self.group)}" + ("-zp" if self.zero_point else "")

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest integer of the grid."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def parts(self, shape: Shape) -> Parts:
        rows, columns = shape
        groups = self.groups(shape)
        parts: Parts = {
            "weight_packed": ("int32", (rows, words(columns, self.bits))),
            "weight_scale": (self.scale, (rows, groups)),
            "weight_shape": ("int64", (2,)),
        }
        if self.zero_point:
            parts["weight_zero_point"] = ("int32", (words(rows, self.bits), groups))
        return parts

    def for_row(self, columns: int) -> Integers:
        return replace(self, group=_fitting(self.group, columns))

    def scaled(self, dtype: str) -> Integers:
        return replace(self, scale=dtype)


@dataclass(frozen=True)
class Levels(Grouped):
    """A fixed table of levels, one of TABLES, times a scale per group.

    weight_packed int32 [rows, words], weight_scale [rows, groups] (uint8 exponent + 127 for mxfp4, fp8
    for nvfp4, which has weight_global fp32 [1] besides)
    """

    table: str
    group: int | None = 64
    scale: str = "bf16"

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise BadRequest(
                f"there is no table of levels {self.table!r}", do=nearest(self.table, TABLES)
            )
        fixed = TABLES[self.table].group
        if fixed is not None and self.group != fixed:
            raise BadRequest(f"{self.table} has groups of {fixed}, not of {self.group}",
                             do="leave group out")  # fmt: skip
        if fixed is None:
            _check_group(self.group)

    @property
    def name(self) -> str:
        return self.table if TABLES[self.table].group else f"{self.table}-{_spelled(self.group)}"

    @property
    def bits(self) -> int:
        return TABLES[self.table].bits

    def parts(self, shape: Shape) -> Parts:
        rows, columns = shape
        kind = {"float": self.scale, "e8m0": "uint8", "e4m3": "fp8"}[TABLES[self.table].scale]
        parts: Parts = {
            "weight_packed": ("int32", (rows, words(columns, self.bits))),
            "weight_scale": (kind, (rows, self.groups(shape))),
        }
        if kind == "fp8":
            parts["weight_global"] = ("fp32", (1,))
        return parts

    def _instead(self, columns: int) -> str:
        if TABLES[self.table].group:
            return f"{self.table} has no other size: take another format, nf4 say"
        return super()._instead(columns)

    def for_row(self, columns: int) -> Levels:
        if TABLES[self.table].group:
            return self
        return replace(self, group=_fitting(self.group, columns))

    def scaled(self, dtype: str) -> Levels:
        return replace(self, scale=dtype)


@dataclass(frozen=True)
class Float8(Format):
    """Floats of 8 bits (e4m3, at most 448) times a scale per row, per tensor, or per square block.

    weight fp8 [rows, columns], weight_scale [rows, 1], [1], or [ceil(rows / 128), ceil(columns / 128)]
    """

    per: str = "row"
    scale: str = "bf16"

    def __post_init__(self) -> None:
        if self.per not in ("row", "tensor", "block"):
            raise BadRequest(f"fp8 has no scales per {self.per!r}", do="per row, tensor or block")

    @property
    def name(self) -> str:
        return f"fp8-{self.per}"

    def parts(self, shape: Shape) -> Parts:
        rows, columns = shape
        sizes = {"row": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}
        return {"weight": ("fp8", shape), "weight_scale": (self.scale, sizes[self.per])}

    def scaled(self, dtype: str) -> Float8:
        return replace(self, scale=dtype)


@dataclass(frozen=True)
class Codebook(Format):
    """A table of 2**bits entries of `vector` neighbouring columns, per matrix or per row.

    weight_packed int32 [rows, words of columns / vector], weight_table [1 or rows, 2**bits, vector]
    """

    bits: int
    vector: int = 1
    per_row: bool = False
    scale: str = "bf16"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BadRequest(
                f"a codebook of {self.bits} bits was asked for", do="they have 1 to 8 bits"
            )
        if self.vector not in (1, 2, 4, 8):
            raise BadRequest(
                f"a codebook of vectors of {self.vector}", do="vectors have 1, 2, 4 or 8 weights"
            )

    @property
    def name(self) -> str:
        size = f"{self.bits}x{self.vector}" if self.vector > 1 else f"{self.bits}"
        return f"codebook{size}" + ("-row" if self.per_row else "")

    def parts(self, shape: Shape) -> Parts:
        rows, columns = shape
        if columns % self.vector:
            raise BadRequest(
                f"vectors of {self.vector} do not divide a row of {columns} weights",
                do=f"sizes that do: {_sizes(columns, (1, 2, 4, 8))}",
            )
        tables = rows if self.per_row else 1
        return {
            "weight_packed": ("int32", (rows, words(columns // self.vector, self.bits))),
            "weight_table": (self.scale, (tables, 2**self.bits, self.vector)),
        }

    def scaled(self, dtype: str) -> Codebook:
        return replace(self, scale=dtype)


@dataclass(frozen=True)
class Sparse(Format):
    """Weights that are not zero, row by row, and a bit for each weight that says where they are.

    weight_mask uint8 [rows, ceil(columns / 8)], low bits first; then the values of `inner`, which is
    Dense (weight_values [slots]) or Integers without zero point (weight_packed int32 [words of slots],
    weight_scale [rows, groups], the groups those of the whole row). `share` of the weights are zero, in
    steps of 1/10000, rounded down: a few set bits may stand before stored zeros. With a pattern `n:m`
    every run of m has n slots, and the share is no setting of its own.
    """

    inner: Format
    share: float = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inner, Integers):
            if self.inner.zero_point:
                raise BadRequest(
                    "sparse integers have no zero point: a weight that is gone is zero",
                    do="leave out -zp",
                )
        elif not isinstance(self.inner, Dense):
            raise BadRequest(
                f"{self.inner.name} cannot be stored sparse", do="dense or integers can"
            )
        if self.pattern is not None:
            kept, of = parse_pattern(self.pattern)
            object.__setattr__(self, "share", 1 - kept / of)
        elif not 0 <= self.share < 1:
            raise BadRequest(f"a share of {self.share} zeros was asked for", do="it lies in [0, 1)")
        else:
            object.__setattr__(self, "share", math.floor(self.share * 10000 + 1e-6) / 10000)

    @property
    def name(self) -> str:
        return f"sparse{self.pattern or f'{self.share:g}'}({self.inner.name})"

    def slots(self, shape: Shape) -> int:
        """Stored values of a matrix. BadRequest where a pattern does not divide the row."""
        rows, columns = shape
        if self.pattern is None:
            return rows * columns - math.floor(self.share * rows * columns)
        kept, of = parse_pattern(self.pattern)
        check_runs(of, columns)
        return rows * columns // of * kept

    def parts(self, shape: Shape) -> Parts:
        rows, columns = shape
        slots = self.slots(shape)
        parts: Parts = {"weight_mask": ("uint8", (rows, -(-columns // 8)))}
        if isinstance(self.inner, Integers):
            parts["weight_packed"] = ("int32", (words(slots, self.inner.bits),))
            parts["weight_scale"] = self.inner.parts(shape)["weight_scale"]
        else:
            parts["weight_values"] = (str(self.inner.dense), (slots,))
        return parts

    def for_row(self, columns: int) -> Sparse:
        return replace(self, inner=self.inner.for_row(columns))

    def scaled(self, dtype: str) -> Sparse:
        return replace(self, inner=self.inner.scaled(dtype))


@dataclass(frozen=True)
class LowRank(Format):
    """left [rows, rank] @ right [rank, columns], both held in `factors`, plus `rest` if there is one.

    The parts are those of the three matrices, behind `left_`, `right_` and `rest_`.
    """

    rank: int
    factors: Format
    rest: Format | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadRequest(f"a rank of {self.rank} was asked for", do="a rank is at least 1")
        for inner in (self.factors, self.rest):
            if isinstance(inner, LowRank):
                raise BadRequest(
                    "a low-rank pair inside a low-rank pair",
                    do="keep the outer one, with a higher rank",
                )

    @property
    def name(self) -> str:
        return f"lowrank{self.rank}({self.factors.name})" + (
            f"+{self.rest.name}" if self.rest else ""
        )

    def pieces(self, shape: Shape) -> dict[str, tuple[Format, Shape]]:
        """prefix -> (format, shape) of the two or three matrices."""
        rows, columns = shape
        if self.rank > min(shape):
            raise BadRequest(
                f"a rank of {self.rank} is above that of a matrix [{rows}, {columns}]",
                do=f"it is at most {min(shape)}",
            )
        pieces = {
            "left_": (self.factors.for_row(self.rank), (rows, self.rank)),
            "right_": (self.factors.for_row(columns), (self.rank, columns)),
        }
        return pieces | ({"rest_": (self.rest, shape)} if self.rest else {})

    def parts(self, shape: Shape) -> Parts:
        return {
            prefix + name: part
            for prefix, (format, own) in self.pieces(shape).items()
            for name, part in format.parts(own).items()
        }

    def for_row(self, columns: int) -> LowRank:
        return replace(self, rest=self.rest.for_row(columns) if self.rest else None)

    def scaled(self, dtype: str) -> LowRank:
        rest = self.rest.scaled(dtype) if self.rest else None
        return replace(self, factors=self.factors.scaled(dtype), rest=rest)

    def stored_in(self, dtype: str) -> LowRank:
        """This format with its dense parts in a dtype, too."""
        rest, factors = self.rest, self.factors
        if isinstance(rest, Sparse) and rest.inner.dense:
            rest = replace(rest, inner=Dense(dtype))
        found = replace(self, factors=Dense(dtype) if factors.dense else factors, rest=rest)
        return found.scaled(dtype)


@dataclass(frozen=True)
class Hashed(Format):
    """Weights that a hash of their place sends to one of rows * columns / factor shared numbers.

    weight_shared [ceil(rows * columns / factor)]; the hash is that of kernels/expand.py (arXiv 1504.04788).
    """

    factor: int
    scale: str = "bf16"

    def __post_init__(self) -> None:
        if not 2 <= self.factor <= 1024:
            raise BadRequest(f"a hashing factor of {self.factor} was asked for", do="2 to 1024")

    @property
    def name(self) -> str:
        return f"hashed{self.factor}"

    def parts(self, shape: Shape) -> Parts:
        return {"weight_shared": (self.scale, (-(-shape[0] * shape[1] // self.factor),))}

    def scaled(self, dtype: str) -> Hashed:
        return replace(self, scale=dtype)


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [out, in] held in a format; `parts` are the framework's arrays, named as stored."""

    format: Format
    shape: Shape
    parts: Mapping[str, Any]

    def piece(self, prefix: str) -> Weight:
        """One of the matrices of a LowRank weight."""
        assert isinstance(self.format, LowRank)
        format, shape = self.format.pieces(self.shape)[prefix]
        return Weight(format, shape, {n: self.parts[prefix + n] for n in format.parts(shape)})


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` values of `bits` bits, packed densely."""
    return -(-count * bits // 32)


def parse_pattern(text: str) -> tuple[int, int]:
    """(kept, of) from `2:4`."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < kept < of <= 1024:
        raise BadRequest(
            f"the pattern {text!r} is not kept:of", do="2:4 keeps 2 of every 4 weights"
        )
    return kept, of


def parse_format(name: str) -> Format:
    """The format of a name as `Format.name` writes it. BadRequest for any other text."""
    if name in DENSE:
        return Dense(name)
    if len(name) <= 200:
        if match := re.fullmatch(r"int([0-9]{1,2})-(g[0-9]{1,4}|row)(-zp)?", name):
            return Integers(int(match[1]), _read(match[2]), bool(match[3]))
        if match := re.fullmatch(r"([a-z0-9]+)-(g[0-9]{1,4}|row)", name):
            if match[1] in TABLES and not TABLES[match[1]].group:
                return Levels(match[1], _read(match[2]))
        if name in TABLES and TABLES[name].group:
            return Levels(name, TABLES[name].group)
        if match := re.fullmatch(r"fp8-(row|tensor|block)", name):
            return Float8(match[1])
        if match := re.fullmatch(r"codebook([0-9])(?:x([0-9]))?(-row)?", name):
            return Codebook(int(match[1]), int(match[2] or 1), bool(match[3]))
        if match := re.fullmatch(r"sparse([0-9.]{1,8}|[0-9]+:[0-9]+)\((.*)\)", name):
            if ":" in match[1]:
                return Sparse(parse_format(match[2]), pattern=match[1])
            if match[1].count(".") <= 1 and match[1] != ".":
                return Sparse(parse_format(match[2]), float(match[1]))
        if match := re.fullmatch(r"lowrank([0-9]{1,6})\(([^+]*)\)(?:\+(.*))?", name):
            rest = parse_format(match[3]) if match[3] else None
            return LowRank(int(match[1]), parse_format(match[2]), rest)
        if match := re.fullmatch(r"hashed([0-9]{1,5})", name):
            return Hashed(int(match[1]))
    raise BadRequest(
        f"there is no format {name[:80]!r}",
        do="examples: bf16, int4-g128, int8-row, nf4-g64, codebook3, sparse0.5(int4-g128)",
    )


def _spelled(group: int | None) -> str:
    return f"g{group}" if group else "row"


def _read(group: str) -> int | None:
    return None if group == "row" else int(group[1:])


def _fitting(group: int | None, columns: int) -> int | None:
    if group is None or columns % group == 0:
        return group
    return max((g for g in GROUPS if g < group and columns % g == 0), default=None)


def check_runs(of: int, columns: int, where: str = "") -> None:
    """BadRequest where a pattern, or a piece, of `of` columns does not divide a row."""
    if columns % of:
        raise BadRequest(
            f"{where}runs of {of} do not divide a row of {columns} weights",
            do=f"sizes that do: {_sizes(columns, range(2, 33)) or 'none'}",
        )


def _sizes(columns: int, sizes: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sizes if columns % size == 0)


def _check_group(group: int | None) -> None:
    if group is not None and group not in GROUPS:
        raise BadRequest(
            f"groups of {group} were asked for",
            do=f"group sizes are {', '.join(map(str, GROUPS))}, or null for one per row",
        )


def _divisors(size: int) -> str:
    fitting = [str(g) for g in GROUPS if size % g == 0]
    return ", ".join(fitting) if fitting else "none of " + ", ".join(map(str, GROUPS))
