"""Mixed bits: each site gets as many as its measured harm deserves, within a budget of the whole.

Before anything is changed, each site is rounded alone to each number of bits, the rest of the model left
as it is, and the harm is measured where it counts: KL(original || model) of the answers to calibration
text, not an error of weights. Then sum KL is minimized over all sites with sum bits * weights within
the budget, exactly (dynamic programming in steps of 1 / STEPS of the budget), and GPTQ rounds each site
to its bits. Linears that read one input share their bits, so fused matrices stay whole.

Time: sites * choices runs of the blocks from the changed one on, over `tried` tokens. Memory: the model,
the inputs of every block for these tokens, their logits twice.

Dong et al., HAWQ, arXiv 1905.03696 (sensitivity); Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onecard.calibrate.walk import Progress, Reached, SitePass
from onecard.core.errors import BadRequest
from onecard.core.format import Format
from onecard.core.report import Row
from onecard.core.spec import Site, Spec, linear_shapes, sites
from onecard.kernels import convert
from onecard.nn.model import Model
from onecard.passes.base import Survey
from onecard.passes.gptq import GPTQ
from onecard.passes.judge import Judge, judge_bytes
from onecard.passes.quantize import make_format

STEPS = 4096


@dataclass(frozen=True)
class Mixed(GPTQ):
    """Settings: the mean number of bits, the least and most for one site, and tokens that are tried."""

    mean: float = 4.0
    least: int = 2
    most: int = 8
    tried: int = 2048

    key = "mixed"
    title = "mixed bits"
    paper = "Dong et al., HAWQ, arXiv 1905.03696"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.least <= self.mean <= self.most <= 8:
            raise BadRequest(
                f"mixed: a mean of {self.mean} bits between {self.least} and {self.most}",
                do="2 <= least <= mean <= most <= 8",
            )
        if not 2 <= self.tried <= 1 << 20:
            raise BadRequest(f"mixed.tried is {self.tried}", do="2 or more tokens are needed")

    @property
    def surveys(self) -> bool:
        return True

    def survey(self, spec: Spec) -> Survey:
        return Sensitivity(self)

    def foretold(self, spec: Spec) -> Sequence[Mapping[str, Format | None]]:
        """What an even harm makes of the budget: which sites get more is not known, the sum is."""
        names, counts = places(spec)
        choices = range(self.least, self.most + 1)
        chosen = allot(
            [[n * 0.25**bits for bits in choices] for n in counts], counts, choices, self.mean
        )
        blocks: list[dict[str, Format | None]] = [{} for _ in spec.layers]
        for (index, site), bits in zip(names, chosen, strict=True):
            shapes = linear_shapes(spec, spec.layers[index])
            for name in site.linears:
                blocks[index][name] = make_format(
                    bits, self.group, self.zero_point, shapes[name][1]
                )
        return blocks

    def informed(self, found: Any) -> SitePass:
        return Allotted(self, found)


class Allotted:
    """The pass once it is known which site gets how many bits."""

    def __init__(self, settings: Mixed, bits: Mapping[str, int]) -> None:
        self.settings, self.bits = settings, bits

    @property
    def needs(self) -> frozenset[str]:
        return self.settings.needs

    def site(self, site: Reached) -> Iterator[Row]:
        bits = self.bits[f"{site.block}.{site.name}"]
        yield Row(f"{site.block}.{site.name}", "bits", bits)
        yield from GPTQ.site(replace(self.settings, bits=bits), site)

    def finish(self, whole: Any) -> Iterator[Row]:
        return iter(())


class Sensitivity(Survey):
    """What each site does to the answers at each number of bits, and the bits that follow from it."""

    whole = True

    def __init__(self, settings: Mixed) -> None:
        self.settings, self.bits = settings, dict[str, int]()

    def whole_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return judge_bytes(spec, self.settings.tried)

    def model(self, model: Model, ids: Tensor, progress: Progress) -> None:
        names, counts = places(model.spec)
        choices = range(self.settings.least, self.settings.most + 1)
        rows = max(1, self.settings.tried // ids.shape[1])
        judge = Judge(model, ids[:rows, : self.settings.tried])
        harm = []
        for number, (index, site) in enumerate(names):
            progress(number, len(names), f"sensitivity of block {index}")
            harm.append(
                [rounded(judge, index, site.linears, bits, self.settings) for bits in choices]
            )
        chosen = allot(harm, counts, list(choices), self.settings.mean)
        for (index, site), bits in zip(names, chosen, strict=True):
            self.bits[f"blocks.{index}.{site.name}"] = bits

    def result(self) -> dict[str, int]:
        return self.bits


def places(spec: Spec) -> tuple[list[tuple[int, Site]], list[int]]:
    """Every site with the number of its block, and its weights."""
    names, counts = [], []
    for index, layer in enumerate(spec.layers):
        shapes = linear_shapes(spec, layer)
        for site in sites(layer):
            names.append((index, site))
            counts.append(sum(shapes[name][0] * shapes[name][1] for name in site.linears))
    return names, counts


def rounded(judge: Judge, index: int, names: Sequence[str], bits: int, settings: Mixed) -> float:
    """What rounding these linears of a block does to the answers."""
    linears = [judge.blocks[index].linear(name) for name in names]
    held = [linear.held() for linear in linears]
    for linear, was in zip(linears, held, strict=True):
        format = make_format(bits, settings.group, settings.zero_point, linear.shape[1])
        linear.replace(convert.round_to_nearest(was.parts["weight"], format))
    try:
        return judge.moved(index)
    finally:
        for linear, was in zip(linears, held, strict=True):
            linear.replace(was)


def allot(
    harm: Sequence[Sequence[float]], counts: Sequence[int], choices: Sequence[int], mean: float
) -> list[int]:
    """The bits of each part with the least sum of harm, sum bits * counts <= mean * sum counts.

    harm[part][choice]; costs are rounded up to steps of the budget, so the budget holds exactly.
    """
    unit = max(1.0, mean * sum(counts) / STEPS)
    least = choices[0]  # what everyone has; steps are spent on what comes on top
    room = int((mean - least) * sum(counts) / unit + 1e-9)
    best = torch.zeros(room + 1, dtype=torch.float64)  # [steps spent]
    taken = []
    for row, count in zip(harm, counts, strict=True):
        options = torch.full((len(choices), room + 1), float("inf"), dtype=torch.float64)
        for i, bits in enumerate(choices):
            cost = -int(-(bits - least) * count // unit)
            if cost <= room:
                options[i, cost:] = best[: room + 1 - cost] + row[i]
        best, pick = options.min(0)
        taken.append(pick)
    chosen, left = [], room
    for pick, count in zip(reversed(taken), reversed(counts), strict=True):
        bits = choices[int(pick[left])]
        chosen.append(bits)
        left -= -int(-(bits - least) * count // unit)
    return chosen[::-1]
