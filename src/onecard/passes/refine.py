"""Better scales and codes for a matrix that is rounded already, under the same error tr(D H D^T), D = Q - W.

GPTQ goes once through the columns and never looks back. A `sweep` goes through the groups again, and
moves one thing at a time to where it is best while all others stay; no step raises the error.

    scale   the group's codes c (zero point taken off) make the error quadratic in its scale s:
                s - c (H d)_g / (c H_gg c),   d = q - w of the whole row
    codes   one column after the other, coordinate descent:
                q_j = round(v_j - (H d)_j / H_jj) in steps of s, v_j its value now

The second is the inner loop of GPTQ with H for R: from v_j as target, what the columns before it have
moved is made good. Each sweep is rows * in^2 operations. Zeros of a pruned matrix stay.

Behdin et al., QuantEase, arXiv 2309.01885 (the descent).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.core.format import Integers
from onecard.kernels import reference
from onecard.passes.columns import loops

BLOCK = 128


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with damp times its mean live diagonal added; columns without input count as that mean."""
    h = hessian.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    level = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal += damp * level
    diagonal[dead] = level
    return h


def sweep(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, format: Integers
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, in] int8, scale [rows, groups] as stored, and by how much the error fell [rows].

    w [rows, in] float32, zero [rows, groups], `hessian` [in, in] positive definite (`damped`).
    """
    size = w.shape[1] // scale.shape[1]
    target = w.T.contiguous()  # [in, rows], as all that follows
    q, gain = codes.T.contiguous(), torch.zeros(len(w))
    wide, offset = scale.T.contiguous(), zero.T.contiguous()  # [groups, rows]
    d = torch.empty_like(target)
    for g in range(len(wide)):
        own = slice(g * size, (g + 1) * size)
        d[own] = reference.decode(q[own].float(), wide[g], offset[g]) - target[own]
    for g in range(len(wide)):
        own = slice(g * size, (g + 1) * size)
        near, pull = hessian[own, own], hessian[own] @ d  # H_gg, (H d)_g
        steps = q[own].float() - offset[g]
        along = near @ steps
        change, gained = _rescaled(wide[g], (steps * along).sum(0), (steps * pull).sum(0), format)
        wide[g] += change
        d[own] += steps * change
        pull += along * change
        codes_now, moved, more = _descend(
            target[own], d[own], pull, near, q[own], wide[g], offset[g], format
        )
        q[own] = codes_now
        d[own] += moved
        gain += gained + more
    return q.T.contiguous(), wide.T.contiguous(), gain


def _rescaled(
    scale: Tensor, power: Tensor, slope: Tensor, format: Integers
) -> tuple[Tensor, Tensor]:
    """By how much a group's scales [rows] move, as stored, and what that gains."""
    best = (scale - slope / power).to(reference.DTYPES[format.scale]).float()
    usable = (power > 0) & torch.isfinite(best) & (best > 1e-30)
    change = torch.where(usable, best - scale, 0.0)
    gained = -change * (2 * slope + change * power)
    return torch.where(gained > 0, change, 0.0), gained.clamp(min=0)


def _descend(
    target: Tensor, d: Tensor, pull: Tensor, h: Tensor, q: Tensor, scale: Tensor, zero: Tensor,
    format: Integers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes of a group [size, rows] after each column has moved once, the moves, and what they gain."""
    rounded, _ = loops(target, h)
    pruned = bool((target == 0).any())
    codes, moves, gain = torch.empty_like(q), torch.empty_like(d), torch.zeros_like(scale)
    for start in range(0, len(d), BLOCK):
        own = slice(start, min(start + BLOCK, len(d)))
        wide = (own.stop - own.start, len(scale))
        keep = (target[own] != 0) | (d[own] != 0) if pruned else None
        off, codes[own], _ = rounded(
            target[own] + d[own], -pull[own], h[own, own], scale.expand(wide), zero.expand(wide),
            keep, format,
        )  # fmt: skip
        moved = moves[own] = -off
        back = h[:, own] @ moved  # [size, rows]
        gain -= (moved * (2 * pull[own] + back[own])).sum(0)
        pull += back
    return codes, moves, gain
