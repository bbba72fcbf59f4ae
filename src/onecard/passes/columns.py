"""The two inner loops of rounding with a Hessian, plain: one block of columns, and the grids of groups.

Both have a native form of the same signature (kernels/convert.py), which `loops` takes where it can.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onecard.core.format import Integers
from onecard.kernels import convert, reference

SEARCH_ROWS = 512
"""Rows whose grids are searched at a time."""


def loops(
    *tensors: Tensor,
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]:
    """`round_columns` and `search_grid` for these: the native ones where the library can read them."""
    if convert.native(*tensors):
        return convert.round_columns, convert.search_grid
    return round_columns, search_grid


def round_columns(
    target: Tensor, carried: Tensor, r: Tensor, scale: Tensor, zero: Tensor, keep: Tensor | None,
    format: Integers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Errors, codes [block, rows] and loss [rows] of one block of columns (convert has a faster one).

    target, carried, scale, zero, keep [block, rows]; r [block, block], this block of R. `carried` is
    the sum over the blocks before; weights with keep = 0 stay zero.
    """
    block, rows = target.shape
    errors, loss = torch.empty(block, rows), torch.zeros(rows)
    codes = torch.empty(block, rows, dtype=torch.int8)
    for j in range(block):
        diagonal = r[j, j]
        aim = torch.addmv(carried[j], errors[:j].T, r[:j, j]) if j else carried[j]
        aim = target[j] + aim / diagonal
        q = reference.encode(aim, scale[j], zero[j], format)
        if keep is not None:
            q = torch.where(keep[j], q, zero[j])
        value = reference.decode(q, scale[j], zero[j])
        errors[j] = target[j] - value
        codes[j] = q.to(torch.int8)
        loss += ((aim - value) * diagonal).square_()
    return errors, codes, loss


def search_grid(w: Tensor, weights: Tensor, format: Integers, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] of w [rows, in] (convert has a faster one).

    With `steps`, each group's range is also tried shrunk to 1 - SHRINK * i / steps of itself, i up to
    `steps`, and the least error weighted by `weights` [in] wins; ties keep the larger grid.
    """
    scale, zero = reference.grid(reference.grouped(w, format), format)
    if not steps:
        return scale, zero
    columns = weights.unflatten(0, (scale.shape[1], -1))
    for begin in range(0, w.shape[0], SEARCH_ROWS):
        own = slice(begin, begin + SEARCH_ROWS)
        blocks = reference.grouped(w[own], format)
        best = torch.full(blocks.shape[:2], float("inf"))
        for i in range(steps + 1):
            smaller = blocks * (1 - convert.SHRINK * i / steps)
            s, z = reference.grid(smaller, format)
            q = reference.encode(blocks, s[..., None], z[..., None], format)
            off = (reference.decode(q, s[..., None], z[..., None]) - blocks).square_()
            error = (off * columns).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale[own] = torch.where(better, s, scale[own])
            zero[own] = torch.where(better, z, zero[own])
    return scale, zero
