"""Dropping whole layers: those that change the residual stream least.

With h_l the input of layer l, [tokens, hidden], the influence of a block is

    BI_l = 1 - mean over tokens of cos(h_l, h_{l+1})

and the layers with the least go (`influence`). Removing one changes what the others see, so a run of n
neighbours can be judged as a whole instead (`consecutive`): the one with the least distance between
h_l and h_{l+n} goes. Models trained with LayerDrop lose layers at equal distances (`even`), without
looking at anything. A list names them outright.

A layer is dropped whole, its neighbours are not changed: matrices may be packed already. The report
has the influence of every layer, and the perplexity on calibration text before and after.

Men et al., ShortGPT, arXiv 2403.03853; Gromov et al., The Unreasonable Ineffectiveness of the Deeper
Layers, arXiv 2403.17887; Fan et al., Reducing Transformer Depth on Demand with Structured Dropout,
arXiv 1909.11556. Trap: depth hurts reasoning long before it hurts perplexity (COMPRESSION 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.nn.graph import Surgery, surgery
from onecard.passes.base import Survey
from onecard.passes.cut import Cut

REMEMBERED = 16
"""Positions at the end of every sample that are kept for judging runs of layers."""


@dataclass(frozen=True)
class DropLayers(Cut):
    """Settings: how many layers (a count or a share), and by what; or which, by number."""

    count: int | None = None
    share: float = 0.25
    by: Literal["influence", "consecutive", "even"] = "influence"
    layers: tuple[int, ...] = ()
    most: float | None = 3.0

    key: ClassVar[str] = "drop_layers"
    title: ClassVar[str] = "layer removal"
    paper: ClassVar[str] = "Men et al., ShortGPT, arXiv 2403.03853"
    takes_packed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise BadRequest(f"drop_layers.share is {self.share}", do="a share from 0 to below 1")
        if self.count is not None and self.count < 0:
            raise BadRequest(f"drop_layers.count is {self.count}", do="a count from 0 on")
        if self.most is not None and self.most < 1:
            raise BadRequest(f"drop_layers.most is {self.most}", do="a number from 1 on, or null")

    def number(self, spec: Spec) -> int:
        """How many layers go."""
        if self.layers:
            return len(set(self.layers))
        return round(self.share * spec.num_layers) if self.count is None else self.count

    def check(self, spec: Spec) -> None:
        if self.number(spec) >= spec.num_layers:
            raise BadRequest(
                f"it would drop {self.number(spec)} of {spec.num_layers} layers",
                do="leave at least one",
            )
        if not self.number(spec) and self.count is None and self.share:
            raise BadRequest(
                f"drop_layers: a share of {self.share:g} takes none of {spec.num_layers} layers",
                do="count: 1 drops the least that can go",
            )
        for layer in self.layers:
            if not 0 <= layer < spec.num_layers:
                raise BadRequest(
                    f"there is no layer {layer} among {spec.num_layers}",
                    do=f"they are counted from 0 to {spec.num_layers - 1}",
                )

    def leaves(self, spec: Spec) -> Spec:
        if self.layers:
            stay = (row for i, row in enumerate(spec.layers) if i not in self.layers)
            return replace(spec, layers=tuple(stay))
        return replace(spec, layers=spec.layers[: spec.num_layers - self.number(spec)])

    def survey(self, spec: Spec) -> Survey:
        return Influence(spec.num_layers, self.number(spec) if self.by == "consecutive" else 0)

    def decide(self, spec: Spec, found: Any) -> tuple[Surgery, list[Row]]:
        gone = dropped(self, spec.num_layers, found["influence"], found["distance"])
        stay = [index for index in range(spec.num_layers) if index not in gone]
        rows = [Row(f"blocks.{i}", "influence", v) for i, v in enumerate(found["influence"])]
        rows += [Row(f"blocks.{i}", "dropped", True) for i in sorted(gone)]
        rows.append(Row("layers", "dropped", f"{len(gone)} of {spec.num_layers}"))
        return surgery(spec, stay, [{} for _ in stay]), rows


def dropped(
    settings: DropLayers, layers: int, influence: Sequence[float], distance: Sequence[float]
) -> set[int]:
    """The layers that go. `distance[l]` is that of the run that begins at l. Of equals the later go."""
    if settings.layers:
        return set(settings.layers)
    count = round(settings.share * layers) if settings.count is None else settings.count
    if settings.by == "even":
        return {int((i + 0.5) * layers / count) for i in range(count)}
    if settings.by == "consecutive" and count:
        first = min(range(len(distance)), key=lambda i: (distance[i], -i))
        return set(range(first, first + count))
    return set(sorted(range(layers), key=lambda i: (influence[i], -i))[:count])


class Influence(Survey):
    """Block influence of every layer, and the distance over every run of `run` layers."""

    runs = True

    def __init__(self, layers: int, run: int) -> None:
        self.layers, self.run = layers, run
        self.influence: list[float] = []
        self.ends: list[list[Tensor]] = []

    def block(self, index: int, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        self.influence.append(turned(before, after))
        if self.run:
            if not index:
                self.ends.append([h[:, -REMEMBERED:].clone() for h in before])
            self.ends.append([h[:, -REMEMBERED:].clone() for h in after])

    def result(self) -> Any:
        starts = range(len(self.ends) - self.run) if self.run else range(0)
        distance = [turned(self.ends[i], self.ends[i + self.run]) for i in starts]
        return {"influence": self.influence, "distance": distance}


def turned(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """1 - mean cosine between two states [B, T, hidden] of the residual stream, over all batches."""
    total = tokens = 0.0
    for x, y in zip(before, after, strict=True):
        cosine = F.cosine_similarity(x.float(), y.float(), dim=-1)
        total += float(cosine.double().sum())
        tokens += cosine.numel()
    return 1 - total / tokens
