"""Low rank: W [rows, in] as left [rows, rank] @ right [rank, in], the best pair in a metric of the inputs.

    minimize |(W - A B) M|_F        M M^T is the metric

    plain        I                  the singular value decomposition of W itself
    activation   diag(x^2a)         x the root mean square of each input, a = strength (ASVD)
    whitened     H                  the error of the outputs themselves (SVD-LLM)

With W M = U S V^T the best pair is A = U_r, B = S_r V_r^T M^-1, and its error the tail of S^2. Two forms,
whichever has the smaller side: A is the first eigenvectors of W M M^T W^T [rows, rows] and B = A^T W, which
needs no root and no inverse of M at all; or V those of M^T W^T W M [in, in], and B = S V^T M^-1 by a
triangular solve. A has orthonormal columns, so the sizes lie in the rows of B, where integers have their
scales. Once A is rounded as it is stored, B is taken anew: A^+ W, the best for this A in every metric.

The rank is given, or the largest whose bytes are at most `share` of the dense ones, or the smallest that
keeps `energy` of the sum of S^2; a matrix that would not get smaller that way stays as it is. Factors
are dense, or integers of `factor_bits` with a scale per row.

Memory: W, the small side squared three times in float64 (24 s^2), M; time: eigenvalues, about 10 s^3.

Yuan et al., ASVD, arXiv 2312.05821; Wang et al., SVD-LLM, arXiv 2403.07378.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Dense, Format, Integers, LowRank, Shape, Weight
from onecard.core.report import Row
from onecard.core.spec import LayerSpec, Spec, linear_shapes, sites
from onecard.kernels import convert, storage
from onecard.passes.base import BlockPass
from onecard.passes.sharing import output_error

DAMP = 1e-4
"""Added to the diagonal of H, as a share of its mean, where a root of it is needed."""

STORED = "bf16"
"""The dtype that shares and energies count dense numbers in."""

Metric = Literal["plain", "activation", "whitened"]


@dataclass(frozen=True)
class Factorize(BlockPass):
    """Settings: the metric, one of rank, share and energy, and the bits of the factors (null: dense)."""

    metric: Metric = "whitened"
    rank: int | None = None
    share: float | None = None
    energy: float | None = None
    factor_bits: int | None = None
    strength: float = 0.5

    key = "svd"
    title = "low-rank factors"
    paper = "Wang et al., SVD-LLM, arXiv 2403.07378; Yuan et al., ASVD, arXiv 2312.05821"

    def __post_init__(self) -> None:
        given = [x for x in (self.rank, self.share, self.energy) if x is not None]
        if len(given) != 1:
            raise BadRequest("svd needs one of rank, share and energy",
                             f"{len(given)} of them", "share: 0.5 halves every matrix")  # fmt: skip
        if self.rank is not None and self.rank < 1:
            raise BadRequest(f"svd.rank is {self.rank}", do="a rank is at least 1")
        for name in ("share", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise BadRequest(f"svd.{name} is {value}", do="a number between 0 and 1")
        if not 0 <= self.strength <= 1:
            raise BadRequest(f"svd.strength is {self.strength}", do="an exponent from 0 to 1")
        factor_format(self.factor_bits, "bf16")

    @property
    def keeps_zeros(self) -> bool:
        return False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.metric == "plain" else frozenset({HESSIAN})

    def format_of(self, columns: int) -> LowRank:
        return self.format_for((columns, columns))

    def format_for(self, shape: Shape) -> LowRank:
        factors = factor_format(self.factor_bits, STORED)
        if self.rank is not None:
            return LowRank(self.rank, factors)
        dense = Dense(STORED).bytes(shape)
        if self.share is not None:
            return LowRank(max(1, most_rank(shape, factors, self.share * dense)), factors)
        return LowRank(min(most_rank(shape, factors, dense) + 1, *shape), factors)

    def check(self, spec: Spec) -> None:
        check_shapes(self, spec)

    def site_bytes(self, rows: int, columns: int) -> int:
        return factor_bytes(rows, columns)

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian if self.needs else None
        metric = metric_of(hessian, self.metric, self.strength)
        root = Root(metric)
        for name, linear in site.linears.items():
            where, w = f"{site.block}.{name}", linear.matrix()
            require_finite(w, where)
            format = self.format_for(linear.shape).stored_in(site.stored)
            basis = decompose(w, root)
            rank = format.rank
            if self.energy is not None:
                rank = energy_rank(basis.powers, self.energy)
                if rank >= format.rank:
                    yield Row(where, "rank", min(linear.shape))
                    yield Row(where, "relative_output_error" if hessian is not None else
                              "relative_weight_error", 0.0)  # fmt: skip
                    continue
            format = replace(format, rank=rank)
            linear.replace(hold_factors(w, basis.left(rank), basis.right(rank), format))
            yield Row(where, "format", format.name)
            yield Row(where, "rank", rank)
            yield error_row(where, w, linear.matrix(), hessian)
        if self.needs and not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


def factor_format(bits: int | None, stored: str) -> Format:
    """The format of both factors."""
    return Dense(stored) if bits is None else Integers(bits, None, scale=stored)


def factor_bytes(rows: int, columns: int) -> int:
    """What `decompose` and `hold_factors` hold for a matrix [rows, columns]."""
    small = min(rows, columns)
    return 16 * rows * columns + 40 * small * small + 16 * columns * columns


def most_rank(shape: Shape, factors: Format, limit: float) -> int:
    """The largest rank whose factors take at most `limit` bytes, 0 where none does."""
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        if LowRank(middle, factors).bytes(shape) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def check_shapes(p: BlockPass, spec: Spec) -> None:
    """BadRequest naming the first linear that cannot have the pass's format."""
    for layer in set(spec.layers):
        for name, shape in walked_shapes(spec, layer):
            try:
                format = p.format_for(shape)
                assert format is not None
                format.parts(shape)
            except BadRequest as error:
                raise BadRequest(f"{name}: {error.what}", do=error.do) from error


def walked_shapes(spec: Spec, layer: LayerSpec) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the linears that a walk reaches."""
    shapes = linear_shapes(spec, layer)
    for site in sites(layer):
        for name in site.linears:
            yield name, shapes[name]


def error_row(where: str, w: Tensor, made: Tensor, hessian: Tensor | None) -> Row:
    """How far `made` is from w, of the outputs where they are known."""
    if hessian is None:
        lost = (made - w).square().sum() / w.square().sum().clamp(min=1e-30)
        return Row(where, "relative_weight_error", float(lost))
    lost, power = output_error(made - w, hessian).sum(), output_error(w, hessian).sum()
    return Row(where, "relative_output_error", float(lost / power.clamp(min=1e-30)))


def require_finite(w: Tensor, where: str) -> None:
    """FailedWork where a matrix holds what is no number."""
    if not bool(torch.isfinite(w).all()):
        raise FailedWork(f"{where}: weights are NaN or infinite", do="check the checkpoint")


# The mathematics ----------------------------------------------------------------------------------


def metric_of(hessian: Tensor | None, metric: Metric, strength: float = 0.5) -> Tensor | None:
    """The metric M M^T: None (I), its diagonal [in], or [in, in]. Without any input it is I."""
    if metric == "plain" or hessian is None or not bool(hessian.diagonal().any()):
        return None
    if metric == "whitened":
        return hessian
    x = hessian.diagonal().clamp(min=0).sqrt()
    return x.clamp(min=1e-6 * float(x.max())) ** (2 * strength)


class Root:
    """M of a metric, made once and only where a matrix needs it."""

    def __init__(self, metric: Tensor | None) -> None:
        self.metric = metric
        self._lower: Tensor | None = None

    def gram(self, w: Tensor) -> Tensor:
        """W M M^T W^T [rows, rows], float64."""
        if self.metric is None:
            return (w @ w.T).double()
        if self.metric.dim() == 1:
            return ((w * self.metric) @ w.T).double()
        return (w @ self.metric @ w.T).double()

    def lower(self) -> Tensor:
        """L lower triangular with L L^T = H, damped."""
        assert self.metric is not None
        if self._lower is None:
            level = float(self.metric.diagonal().mean())
            for damp in (DAMP, 100 * DAMP):
                h = self.metric.clone()
                h.diagonal().add_(damp * level)
                self._lower, failed = torch.linalg.cholesky_ex(h)
                if not int(failed):
                    return self._lower
            raise FailedWork("the Hessian of the inputs is not positive definite",
                             do="use more calibration text")  # fmt: skip
        return self._lower

    def times(self, w: Tensor) -> Tensor:
        """W M."""
        if self.metric is None:
            return w
        return w * self.metric.sqrt() if self.metric.dim() == 1 else w @ self.lower()

    def undone(self, b: Tensor) -> Tensor:
        """B M^-1."""
        if self.metric is None:
            return b
        if self.metric.dim() == 1:
            return b / self.metric.sqrt()
        return torch.linalg.solve_triangular(self.lower(), b, upper=False, left=False)


@dataclass(frozen=True)
class Basis:
    """W by its directions, the strongest first: powers S^2 [small], and either the left ones [rows, small]
    with W, or the right ones [small, in] with W M."""

    powers: Tensor
    directions: Tensor
    other: Tensor
    root: Root
    by_rows: bool

    def left(self, rank: int) -> Tensor:
        """A [rows, rank], orthonormal columns where the power is not zero."""
        if self.by_rows:
            return self.directions[:, :rank]
        size = self.powers[:rank].clamp(min=0).sqrt()
        return (self.other @ self.directions[:rank].T) / torch.where(size > 0, size, 1.0)

    def right(self, rank: int) -> Tensor:
        """B [rank, in]."""
        if self.by_rows:
            return self.directions[:, :rank].T @ self.other
        size = self.powers[:rank].clamp(min=0).sqrt()
        return self.root.undone(self.directions[:rank]) * size[:, None]


def decompose(w: Tensor, root: Root) -> Basis:
    """The directions of w [rows, in] float32 in a metric."""
    by_rows = w.shape[0] <= w.shape[1]
    if by_rows:
        other, gram = w, root.gram(w)
    else:
        other = root.times(w)
        gram = (other.T @ other).double()
    powers, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    powers = powers.flip(0).float().clamp(min=0)
    vectors = vectors.flip(1).float()
    directions = vectors.contiguous() if by_rows else vectors.T.contiguous()
    return Basis(powers, directions, other, root, by_rows)


def energy_rank(powers: Tensor, energy: float) -> int:
    """The smallest rank whose powers sum to at least `energy` of all."""
    kept = powers.double().cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(powers))


def hold_factors(w: Tensor, left: Tensor, right: Tensor, format: LowRank) -> Weight:
    """The pair as stored; the right one is taken anew for the left one as it is stored.

    A rounded left factor that has lost its rank keeps the right one it came with.
    """
    pieces = format.pieces((w.shape[0], w.shape[1]))
    held = storage.held_in(left, pieces["left_"][0])
    a = convert.to_dense(held)
    lower, failed = torch.linalg.cholesky_ex((a.T @ a).double())
    if not int(failed) and bool((lower.diagonal() > 1e-3).all()):
        right = torch.cholesky_solve((a.T @ w).double(), lower).float()
    return storage.hold_lowrank(held, storage.held_in(right, pieces["right_"][0]))
