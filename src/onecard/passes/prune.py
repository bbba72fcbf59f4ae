"""Pruning: the weights, runs or blocks of the lowest score become zero; which, is a criterion's business.

Budgets: the same share of every matrix (`uniform`); one threshold over the model (`global`); shares by
measured sensitivity (`sensitivity`, see budget.py). Scores and masks: criteria.py.

Han et al., Learning both Weights and Connections, arXiv 1506.02626; n:m: Zhou et al., arXiv 2102.04010;
Sun et al., Wanda, arXiv 2306.11695. Trap: magnitude pruning of language models breaks down early
(LLaMA-7B at 50 %: perplexity 5.68 to 17.29, COMPRESSION 3.7): the report carries what every layer lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from onecard.calibrate.stats import HESSIAN, NORM, Statistics
from onecard.calibrate.walk import Reached, SitePass, Whole
from onecard.core.errors import BadRequest
from onecard.core.format import Format
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels.reference import from_dense
from onecard.passes.base import BlockPass, Survey, Zeros
from onecard.passes.budget import Budget, Histograms, WholeModel
from onecard.passes.criteria import CRITERIA, Criterion, Name, Seen, Shape, keep_mask, scored


@dataclass(frozen=True)
class Prune(BlockPass):
    """Settings: a criterion; a share of the weights, or a pattern such as 2:4 (kept:of); the piece that
    goes as one, such as 1x8 or 4x4 (rows x columns); whether a share is taken of every row or of the
    matrix; how much every matrix loses; whether zeros are left out or stored like other numbers.
    """

    criterion: Name = "l1"
    share: float = 0.5
    pattern: str | None = None
    scope: Literal["row", "matrix"] = "matrix"
    piece: str = "1x1"
    budget: Literal["uniform", "global", "sensitivity"] = "uniform"
    seed: int = 0
    stored: Literal["sparse", "dense"] = "sparse"

    key: ClassVar[str] = "prune"
    title: ClassVar[str] = "pruning by score"
    paper: ClassVar[str] = (
        "Han et al., arXiv 1506.02626; Sun et al., Wanda, arXiv 2306.11695; "
        "Molchanov et al., arXiv 1906.10771; Hassibi and Stork, NeurIPS 1993"
    )
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise BadRequest(
                f"prune.share is {self.share}", do="a share from 0 to below 1 is needed"
            )
        shape = self.shape
        if shape.pattern is not None and self.budget != "uniform":
            raise BadRequest(f"prune: the pattern {self.pattern} leaves no choice of budget",
                             do="give a pattern, or a share with a budget")  # fmt: skip

    @property
    def shape(self) -> Shape:
        return Shape(self.pattern, self.scope, self.piece)

    @property
    def chosen(self) -> Criterion:
        return CRITERIA[self.criterion]

    @property
    def needs(self) -> frozenset[str]:
        return self.chosen.needs

    @property
    def calibrated(self) -> bool:
        return bool(self.needs) or self.chosen.gradients or self.budget == "sensitivity"

    @property
    def surveys(self) -> bool:
        return self.chosen.gradients or self.budget != "uniform"

    def survey(self, spec: Spec) -> Survey:
        budget = Budget(self.criterion, self.share, self.shape, self.budget, self.seed)
        if self.chosen.gradients or self.budget == "sensitivity":
            return WholeModel(budget)
        return Histograms(budget)

    def informed(self, found: Any) -> SitePass:
        return Informed(self, found["shares"], found.get("gradients", {}))

    def format_of(self, columns: int) -> Format | None:
        return None

    @property
    def zeros(self) -> Zeros | None:
        return Zeros(self.share, self.pattern) if self.stored == "sparse" else None

    def check(self, spec: Spec) -> None:
        for layer in set(spec.layers):
            for name, shape in linear_shapes(spec, layer).items():
                self.shape.check(name, shape)

    def site_bytes(self, rows: int, columns: int) -> int:
        more = 12 * columns * columns if HESSIAN in self.needs else 0
        return 44 * rows * columns + more  # measured; sorting and storing without zeros

    def site(self, site: Reached) -> Iterator[Row]:
        yield from Informed(self, {}, {}).site(site)


@dataclass(frozen=True)
class Informed:
    """A Prune that knows what share every matrix loses (all of them `settings.share` where it is not
    said), and the gradients of each where they were looked at.
    """

    settings: Prune
    shares: Mapping[str, float]
    gradients: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def needs(self) -> frozenset[str]:
        return self.settings.needs

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            where = f"{site.block}.{name}"
            w = linear.matrix()
            seen = Seen(where, site.stats, self.settings.seed, *self.gradients.get(where, ()))
            share = self.shares.get(where, self.settings.share)
            mask = keep_mask(scored(w, seen, self.settings.criterion), share, self.settings.shape)
            stored = linear.held().parts["weight"].dtype
            linear.replace(from_dense((w * mask).to(stored)))
            yield Row(where, "sparsity", float((~mask).float().mean()))
            yield Row(where, "relative_weight_error", lost_share(w, mask))
            if HESSIAN in self.needs or NORM in self.needs:
                yield Row(where, "relative_output_error", output_share(w, mask, site.stats))

    def finish(self, whole: Whole) -> Iterator[Row]:
        """Nothing: scores need no original to compare with."""
        yield from ()


def lost_share(w: Tensor, mask: Tensor) -> float:
    """The share of the sum of squares that went."""
    return float((w * ~mask).square().sum() / w.square().sum().clamp(min=1e-30))


def output_share(w: Tensor, mask: Tensor, stats: Statistics) -> float:
    """The same of outputs, with inputs taken as independent: sum_j D_ij^2 |X_j|^2."""
    power = stats.norm.square()
    lost = ((w * ~mask).square() * power).sum()
    return float(lost / (w.square() * power).sum().clamp(min=1e-30))
