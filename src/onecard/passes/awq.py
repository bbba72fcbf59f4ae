"""AWQ: scales that protect the weights of large inputs, then rounding with the best clipping.

After the scales (scales.py) each group of weights is rounded to nearest on a grid that covers 1 -
SHRINK * i / clip of its range, i up to `clip`; what is outside is clipped. The one with the least
output error of the group's own inputs wins,

    e H_gg e^T,  e = Q(w_g) - w_g,  H_gg the group's block of the Hessian

which is the paper's mean square of x_g e over stored inputs. No weight makes good for another: GPTQ
(after `scale`) does that on top.

Lin et al., AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest
from onecard.core.format import Integers
from onecard.core.report import Row
from onecard.kernels import convert, reference
from onecard.passes.quantize import make_format, require_finite_scale
from onecard.passes.scales import SAMPLED_ROWS, Scale, output_error, scale_site


@dataclass(frozen=True)
class AWQ(Scale):
    """Settings: the grid, how many exponents and how many ranges are tried."""

    clip: int = 12

    key = "awq"
    title = "AWQ"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.clip <= 100:
            raise BadRequest(f"awq.clip is {self.clip}", do="0 to 100 ranges are tried")

    def format_of(self, columns: int) -> Integers:
        return make_format(self.bits, self.group, self.zero_point, columns)

    def site_bytes(self, rows: int, columns: int) -> int:
        return super().site_bytes(rows, columns) + 16 * min(rows, SAMPLED_ROWS) * columns

    def site(self, site: Reached) -> Iterator[Row]:
        format = self.format_of(site.stats.size).scaled(site.stored)
        yield from scale_site(site, format, self.steps)
        hessian = site.stats.hessian
        for name, linear in site.linears.items():
            w, where = linear.matrix(), f"{site.block}.{name}"
            scale, zero = clip_grid(w, hessian, format, self.clip)
            require_finite_scale(scale, format, where)
            q = reference.encode(
                reference.grouped(w, format), scale[..., None], zero[..., None], format
            )
            linear.replace(convert.hold(q.flatten(1), scale, zero, format))
            lost = output_error(linear.matrix() - w, hessian)
            yield Row(where, "format", format.name)
            power = output_error(w, hessian)
            yield Row(where, "relative_output_error", lost / max(power, 1e-30))
        if not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def clip_grid(w: Tensor, hessian: Tensor, format: Integers, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] with the least error e H_gg e^T per group; ties keep the larger.

    An expert that saw no token (H = 0) is judged by e e^T.
    """
    scale, zero = reference.grid(reference.grouped(w, format), format)
    groups = scale.shape[1]
    size = w.shape[1] // groups
    inner = torch.stack([hessian[i : i + size, i : i + size] for i in range(0, w.shape[1], size)])
    if not bool(inner.any()):
        inner = torch.eye(size).expand(groups, -1, -1)
    for begin in range(0, w.shape[0], SAMPLED_ROWS) if steps else ():
        own = slice(begin, begin + SAMPLED_ROWS)
        blocks = reference.grouped(w[own], format)
        best = torch.full(blocks.shape[:2], float("inf"))
        for i in range(steps + 1):
            s, z = reference.grid(blocks * (1 - convert.SHRINK * i / steps), format)
            q = reference.encode(blocks, s[..., None], z[..., None], format)
            e = (reference.decode(q, s[..., None], z[..., None]) - blocks).transpose(0, 1)
            error = torch.linalg.vecdot(e @ inner, e).T  # [rows, groups]
            better = error < best
            best = torch.where(better, error, best)
            scale[own] = torch.where(better, s, scale[own])
            zero[own] = torch.where(better, z, zero[own])
    return scale, zero
