"""SparseGPT: which weights go is decided column block by column block, and the others make it good.

With H = R R^T, R upper triangular, and d = w - q for the columns already done, what column j has become
is (gptq.py has the derivation)

    t_j = w_j + sum_{k<j} R_kj d_k / R_jj            loss = sum_j (R_jj (t_j - q_j))^2

Rounding takes q_j on a grid; pruning takes q_j = 0 for the weights that go and q_j = t_j for the others.
R_jj^2 = 1 / [H_F^-1]_jj of the paper (H_F: the columns not yet done), so the weights of a block of columns
with the least (t_ij R_jj)^2, all rows together, go. A pattern n:m chooses among every m columns when
they are reached, within each row. To round the survivors as well let GPTQ follow in the same recipe: it
keeps what is zero, and starts from weights that already make good what went.

With H = 1 nothing is made good and what is left is magnitude pruning, block by block.

Memory: W twice, d, the mask, and H, R as in GPTQ. Time: rows * in^2 for the products, in^3 / 3 for R.

Frantar and Alistarh, SparseGPT, arXiv 2301.00774.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Format, parse_pattern
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels.reference import from_dense
from onecard.passes.base import BlockPass, Zeros
from onecard.passes.criteria import Shape, highest
from onecard.passes.gptq import factor, output_power

INNER = 32
"""Columns whose errors reach each other one by one; beyond it they travel in products."""


@dataclass(frozen=True)
class SparseGPT(BlockPass):
    """Settings: a share of the weights, or a pattern such as 2:4; columns that are masked at once;
    damping as a share of the mean of diag(H); whether zeros are left out or stored like other numbers.
    """

    share: float = 0.5
    pattern: str | None = None
    block: int = 128
    damp: float = 0.01
    stored: Literal["sparse", "dense"] = "sparse"

    key: ClassVar[str] = "sparsegpt"
    title: ClassVar[str] = "SparseGPT"
    paper: ClassVar[str] = "Frantar and Alistarh, SparseGPT, arXiv 2301.00774"
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise BadRequest(f"sparsegpt.share is {self.share}", do="a share from 0 to below 1")
        if not 1 <= self.block <= 4096:
            raise BadRequest(f"sparsegpt.block is {self.block}", do="1 to 4096 columns")
        if not 0 < self.damp <= 1:
            raise BadRequest(f"sparsegpt.damp is {self.damp}", do="a share from above 0 to 1")
        Shape(self.pattern)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    def format_of(self, columns: int) -> Format | None:
        return None

    @property
    def zeros(self) -> Zeros | None:
        return Zeros(self.share, self.pattern) if self.stored == "sparse" else None

    def check(self, spec: Spec) -> None:
        for layer in set(spec.layers):
            for name, shape in linear_shapes(spec, layer).items():
                Shape(self.pattern).check(name, shape)

    def site_bytes(self, rows: int, columns: int) -> int:
        return max(20 * rows * columns + 8 * columns * columns, 12 * columns * columns)

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian
        for name, linear in site.linears.items():
            where, w = f"{site.block}.{name}", linear.matrix()
            stored = linear.held().parts["weight"].dtype
            try:
                q = solve(w, hessian, self.share, self.pattern, self.block, self.damp)
            except FailedWork as error:
                raise FailedWork(f"{where}: {error.what}", error.seen, error.do) from error
            power = output_power(w, hessian).sum().clamp(min=1e-30)
            yield Row(where, "sparsity", float((q == 0).float().mean()))
            yield Row(
                where, "relative_output_error", float(output_power(w - q, hessian).sum() / power)
            )
            linear.replace(from_dense(q.to(stored)))
        if not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def solve(
    w: Tensor, hessian: Tensor, share: float, pattern: str | None = None, block: int = 128,
    damp: float = 0.01,
) -> Tensor:  # fmt: skip
    """w [rows, in] with a share of it (or all but n of every m) zero, under H [in, in]."""
    rows, columns = w.shape
    kept, of = parse_pattern(pattern) if pattern else (0, 1)
    block = max(of, block - block % of)
    r, _ = factor(hessian, damp, torch.arange(columns))
    target = w.T.contiguous()  # [in, rows]; every column of W is a row from here on
    errors = torch.zeros(columns, rows)  # d = w - q
    for start in range(0, columns, block):
        end = min(start + block, columns)
        far = r[:start, start:end].T @ errors[:start]  # what comes from earlier blocks
        keep = None
        if not pattern:
            now = target[start:end] + _solved(r[start:end, start:end], far)
            score = (now * r.diagonal()[start:end, None]).square()
            left = score.numel() - round(share * score.numel())
            keep = highest(score.T.flatten(), left).view(rows, -1).T
        inner = of if pattern else INNER
        for first in range(start, end, inner):
            last = min(first + inner, end)
            carried = far[first - start : last - start]
            carried = carried + r[start:first, first:last].T @ errors[start:first]
            own = r[first:last, first:last]
            if pattern:
                now = target[first:last] + _solved(own, carried)
                score = (now * own.diagonal()[:, None]).square()
                stay = highest(score.T, kept).T
            else:
                assert keep is not None
                stay = keep[first - start : last - start]
            errors[first:last] = _columns(target[first:last], carried, own, stay)
    return torch.where(errors == target, 0.0, target - errors).T.contiguous()


def _solved(own: Tensor, carried: Tensor) -> Tensor:
    """R^-T carried: how far the columns of a block have moved for all errors before it."""
    return torch.linalg.solve_triangular(own.T, carried, upper=False)


def _columns(target: Tensor, carried: Tensor, r: Tensor, keep: Tensor) -> Tensor:
    """d [n, rows] of a few columns, one after the other."""
    errors = torch.zeros_like(target)
    for j in range(len(target)):
        moved = carried[j] if not j else torch.addmv(carried[j], errors[:j].T, r[:j, j])
        moved = moved / r[j, j]  # t - w
        errors[j] = torch.where(keep[j], -moved, target[j])
    return errors
