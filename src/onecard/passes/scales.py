"""Scales on a site's inputs that make its weights easier to round. The model stays the same function.

W x = (W diag(s)) (x / s): a channel with large inputs gets finer steps, at the cost of coarser ones for
the others in its group. x / s costs nothing: it is folded into the norm, the values or the `up` linear
that makes x (calibrate/fold.py). Two ways of choosing s:

    activation-aware   s = x^a  and  s = x^a / w^(1-a), a from a grid of `steps`, the one with the least
                       output error tr(D H D^T), D = Q(W diag(s)) diag(s)^-1 - W, wins; 1 is among them.
                       x is the root mean square input, w the mean |weight| of a column, both from what
                       other passes use too: the paper's loop over stored activations gives the same
                       numbers, as |D X|^2 = tr(D X X^T D^T)
    smoothing          s = max|x|^a / max|w|^(1-a), for inputs that are rounded too (int8 weights and
                       activations): outliers of x move into W

Lin et al., AWQ, arXiv 2306.00978; Xiao et al., SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import ABSMAX, HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import Format, Integers
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert
from onecard.passes.base import BlockPass, check_groups
from onecard.passes.quantize import AUTO, make_format

SAMPLED_ROWS = 512
"""Rows of a site's linears that a scale is judged by, spread evenly."""


@dataclass(frozen=True)
class Scale(BlockPass):
    """Settings: the grid that will be rounded to, and how many exponents are tried."""

    bits: int = 4
    group: int | Literal["auto"] | None = AUTO
    zero_point: bool = False
    steps: int = 20

    key = "scale"
    title = "activation-aware scales"
    paper = "Lin et al., AWQ, arXiv 2306.00978"

    def __post_init__(self) -> None:
        make_format(self.bits, self.group, self.zero_point, 128)
        if not 1 <= self.steps <= 100:
            raise BadRequest(f"{self.key}.steps is {self.steps}", do="1 to 100 exponents are tried")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    def format_of(self, columns: int) -> Format | None:
        return None

    def check(self, spec: Spec) -> None:
        check_groups(
            make_format(self.bits, self.group, self.zero_point, 128), spec, self.group != AUTO
        )

    def site_bytes(self, rows: int, columns: int) -> int:
        return 4 * rows * columns + 8 * columns * columns + 24 * min(rows, SAMPLED_ROWS) * columns

    def site(self, site: Reached) -> Iterator[Row]:
        format = make_format(self.bits, self.group, self.zero_point, site.stats.size)
        yield from scale_site(site, format.scaled(site.stored), self.steps)


@dataclass(frozen=True)
class Smooth(BlockPass):
    """Settings: the share of the difficulty that moves into the weights; which sites."""

    strength: float = 0.5
    sites: Literal["norms", "all"] = "norms"

    key = "smooth"
    title = "SmoothQuant"
    paper = "Xiao et al., SmoothQuant, arXiv 2211.10438"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise BadRequest(f"smooth.strength is {self.strength}", do="a share from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({ABSMAX})

    def format_of(self, columns: int) -> Format | None:
        return None

    def check(self, spec: Spec) -> None:
        if all(layer.order == "post" for layer in spec.layers) and self.sites == "norms":
            raise BadRequest("smooth: the model has no norms before its linears", do="sites: all")

    def site(self, site: Reached) -> Iterator[Row]:
        if site.made is None or not site.stats.count:
            return
        if self.sites == "norms" and not site.name.endswith(".in"):
            return
        w = torch.cat([linear.matrix() for linear in site.linears.values()])
        s = smooth_scale(w, site.stats.absmax, site.made.source, self.strength)
        yield site.rescale(site.exact(s))


def scale_site(site: Reached, format: Integers, steps: int) -> Iterator[Row]:
    """Search a site's scales and apply them; nothing where they would not help."""
    if site.made is None or not site.stats.count:
        return
    w = torch.cat([linear.matrix() for linear in site.linears.values()])
    found = search_scale(w, site.stats.hessian, format, site.made.source, site.exact, steps)
    if found is not None:
        yield site.rescale(found)


def smooth_scale(w: Tensor, absmax: Tensor, source: Tensor, strength: float) -> Tensor:
    """s [channels] = max|x|^a / max|w|^(1-a) over all inputs [in] that copy a channel; 1 for idle ones."""
    count = int(source.max()) + 1
    x = torch.zeros(count).scatter_reduce(0, source, absmax, "amax")
    wide = torch.zeros(count).scatter_reduce(0, source, w.abs().amax(0), "amax")
    s = x**strength / wide.clamp(min=1e-5) ** (1 - strength)
    return torch.where(x > 0, s.clamp(1e-4, 1e4), 1.0)


def search_scale(
    w: Tensor, hessian: Tensor, format: Integers, source: Tensor,
    exact: Callable[[Tensor], Tensor], steps: int,
) -> Tensor | None:  # fmt: skip
    """The best s [channels] for w [rows, in] under H [in, in]; None when it is 1."""
    w = w[:: -(-w.shape[0] // SAMPLED_ROWS)]
    best, least = None, output_error(rounded(w, format) - w, hessian)
    for s in map(exact, candidates(w, hessian.diagonal(), source, steps)):
        into = s[source]
        error = output_error(rounded(w * into, format) / into - w, hessian)
        if error < least:
            best, least = s, error
    return best


def candidates(w: Tensor, power: Tensor, source: Tensor, steps: int) -> Iterator[Tensor]:
    """Scales [channels] to try; `power` [in] is the mean square of each input."""
    count = int(source.max()) + 1
    copies = torch.zeros(count).index_add(0, source, torch.ones(len(source)))
    x = (torch.zeros(count).index_add(0, source, power) / copies).sqrt()
    wide = torch.zeros(count).index_add(0, source, w.abs().mean(0)) / copies
    used = (x > 0) & (wide > 0)
    if not bool(used.any()):
        return
    for i in range(steps + 1):
        a = i / steps
        for s in (x**a, x**a / wide ** (1 - a)):
            level = (s[used].max() * s[used].min()).sqrt()
            yield torch.where(used, (s / level).clamp(1e-4, 1e4), 1.0)


def rounded(w: Tensor, format: Integers) -> Tensor:
    """w as round-to-nearest would hold it."""
    return convert.to_dense(convert.round_to_nearest(w.contiguous(), format))


def output_error(d: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) of a change D [rows, in]: twice the mean square change of the outputs."""
    return float(torch.linalg.vecdot(d @ hessian, d).sum())
