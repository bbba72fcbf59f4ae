"""Better scales and codes for a matrix that is rounded already, under the same error tr(D H D^T), D = Q - W.

`fit_scales`   given the codes, the error of a row is quadratic in its scales s. With the row's codes cut
               into groups c_g (zero point taken off) the best s solve M s = b,

                   M_gh = c_g H_gh c_h,   b_g = c_g (H w)_g

`descend`      given the scales, one code after the other goes where it is best while all others stay:
               coordinate descent, q_j = round(w_j - sum_{k != j} H_jk d_k / H_jj, in steps of s). It
               starts where GPTQ, which never looks back, has ended, and no step raises the error.

Each is rows * in^2 operations a round. Zeros of a pruned matrix stay.

Behdin et al., QuantEase, arXiv 2309.01885 (the descent); Egiazarian et al., AQLM, arXiv 2401.06118 (least
squares).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.core.format import Integers
from onecard.kernels import reference

BLOCK = 128
ROWS = 1024


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with damp times its mean live diagonal added; columns without input count as that mean."""
    h = hessian.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    level = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal += damp * level
    diagonal[dead] = level
    return h


def fit_scales(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, format: Integers
) -> Tensor:
    """The best scales [rows, groups] of codes [rows, in], as stored; rows that gain nothing keep theirs."""
    found = [
        _fit(w[i : i + ROWS], codes[i : i + ROWS], scale[i : i + ROWS], zero[i : i + ROWS],
             hessian, format)
        for i in range(0, w.shape[0], ROWS)
    ]  # fmt: skip
    return torch.cat(found)


def _fit(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, format: Integers
) -> Tensor:
    steps = reference.grouped(codes.float(), format) - zero[..., None]  # c [rows, groups, size]
    rows, groups, size = steps.shape
    products = torch.empty(rows, groups, groups)
    for g in range(groups):
        along = steps[:, g] @ hessian[g * size : (g + 1) * size]  # c_g H_g: [rows, in]
        products[:, g] = (along.unflatten(1, (groups, size)) * steps).sum(-1)
    aims = ((w @ hessian).unflatten(1, (groups, size)) * steps).sum(-1)
    used = products.diagonal(dim1=1, dim2=2) > 0
    ridge = torch.diag_embed(torch.where(used, 0.0, 1.0))
    fitted, failed = torch.linalg.solve_ex(products + ridge, aims)
    good = (failed == 0)[:, None] & used & (fitted > 1e-30) & torch.isfinite(fitted)
    fitted = torch.where(good, fitted, scale)
    fitted = fitted.to(reference.DTYPES[format.scale]).float()

    def error(s: Tensor) -> Tensor:  # s M s - 2 b s, [rows]
        return ((products @ s[..., None])[..., 0] * s - 2 * aims * s).sum(-1)

    return torch.where((error(fitted) < error(scale))[:, None], fitted, scale)


def descend(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, format: Integers
) -> Tensor:
    """Codes [rows, in] int8 after every column has moved once; where w is 0 and Q is too, both stay."""
    size = w.shape[1] // scale.shape[1]
    wide, offset = scale.T.contiguous(), zero.T.contiguous()  # [groups, rows]
    q = codes.T.float().contiguous()  # [in, rows]
    target = w.T.contiguous()
    d = torch.empty_like(q)
    for g in range(len(wide)):
        own = slice(g * size, (g + 1) * size)
        d[own] = reference.decode(q[own], wide[g], offset[g]) - target[own]
    pruned = (target == 0) & (d == 0) if bool((target == 0).any()) else None
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        pull = hessian[start:end] @ d  # [block, rows]
        for j in range(start, end):
            g, row = j // size, hessian[j]
            value = d[j] + target[j]
            aim = value - pull[j - start] / row[j]
            new = reference.encode(aim, wide[g], offset[g], format)
            if pruned is not None:
                new = torch.where(pruned[j], q[j], new)
            moved = reference.decode(new, wide[g], offset[g]) - value
            q[j] = new
            d[j] += moved
            if j + 1 < end:
                pull[j + 1 - start :] += row[j + 1 : end, None] * moved
    return q.T.to(torch.int8).contiguous()
