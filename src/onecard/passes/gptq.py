"""GPTQ: second-order rounding. Columns are rounded one by one, each making good the errors before it.

For W [rows, in] and the Hessian H of the inputs, minimize tr((W - Q) H (W - Q)^T) greedily in a fixed
column order. The paper updates all later columns with the inverse Hessian; the same numbers come from
the Cholesky factor of H itself (GPTQ is Babai's nearest plane, arXiv 2507.18553). With H = R R^T, R
upper triangular, and d = w - q for the columns already rounded, column j aims at

    t_j = w_j + sum_{k<j} R_kj d_k / R_jj            loss = sum_j (R_jj (t_j - q_j))^2

so one factorization of in^3 / 3 is enough and nothing is written back: the sum over finished panels of
columns is one wide matrix product per panel, a narrow one per block, a vector product per column.

Order `activation` takes columns by falling diag(H) on groups fixed beforehand (static), so nothing but
the result is stored. Moving groups take their scale when they are reached, from the weights as the
paper has updated them: for a block b that is W_b + (R_bb^-T (R_Qb^T d_Q)). `search` tries smaller
grids for each group and keeps the one with the least diag(H)-weighted error.

A column without any input (H_jj = 0), and an expert that saw no token, is rounded to nearest. A
weight that is exactly zero in a pruned matrix stays zero, and its absence is made good like any error
(SparseGPT's reconstruction, arXiv 2301.00774).

`sweeps` over scales and codes follow (refine.py), one unless told otherwise. `correct` aims at what the
original model's inputs X would have given, rather than at what W makes of the inputs Y that the compressed
one has (asymmetric calibration): |Q Y - W X|^2 is least at W X Y^T (Y Y^T)^-1, and W goes that share of the
way,

    W + correct * W (C - H) (H + damping)^-1,   C = 2 X^T Y / n

Memory: H and R, W twice, d, codes and what a panel leaves behind: 20 rows * in + 8 in^2 bytes; while
factoring H, its reordered copy and R: 4 rows * in + 12 in^2. Time: rows * in^2 for the products, as much
for a sweep, and in^3 / 3 for the factor.

Frantar et al., GPTQ, arXiv 2210.17323; Behdin et al., QuantEase, arXiv 2309.01885 (`sweeps`); Li et al.,
GPTAQ, arXiv 2504.02692 (`correct`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import CROSS, HESSIAN, multiply_in_bfloat16
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert
from onecard.passes.base import BlockPass, check_groups
from onecard.passes.columns import SEARCH_ROWS, loops
from onecard.passes.quantize import AUTO, make_format, require_finite_scale
from onecard.passes.refine import damped, sweep

PRUNED_SHARE = 0.02
PANEL = 512


@dataclass(frozen=True)
class Rounding:
    """How the columns are gone through."""

    damp: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    static_groups: bool = True
    block: int = 128
    search: int = 12


@dataclass(frozen=True)
class Solution:
    """Codes [rows, in] int8, scale and zero point [rows, groups], the loss per row."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    loss: Tensor


@dataclass(frozen=True)
class GPTQ(BlockPass):
    """Settings: the grid (bits, group, zero_point) and the rounding (damp, order, search ...)."""

    bits: int = 4
    group: int | Literal["auto"] | None = AUTO
    zero_point: bool = False
    damp: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    static_groups: bool = True
    block: int = 128
    search: int = 12
    sweeps: int = 1
    correct: float = 0.0

    key = "gptq"
    title = "GPTQ"
    paper = "Frantar et al., GPTQ, arXiv 2210.17323"

    def __post_init__(self) -> None:
        make_format(self.bits, self.group, self.zero_point, 128)
        if not 0 <= self.damp <= 1:
            raise BadRequest(
                f"gptq.damp is {self.damp}", do="a share from 0 to 1 is needed, 0.01 say"
            )
        if not 1 <= self.block <= 4096 or not 0 <= self.search <= 100:
            raise BadRequest(
                f"gptq: block {self.block} or search {self.search} is out of range",
                do="blocks of 1 to 4096 columns; 0 to 100 steps of search",
            )
        if not 0 <= self.sweeps <= 100 or not 0 <= self.correct <= 1:
            raise BadRequest(
                f"gptq: sweeps {self.sweeps} or correct {self.correct} is out of range",
                do="0 to 100 sweeps; a share from 0 to 1",
            )
        if self.order == "activation" and not self.static_groups:
            raise BadRequest(
                "gptq: moving groups in activation order would need a group index per column",
                do="use static_groups: true, or order: natural",
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN, CROSS} if self.correct else {HESSIAN})

    def format_of(self, columns: int) -> Integers:
        return make_format(self.bits, self.group, self.zero_point, columns)

    def check(self, spec: Spec) -> None:
        check_groups(self.format_of(128), spec, self.group != AUTO)

    def site_bytes(self, rows: int, columns: int) -> int:
        searching = 0 if convert.native() else 16 * SEARCH_ROWS * columns
        factoring = 4 * rows * columns + 12 * columns * columns
        return max(factoring, 20 * rows * columns + 8 * columns * columns + searching)

    def site(self, site: Reached) -> Iterator[Row]:
        _, solution, format = self.solved(site)
        yield from self.hold(site, solution, format)

    def solved(self, site: Reached) -> tuple[dict[str, Tensor], dict[str, Solution], Integers]:
        """What each linear of a site aims at, float32 [out, in], and what it will be."""
        linears = list(site.linears.values())
        columns = linears[0].shape[1]
        w = torch.cat([linear.matrix() for linear in linears])
        format = self.format_of(columns).scaled(site.stored)
        rounding = Rounding(self.damp, self.order, self.static_groups, self.block, self.search)
        hessian = site.stats.hessian
        if self.correct:
            w = corrected(w, hessian, site.stats.cross, self.damp, self.correct)
        try:
            solution = solve(w, hessian, format, rounding)
            if self.sweeps:
                hessian = damped(hessian, self.damp)
            for _ in range(self.sweeps):
                solution = refined(w, solution, hessian, format)
        except FailedWork as error:
            raise FailedWork(
                f"{site.block}.{site.name}: {error.what}", error.seen, error.do
            ) from error
        require_finite_scale(solution.scale, format, f"{site.block}.{site.name}")
        aims, found, start = {}, {}, 0
        for name, linear in site.linears.items():
            own = slice(start, start + linear.shape[0])
            start = own.stop
            aims[name] = w[own]
            found[name] = Solution(solution.codes[own], solution.scale[own], solution.zero[own],
                                   solution.loss[own])  # fmt: skip
        return aims, found, format

    def hold(
        self, site: Reached, solutions: dict[str, Solution], format: Integers
    ) -> Iterator[Row]:
        """Put what was solved into a site's linears."""
        hessian = site.stats.hessian
        for name, linear in site.linears.items():
            found, power = solutions[name], output_power(linear.matrix(), hessian)
            linear.replace(convert.hold(found.codes, found.scale, found.zero, format))
            where = f"{site.block}.{name}"
            yield Row(where, "format", format.name)
            yield Row(where, "relative_output_error", _share(found.loss, power))
        if not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def corrected(w: Tensor, hessian: Tensor, cross: Tensor, damp: float, share: float) -> Tensor:
    """W, `share` of the way to the matrix that makes the original's outputs of the inputs there are.

    What is pruned stays so.
    """
    inverse, failed = torch.linalg.cholesky_ex(damped(hessian, max(damp, 0.01)))
    if int(failed):
        return w
    aim = w + share * torch.cholesky_solve((w @ (cross - hessian)).T, inverse).T
    return torch.where(w == 0, 0.0, aim) if is_pruned(w) else aim


def is_pruned(w: Tensor) -> bool:
    """Whether so many weights are zero that their places are to be kept."""
    return int(torch.count_nonzero(w)) < (1 - PRUNED_SHARE) * w.numel()


def refined(w: Tensor, solution: Solution, hessian: Tensor, format: Integers) -> Solution:
    """After one sweep over scales and codes; `hessian` is damped."""
    codes, scale, gain = sweep(w, solution.codes, solution.scale, solution.zero, hessian, format)
    return Solution(codes, scale, solution.zero, (solution.loss - gain).clamp(min=0))


def output_power(w: Tensor, hessian: Tensor) -> Tensor:
    """w H w^T per row: twice the mean square of the output, [rows]; three digits are enough.

    H is its own mirror image, so what lies above its diagonal counts twice.
    """
    power = torch.zeros(len(w))
    with multiply_in_bfloat16():
        for start in range(0, w.shape[1], PANEL):
            own = slice(start, start + PANEL)
            above, corner = w[:, :start] @ hessian[:start, own], w[:, own] @ hessian[own, own]
            power += torch.linalg.vecdot(above.mul_(2).add_(corner), w[:, own])
    return power


def _share(loss: Tensor, power: Tensor) -> float:
    return float(loss.sum() / power.sum().clamp(min=1e-30))


def factor(hessian: Tensor, damp: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """R upper triangular with H + damping = R R^T, and which columns had no input, in the given order.

    FailedWork when H is not finite or not positive definite even with ten times the damping.
    """
    diagonal, back = hessian.diagonal()[order], order.flip(0)
    if not bool(torch.isfinite(hessian.sum())) or bool((diagonal < 0).any()):
        raise FailedWork(
            "the Hessian of the inputs is not a sum of squares", do="check the weights"
        )
    dead = diagonal == 0
    level = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    for strength in (damp, max(10 * damp, 0.01)):
        h = hessian[back[:, None], back]
        h.diagonal().add_(strength * level)
        h.diagonal()[dead.flip(0)] = level
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        if not int(failed):
            return lower.flip(0, 1), dead
    raise FailedWork(
        f"the Hessian of the inputs is not positive definite with damping {max(10 * damp, 0.01)}",
        do="use more calibration text, or a larger damp",
    )


def solve(w: Tensor, hessian: Tensor, format: Integers, rounding: Rounding) -> Solution:
    """Codes for w [rows, in] float32 under H [in, in]. See the top of the file for the mathematics."""
    rows, columns = w.shape
    group = format.group or columns
    groups = format.groups((rows, columns))
    order = torch.arange(columns)
    if rounding.order == "activation":
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    r, _ = factor(hessian, rounding.damp, order)
    target = w.T.contiguous()[order]  # [in, rows]; every column of W is a row from here on
    keep = target != 0
    pruned = is_pruned(target)

    rounded, searched = loops(w, hessian)
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    if rounding.static_groups:
        scale, zero = searched(w, hessian.diagonal(), format, rounding.search)
    group_of = order // group
    moving = not rounding.static_groups

    block = math.gcd(rounding.block, group) if moving else rounding.block
    panel = block * max(1, PANEL // block)
    errors = torch.zeros(columns, rows)  # d = w - q, float32
    codes = torch.empty(columns, rows, dtype=torch.int8)
    loss = torch.zeros(rows)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if start % panel == 0:  # one wide product for what comes from earlier panels
            ahead = min(start + panel, columns)
            from_panels = r[:start, start:ahead].T @ errors[:start]  # [panel, rows]
        first = start - start % panel
        near = r[first:start, start:end].T @ errors[first:start]
        carried = near.add_(from_panels[start - first : end - first])  # [block, rows]
        if moving and start % group == 0:
            stop = min(start + group, columns)
            now = _updated(target, r, errors, start, stop)
            g = start // group
            chosen = searched(now.T, hessian.diagonal()[start:stop],
                              replace(format, group=None), rounding.search)  # fmt: skip
            scale[:, g], zero[:, g] = chosen[0][:, 0], chosen[1][:, 0]
        scales = scale.T[group_of[start:end]].contiguous()  # [block, rows]
        zeros = zero.T[group_of[start:end]].contiguous()
        errors[start:end], codes[start:end], lost = rounded(
            target[start:end], carried, r[start:end, start:end], scales, zeros,
            keep[start:end] if pruned else None, format,
        )  # fmt: skip
        loss += lost
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return Solution(codes[back].T.contiguous(), scale, zero, loss)


def _updated(target: Tensor, r: Tensor, errors: Tensor, start: int, stop: int) -> Tensor:
    """Columns start..stop [n, rows] as the paper has updated them for the errors before `start`."""
    if not start:
        return target[:stop]
    carried = r[:start, start:stop].T @ errors[:start]
    moved = torch.linalg.solve_triangular(r[start:stop, start:stop].T, carried, upper=False)
    return target[start:stop] + moved
