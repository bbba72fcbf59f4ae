"""What a weight is worth: criteria as functions, and masks of what stays by a score.

A criterion is one function (weight [rows, in], what was seen) -> score of the same shape, and one row
in CRITERIA; every shape of piece, every pattern and every budget takes every criterion.

    l1            |w|
    l2            w^2                    like l1 for single weights; over larger pieces it is not
    random        the seed's             what a score has to beat
    wanda         |w_ij| |X_j|           the norm of a column's inputs (arXiv 2306.11695)
    second_order  w_ij^2 / 2 [H^-1]_jj   what the output loses when the rest makes it good (OBS, 1993)
    gradient      |w g|                  g the mean gradient of the loss (arXiv 1810.02340)
    taylor        w^2 mean(g_b^2)        over batches b: the diagonal Fisher (arXiv 1906.10771)

The last two differentiate the loss, with the whole model in memory. A matrix whose inputs were never
seen (an idle expert) is scored by magnitude.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN, NORM, Statistics
from onecard.core.errors import BadRequest
from onecard.core.format import check_runs, parse_pattern
from onecard.passes.gptq import factor


@dataclass(frozen=True)
class Seen:
    """What a score may look at: the inputs of the site, and the gradients of this matrix."""

    where: str
    stats: Statistics
    seed: int = 0
    slope: Tensor | None = None
    squares: Tensor | None = None
    """Mean over batches of dL/dW, and of its square."""


@dataclass(frozen=True)
class Criterion:
    """A score, and what it needs."""

    score: Callable[[Tensor, Seen], Tensor]
    needs: frozenset[str] = frozenset()
    gradients: bool = False


def random_score(w: Tensor, seen: Seen) -> Tensor:
    """Equal chances, other ones for every matrix, the same in every run."""
    seed = seen.seed ^ zlib.crc32(seen.where.encode())
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(seed))


def second_order(w: Tensor, seen: Seen) -> Tensor:
    """w^2 / 2 [H^-1]_jj, H damped by a hundredth of its mean diagonal; idle columns score 0."""
    hessian = seen.stats.hessian
    r, dead = factor(hessian, 0.01, torch.arange(w.shape[1]))  # H = R R^T
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r)), upper=True)
    spread = inverse.square().sum(0)  # the diagonal of R^-T R^-1
    return torch.where(dead, 0.0, w.square() / (2 * spread))


def gradient_score(w: Tensor, seen: Seen) -> Tensor:
    assert seen.slope is not None
    return (w * seen.slope).abs()


def taylor_score(w: Tensor, seen: Seen) -> Tensor:
    assert seen.squares is not None
    return w.square() * seen.squares


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(lambda w, seen: w.abs()),
    "l2": Criterion(lambda w, seen: w.square()),
    "random": Criterion(random_score),
    "wanda": Criterion(lambda w, seen: w.abs() * seen.stats.norm, frozenset({NORM})),
    "second_order": Criterion(second_order, frozenset({HESSIAN})),
    "gradient": Criterion(gradient_score, gradients=True),
    "taylor": Criterion(taylor_score, gradients=True),
}
Name = Literal["l1", "l2", "random", "wanda", "second_order", "gradient", "taylor"]


def scored(w: Tensor, seen: Seen, criterion: str) -> Tensor:
    """The score of a matrix; by magnitude where no token came (an idle expert)."""
    idle = CRITERIA[criterion].needs and not seen.stats.count
    return CRITERIA["l2" if idle else criterion].score(w, seen)


# Masks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What goes as one, and among what it is ranked: a pattern (kept of every so many), or pieces of
    rows x columns ranked within a row or within the matrix.
    """

    pattern: str | None = None
    scope: Literal["row", "matrix"] = "matrix"
    piece: str = "1x1"

    def __post_init__(self) -> None:
        rows, columns = parse_piece(self.piece)
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if rows * columns > 1:
                raise BadRequest(f"the pattern {self.pattern} has no piece {self.piece}",
                                 do="give one of them")  # fmt: skip
        if rows > 1 and self.scope == "row":
            raise BadRequest(f"pieces of {rows} rows are not taken row by row", do="scope: matrix")

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """BadRequest where a matrix does not divide into pieces."""
        rows, of = parse_piece(self.piece)
        if self.pattern is not None:
            of = parse_pattern(self.pattern)[1]
        check_runs(of, shape[1], f"{name}: ")
        if shape[0] % rows:
            raise BadRequest(
                f"{name}: pieces of {rows} rows do not divide {shape[0]} rows",
                do=f"piece: 1x{of} goes row by row",
            )


def parse_piece(text: str) -> tuple[int, int]:
    """(rows, columns) from `1x8`."""
    match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text)
    rows, columns = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < rows <= 1024 >= columns > 0:
        raise BadRequest(
            f"the piece {text!r} is not rows x columns", do="1x8 is 8 weights of a row"
        )
    return rows, columns


def pieces(score: Tensor, piece: str) -> Tensor:
    """Scores [rows, in] summed over every piece."""
    down, across = parse_piece(piece)
    if down * across == 1:
        return score
    return score.unflatten(1, (-1, across)).unflatten(0, (-1, down)).sum((1, 3))


def keep_mask(score: Tensor, share: float, shape: Shape) -> Tensor:
    """bool [rows, in]: which weights stay when `share` go. Of equal scores the later one goes."""
    if shape.pattern is not None:
        kept, of = parse_pattern(shape.pattern)
        return highest(score.unflatten(1, (-1, of)), kept).flatten(1)
    down, across = parse_piece(shape.piece)
    score = pieces(score, shape.piece)
    if shape.scope == "row":
        mask = highest(score, score.shape[1] - round(share * score.shape[1]))
    else:
        count = score.numel() - round(share * score.numel())
        mask = highest(score.flatten(), count).view_as(score)
    if down * across == 1:
        return mask
    return mask.repeat_interleave(down, 0).repeat_interleave(across, 1)


def highest(score: Tensor, count: int) -> Tensor:
    """bool: the `count` highest along the last axis."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
