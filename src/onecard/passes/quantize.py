"""Round to nearest: each group of weights on its own grid, no data needed.

    q = clamp(round(w / scale) + zero),   scale from the group's largest magnitude or its range

The grid is kernels.reference.grid. It is the baseline of every quantizer, and enough at 8 bits. torch is
imported where a matrix is given in it: a recipe of nothing but rounding goes without (rounding.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers, Weight
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import cpu
from onecard.passes.base import BlockPass, check_groups

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.calibrate.walk import Reached

AUTO: Literal["auto"] = "auto"


def make_format(
    bits: int, group: int | Literal["auto"] | None, zero_point: bool, columns: int
) -> Integers:
    """The format of a row of `columns`; `auto` is the largest shipped group that divides it."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise BadRequest(f"bits is {bits!r}", do="a whole number from 2 to 8 is needed")
    if group == AUTO:
        return Integers(bits, 128, zero_point).for_row(columns)
    return Integers(bits, group, zero_point)


@dataclass(frozen=True)
class RoundToNearest(BlockPass):
    """Settings: bits 2..8, group 32/64/128, null (one per row) or auto, symmetric or zero point."""

    bits: int = 8
    group: int | Literal["auto"] | None = AUTO
    zero_point: bool = False

    key = "rtn"
    title = "round to nearest"
    paper = "Gholami et al., A Survey of Quantization Methods, arXiv 2103.13630"

    def __post_init__(self) -> None:
        make_format(self.bits, self.group, self.zero_point, 128)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def format_of(self, columns: int) -> Integers:
        return make_format(self.bits, self.group, self.zero_point, columns)

    def check(self, spec: Spec) -> None:
        check_groups(self.format_of(128), spec, self.group != AUTO)

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            held = linear.held().parts["weight"]
            format = self.format_of(linear.shape[1]).scaled(site.stored)
            linear.replace(round_weight(held, format, f"{site.block}.{name}"))
            yield Row(f"{site.block}.{name}", "format", format.name)

    def site_bytes(self, rows: int, columns: int) -> int:
        return 0 if cpu.available() else 20 * rows * columns


def round_weight(w: Tensor, format: Integers, where: str = "a weight") -> Weight:
    """`reference.round_to_nearest`, natively where possible. FailedWork on overflow."""
    from onecard.kernels import convert

    try:
        weight = convert.round_to_nearest(w, format)
    except FailedWork as error:
        raise FailedWork(f"{where}: {error.what}", error.seen, error.do) from error
    require_finite_scale(weight.parts["weight_scale"], format, where)
    return weight


def require_finite_scale(scale: Tensor, format: Integers, where: str) -> None:
    """FailedWork where a scale overflows its dtype, or came from weights that are no numbers."""
    if not bool(scale.amax().isfinite()):
        raise scale_overflow(format, where)


def scale_overflow(format: Integers, where: str) -> FailedWork:
    return FailedWork(
        f"{where}: a scale is not finite",
        do=f"the weights are NaN, infinite, or too large for {format.scale} scales",
    )
