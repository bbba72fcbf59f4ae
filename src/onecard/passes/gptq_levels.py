"""GPTQ on a fixed table of levels (NF4, FP4, MXFP4, NVFP4, ternary, binary).

The column loop of gptq.py with another rounding: with H = R R^T, R upper triangular, columns in the
order of falling diag(H), and d = w - q for those already rounded, column j goes to the level nearest to

    t_j = w_j + sum_{k<j} R_kj d_k / R_jj

Scales are chosen beforehand, group by group: of `search` sizes of what the top level stands for, the one
with the least diag(H)-weighted error of rounding. `correct` is that of gptq.py, and so is that the zeros of
a pruned matrix stay.

In plain PyTorch, a vector operation per column: rows * in^2 operations and in^3 / 3 for the factor.

Frantar et al., GPTQ, arXiv 2210.17323; the tables: core/format.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.calibrate.stats import CROSS, HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import TABLES, Levels, Weight
from onecard.core.report import Row
from onecard.kernels import storage
from onecard.passes.gptq import corrected, factor, is_pruned, output_power
from onecard.passes.levels import RoundToLevels

BLOCK = 128
WIDEST = {"ternary": 1.5, "binary": 1.5, "mxfp4": 2.0}
"""The largest scale that is tried, in those of `group_top`; half of it is the smallest."""


@dataclass(frozen=True)
class GPTQLevels(RoundToLevels):
    """Settings: a table and its group as for `levels`; damp, search and correct as for `gptq`."""

    damp: float = 0.01
    search: int = 12
    correct: float = 0.0

    key = "gptq-levels"
    title = "GPTQ on levels"
    paper = "Frantar et al., GPTQ, arXiv 2210.17323"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table not in TABLES:
            raise BadRequest(f"gptq-levels: {self.table} has no table", do=", ".join(TABLES))
        if not (0 <= self.damp <= 1 and 0 <= self.search <= 100 and 0 <= self.correct <= 1):
            raise BadRequest(
                f"gptq-levels: damp {self.damp}, correct {self.correct} or search {self.search} is out of "
                "range", do="damp and correct are shares from 0 to 1, search is 0 to 100",
            )  # fmt: skip

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN, CROSS} if self.correct else {HESSIAN})

    def site_bytes(self, rows: int, columns: int) -> int:
        return 40 * rows * columns + 12 * columns * columns

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian
        for name, linear in site.linears.items():
            format = self.format_of(linear.shape[1]).scaled(site.stored)
            assert isinstance(format, Levels)
            w, where = linear.matrix(), f"{site.block}.{name}"
            aim = w
            if self.correct:
                aim = corrected(w, hessian, site.stats.cross, self.damp, self.correct)
            linear.replace(solve(aim, hessian, format, self.damp, self.search))
            d = linear.matrix() - aim
            lost = torch.linalg.vecdot(d @ hessian, d).sum()
            yield Row(where, "format", format.name)
            power = output_power(w, hessian).sum().clamp(min=1e-30)
            yield Row(where, "relative_output_error", float(lost / power))
        if not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def solve(w: Tensor, hessian: Tensor, format: Levels, damp: float, search: int) -> Weight:
    """w [rows, in] float32 on a table of levels, under H [in, in]."""
    rows, columns = w.shape
    levels = torch.tensor(TABLES[format.table].levels)
    stored, scale = search_scales(w, hessian.diagonal(), format, search)
    steps = torch.where(scale > 0, scale, 1.0).T.contiguous()  # [groups, rows]
    size = columns // scale.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    r, _ = factor(hessian, damp, order)
    target = w.T.contiguous()[order]
    zero = (levels == 0).nonzero().flatten()[:1]  # the code of what is pruned, if there is one
    gone = target == 0 if len(zero) and is_pruned(w) else None
    errors, codes = torch.zeros(columns, rows), torch.empty(columns, rows, dtype=torch.int64)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        carried = r[:start, start:end].T @ errors[:start]  # [block, rows]
        for j in range(start, end):
            pull = torch.addmv(carried[j - start], errors[start:j].T, r[start:j, j])
            step = steps[int(order[j]) // size]
            codes[j] = storage.nearest_level((target[j] + pull / r[j, j]) / step, levels)
            if gone is not None:
                codes[j] = torch.where(gone[j], zero, codes[j])
            errors[j] = target[j] - levels[codes[j]] * step
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return storage.hold_levels(codes[back].T.contiguous(), stored, format)


def search_scales(
    w: Tensor, weights: Tensor, format: Levels, steps: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored parts and values [rows, groups] of scales; each group's error weighted by `weights` [in]."""
    top = storage.group_top(w, format)
    blocks = w.unflatten(1, (top.shape[1], -1))
    columns = weights.unflatten(0, (top.shape[1], -1))
    levels = torch.tensor(TABLES[format.table].levels)
    wide = WIDEST.get(format.table, 1.0)
    best, most = torch.full(top.shape, float("inf")), top
    for i in range(steps + 1) if steps else ():
        tried = top * (wide - 0.5 * wide * i / steps)
        scale = storage.level_scale(tried, format)[1]
        step = torch.where(scale > 0, scale, 1.0)[..., None]
        off = levels[storage.nearest_level(blocks / step, levels)] * step - blocks
        error = (off.square() * columns).sum(-1)
        better = error < best
        best, most = torch.where(better, error, best), torch.where(better, tried, most)
    return storage.level_scale(most, format)
