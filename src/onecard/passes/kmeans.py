"""k-means: a few levels, or a few vectors, that stand for many weights, each with its importance.

    minimize sum_i u_i (x_i - c(i))^2      u_i the importance of the column that weight i stands in

Of single weights the clusters are runs of the sorted weights, and with running sums of u, u x and u x^2
the cost of a run is a difference of two entries. Up to SMALL levels the best cuts among the boundaries
of at most BINS runs are found exactly by dynamic programming (Wang and Song, Ckmeans.1d.dp, 2011); more
levels start where the cube root of the density puts them (Panter and Dite, 1951). Lloyd's iteration
then moves the cuts to the middles between levels, by one binary search per level.

Vectors start from k-means++ (Arthur and Vassilvitskii, 2007) on a sample, with a fixed seed. A cluster that
lost all its vectors takes the place of the vector that is furthest from its own.

Memory: 60 bytes per weight of CHUNK rows; a matrix that has one table is reduced to FINE equal bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL, BINS, FINE = 16, 128, 1 << 16
CHUNK = 128
SAMPLE, TILE = 1 << 16, 1 << 13
"""Vectors that are clustered, and how many of them are compared with all centres at once."""


@dataclass(frozen=True)
class Points:
    """Sorted points [rows, n] and running sums of u, u x, u x^2 [rows, n + 1], float64, of each row."""

    x: Tensor
    sums: tuple[Tensor, Tensor, Tensor]

    def between(self, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums over the points of each row from `begin` up to `end` (both [rows, ...])."""
        s0, s1, s2 = (s.gather(1, end) - s.gather(1, begin) for s in self.sums)
        return s0, s1, s2


def points_of(x: Tensor, weights: Tensor) -> Points:
    """Rows x [rows, n] with importances [rows, n]."""
    x, order = x.float().sort(dim=1)
    return _summed(x, weights.expand(x.shape).gather(1, order).double(), x.double())


def points_of_matrix(w: Tensor, weights: Tensor) -> Points:
    """All weights of w [rows, in] as one row, with importances [in] or [rows, in].

    More than FINE weights are represented by the means of FINE equal bins of their range.
    """
    weights = weights.expand(w.shape)
    if w.numel() <= FINE:
        return points_of(w.reshape(1, -1), weights.reshape(1, -1))
    low, high = (float(x) for x in w.aminmax())
    step = (high - low) / (FINE - 1) or 1.0
    mass, moment = torch.zeros(FINE, dtype=torch.float64), torch.zeros(FINE, dtype=torch.float64)
    for part, own in zip(w.split(CHUNK), weights.split(CHUNK), strict=True):
        place = ((part - low) / step).round_().long().clamp_(0, FINE - 1).flatten()
        u = own.flatten().double()
        mass += torch.bincount(place, u, FINE)
        moment += torch.bincount(place, u * part.flatten(), FINE)
    middle = low + step * torch.arange(FINE, dtype=torch.float64)
    x = torch.where(mass > 0, moment / mass.clamp(min=1e-300), middle)
    return _summed(x.float()[None], mass[None], x[None])


def _summed(x: Tensor, u: Tensor, exact: Tensor) -> Points:
    first, second = u * exact, u * exact.square()
    s0, s1, s2 = (
        torch.nn.functional.pad(values.cumsum(1), (1, 0)) for values in (u, first, second)
    )
    return Points(x, (s0, s1, s2))


def cost(sums: tuple[Tensor, ...]) -> Tensor:
    """sum u (x - mean)^2 of runs, from their sums of u, u x, u x^2."""
    s0, s1, s2 = sums
    return (s2 - s1.square() / torch.where(s0 > 0, s0, 1.0)).clamp(min=0)


def levels(points: Points, count: int, rounds: int = 40) -> Tensor:
    """`count` rising levels [rows, count], float32, for each row of points."""
    start = _best_cuts if count <= SMALL else _density_cuts
    return lloyd(points, _centres(points, start(points, count)), rounds)


def lloyd(points: Points, centres: Tensor, rounds: int) -> Tensor:
    """Centres [rows, count] moved to the means of the points nearest to them, again and again."""
    for _ in range(rounds):
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        cuts = torch.searchsorted(points.x.double(), middles.contiguous())
        moved = _centres(points, _bounded(cuts, points), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.float()


def _bounded(cuts: Tensor, points: Points) -> Tensor:
    """Inner cuts with 0 and n around them."""
    n = points.x.shape[1]
    return torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=n)


def _centres(points: Points, cuts: Tensor, before: Tensor | None = None) -> Tensor:
    """The mean of each run between neighbouring cuts; of an empty one what it was before, or where it
    lies."""
    s0, s1, _ = points.between(cuts[:, :-1], cuts[:, 1:])
    if before is None:
        before = points.x.double().gather(1, cuts[:, :-1].clamp(max=points.x.shape[1] - 1))
    return torch.where(s0 > 0, s1 / torch.where(s0 > 0, s0, 1.0), before).sort(dim=1).values


def _bins(points: Points, count: int) -> Tensor:
    """Boundaries [rows, count + 1] of runs: half of them hold equally many points, half are equally wide."""
    rows, n = points.x.shape
    if n <= count:
        return torch.arange(n + 1).expand(rows, -1)
    even = torch.linspace(0, n, count // 2 + 1).round().long().expand(rows, -1)
    share = torch.linspace(0, 1, count - count // 2 + 2)[1:-1]
    low, high = points.x[:, :1], points.x[:, -1:]
    wide = torch.searchsorted(points.x, (low + (high - low) * share).contiguous())
    return torch.cat((even, wide), 1).sort(dim=1).values


def _best_cuts(points: Points, count: int) -> Tensor:
    """Cuts [rows, count + 1] with the least cost among those at the boundaries of `_bins`."""
    single = points.x.shape[0] == 1
    return torch.cat([
        _best_of(Points(points.x[own], tuple(s[own] for s in points.sums)),  # type: ignore[arg-type]
                 count, 4 * BINS if single else BINS)
        for own in torch.arange(points.x.shape[0]).split(16)
    ])  # fmt: skip


def _best_of(points: Points, count: int, bins: int) -> Tensor:
    edges = _bins(points, bins)
    rows, size = edges.shape
    s0, s1, s2 = (s.gather(1, edges) for s in points.sums)
    between = tuple(s[:, :, None] - s[:, None, :] for s in (s0, s1, s2))
    runs = cost(between).float()  # [rows, j, i]: from edge i to edge j
    runs.masked_fill_(torch.arange(size)[:, None] < torch.arange(size), float("inf"))
    best, came = runs[:, :, 0], []
    for _ in range(count - 1):
        best, last = (best[:, None, :] + runs).min(2)  # [rows, size]: the best end at each edge
        came.append(last)
    at = torch.full((rows, 1), size - 1)
    found = [at]
    for last in reversed(came):
        at = last.gather(1, at)
        found.append(at)
    found.append(torch.zeros_like(at))
    return edges.gather(1, torch.cat(found[::-1], 1))


def _density_cuts(points: Points, count: int) -> Tensor:
    """Cuts so that every run has the same integral of the cube root of the density."""
    bins = 8 * count
    low, high = points.x[:, :1].double(), points.x[:, -1:].double()
    inner = low + (high - low) * torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    edges = _bounded(torch.searchsorted(points.x.double(), inner.contiguous()), points)
    mass, _, _ = points.between(edges[:, :-1], edges[:, 1:])
    grown = torch.nn.functional.pad(mass.pow(1 / 3).cumsum(1), (1, 0))
    wanted = grown[:, -1:] * torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1]
    return _bounded(edges.gather(1, torch.searchsorted(grown, wanted.contiguous())), points)


# Vectors ------------------------------------------------------------------------------------------


def vectors(w: Tensor, weights: Tensor, size: int, count: int, rounds: int = 20) -> Tensor:
    """`count` centres [count, size] of the runs of `size` neighbours in w [rows, in]; weights [in]."""
    runs = w.shape[1] // size
    step = max(1, -(-w.shape[0] * runs // SAMPLE))
    rows = (
        torch.arange(0, w.shape[0], step) if step <= w.shape[0] // 8 else torch.arange(w.shape[0])
    )
    x = w[rows].float().reshape(-1, size)
    u = weights.float().reshape(runs, size).repeat(len(rows), 1)
    u = u / u.mean().clamp(min=1e-30)
    generator = torch.Generator().manual_seed(0)
    if len(x) > SAMPLE:
        chosen = torch.randperm(len(x), generator=generator)[:SAMPLE]
        x, u = x[chosen], u[chosen]
    centres = _seeds(x, u, count, generator)
    for _ in range(rounds):
        code, off = nearest_vectors(x, u, centres)
        mass = torch.zeros(count, size).index_add_(0, code, u)
        moment = torch.zeros(count, size).index_add_(0, code, u * x)
        moved = torch.where(mass > 0, moment / mass.clamp(min=1e-30), centres)
        empty = torch.bincount(code, minlength=count) == 0
        if bool(empty.any()):
            worst = off.topk(min(int(empty.sum()), len(x))).indices
            moved[torch.nonzero(empty)[: len(worst), 0]] = x[worst]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def nearest_vectors(x: Tensor, u: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The centre nearest to each x [n, size] in sum u (x - c)^2, and this distance."""
    both = torch.cat((centres.square(), -2 * centres), 1).T.contiguous()  # [2 size, count]
    found = [
        (torch.cat((v, v * y), 1) @ both).min(1)
        for y, v in zip(x.split(TILE), u.split(TILE), strict=True)
    ]
    off = torch.cat([least.values for least in found]) + (u * x.square()).sum(1)
    return torch.cat([least.indices for least in found]), off.clamp(min=0)


def _seeds(x: Tensor, u: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is drawn in proportion to the distance from those before it."""
    few = torch.randperm(len(x), generator=generator)[: 16 * count]
    x, u = x[few], u[few]
    centres = x[:1].repeat(count, 1)
    off = (u * (x - centres[0]).square()).sum(1)
    for i in range(1, count):
        if not bool(off.any()):
            break
        pick = torch.multinomial(off, 1, generator=generator)
        centres[i] = x[pick[0]]
        off = torch.minimum(off, (u * (x - centres[i]).square()).sum(1))
    return centres
