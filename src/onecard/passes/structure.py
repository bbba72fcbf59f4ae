"""Cutting parts out: feed-forward neurons, attention heads, key/value groups, the width of the stream.

A unit is scored by what is summed over its entries on the sides where it lives (nn/graph.py):

    l1, l2      |w|, w^2 on all its sides
    random      the seed's
    wanda       |w_ij| |X_j| over the columns that read it: what it contributes
    apoz        the share of tokens for which a neuron is not zero (arXiv 1607.03250); relu only
    gradient    |mean_b g_b|    g_b = sum w dL_b/dw over the columns that read it, which is the slope of
    taylor      mean_b g_b^2    batch b's loss along a gate on the unit (arXiv 1905.10650, 1906.10771)

Every layer loses the same number (`uniform`); or all units of the model are ranked together (`global`), or
one layer at a time is cut at a few shares and what that does to the answers decides (`sensitivity`, see
budget.py), and layers end up different. No layer loses its last one. Heads that share a key/value head
are taken evenly from all groups, so of few heads a layer loses many or none: where layers may differ, some
of them lose theirs until the share of the whole is met. The experts of a layer stay equally wide.

A cut is exact (the masked model is the cut one) and may still wreck the model: magnitude says little
about units of language models. So perplexity on calibration text is measured before and after, reported,
and more than `most` times of it is refused; `most: null` delivers whatever comes, to be recovered.

Michel et al., Are Sixteen Heads Really Better than One?, arXiv 1905.10650; Molchanov et al., Importance
Estimation, arXiv 1906.10771; Hu et al., Network Trimming, arXiv 1607.03250; Ma et al., LLM-Pruner,
arXiv 2305.11627.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import NORM, ZEROS
from onecard.calibrate.walk import Progress, Reached
from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import LayerSpec, Spec
from onecard.kernels.reference import Weight, from_dense
from onecard.nn.graph import (
    HIDDEN,
    Group,
    Kind,
    Side,
    Surgery,
    groups,
    hidden_sides,
    require_hidden,
    surgery,
)
from onecard.nn.model import Model
from onecard.passes.base import Survey
from onecard.passes.budget import PROBED, allocate, few, probes
from onecard.passes.criteria import highest
from onecard.passes.cut import Cut
from onecard.passes.judge import Judge, judge_bytes
from onecard.passes.memory import differentiated, gradient, gradient_bytes, look

GRADIENTS = ("gradient", "taylor")
Scores = dict[str, list[float]]
"""Group name -> a score per unit; under SHARE the share of its units that a layer is to lose, if known."""
SHARE = "share"


@dataclass(frozen=True)
class CutUnits(Cut):
    """Settings: what is cut, by what score, what share of it (or how many of each layer stay), spread
    how; counts that stay are multiples of `multiple`.
    """

    unit: Kind = "neuron"
    by: Literal["l1", "l2", "random", "wanda", "apoz", "gradient", "taylor"] = "taylor"
    share: float = 0.25
    keep: int | None = None
    budget: Literal["uniform", "global", "sensitivity"] = "uniform"
    multiple: int = 1
    most: float | None = 3.0
    seed: int = 0

    key: ClassVar[str] = "cut"
    title: ClassVar[str] = "structured pruning"
    paper: ClassVar[str] = (
        "Michel et al., arXiv 1905.10650; Molchanov et al., arXiv 1906.10771; "
        "Ma et al., LLM-Pruner, arXiv 2305.11627"
    )
    takes_sparse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise BadRequest(f"cut.share is {self.share}", do="a share from 0 to below 1 is needed")
        if self.multiple < 1:
            raise BadRequest(f"cut.multiple is {self.multiple}", do="a count from 1 on")
        if self.most is not None and self.most < 1:
            raise BadRequest(f"cut.most is {self.most}", do="a number from 1 on, or null")
        if self.by == "apoz" and self.unit != "neuron":
            raise BadRequest("cut: apoz counts zeros of neurons", do="unit: neuron")
        if self.unit == "hidden" and self.budget != "uniform":
            raise BadRequest("cut: the width is one for all layers", do="budget: uniform")
        if self.keep is not None and (self.budget != "uniform" or self.keep < 1):
            raise BadRequest(f"cut.keep is {self.keep}", do="a count from 1 on, budget: uniform")

    def check(self, spec: Spec) -> None:
        if self.unit == "hidden":
            require_hidden(spec)
        kinds = {layer.feed_forward.activation for layer in spec.layers}
        if self.by == "apoz" and kinds != {"relu"}:
            raise BadRequest(
                f"cut: apoz counts zeros, and {', '.join(sorted(kinds))} gives none",
                do="by: taylor",
            )
        if self.share and self.keep is None and self.leaves(spec) == spec:
            raise self.takes_none(spec)

    def takes_none(self, spec: Spec) -> BadRequest:
        """The error about a share that is too small: how many go at a time, and the nearest that will do."""
        count, step = min(self.steps(spec), key=lambda size: size[1] / size[0])
        alone = self.budget == "uniform"
        total = count if alone else sum(count for count, _ in self.steps(spec))
        if least := fewest(count, step):
            do = f"share: {math.ceil(1000 * least / total) / 1000:g} is the nearest that takes any"
            if alone and self.unit != "hidden" and spec.num_layers > 1:
                do += "; with budget: global layers may differ, and less will do"
        else:
            do = "lower multiple" if self.multiple > 1 else "none can go: cut another unit"
        return BadRequest(
            f"cut: a share of {self.share:g} takes none of the {NAMES[self.unit]}",
            f"there are {total}{'' if alone else ' in all'}, and {step} go at a time",
            do,
        )

    def steps(self, spec: Spec) -> list[tuple[int, int]]:
        """How many units there are, of every group, and how many of them go at a time."""
        if self.unit == "hidden":
            return [(spec.hidden, self.multiple)]
        every = [g for layer in spec.layers for g in groups(layer, self.unit)]
        return [(g.count, _common(self.multiple, g.runs)) for g in every]

    def leaves(self, spec: Spec) -> Spec:
        if self.unit == "hidden":
            return replace(spec, hidden=self.left(spec.hidden))
        every = [groups(layer, self.unit) for layer in spec.layers]
        if self.budget == "uniform":
            counts = [{g.name: self.left(g.count, g.runs) for g in own} for own in every]
        else:  # which layers lose them is not known, how many of all is
            counts = self.dealt(every, [{g.name: [0.0] * g.count for g in own} for own in every])
        rows = [{name: torch.arange(left) for name, left in row.items()} for row in counts]
        return surgery(spec, range(spec.num_layers), rows, self.unit).spec

    def left(self, count: int, runs: int = 1, share: float | None = None) -> int:
        """How many of `count` units stay where `share` of them go, the same number in each of `runs`."""
        if self.keep is not None:
            if self.keep > count or self.keep % runs:
                raise BadRequest(
                    f"{self.keep} of {count} {NAMES[self.unit]} are to stay",
                    f"they share {runs} key/value heads" if runs > 1 else "",
                    f"a multiple of {runs} up to {count}, or unit: kv_group" if runs > 1
                    else f"a count up to {count}",
                )  # fmt: skip
            return self.keep
        step = _common(self.multiple, runs)
        share = self.share if share is None else share
        return min(count, max(step, round((1 - share) * count / step) * step))

    def survey(self, spec: Spec) -> Survey:
        scores = (Slopes if self.by in GRADIENTS else Sums)(self, spec)
        return Sensitivity(self, scores) if self.budget == "sensitivity" else scores

    def decide(self, spec: Spec, found: Any) -> tuple[Surgery, list[Row]]:
        if self.unit == "hidden":
            stay = best(found[0][HIDDEN], self.left(spec.hidden))
            plan = surgery(spec, range(spec.num_layers), [{}] * spec.num_layers, "hidden", stay)
            return plan, [Row("model", "width", len(stay), "", spec.hidden)]
        counts = self.counts(spec, found)
        kept, rows = [], []
        for index, (layer, scores) in enumerate(zip(spec.layers, found, strict=True)):
            row: dict[str, Tensor] = {}
            for group in groups(layer, self.unit):
                row[group.name] = best(scores[group.name], counts[index][group.name], group.runs)
                where = f"blocks.{index}.{group.name}"
                rows.append(Row(where, NAMES[self.unit], len(row[group.name]), "", group.count))
            kept.append(row)
        total = sum(group.count for layer in spec.layers for group in groups(layer, self.unit))
        gone = total - sum(len(stay) for row in kept for stay in row.values())
        rows.append(Row(NAMES[self.unit], "dropped", f"{gone} of {total}"))
        return surgery(spec, range(spec.num_layers), kept, self.unit), rows

    def counts(self, spec: Spec, found: Sequence[Scores]) -> list[dict[str, int]]:
        """Group name -> units that stay, per layer."""
        every = [groups(layer, self.unit) for layer in spec.layers]
        if self.budget != "global":
            shares = [row[SHARE][0] if SHARE in row else None for row in found]
            return [
                {g.name: self.left(g.count, g.runs, share) for g in own}
                for own, share in zip(every, shares, strict=True)
            ]
        return self.dealt(every, found)

    def dealt(
        self, every: Sequence[Sequence[Group]], found: Sequence[Scores]
    ) -> list[dict[str, int]]:
        """The same where all units of the model are ranked together. They go in pieces, of as many as go
        at a time: the worst of a layer, then its next worst, until the share is met as nearly as it can be.
        """
        rows = [{g.name: g.count for g in own} for own in every]
        wanted = self.share * sum(sum(row.values()) for row in rows)
        pieces: list[tuple[float, int, int, tuple[Group, ...], int]] = []
        for index, own in enumerate(every):
            for alike in alike_of(own):
                runs = alike[0].runs
                step = _common(self.multiple, runs) // runs  # of every run
                scores = torch.tensor([found[index][g.name] for g in alike], dtype=torch.float64)
                worth = scores.view(len(alike) * runs, -1).sort(1).values.mean(0)
                room = max(0, len(worth) - step)  # the last piece stays
                first = min(room, room % step or step)
                for depth, start in enumerate((0, *range(first, room, step))):
                    piece = worth[start : start + step if start else first]
                    if len(piece):
                        pieces.append((float(piece.mean()), depth, index, alike, len(piece) * runs))
        for _, _, index, alike, size in sorted(pieces, key=lambda piece: piece[:3]):
            if size * len(alike) > 2 * wanted:
                break
            wanted -= size * len(alike)
            for group in alike:
                rows[index][group.name] -= size
        return rows


def alike_of(own: Sequence[Group]) -> list[tuple[Group, ...]]:
    """The groups of a layer that stay equally wide: its experts. The one that all share is its own."""
    kinds = [tuple(g for g in own if ("shared" in g.name) is shared) for shared in (False, True)]
    return [kind for kind in kinds if kind]


NAMES: dict[Kind, str] = {
    "head": "heads", "kv_group": "kv_groups", "neuron": "neurons", "hidden": "width",
}  # fmt: skip


def _common(a: int, b: int) -> int:
    return int(torch.lcm(torch.tensor(a), torch.tensor(b)))


def fewest(count: int, step: int) -> int:
    """The fewest units that can go where a multiple of `step` stays; 0 where none can."""
    return (count % step or step) if step < count else 0


def best(scores: Sequence[float], count: int, runs: int = 1) -> Tensor:
    """The units with the highest scores, in order, the same number of each run. Of equals the first."""
    rows = torch.tensor(scores, dtype=torch.float64).view(runs, -1)
    return highest(rows, count // runs).flatten().nonzero().flatten()


# Surveys ------------------------------------------------------------------------------------------


class Sums(Survey):
    """Scores of units from weights, and from statistics of what is read."""

    def __init__(self, settings: CutUnits, spec: Spec) -> None:
        self.settings, self.spec = settings, spec
        self.needs = {"wanda": frozenset({NORM}), "apoz": frozenset({ZEROS})}.get(
            settings.by, frozenset()
        )
        self.runs = bool(self.needs)
        self.found: list[dict[str, Tensor]] = [{} for _ in spec.layers]

    def site(self, site: Reached) -> Iterator[Row]:
        index = int(site.block.split(".")[1])
        row = self.found[0 if self.settings.unit == "hidden" else index]
        for name, linear in site.linears.items():
            for group, side, reads in sides_of(self.spec.layers[index], self.settings.unit, name):
                worth = self.worth(linear.matrix(), side, reads, site, group)
                if worth is not None:
                    own = worth.view(-1, side.size).sum(1)
                    row[group] = own if group not in row else row[group] + own
        yield from ()

    def worth(self, w: Tensor, side: Side, reads: bool, site: Reached, group: str) -> Tensor | None:
        """What the entries [n] of one side are worth; None where the score does not look at it."""
        by, across = self.settings.by, 1 - side.axis
        if by in ("l1", "l2"):
            return (w.abs() if by == "l1" else w.square()).sum(across)
        if not reads:
            return None
        if by == "random":
            seed = self.settings.seed ^ zlib.crc32(f"{site.block}.{group}".encode())
            return torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed))
        if not site.stats.count:  # an expert that saw no token
            return torch.zeros(w.shape[1])
        if by == "apoz":
            return 1 - site.stats.zeros / site.stats.count
        return (w.abs() * site.stats.norm).sum(0)

    def result(self) -> Any:
        return [{name: scores.tolist() for name, scores in row.items()} for row in self.found]


def sides_of(layer: LayerSpec, unit: Kind, linear: str) -> Iterator[tuple[str, Side, bool]]:
    """(group, side, whether it reads the unit) of every side of a linear that a unit lives on."""
    if unit == "hidden":
        for side in hidden_sides({linear: None}):
            yield HIDDEN, side, side.axis == 1
        return
    for group in groups(layer, unit):
        for side in group.sides:
            if side.path == linear:
                yield group.name, side, side in group.readers


class Slopes(Survey):
    """Slopes of the loss along a gate on every unit, batch by batch."""

    whole = True

    def __init__(self, settings: CutUnits, spec: Spec) -> None:
        self.settings, self.spec = settings, spec
        self.found: list[dict[str, Tensor]] = [{} for _ in spec.layers]
        self.batches = 0

    def whole_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return gradient_bytes(spec, ids)

    def model(self, model: Model, ids: Tensor, progress: Progress) -> None:
        hidden, taylor = self.settings.unit == "hidden", self.settings.by == "taylor"
        for _ in differentiated(model, ids, progress):
            self.batches += 1
            slopes: list[dict[str, Tensor]] = [{} for _ in self.found]
            for where, linear in model.linears():
                index, name = int(where.split(".")[1]), where.split(".", 2)[2]
                row = slopes[0 if hidden else index]
                for group, side, reads in sides_of(
                    self.spec.layers[index], self.settings.unit, name
                ):
                    if reads:
                        own = (linear.matrix() * gradient(linear)).sum(0).view(-1, side.size).sum(1)
                        row[group] = own if group not in row else row[group] + own
            for row, own_row in zip(self.found, slopes, strict=True):
                for group, slope in own_row.items():
                    term = slope.square() if taylor else slope
                    row[group] = term if group not in row else row[group] + term

    def result(self) -> Any:
        return [
            {name: (total / self.batches).abs().tolist() for name, total in row.items()}
            for row in self.found
        ]


class Sensitivity(Survey):
    """Scores, and the share of its units that each layer is to lose: the least that moves the answers.

    A layer is tried with the columns that read its worst units set to zero, which is what cutting them does.
    """

    whole = True

    def __init__(self, settings: CutUnits, scores: Survey) -> None:
        self.settings, self.scores = settings, scores
        self.found: list[Scores] = []

    def whole_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return self.scores.whole_bytes(spec, ids) + judge_bytes(spec, PROBED)

    def model(self, model: Model, ids: Tensor, progress: Progress) -> None:
        self.found = look(model, self.scores, ids, progress)
        judge, spec = Judge(model, few(ids)), model.spec
        curves, sizes = [], []
        for index, layer in enumerate(spec.layers):
            progress(index, spec.num_layers, f"sensitivity of block {index}")
            own = groups(layer, self.settings.unit)
            curves.append(
                [(gone, self.tried(judge, index, own, share)) for gone, share in self.tries(own)]
                or [(self.settings.share, math.inf)]
            )
            sizes.append(sum(group.count for group in own))
        shares = allocate(curves, sizes, self.settings.share)
        for row, share in zip(self.found, shares, strict=True):
            row[SHARE] = [share]

    def tries(self, own: Sequence[Group]) -> list[tuple[float, float]]:
        """(share of a layer that goes, share that is asked for) of those tried, rising. Where so many units
        go at a time that the shares probed take none, the least that takes any is tried instead."""
        total, step = sum(group.count for group in own), self.settings.multiple
        least = max(fewest(g.count, _common(step, g.runs)) / g.count for g in own)
        found = dict[float, float]()
        for share in (*probes(self.settings.share), least):
            left = sum(self.settings.left(g.count, g.runs, share) for g in own)
            if left < total and (share != least or not found):
                found[1 - left / total] = share
        return sorted(found.items())

    def tried(self, judge: Judge, index: int, own: Sequence[Group], share: float) -> float:
        """Nats that the answers move by without the worst units of a layer."""
        block = judge.blocks[index]
        held: dict[str, Weight] = {}
        for group in own:
            left = self.settings.left(group.count, group.runs, share)
            stay = torch.zeros(group.count)
            stay[best(self.found[index][group.name], left, group.runs)] = 1
            for side in group.readers:
                linear = block.linear(side.path)
                was = held.setdefault(side.path, linear.held())
                kept = linear.matrix() * stay.repeat_interleave(side.size)
                linear.replace(from_dense(kept.to(was.parts["weight"].dtype)))
        try:
            return judge.moved(index)
        finally:
            for path, was in held.items():
                block.linear(path).replace(was)

    def result(self) -> Any:
        return self.found
