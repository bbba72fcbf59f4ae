"""Rounding to a fixed table of levels, or to floats of 8 bits: no data needed.

    code = argmin |w / scale - level|,   scale = max|w| of the group / the largest level

The tables are those of core/format.py: NF4 has the quantiles of a normal distribution, FP4 (e2m1) and
its blocks of 32 and 16 with scales of a byte are what recent processors multiply, ternary and binary
take the mean magnitude as their scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, FailedWork, nearest
from onecard.core.format import TABLES, Float8, Format, Levels
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels import storage
from onecard.passes.base import BlockPass
from onecard.passes.quantize import AUTO

FP8 = ("fp8-row", "fp8-tensor", "fp8-block")


@dataclass(frozen=True)
class RoundToLevels(BlockPass):
    """Settings: a table (nf4, fp4, mxfp4, nvfp4, ternary, binary, fp8-row, fp8-tensor, fp8-block) and its
    group: 32/64/128, null (one per row), or auto (64, or the largest that divides)."""

    table: str = "nf4"
    group: int | Literal["auto"] | None = AUTO

    key = "levels"
    title = "round to levels"
    paper = "Dettmers et al., QLoRA (NF4), arXiv 2305.14314; OCP Microscaling Formats (MX) 1.0"

    def __post_init__(self) -> None:
        if self.table not in TABLES and self.table not in FP8:
            raise BadRequest(
                f"levels.table is {self.table!r}", do=nearest(self.table, (*TABLES, *FP8))
            )
        self.format_of(128)

    @property
    def keeps_zeros(self) -> bool:
        return self.table in FP8 or 0.0 in TABLES[self.table].levels

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def format_of(self, columns: int) -> Format:
        if self.table in FP8:
            return Float8(self.table.removeprefix("fp8-"))
        own = TABLES[self.table].group
        if own is not None:
            return Levels(self.table, own)
        if self.group == AUTO:
            return Levels(self.table, 64).for_row(columns)
        return Levels(self.table, self.group)

    def check(self, spec: Spec) -> None:
        for layer in set(spec.layers):
            for name, shape in linear_shapes(spec, layer).items():
                try:
                    self.format_of(shape[1]).parts(shape)
                except BadRequest as error:
                    raise BadRequest(f"{name}: {error.what}", do=error.do) from error

    def site_bytes(self, rows: int, columns: int) -> int:
        return 40 * rows * columns

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            format = self.format_of(linear.shape[1]).scaled(site.stored)
            where = f"{site.block}.{name}"
            try:
                linear.replace(storage.held_in(linear.matrix(), format))
            except FailedWork as error:
                raise FailedWork(f"{where}: {error.what}", error.seen, error.do) from error
            yield Row(where, "format", format.name)
