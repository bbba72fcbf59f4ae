"""Codebooks and hashing: the best clusters there are, errors made good, tables fitted, Huffman's size."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from test_gptq import problem
from test_walk import SETTINGS, ids_of, same
from torch import Tensor

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.shards import Checkpoint
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Codebook, Integers
from onecard.kernels import expand, reference, storage
from onecard.passes import Cluster, Hash, Prune, find_recipe, kmeans
from onecard.passes.base import Recipe
from onecard.passes.codebook import (
    Shared,
    code,
    huffman_bytes,
    huffman_lengths,
    look_up,
    nearest,
    solve,
)
from onecard.passes.gptq import Rounding, factor
from onecard.passes.gptq import solve as gptq
from onecard.passes.hashing import Buckets
from onecard.passes.job import Settings, compress, file_bytes, prepare
from onecard.passes.sharing import least_squares, output_error
from onecard.passes.walked import apply


def error(w: Tensor, made: Tensor, h: Tensor) -> float:
    return float(output_error(made - w, h).sum() / output_error(w, h).sum())


def matrix(shared: Shared) -> Tensor:
    return look_up(shared.table, shared.codes)


# Clusters -----------------------------------------------------------------------------------------


def best_cost(x: list[float], u: list[float], count: int) -> float:
    """The least weighted cost over all ways of cutting sorted points into runs."""
    pairs = sorted(zip(x, u, strict=True))

    def run(part: list[tuple[float, float]]) -> float:
        mass = sum(u for _, u in part)
        mean = sum(x * u for x, u in part) / mass
        return sum(u * (x - mean) ** 2 for x, u in part)

    return min(
        sum(run(pairs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(pairs))))
        for cuts in itertools.combinations(range(1, len(pairs)), count - 1)
    )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_levels_are_the_best_there_are(count: int) -> None:
    """Few points: against every way of cutting them."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, u = torch.randn(3, 11, generator=generator), torch.rand(3, 11, generator=generator) + 0.1
        table = kmeans.levels(kmeans.points_of(x, u), count)
        assert (table.diff() >= 0).all()
        for row in range(3):
            off = (x[row][:, None] - table[row]).square().amin(1)
            wanted = best_cost(x[row].tolist(), u[row].tolist(), count)
            assert float((u[row] * off).sum()) == pytest.approx(wanted, rel=1e-4)


def test_many_levels_follow_the_density() -> None:
    """Lloyd's fixed point for normal weights: the known distortions of optimal quantizers."""
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for bits, wanted in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)):
        table = kmeans.levels(kmeans.points_of_matrix(x, torch.ones(200_000)), 2**bits, 200)
        off = x[0] - table[0][torch.bucketize(x[0], (table[0][1:] + table[0][:-1]) / 2)]
        assert float(off.square().mean()) == pytest.approx(wanted, rel=0.03)


def test_few_values_are_kept_exactly() -> None:
    """Fewer distinct weights than levels, constant rows, single columns: nothing is lost."""
    for w in (torch.tensor([[1.0, 2.0, 2.0, -3.0]]), torch.full((2, 8), 0.5), torch.zeros(3, 4)):
        for per_row in (True, False):
            made = solve(w, None, Codebook(2, 1, per_row, "fp32"), DATALESS)
            assert torch.equal(matrix(made), w)


DATALESS = Cluster(bits=2, weigh=False, compensate=False)


def test_vectors_find_their_centres() -> None:
    """Vectors drawn around 16 centres: found again, whatever the seeds; importance moves the choice."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 4, generator=generator) * 5
    pick = torch.randint(16, (64, 32), generator=generator)
    w = (centres[pick] + 0.01 * torch.randn(64, 32, 4, generator=generator)).flatten(1)
    found = kmeans.vectors(w, torch.ones(128), 4, 16)
    assert torch.cdist(centres, found).amin(1).max() < 0.02
    made = solve(
        w, None, Codebook(4, 4, scale="fp32"), Cluster(4, 4, weigh=False, compensate=False)
    )
    assert float((matrix(made) - w).abs().max()) < 0.06


# Coding -------------------------------------------------------------------------------------------


def test_levels_of_a_grid_are_gptq() -> None:
    """With the integers' grid as its levels, the column loop is GPTQ's."""
    w, h = problem(columns=96)
    format = Integers(3, None, False, "fp32")
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    r, _ = factor(h, 0.01, order)
    theirs = gptq(w, h, format, Rounding(search=0))
    table = (torch.arange(-4.0, 4.0) * theirs.scale)[..., None]
    mine = code(w, r, order, table, h.diagonal())
    assert (mine.codes.int() - 4 == theirs.codes).float().mean() > 0.995


@pytest.mark.parametrize("vector, per_row", [(1, True), (1, False), (2, False), (4, False)])
def test_each_choice_is_the_best_for_what_came_before(vector: int, per_row: bool) -> None:
    """Against trying every entry at every place in the exact error, in float64."""
    w, h = problem(rows=5, columns=24)
    table = torch.randn(5 if per_row else 1, 8, vector).sort(dim=1).values
    order = torch.arange(24)
    r, _ = factor(h, 0.01, order)
    mine = code(w, r, order, table, torch.ones(24))
    for row in range(5):
        d, entries = torch.zeros(0, dtype=torch.float64), table[row * per_row].double()
        for v in range(24 // vector):
            own = slice(v * vector, (v + 1) * vector)
            tried = torch.stack([torch.cat((d, w[row, own].double() - c)) for c in entries])
            part = (tried @ r[: own.stop, own].double()).square().sum(1)
            chosen = int(mine.codes[row, v])
            assert part[chosen] <= part.min() * (1 + 1e-4) + 1e-9
            d = tried[chosen]


@pytest.mark.parametrize("format", ["codebook2-row", "codebook3", "codebook8x2", "codebook4x4"])
def test_every_step_lowers_the_error(format: str) -> None:
    """Rounding to a grid > clusters > clusters that make good for each other > tables fitted anew."""
    from onecard.core.format import parse_format

    kind = parse_format(format).scaled("fp32")
    assert isinstance(kind, Codebook)
    for seed in range(2):
        w, h = problem(rows=48, columns=128, tokens=600, seed=seed)
        per = "row" if kind.per_row else "matrix"
        found = []
        for weigh, compensate, rounds in ((False, False, 0), (True, True, 0), (True, True, 3)):
            settings = Cluster(kind.bits, kind.vector, per, weigh, compensate, rounds)
            made = solve(w, h if weigh else None, kind, settings)
            found.append(error(w, matrix(made), h))
        assert found[0] > found[1] * 1.1 and found[1] > found[2]
        if kind.vector == 1:
            grid = reference.round_to_nearest(w, Integers(kind.bits, 128, False, "fp32"))
            assert error(w, reference.to_dense(grid), h) > found[0]


def test_importance_weighs() -> None:
    """Columns with large inputs come closer when they weigh, and the weighted error is lower."""
    w, _ = problem(rows=32, columns=64)
    h = torch.diag(torch.where(torch.arange(64) % 8 == 0, 100.0, 1.0))
    kind = Codebook(2, 1, True, "fp32")
    plain = solve(w, None, kind, DATALESS)
    weighed = solve(w, h, kind, Cluster(2, per="row", compensate=False, rounds=0))
    assert error(w, matrix(weighed), h) < 0.5 * error(w, matrix(plain), h)
    for vector in (2, 4):
        kind = Codebook(6, vector, scale="fp32")
        plain = solve(w, None, kind, Cluster(6, vector, weigh=False, compensate=False))
        weighed = solve(w, h, kind, Cluster(6, vector, compensate=False, rounds=0))
        assert error(w, matrix(weighed), h) < 0.6 * error(w, matrix(plain), h)


@pytest.mark.parametrize("per", ["row", "matrix"])
def test_zeros_of_a_pruned_matrix_stay(per: str) -> None:
    w, h = problem(rows=16, columns=128)
    w = w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    for settings in (Cluster(3, per=per), Cluster(3, per=per, weigh=False, compensate=False)):
        kind = Codebook(3, 1, per == "row")
        made = matrix(solve(w, h if settings.weigh else None, kind, settings))
        assert not made[w == 0].any() and (made == 0).float().mean() < 0.65


def test_columns_without_inputs_are_rounded() -> None:
    """Idle columns, and an expert that saw no token: still near their weights."""
    w, h = problem(rows=8, columns=64)
    h[5], h[:, 5] = 0, 0
    for hessian in (h, torch.zeros(64, 64)):
        made = matrix(solve(w, hessian, Codebook(4, 1, True, "fp32"), Cluster(4, per="row")))
        assert torch.isfinite(made).all() and (made - w)[:, 5].abs().max() < 0.6


# Fits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_fits_are_the_normal_equations(alone: bool) -> None:
    """Tables against a dense least squares solution; numbers held fixed stay."""
    w, h = problem(rows=4, columns=32)
    codes = torch.randint(0, 4, (4, 16), generator=torch.Generator().manual_seed(0))
    shared = Shared(codes.to(torch.uint8), torch.zeros(4 if alone else 1, 4, 2), alone)
    found = least_squares(shared, w, h, shared.table, 60)
    root = torch.linalg.cholesky(h.double())
    for own in [slice(i, i + 1) for i in range(4)] if alone else [slice(0, 4)]:
        columns = []
        for entry, part in itertools.product(range(4), range(2)):
            x = torch.zeros_like(shared.table)
            x[:, entry, part] = 1
            columns.append((shared.read(x, slice(0, 4))[own].double() @ root).flatten())
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), (w[own].double() @ root).flatten())
        got = found[own if alone else slice(None)].flatten().double()
        torch.testing.assert_close(got, wanted.solution, rtol=1e-3, atol=1e-3)
    free = torch.ones_like(shared.table)
    free[:, 1] = 0
    assert not least_squares(shared, w, h, shared.table, 5, free)[:, 1].any()


def test_a_fit_never_raises_the_error() -> None:
    w, h = problem(rows=16, columns=64)
    made = solve(w, h, Codebook(2, 1, True, "fp32"), Cluster(2, per="row", rounds=0))
    before = output_error(matrix(made) - w, h)
    for steps in (1, 3, 10):
        table = least_squares(made, w, h, made.table, steps)
        after = output_error(look_up(table, made.codes) - w, h)
        assert (after <= before * (1 + 1e-5)).all()
        before = after


# Huffman ------------------------------------------------------------------------------------------


def test_huffman() -> None:
    """The textbook's code; within a bit of the entropy; no shorter code exists for small alphabets."""
    assert huffman_lengths([45, 13, 12, 16, 9, 5]) == [1, 3, 3, 3, 4, 4]
    assert huffman_lengths([0, 7, 0]) == [0, 0, 0] and huffman_lengths([1, 1]) == [1, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        counts = torch.randint(1, 60, (5,), generator=generator).tolist()
        lengths = huffman_lengths(counts)
        assert sum(2.0**-n for n in lengths) == 1
        least = min(
            sum(c * n for c, n in zip(counts, tried, strict=True))
            for tried in itertools.product(range(1, 5), repeat=5)
            if sum(2.0**-n for n in tried) <= 1
        )
        assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == least
    w = torch.randn(64, 512, generator=generator) * (torch.rand(64, 512, generator=generator) > 0.9)
    kind = Codebook(4)
    made = solve(w, None, kind, Cluster(4, weigh=False, compensate=False, per="matrix"))
    assert huffman_bytes(made.codes, made.table, kind) < 0.6 * kind.bytes((64, 512))


# Hashing ------------------------------------------------------------------------------------------


def test_hashing_is_unbiased() -> None:
    """Over many places of one small matrix, each with its own hash, products average to the true ones."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 32, generator=generator), torch.randn(32, generator=generator)
    tiles = 400
    bucket, sign = expand.hashed((8 * tiles, 32), 64)
    total = []
    for i in range(tiles):
        b, s = (torch.from_numpy(part[8 * i : 8 * i + 8]) for part in (bucket, sign))
        shared = torch.zeros(64).index_add_(0, b.flatten(), (w * s).flatten())
        total.append((shared[b] * s) @ x)
    seen = torch.stack(total)
    wrong = (seen.mean(0) - w @ x) / (seen.std(0) / tiles**0.5)
    assert wrong.abs().max() < 4 and wrong.square().mean() < 2.5


def test_hashing_fits_the_outputs() -> None:
    w, h = problem(rows=32, columns=64)
    means = storage.round_to_hashed(w, Hash(4).format_of(64).scaled("fp32"))
    start = means.parts["weight_shared"]
    buckets = Buckets((32, 64), len(start))
    fitted = least_squares(buckets, w, h, start, 50)
    whole = slice(0, 32)
    assert torch.equal(buckets.read(start, whole), storage.to_dense(means))
    assert error(w, buckets.read(fitted, whole), h) < error(w, buckets.read(start, whole), h)


# The passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [
    Recipe("row", (Cluster(3, per="row", rounds=1),)),
    Recipe("pruned", (Prune(share=0.5), Cluster(4))),
    Recipe("vectors", (Cluster(6, 4, rounds=1),)),
    Recipe("hashed", (Hash(4),)),
    Recipe("dataless", (Cluster(4, weigh=False, compensate=False),)),
], ids=lambda r: r.name)  # fmt: skip
def test_streamed_equals_in_memory(
    tiny: Path, text_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    report = compress(
        prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16"))
    )
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    rows = {row.what for row in report.rows if row.where.startswith("blocks.")}
    assert "format" in rows and ("huffman_bytes" in rows or recipe.name == "hashed")
    assert report.value("output_bytes", "plan") == file_bytes(Checkpoint(tmp_path / "streamed"))


def test_tables_where_they_pay() -> None:
    assert Cluster(3).format_of(2048).per_row and not Cluster(3).format_of(128).per_row
    assert not Cluster(8, 4).format_of(4096).per_row and Cluster(4, per="row").format_of(64).per_row


@pytest.mark.parametrize("make", [
    lambda: Cluster(0), lambda: Cluster(9), lambda: Cluster(4, 3), lambda: Cluster(4, 2, "row"),
    lambda: Cluster(4, weigh=False), lambda: Cluster(4, rounds=-1), lambda: Cluster(damp=2.0),
    lambda: Hash(1), lambda: Hash(5000), lambda: Hash(steps=0),
])  # fmt: skip
def test_bad_settings(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadRequest):
        make()


def test_vectors_that_do_not_divide(tmp_path: Path) -> None:
    from conftest import make_llama

    folder = make_llama(tmp_path / "m", intermediate_size=252)
    with pytest.raises(BadRequest, match="vectors of 8 do not divide"):
        prepare(folder, tmp_path / "out", Recipe("pq", (Cluster(8, 8),)), Settings())
    assert not (tmp_path / "out").exists()


def test_infinite_weights_are_named(tiny: Path) -> None:
    model = load_model(tiny)
    name, linear = next(model.linears())
    linear.weight.data[0, 0] = float("inf")
    for p in (DATALESS, Hash(4, weigh=False)):
        with pytest.raises(FailedWork, match=name.rpartition(".")[2]):
            apply(model, Recipe("r", (p,)), None)


def test_nearest_is_nearest() -> None:
    w, table = torch.randn(6, 40), torch.randn(6, 8, 1).sort(dim=1).values
    codes = nearest(w, table, torch.ones(40))
    assert torch.equal(codes.long(), (w[..., None] - table[:, None, :, 0]).abs().argmin(-1))


def test_named_recipes() -> None:
    for name in ("kmeans-4", "kmeans-3", "kmeans-2", "pq-8x2", "pq-8x4", "hashed-8"):
        assert find_recipe(name).good_for
