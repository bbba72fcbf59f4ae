"""Codebooks: weights take their values from a table of 2**bits entries, a weight or a vector at a time.

The table is clustered (kmeans.py) with the importance of each column. Then, unless `compensate` is off,
columns are coded one after the other, each making good the errors before it, as GPTQ does, on these
levels instead of a grid. With H = R R^T, R upper triangular, and d = w - c for what is coded, run v of
`vector` columns adds to the output error tr(D H D^T)

    | (w_v - c) R_vv + sum_{k<v} d_k R_kv |^2

so the best entry is the nearest one, in plain distance, among the entries times R_vv; for one column that
is GPTQ's rule. (GPTVQ weighs a run by the inverse Hessian's diagonal; this is the exact term.) The same R
says how much a column matters while others make good for it: the importance is R_jj^2, or the diagonal of
H where nothing makes good. With the codes fixed, the table that minimizes tr(D H D^T) is a linear least
squares problem (sharing.py); coding and fitting take turns `rounds` times and the best is kept.

`per: auto` gives every row its own table where that costs at most a tenth of the codes, and vectors one
per matrix. Weights that are zero in a pruned matrix keep an entry of their own, which stays zero (not in
vectors). `huffman_bytes` is what the codes would take in the best prefix code of the matrix, with its
lengths and the tables: exact, but nothing is stored so, because no kernel reads it while multiplying.

Memory: W, its copy by columns, errors: 12 bytes per weight, 3 for codes; H, its copy and R: 12 in^2;
kmeans.py's and sharing.py's pieces. Time: rows * in * 2**bits for vectors, 2 * rows * in^2 for a step of
the fit.

Kim et al., SqueezeLLM, arXiv 2306.07629; van Baalen et al., GPTVQ, arXiv 2402.15319; Han et al., Deep
Compression, arXiv 1510.00149 (Huffman's size, zeros apart).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import DTYPE_BYTES, Codebook
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels import storage
from onecard.kernels.reference import DTYPES
from onecard.passes import kmeans
from onecard.passes.base import BlockPass
from onecard.passes.gptq import PRUNED_SHARE, factor
from onecard.passes.sharing import least_squares, output_error

BLOCK, PANEL, TILE = 128, 512, 4096
STEPS = 12
"""Conjugate gradient steps of a fit; more change little, as the codes are taken anew."""


@dataclass(frozen=True)
class Cluster(BlockPass):
    """Settings: bits of a code, weights of an entry (1, 2, 4, 8), a table per row or per matrix, whether
    inputs weigh, whether columns make good for each other, how often the table is fitted anew."""

    bits: int = 4
    vector: int = 1
    per: Literal["auto", "row", "matrix"] = "auto"
    weigh: bool = True
    compensate: bool = True
    rounds: int = 1
    damp: float = 0.01

    key = "kmeans"
    title = "k-means codebook"
    paper = (
        "Kim et al., SqueezeLLM, arXiv 2306.07629; van Baalen et al., GPTVQ, arXiv 2402.15319; "
        "Han et al., Deep Compression, arXiv 1510.00149"
    )

    def __post_init__(self) -> None:
        Codebook(self.bits, self.vector, self.per == "row")
        if self.vector > 1 and self.per == "row":
            raise BadRequest("kmeans: a table of vectors per row is larger than the row",
                             do="per: matrix, or vector: 1")  # fmt: skip
        if self.compensate and not self.weigh:
            raise BadRequest("kmeans: columns can only make good for each other when inputs weigh",
                             do="weigh: true, or compensate: false")  # fmt: skip
        if not 0 <= self.rounds <= 20 or not 0 <= self.damp <= 1:
            raise BadRequest(f"kmeans: rounds {self.rounds} or damp {self.damp} is out of range",
                             do="0 to 20 rounds, a damp from 0 to 1")  # fmt: skip

    @property
    def keeps_zeros(self) -> bool:
        return self.vector == 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN}) if self.weigh else frozenset()

    def format_of(self, columns: int) -> Codebook:
        tables = 8 * 2 * 2**self.bits
        small = self.vector == 1 and 10 * tables <= columns * self.bits
        return Codebook(self.bits, self.vector, small if self.per == "auto" else self.per == "row")

    def check(self, spec: Spec) -> None:
        for layer in set(spec.layers):
            for name, shape in linear_shapes(spec, layer).items():
                try:
                    self.format_of(shape[1]).parts(shape)
                except BadRequest as error:
                    raise BadRequest(f"{name}: {error.what}", do=error.do) from error

    def site_bytes(self, rows: int, columns: int) -> int:
        pieces = 80 * kmeans.CHUNK * columns + (64 << 20)
        return 20 * rows * columns + 12 * columns * columns * self.weigh + pieces

    def site(self, site: Reached) -> Iterator[Row]:
        hessian = site.stats.hessian if self.weigh else None
        for name, linear in site.linears.items():
            where, w = f"{site.block}.{name}", linear.matrix()
            format = self.format_of(w.shape[1]).scaled(site.stored)
            _require_finite(w, where)
            try:
                made = solve(w, hessian, format, self)
            except FailedWork as error:
                raise FailedWork(f"{where}: {error.what}", error.seen, error.do) from error
            linear.replace(storage.hold_codebook(made.codes, made.table, format))
            yield Row(where, "format", format.name)
            yield Row(where, "huffman_bytes", huffman_bytes(made.codes, made.table, format), "B")
            d = linear.matrix() - w
            if hessian is None:
                lost, power = d.square().sum(), w.square().sum()
            else:
                lost, power = output_error(d, hessian).sum(), output_error(w, hessian).sum()
            what = "relative_weight_error" if hessian is None else "relative_output_error"
            yield Row(where, what, float(lost / power.clamp(min=1e-30)))
        if self.weigh and not site.stats.count:
            yield Row(f"{site.block}.{site.name}", "calibration_tokens", 0)


@dataclass(frozen=True)
class Shared:
    """Codes uint8 [rows, in / vector] and the table [1 or rows, 2**bits, vector] they point into."""

    codes: Tensor
    table: Tensor
    alone: bool

    def read(self, x: Tensor, own: slice) -> Tensor:
        """Rows `own` of the matrix that table x makes."""
        return look_up(x[own] if self.alone else x, self.codes[own])

    def add(self, d: Tensor, own: slice, into: Tensor) -> None:
        """The sums of d [rows, in] by entry."""
        codes, size = self.codes[own].long(), into.shape[2]
        if self.alone:
            codes = codes + torch.arange(own.start, own.stop)[:, None] * into.shape[1]
        into.view(-1, size).index_add_(0, codes.flatten(), d.reshape(-1, size))


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The matrix [rows, in] of a table [1 or rows, entries, vector] and codes [rows, in / vector]."""
    codes, (tables, _, size) = codes.long(), table.shape
    if tables == 1:
        return table[0][codes].flatten(1)
    return table.gather(1, codes[..., None].expand(-1, -1, size)).flatten(1)


def solve(w: Tensor, hessian: Tensor | None, format: Codebook, settings: Cluster) -> Shared:
    """Codes and table for w [rows, in] float32 under H [in, in], None: every weight counts the same."""
    columns, dtype = w.shape[1], DTYPES[format.scale]
    importance, r, order = torch.ones(columns), None, torch.arange(columns)
    if hessian is not None:
        order = by_importance(hessian.diagonal(), format.vector)
        level = hessian.diagonal().mean()
        importance = hessian.diagonal() + settings.damp * torch.where(level > 0, level, 1.0)
        hessian = hessian.clone()
        hessian.diagonal().copy_(importance)
    if hessian is not None and settings.compensate:
        r, _ = factor(hessian, 0.0, order)
        importance = torch.empty(columns).index_copy_(0, order, r.diagonal().square())
    zeros = None
    if format.vector == 1 and int((w == 0).sum()) > PRUNED_SHARE * w.numel():
        zeros = w == 0
    table = first_table(w, importance, format, zeros).to(dtype).float()
    found = code(w, r, order, table, importance, zeros)
    if hessian is None:
        return found
    best, least = found, _error(w, found, hessian)
    for _ in range(settings.rounds):
        free = None if zeros is None else found.table != 0
        fitted = least_squares(found, w, hessian, found.table, STEPS, free).to(dtype).float()
        for again in (False, True):
            if again:
                found = code(w, r, order, _risen(fitted), importance, zeros)
            else:
                found = Shared(found.codes, fitted, found.alone)
            error = _error(w, found, hessian)
            best, least = _better(best, least, found, error)
    return _in_order(best) if format.vector == 1 else best


def _error(w: Tensor, shared: Shared, hessian: Tensor) -> Tensor:
    """The output error of each row, or of the whole where all rows share a table."""
    parts = [
        output_error(shared.read(shared.table, slice(i, i + TILE)) - w[i : i + TILE], hessian)
        for i in range(0, w.shape[0], TILE)
    ]
    return torch.cat(parts) if shared.alone else torch.cat(parts).sum()[None]


def _better(best: Shared, least: Tensor, found: Shared, error: Tensor) -> tuple[Shared, Tensor]:
    """The better of two, row by row where rows have tables of their own."""
    wins = error < least
    codes = torch.where(wins[:, None], found.codes, best.codes)
    table = torch.where(wins[:, None, None], found.table, best.table)
    return Shared(codes, table, found.alone), torch.where(wins, error, least)


def _risen(table: Tensor) -> Tensor:
    """Levels in rising order; vectors as they are."""
    return table.sort(dim=1).values if table.shape[2] == 1 else table


def _in_order(shared: Shared) -> Shared:
    """The same matrix from a table in rising order."""
    order = shared.table[..., 0].argsort(dim=1, stable=True)
    place = order.argsort(dim=1).to(torch.uint8)
    codes = shared.codes.long()
    moved = place.gather(1, codes) if shared.alone else place[0][codes]
    return Shared(moved, shared.table.gather(1, order[..., None]), shared.alone)


def by_importance(diagonal: Tensor, vector: int) -> Tensor:
    """Columns by falling diag(H), runs of `vector` neighbours together."""
    runs = torch.argsort(diagonal.view(-1, vector).sum(1), descending=True, stable=True)
    return (runs[:, None] * vector + torch.arange(vector)).flatten()


def first_table(w: Tensor, importance: Tensor, format: Codebook, zeros: Tensor | None) -> Tensor:
    """The clustered table [1 or rows, 2**bits, vector], levels rising."""
    count = 2**format.bits
    if format.vector > 1:
        return kmeans.vectors(w, importance, format.vector, count)[None]
    weights = importance
    if zeros is not None:  # zeros weigh nothing, and have an entry of their own
        count, weights = count - 1, importance * ~zeros
    if format.per_row:
        wide = weights.expand(w.shape)
        table = torch.cat([
            kmeans.levels(kmeans.points_of(part, u), count)
            for part, u in zip(w.split(kmeans.CHUNK), wide.split(kmeans.CHUNK), strict=True)
        ])  # fmt: skip
    else:
        table = kmeans.levels(kmeans.points_of_matrix(w, weights), count)
    if zeros is not None:
        table = torch.cat((table, torch.zeros(len(table), 1)), 1).sort(dim=1).values
    return table[..., None]


def code(
    w: Tensor, r: Tensor | None, order: Tensor, table: Tensor, importance: Tensor,
    zeros: Tensor | None = None,
) -> Shared:  # fmt: skip
    """Codes for w [rows, in] in a table [1 or rows, entries, vector]; R in `order`, None: no making good.

    Levels have to rise. Weights under `zeros` get the entry that is zero.
    """
    alone, size = table.shape[0] > 1 or w.shape[0] == 1, table.shape[2]
    if r is None:
        found = nearest(w, table, importance)
    else:
        made = _code_columns(w.T.contiguous()[order], r, table, _zero_entry(table, zeros, w, order))
        runs = order.view(-1, size)[:, 0] // size
        found = torch.empty_like(made).index_copy_(0, runs, made).T.contiguous()
    if zeros is not None:
        found = torch.where(zeros, _zero_of(table), found)
    return Shared(found, table, alone)


def _zero_of(table: Tensor) -> Tensor:
    """The entry that is zero, uint8 [1 or rows, 1]."""
    return (table[..., 0] == 0).to(torch.uint8).argmax(1, keepdim=True).to(torch.uint8)


def _zero_entry(
    table: Tensor, zeros: Tensor | None, w: Tensor, order: Tensor
) -> tuple[Tensor, Tensor] | None:
    """bool [in, rows] in order, and the entry [rows] that its zeros get."""
    if zeros is None:
        return None
    return zeros.T.contiguous()[order], _zero_of(table)[:, 0].expand(w.shape[0])


def nearest(w: Tensor, table: Tensor, importance: Tensor) -> Tensor:
    """Codes uint8 [rows, in / vector] of the nearest entries; of vectors, by the weights of their columns."""
    size = table.shape[2]
    if size == 1:
        middles = _middles(table)
        parts = [
            torch.searchsorted(middles[i : i + len(part)], part)
            if len(middles) > 1 else torch.bucketize(part, middles[0])
            for i, part in _tiles(w)
        ]  # fmt: skip
        return torch.cat(parts).to(torch.uint8)
    u = importance.view(-1, size).repeat(w.shape[0], 1)
    found, _ = kmeans.nearest_vectors(w.reshape(-1, size), u, table[0])
    return found.view(w.shape[0], -1).to(torch.uint8)


def _tiles(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    for i in range(0, w.shape[0], kmeans.CHUNK):
        yield i, w[i : i + kmeans.CHUNK].contiguous()


def _middles(table: Tensor) -> Tensor:
    levels = table[..., 0]
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def _code_columns(
    target: Tensor, r: Tensor, table: Tensor, zero: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Codes uint8 [in / vector, rows] of target [in, rows], which is W by columns, under R [in, in]."""
    columns, rows = target.shape
    tables, _, size = table.shape
    middles = _middles(table) if size == 1 else None
    levels = table[..., 0].contiguous()
    errors = torch.zeros(columns, rows)
    codes = torch.empty(columns // size, rows, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        if start % PANEL == 0:
            from_panels = r[:start, start : start + PANEL].T @ errors[:start]
        first = start - start % PANEL
        carried = r[first:start, start:end].T @ errors[first:start]
        carried += from_panels[start - first : end - first]  # [block, rows]
        for v in range(start, end, size):
            own = slice(v, v + size)
            moved = carried[v - start : v - start + size]
            if v > start:
                moved = moved + r[start:v, own].T @ errors[start:v]
            if middles is None:
                aim = moved + r[own, own].T @ target[own]  # [size, rows]
                chosen = _nearest_entry(aim.T, table[0] @ r[own, own])
                value = table[0][chosen].T
            else:
                aim = target[v] + moved[0] / r[v, v]
                if tables == 1:
                    chosen = torch.bucketize(aim, middles[0])
                else:
                    chosen = torch.searchsorted(middles, aim[:, None])[:, 0]
                if zero is not None:
                    chosen = torch.where(zero[0][v], zero[1].long(), chosen)
                value = (
                    levels[0][chosen] if tables == 1 else levels.gather(1, chosen[:, None])[:, 0]
                )
            errors[own] = target[own] - value
            codes[v // size] = chosen.to(torch.uint8)
    return codes


def _nearest_entry(x: Tensor, entries: Tensor) -> Tensor:
    """The index of the entry [entries, size] nearest to each x [rows, size]."""
    half = entries.square().sum(1) / 2
    return torch.cat(
        [torch.addmm(half, part, entries.T, alpha=-1).argmin(1) for part in x.split(TILE)]
    )


# Huffman's size -----------------------------------------------------------------------------------


def huffman_lengths(counts: Sequence[int]) -> list[int]:
    """Code lengths of the best prefix code for symbols that occur so often; 0 for those that never do.

    One symbol alone needs no bits: its count says it all.
    """
    heap = [(count, i, [i]) for i, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    heapq.heapify(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        for i in a[2] + b[2]:
            lengths[i] += 1
        heapq.heappush(heap, (a[0] + b[0], min(a[1], b[1]), a[2] + b[2]))
    return lengths


def huffman_bytes(codes: Tensor, table: Tensor, format: Codebook) -> int:
    """Bytes of the codes in their best prefix code, a byte per length, and the tables."""
    counts = torch.bincount(codes.flatten(), minlength=2**format.bits).tolist()
    bits = sum(n * length for n, length in zip(counts, huffman_lengths(counts), strict=True))
    return -(-bits // 8) + 2**format.bits + table.numel() * DTYPE_BYTES[format.scale]


def _require_finite(w: Tensor, where: str) -> None:
    if not bool(torch.isfinite(w).all()):
        raise FailedWork(f"{where}: weights are NaN or infinite", do="check the checkpoint")
