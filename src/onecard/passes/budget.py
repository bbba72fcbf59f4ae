"""How much every matrix loses when the whole model is to lose a given share.

`global` ranks all pieces of the model by one threshold. Scores are too many to keep, so each matrix
keeps a histogram: the upper 16 bits of a float32 that is not negative order like the number, so 2^15
counts hold a matrix's scores to 8 bits of precision whatever their range. Where the threshold falls
into a bin, every matrix loses the same share of that bin.

`sensitivity` measures: one block at a time is pruned at a few shares and KL(p_whole || p_pruned) is taken
on calibration text. With f_b the measured cost of block b, made convex, and n_b its weights,

    minimize  sum_b f_b(s_b)   subject to   sum_b n_b s_b = share * sum_b n_b

is solved by giving step after step to the block whose next step costs least per weight. Costs of single
blocks are taken to add up, which they do not quite.

Where a criterion needs gradients they are summed here too: sum_b g_b / n and sum_b g_b^2 / n, float32.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import Statistics
from onecard.calibrate.walk import Progress, Reached, walk, weight_count
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels.reference import from_dense
from onecard.nn.model import Model
from onecard.passes.base import Survey
from onecard.passes.criteria import CRITERIA, Name, Seen, Shape, keep_mask, pieces, scored
from onecard.passes.judge import Judge, judge_bytes
from onecard.passes.memory import (
    ModelBlocks,
    Watched,
    differentiated,
    gradient,
    gradient_bytes,
    inputs,
)

BINS = 1 << 15
PROBED = 2048
"""Tokens that a block's sensitivity is measured on."""
PROBES = (0.5, 1.0, 1.5)
"""Shares that a block is tried at, as multiples of the share asked for."""
MOST, STEP = 0.95, 0.01
"""No block loses more; what it is given at once."""


def histogram(score: Tensor) -> Tensor:
    """int64 [BINS]: how many scores (not negative) have each upper half of their bits."""
    bits = score.float().flatten().view(torch.int32) >> 16
    return torch.bincount(bits.clamp(min=0), minlength=BINS)


def global_shares(histograms: Mapping[str, Tensor], share: float) -> dict[str, float]:
    """The share that each matrix loses under one threshold for all."""
    total = torch.stack(list(histograms.values())).sum(0)
    wanted = round(share * int(total.sum()))
    upto = total.cumsum(0)
    edge = int(torch.searchsorted(upto, wanted))
    edge = min(edge, BINS - 1)
    below = int(upto[edge]) - int(total[edge])
    part = (wanted - below) / max(1, int(total[edge]))
    return {
        name: (float(counts[:edge].sum()) + part * float(counts[edge])) / max(1, int(counts.sum()))
        for name, counts in histograms.items()
    }


def few(ids: Tensor) -> Tensor:
    """The rows that sensitivity is measured on."""
    return ids[: max(1, PROBED // ids.shape[1])]


def probes(share: float) -> list[float]:
    """The shares that a block is tried at, rising."""
    return sorted({min(MOST, round(p * share, 6)) for p in PROBES})


def allocate(
    curves: Sequence[Sequence[tuple[float, float]]], sizes: Sequence[int], share: float
) -> list[float]:
    """A share for every block: least total cost, `share` on average. `curves` [(share, cost)] rise."""
    slopes = [convex(curve) for curve in curves]
    given = [0.0] * len(curves)
    left = share * sum(sizes)
    queue = [(slopes[b][0][1] / sizes[b], b) for b in range(len(curves))]
    heapq.heapify(queue)
    while left > 1e-9 and queue:
        _, b = heapq.heappop(queue)
        end = slopes[b][-1][0]
        step = min(STEP, end - given[b], left / sizes[b])
        given[b] += step
        left -= step * sizes[b]
        if given[b] < end - 1e-9:
            slope = next(s for until, s in slopes[b] if given[b] < until - 1e-9)
            heapq.heappush(queue, (slope / sizes[b], b))
    return given


def convex(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(until which share, cost per share from there back) of a curve from (0, 0), slopes never falling."""
    found, before, least = [], (0.0, 0.0), 0.0
    for share, cost in curve:
        least = max(least, (cost - before[1]) / (share - before[0]))
        found.append((share, least))
        before = (share, cost)
    return found


@dataclass(frozen=True)
class Budget:
    """What is to be lost, by which score, and how it is spread."""

    criterion: Name
    share: float
    shape: Shape
    spread: Literal["uniform", "global", "sensitivity"]
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return CRITERIA[self.criterion].needs

    @property
    def gradients(self) -> bool:
        return CRITERIA[self.criterion].gradients


# Surveys ------------------------------------------------------------------------------------------


@dataclass
class Histograms(Survey):
    """Scores of every matrix, as histograms."""

    settings: Budget

    def __post_init__(self) -> None:
        self.needs = self.settings.needs
        self.runs = bool(self.needs)
        self.counts: dict[str, Tensor] = {}

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            where = f"{site.block}.{name}"
            seen = Seen(where, site.stats, self.settings.seed)
            self.counts[where] = counted(linear.matrix(), seen, self.settings)
        yield from ()

    def result(self) -> Any:
        return {"shares": global_shares(self.counts, self.settings.share)}


def counted(w: Tensor, seen: Seen, settings: Budget) -> Tensor:
    """The histogram of a matrix's scores, per piece."""
    return histogram(pieces(scored(w, seen, settings.criterion), settings.shape.piece))


class WholeModel(Survey):
    """What can only be seen in a whole model: gradients, and what pruning a block does to the output."""

    whole = True

    def __init__(self, settings: Budget) -> None:
        self.settings = settings
        self.shares: dict[str, float] = {}
        self.gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def whole_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        weights = sum(weight_count(spec, layer) for layer in spec.layers)
        sums = 8 * weights if self.settings.gradients else 0
        judged = judge_bytes(spec, PROBED) if self.settings.spread == "sensitivity" else 0
        return gradient_bytes(spec, ids) + sums + judged

    def model(self, model: Model, ids: Tensor, progress: Progress) -> None:
        if self.settings.gradients:
            self.gradients = mean_gradients(model, ids, progress)
        if self.settings.spread == "uniform":
            return
        stats = collected(model, ids, self.settings.needs)
        seen = {
            where: Seen(where, stats[where], self.settings.seed, *self.gradients.get(where, ()))
            for where, _ in model.linears()
        }
        if self.settings.spread == "global":
            counts = {w: counted(m.matrix(), seen[w], self.settings) for w, m in model.linears()}
            self.shares = global_shares(counts, self.settings.share)
        else:
            self.shares = sensitive_shares(model, ids, self.settings, seen, progress)

    def result(self) -> Any:
        return {"shares": self.shares, "gradients": self.gradients}


def mean_gradients(
    model: Model, ids: Tensor, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """where -> mean gradient and mean squared gradient of its matrix, over batches."""
    found = {name: (torch.zeros(m.shape), torch.zeros(m.shape)) for name, m in model.linears()}
    count = 0
    for _ in differentiated(model, ids, progress):
        count += 1
        for name, linear in model.linears():
            g = gradient(linear)
            found[name][0].add_(g)
            found[name][1].addcmul_(g, g)
    for slope, squares in found.values():
        slope.div_(count)
        squares.div_(count)
    return found


class Recorder(Survey):
    """The statistics of every matrix's inputs."""

    runs = True

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs
        self.found: dict[str, Statistics] = {}

    def site(self, site: Reached) -> Iterator[Row]:
        self.found |= {f"{site.block}.{name}": site.stats for name in site.linears}
        yield from ()

    def result(self) -> Any:
        return self.found


def collected(model: Model, ids: Tensor, needs: frozenset[str]) -> dict[str, Statistics]:
    """where -> statistics of the inputs, in the model as it is."""
    recorder = Recorder(needs)
    hidden = inputs(model, ids) if needs else []
    walk(Watched(ModelBlocks(model), recorder, hidden), (recorder,), hidden)
    return recorder.result()


def sensitive_shares(
    model: Model, ids: Tensor, settings: Budget, seen: Mapping[str, Seen], progress: Progress
) -> dict[str, float]:
    """where -> share, by what pruning each block alone does to the output."""
    judge = Judge(model, few(ids))
    linears: dict[str, list[str]] = {}
    matrices = dict(model.linears())
    for where in matrices:
        linears.setdefault(".".join(where.split(".")[:2]), []).append(where)
    curves = []
    for number, (block, names) in enumerate(linears.items()):
        progress(number, len(linears), f"sensitivity of {block}")
        kept = {where: matrices[where].held() for where in names}
        curve = []
        for share in probes(settings.share):
            for where in names:
                w = matrices[where].matrix()
                score = scored(w, seen[where], settings.criterion)
                mask = keep_mask(score, share, settings.shape)
                stored = kept[where].parts["weight"].dtype
                matrices[where].replace(from_dense((w * mask).to(stored)))
            curve.append((share, judge.moved(number)))
            for where in names:
                matrices[where].replace(kept[where])
        curves.append(curve)
    sizes = [
        sum(matrices[w].shape[0] * matrices[w].shape[1] for w in ws) for ws in linears.values()
    ]
    given = allocate(curves, sizes, settings.share)
    return {
        where: share
        for names, share in zip(linears.values(), given, strict=True)
        for where in names
    }
