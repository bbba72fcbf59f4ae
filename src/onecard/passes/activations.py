"""Rounded inputs: the other half of W8A8 and W4A8, behind a pass that rounds weights.

    int8-token, fp8-token     a scale per token, found as it comes: nothing to calibrate
    int8-static, fp8-static   one scale for all inputs of a site, found here and stored:
                              s = max|x| / top, or with `search` the one of so many smaller ranges that
                              loses the least on a sample of the inputs, mean (Q(x) - x)^2

A token's own scale follows it, so it loses less; a stored one costs no look at the inputs, and one token
with large numbers spoils it for all the others. `smooth` before the rounding of weights moves what is
large in x into W. Where no token came (an expert that nobody was sent to) inputs keep scales per token.

Sites that come later are calibrated on what rounded inputs have made of the earlier ones.

Jacob et al., arXiv 1712.05877; per token: Yao et al., ZeroQuant, arXiv 2206.01861.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from onecard.core.errors import BadRequest
from onecard.core.format import Format
from onecard.core.report import Row
from onecard.core.scheme import Inputs, parse_inputs
from onecard.core.spec import Spec
from onecard.passes.base import BlockPass, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.calibrate.walk import Reached

LEAST = 0.5
"""Ranges that are tried go down to this share of the largest input."""


@dataclass(frozen=True)
class Activations(BlockPass):
    """Settings: how inputs are rounded, and how many ranges a stored scale is chosen from."""

    inputs: Literal["int8-token", "int8-static", "fp8-token", "fp8-static"] = "int8-token"
    search: int = 0

    key = "activations"
    title = "rounded inputs"
    paper = "Jacob et al., Integer-Arithmetic-Only Inference, arXiv 1712.05877"
    takes_packed = True

    def __post_init__(self) -> None:
        if not 0 <= self.search <= 100:
            raise BadRequest(f"activations.search is {self.search}", do="0 to 100 ranges are tried")
        if self.search and not self.rounding.static:
            raise BadRequest(
                f"activations: {self.inputs} has no ranges to search",
                do="search is for scales that are stored: int8-static, fp8-static",
            )

    @property
    def rounding(self) -> Inputs:
        return parse_inputs(self.inputs)

    @property
    def needs(self) -> frozenset[str]:
        if not self.rounding.static:
            return frozenset()
        return frozenset({"absmax", "sample"} if self.search else {"absmax"})

    def format_of(self, columns: int) -> Format | None:
        return None

    def check(self, spec: Spec) -> None:
        return None

    def follows(self, earlier: Sequence[Pass]) -> None:
        if not any(p.quantizes and p.key != "tables" for p in earlier):
            raise BadRequest(
                "it rounds inputs and leaves weights as they are",
                do="put a pass before activations that rounds them: rtn, gptq, awq ...",
            )

    def site_bytes(self, rows: int, columns: int) -> int:
        return 12 * 512 * columns if self.search else 0

    def site(self, site: Reached) -> Iterator[Row]:
        import torch

        from onecard.kernels.reference import DTYPES

        rounding, scale = self.rounding, None
        if rounding.static and not site.stats.count:
            rounding = replace(rounding, static=False)
        if rounding.static:
            best = static_scale(site.stats.absmax.amax(), rounding)
            if self.search:
                best = search_scale(site.stats.sample, best, rounding, self.search)
            least = torch.finfo(DTYPES[site.stored]).tiny
            scale = best.clamp(min=least).to(DTYPES[site.stored]).reshape(1)
            yield Row(f"{site.block}.{site.name}", "input_scale", float(scale))
        for name, linear in site.linears.items():
            linear.round(rounding, scale)
            yield Row(f"{site.block}.{name}", "inputs", rounding.name)


def static_scale(most: Tensor, rounding: Inputs) -> Tensor:
    """The scale that covers the largest input; 1 where all are zero."""
    return most.where(most > 0, most.new_tensor(float(rounding.top))) / rounding.top


def search_scale(x: Tensor, scale: Tensor, rounding: Inputs, steps: int) -> Tensor:
    """Of the ranges scale * (1 - i (1 - LEAST) / steps) the one with the least error on x [some, in]."""
    from onecard.kernels.reference import round_inputs

    tried = [scale * (1 - i * (1 - LEAST) / steps) for i in range(steps + 1)]
    errors = [float((round_inputs(x, rounding, s) - x).square().mean()) for s in tried]
    return tried[errors.index(min(errors))]
