"""Low rank plus a remainder: a few directions at full precision, the rest in few bits or mostly zero.

    W = A B + R        A B of `rank` (lowrank.py), R rounded, by GPTQ, or sparse

Both are fitted in turn: R = hold(W - A B), then A B = the best pair for W - R in the metric of the inputs.
The first turn rounds W itself, and the pair takes up what that lost (LQER); the second begins anew with the
directions of W, so that less is left to round (SVDQuant), and the others go on from there. A sparse R keeps
its largest weights, each times the root mean square of its input: the turns find outliers and directions
apart (OATS, SLiM). The turn with the least output error, as everything is stored, wins.

Rounds of GPTQ cost as much as GPTQ each. Memory: lowrank.py's, W three times, and GPTQ's.

Zhang et al., LQER, arXiv 2402.02446; Li et al., SVDQuant, arXiv 2411.05007; Zhang and Papyan, OATS, arXiv
2409.13652; Mozaffari et al., SLiM, arXiv 2410.09615; Li et al., LoSparse, arXiv 2306.11222.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import (
    Dense,
    Format,
    Integers,
    LowRank,
    Shape,
    Sparse,
    Weight,
    parse_pattern,
)
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert, storage
from onecard.passes.base import BlockPass
from onecard.passes.gptq import GPTQ, Rounding, solve
from onecard.passes.lowrank import (
    STORED,
    Metric,
    Root,
    check_shapes,
    decompose,
    error_row,
    factor_bytes,
    factor_format,
    hold_factors,
    metric_of,
    require_finite,
)
from onecard.passes.sharing import output_error


@dataclass(frozen=True)
class LowRankPlus(BlockPass):
    """Settings: rank, metric and bits of the factors; of the remainder: how it is held, its bits (null:
    dense, when sparse) and group, the share or pattern of its zeros; how many turns."""

    rank: int = 32
    metric: Metric = "whitened"
    factor_bits: int | None = 8
    rest: Literal["rtn", "gptq", "sparse"] = "gptq"
    bits: int | None = 4
    group: int | Literal["auto"] | None = "auto"
    share: float = 0.5
    pattern: str | None = None
    rounds: int = 2
    damp: float = 0.01

    key = "lowrank_plus"
    title = "low rank plus remainder"
    paper = (
        "Zhang et al., LQER, arXiv 2402.02446; Li et al., SVDQuant, arXiv 2411.05007; "
        "Zhang and Papyan, OATS, arXiv 2409.13652"
    )

    def __post_init__(self) -> None:
        if self.rest != "sparse" and self.bits is None:
            raise BadRequest("lowrank_plus: the remainder needs bits, or to be sparse",
                             do="bits: 4, or rest: sparse")  # fmt: skip
        if not 1 <= self.rounds <= 20 or not 0 <= self.damp <= 1:
            raise BadRequest(f"lowrank_plus: rounds {self.rounds} or damp {self.damp} is out of range",
                             do="1 to 20 rounds, a damp from 0 to 1")  # fmt: skip
        if self.rest == "gptq" and self.metric == "plain":
            raise BadRequest("lowrank_plus: GPTQ on a remainder that ignores the inputs",
                             do="metric: whitened, or rest: rtn")  # fmt: skip
        if not 0 <= self.share < 1:
            raise BadRequest(f"lowrank_plus.share is {self.share}", do="a share from 0 to below 1")
        if self.pattern is not None and self.rest != "sparse":
            raise BadRequest(f"lowrank_plus: a remainder by {self.rest} has no pattern of zeros",
                             do="rest: sparse, or leave pattern out")  # fmt: skip
        self.format_of(128)

    @property
    def keeps_zeros(self) -> bool:
        return False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.metric == "plain" else frozenset({HESSIAN})

    def rest_for(self, columns: int) -> Format:
        """The format of the remainder of rows of `columns`."""
        inner: Format = Dense(STORED)
        if self.bits is not None:
            inner = Integers(self.bits, 128 if self.group == "auto" else self.group)
            inner = inner.for_row(columns) if self.group == "auto" else inner
        return Sparse(inner, self.share, self.pattern) if self.rest == "sparse" else inner

    def format_of(self, columns: int) -> LowRank:
        return self.format_for((columns, columns))

    def format_for(self, shape: Shape) -> LowRank:
        factors = factor_format(self.factor_bits, STORED)
        return LowRank(self.rank, factors, self.rest_for(shape[1]))

    def check(self, spec: Spec) -> None:
        check_shapes(self, spec)

    def site_bytes(self, rows: int, columns: int) -> int:
        held = {"gptq": GPTQ(4).site_bytes(rows, columns), "rtn": 24 * rows * columns,
                "sparse": 32 * rows * columns}[self.rest]  # fmt: skip
        return factor_bytes(rows, columns) + 12 * rows * columns + held

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian if self.needs else None
        root = Root(metric_of(hessian, self.metric))
        for name, linear in site.linears.items():
            where, w = f"{site.block}.{name}", linear.matrix()
            require_finite(w, where)
            format = self.format_for(linear.shape).stored_in(site.stored)
            linear.replace(alternate(w, hessian, root, format, self))
            yield Row(where, "format", linear.format.name)
            yield error_row(where, w, linear.matrix(), hessian)
        if self.needs and not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def alternate(
    w: Tensor, hessian: Tensor | None, root: Root, format: LowRank, settings: LowRankPlus
) -> Weight:
    """The best of `rounds` turns for w [rows, in]: from W rounded whole, then from its own directions on."""
    best, least = None, float("inf")
    product = torch.zeros_like(w)
    for turn in range(settings.rounds):
        if turn == 1:
            product = convert.to_dense(directions_of(w, root, format))
        rest = hold_rest(w - product, hessian, format, settings)
        pair = directions_of(w - convert.to_dense(rest), root, format)
        product = convert.to_dense(pair)
        d = w - convert.to_dense(rest) - product
        error = float(d.square().sum() if hessian is None else output_error(d, hessian).sum())
        if error < least:
            best = storage.hold_lowrank(pair.piece("left_"), pair.piece("right_"), rest)
            least = error
    assert best is not None
    return best


def directions_of(w: Tensor, root: Root, format: LowRank) -> Weight:
    """The best pair for w as it is stored."""
    basis = decompose(w, root)
    alone = replace(format, rest=None)
    return hold_factors(w, basis.left(format.rank), basis.right(format.rank), alone)


def hold_rest(w: Tensor, hessian: Tensor | None, format: LowRank, settings: LowRankPlus) -> Weight:
    """The remainder w [rows, in] as it is stored."""
    rest = format.rest
    if isinstance(rest, Sparse):
        power = (
            w.new_ones(w.shape[1]) if hessian is None else hessian.diagonal().clamp(min=0).sqrt()
        )
        mask = kept(w.abs() * torch.where(power > 0, power, 1e-6), rest)
        return storage.held_in(w * mask, rest)
    assert isinstance(rest, Integers)
    if settings.rest == "rtn" or hessian is None:
        return convert.round_to_nearest(w.contiguous(), rest)
    solution = solve(w, hessian, rest, Rounding(settings.damp))
    return convert.hold(solution.codes, solution.scale, solution.zero, rest)


def kept(score: Tensor, format: Sparse) -> Tensor:
    """bool [rows, in]: the weights that a sparse format has room for, by falling score."""
    if format.pattern is None:
        runs, room = score.flatten(), format.slots((score.shape[0], score.shape[1]))
    else:
        room, of = parse_pattern(format.pattern)
        runs = score.unflatten(1, (-1, of))
    first = torch.sort(runs, dim=-1, descending=True, stable=True).indices[..., :room]
    return torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, first, True).view_as(score)
