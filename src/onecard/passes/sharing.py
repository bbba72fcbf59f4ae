"""Shared numbers fitted to outputs: conjugate gradients on the normal equations.

Where weights share numbers x (the entries of a codebook, the buckets of a hash) W' = A x is linear in
them, and with who shares what fixed

    minimize f(x) = tr((W - A x) H (W - A x)^T):      A^T[(A x) H] = A^T[W H]

A reads x out into a matrix, A^T adds up what belongs to the same number. One step is one product with H
and needs no matrix of the size of x squared. It is preconditioned by the sums of diag(H) over those who
share a number; from any start f never rises.

`alone`: every row of W has numbers of its own, and its own step lengths.

Memory: ROWS rows of W twice, four times x.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

ROWS = 512


class Sharing(Protocol):
    """Who shares what in a matrix of some rows."""

    @property
    def alone(self) -> bool: ...

    def read(self, x: Tensor, own: slice) -> Tensor:
        """A x: rows `own` of the matrix [rows, in]."""

    def add(self, d: Tensor, own: slice, into: Tensor) -> None:
        """A^T d of rows `own`, added into something shaped like x."""


def least_squares(
    sharing: Sharing, w: Tensor, hessian: Tensor, start: Tensor, steps: int,
    free: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The numbers after `steps` steps from `start`; those that are not `free` stay."""

    def sums(matrix: Tensor | None, x: Tensor | None) -> Tensor:
        """A^T[(matrix - A x) H], either left out."""
        total = torch.zeros_like(start)
        for begin in range(0, w.shape[0], ROWS):
            own = slice(begin, min(begin + ROWS, w.shape[0]))
            d = torch.zeros(()) if matrix is None else matrix[own]
            d = d if x is None else d - sharing.read(x, own)
            sharing.add(d @ hessian, own, total)
        return total if free is None else total * free

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (
            (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))
            if sharing.alone
            else (a * b).sum()
        )

    weight = torch.zeros_like(start)
    ones = hessian.diagonal().clamp(min=0).expand(min(ROWS, w.shape[0]), -1)
    for begin in range(0, w.shape[0], ROWS):
        own = slice(begin, min(begin + ROWS, w.shape[0]))
        sharing.add(ones[: own.stop - own.start].contiguous(), own, weight)
    scale = torch.where(weight > 0, 1 / weight.clamp(min=1e-30), 0.0)
    x, r = start.clone(), sums(w, start)
    z = scale * r
    p, power = z, dot(r, z)
    for _ in range(steps):
        q = -sums(None, p)
        curve = dot(p, q)
        length = torch.where(curve > 0, power / curve.clamp(min=1e-30), 0.0)
        x += length * p
        r -= length * q
        z = scale * r
        before, power = power, dot(r, z)
        p = z + torch.where(before > 0, power / before.clamp(min=1e-30), 0.0) * p
    return x


def output_error(d: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row, [rows]: twice the mean square change of an output."""
    return torch.cat([torch.linalg.vecdot(part @ hessian, part) for part in d.split(ROWS)])
