"""Pruning single weights by a score: the lowest go, per row, per matrix, or n of every m.

A criterion is one function (weight [rows, in], statistics) -> score of the same shape and one row in
CRITERIA; every pattern takes every criterion. Scores of single weights by L1 and by L2 magnitude rank
alike; they are both here because over larger pieces they do not.

Han et al., Learning both Weights and Connections, arXiv 1506.02626; n:m: Zhou et al., arXiv 2102.04010.
Trap: magnitude pruning of language models breaks down early (LLaMA-7B at 50 %: perplexity 5.68 to
17.29, COMPRESSION §3.7): the report carries the output error of every layer it touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import Statistics
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import Format
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels.reference import from_dense
from onecard.passes.base import BlockPass

Criterion = Callable[[Tensor, Statistics], Tensor]

CRITERIA: dict[str, Criterion] = {
    "l1": lambda w, stats: w.abs(),
    "l2": lambda w, stats: w.square(),
}


@dataclass(frozen=True)
class Prune(BlockPass):
    """Settings: a criterion, and either a share of the weights or a pattern such as 2:4 (kept:of)."""

    criterion: Literal["l1", "l2"] = "l1"
    share: float = 0.5
    pattern: str | None = None
    scope: Literal["row", "matrix"] = "matrix"

    key = "prune"
    title = "magnitude pruning"
    paper = "Han et al., Learning both Weights and Connections, arXiv 1506.02626"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadRequest(f"prune.share is {self.share}", do="a share between 0 and 1 is needed")
        if self.pattern is not None:
            parse_pattern(self.pattern)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def format_of(self, columns: int) -> Format | None:
        return None

    def check(self, spec: Spec) -> None:
        if self.pattern is None:
            return
        _, of = parse_pattern(self.pattern)
        for layer in set(spec.layers):
            for name, (_, columns) in linear_shapes(spec, layer).items():
                if columns % of:
                    raise BadRequest(
                        f"{name}: runs of {of} do not divide a row of {columns} weights"
                    )

    def site_bytes(self, rows: int, columns: int) -> int:
        return 28 * rows * columns  # measured; sorting is most of it

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            stored = linear.held().parts["weight"]
            w = linear.matrix()
            mask = keep_mask(CRITERIA[self.criterion](w, site.stats), self)
            linear.replace(from_dense((w * mask).to(stored.dtype)))
            lost = (w * ~mask).square().sum() / w.square().sum().clamp(min=1e-30)
            where = f"{site.block}.{name}"
            yield Row(where, "sparsity", float((~mask).float().mean()))
            yield Row(where, "relative_weight_error", float(lost))


def parse_pattern(text: str) -> tuple[int, int]:
    """(kept, of) from `2:4`."""
    kept, _, of = text.partition(":")
    if not (kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of) <= 1024):
        raise BadRequest(
            f"the pattern {text!r} is not kept:of", do="2:4 keeps 2 of every 4 weights"
        )
    return int(kept), int(of)


def keep_mask(score: Tensor, settings: Prune) -> Tensor:
    """bool [rows, in]: which weights stay. Of equal scores the later one goes."""
    if settings.pattern is not None:
        kept, of = parse_pattern(settings.pattern)
        runs = score.unflatten(1, (-1, of))
        return _highest(runs, kept).flatten(1)
    if settings.scope == "row":
        return _highest(score, score.shape[1] - round(settings.share * score.shape[1]))
    return _highest(score.flatten(), score.numel() - round(settings.share * score.numel())).view_as(
        score
    )


def _highest(score: Tensor, count: int) -> Tensor:
    """bool: the `count` highest along the last axis."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
