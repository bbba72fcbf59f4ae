"""Half-quadratic quantization: a grid fitted to most weights rather than to the few largest. No data.

Minimize sum |w - Q(w)|^p, p < 1, over the grid of each group. With an auxiliary error e it splits into
two steps with closed forms, taken in turn while the coupling b grows:

    e  <- shrink(r) = sign(r) max(0, |r| - p |r|^(p-1) / b),   r = w - (q - z) s
    s  <- <q - z, w - e> / <q - z, q - z>
    z  <- mean(q - (w - e) / s)

The paper moves z, a number of its own; in our formats, which others load, zero points are integers, so
z is rounded and s moves with it. A round that does not lower a group's sum of |r|^p is not kept.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import Integers
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert, reference
from onecard.passes.base import BlockPass, check_groups
from onecard.passes.quantize import AUTO, make_format, require_finite_scale

ROWS = 512
START, GROWTH = 10.0, 1.05
"""The coupling at first (for weights divided by their group's largest), and its growth per round."""


@dataclass(frozen=True)
class HQQ(BlockPass):
    """Settings: the grid, the exponent p of the error, and the most rounds."""

    bits: int = 4
    group: int | Literal["auto"] | None = 64
    zero_point: bool = True
    power: float = 0.7
    rounds: int = 20

    key = "hqq"
    title = "half-quadratic quantization"
    paper = "Badri and Shaji, Half-Quadratic Quantization, mobiusml.github.io/hqq_blog, 2023"

    def __post_init__(self) -> None:
        make_format(self.bits, self.group, self.zero_point, 128)
        if not 0 < self.power <= 1:
            raise BadRequest(f"hqq.power is {self.power}", do="an exponent above 0, at most 1")
        if not 0 <= self.rounds <= 1000:
            raise BadRequest(f"hqq.rounds is {self.rounds}", do="0 to 1000 rounds")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def format_of(self, columns: int) -> Integers:
        return make_format(self.bits, self.group, self.zero_point, columns)

    def check(self, spec: Spec) -> None:
        check_groups(self.format_of(128), spec, self.group != AUTO)

    def site_bytes(self, rows: int, columns: int) -> int:
        return 8 * rows * columns + 40 * min(rows, ROWS) * columns

    def site(self, site: Reached) -> Iterator[Row]:
        for name, linear in site.linears.items():
            w, where = linear.matrix(), f"{site.block}.{name}"
            format = self.format_of(w.shape[1]).scaled(site.stored)
            scale, zero = fit_grid(w, format, self.power, self.rounds)
            require_finite_scale(scale, format, where)
            blocks = reference.grouped(w, format)
            q = reference.encode(blocks, scale[..., None], zero[..., None], format)
            linear.replace(convert.hold(q.flatten(1), scale, zero, format))
            yield Row(where, "format", format.name)


def fit_grid(w: Tensor, format: Integers, power: float, rounds: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] of w [rows, in]."""
    parts = [
        _fit(reference.grouped(w[i : i + ROWS], format), format, power, rounds)
        for i in range(0, w.shape[0], ROWS)
    ]
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _fit(w: Tensor, format: Integers, power: float, rounds: int) -> tuple[Tensor, Tensor]:
    """The same for w [rows, groups, size]."""
    low, high = format.levels
    scale, zero = reference.grid(w, format)
    unit = (
        w.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    )  # errors are judged in units of the largest
    s, z, coupling = scale, zero, START
    best = torch.full(scale.shape, float("inf"))
    for _ in range(rounds + 1):
        q = reference.encode(w, s[..., None], z[..., None], format)
        r = (w - reference.decode(q, s[..., None], z[..., None])) / unit
        error = r.abs().pow(power).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        aim = w - shrink(r, coupling, power) * unit
        if format.zero_point:
            z = torch.round((q - aim / s[..., None]).mean(-1)).clamp(low, high)
        steps = q - z[..., None]
        norm = steps.square().sum(-1)
        fitted = (steps * aim).sum(-1) / norm.clamp(min=1e-12)
        fitted = torch.where((norm > 0) & (fitted > 1e-30), fitted, s)
        s = fitted.to(reference.DTYPES[format.scale]).float()
        coupling *= GROWTH
    return scale, zero


def shrink(r: Tensor, coupling: float, power: float) -> Tensor:
    """The generalized soft threshold: argmin over e of |e|^p + coupling / 2 (e - r)^2, approximately."""
    size = r.abs().clamp(min=1e-8)
    return torch.sign(r) * (r.abs() - power * size.pow(power - 1) / coupling).clamp(min=0)
