"""Low rank: errors are tails of singular values, whitened is the best for outputs, remainders help."""

from __future__ import annotations

from dataclasses import replace
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
from onecard.core.format import Dense, Format, Integers, LowRank, Sparse, parse_format
from onecard.kernels import reference, storage
from onecard.passes import Factorize, LowRankPlus, find_recipe
from onecard.passes.base import Recipe
from onecard.passes.gptq import Rounding, solve
from onecard.passes.job import Settings, compress, file_bytes, prepare
from onecard.passes.lowrank import Root, decompose, energy_rank, hold_factors, metric_of, most_rank
from onecard.passes.remainder import alternate, kept
from onecard.passes.sharing import output_error
from onecard.passes.walked import apply

SHAPES = [(24, 40), (40, 24), (32, 32)]


def pair(w: Tensor, metric: Tensor | None, rank: int) -> Tensor:
    basis = decompose(w, Root(metric))
    return basis.left(rank) @ basis.right(rank)


def lost(w: Tensor, made: Tensor, h: Tensor) -> float:
    return float(output_error(made - w, h).sum())


def made_of(w: Tensor, h: Tensor, format: LowRank, settings: LowRankPlus) -> Tensor:
    root = Root(metric_of(h, settings.metric))
    return storage.to_dense(alternate(w, h, root, format, settings))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_tail(shape: tuple[int, int]) -> None:
    """Plain: of the squared singular values of W; whitened: of those of W L, H = L L^T."""
    w, h = problem(*shape, tokens=400)
    plain = torch.linalg.svdvals(w).square()
    lower = torch.linalg.cholesky(h)
    white = torch.linalg.svdvals(w @ lower).square()
    for rank in (1, 5, 20):
        off = pair(w, None, rank) - w
        assert float(off.square().sum()) == pytest.approx(float(plain[rank:].sum()), rel=2e-3)
        found = lost(w, pair(w, h, rank), h)
        assert found == pytest.approx(float(white[rank:].sum()), rel=5e-3)
        assert found <= lost(w, pair(w, None, rank), h)
        assert found <= lost(w, pair(w, metric_of(h, "activation"), rank), h)
    assert torch.allclose(pair(w, h, min(shape)), w, atol=2e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_is_the_decomposition_of_scaled_columns(shape: tuple[int, int]) -> None:
    """ASVD as the paper has it: W S = U T V^T, W' = U_r T_r V_r^T S^-1."""
    w, h = problem(*shape, tokens=400)
    s = h.diagonal().sqrt() ** 0.5
    u, t, v = torch.linalg.svd(w * s, full_matrices=False)
    wanted = (u[:, :6] * t[:6]) @ v[:6] / s
    torch.testing.assert_close(
        pair(w, metric_of(h, "activation", 0.5), 6), wanted, atol=2e-3, rtol=1e-2
    )


def test_inputs_that_never_come() -> None:
    """A singular H, idle inputs, and none at all: finite, and no worse than plain for the outputs."""
    for shape in SHAPES:
        w, _ = problem(*shape)
        x = torch.randn(7, shape[1])
        x[:, 3] = 0
        h = x.T @ x / 7
        for rank in (3, 12):
            made = pair(w, h, rank)
            assert torch.isfinite(made).all()
            assert lost(w, made, h) <= lost(w, pair(w, None, rank), h) * 1.001 + 1e-3
    nothing = metric_of(torch.zeros(40, 40), "whitened")
    assert nothing is None


def test_rank_by_energy_and_by_bytes() -> None:
    powers = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    assert [energy_rank(powers, e) for e in (0.1, 0.5, 0.51, 0.75, 0.9, 0.99)] == [1, 1, 2, 2, 4, 5]
    assert most_rank((64, 64), Dense("bf16"), 64 * 64) == 16
    for shape in ((64, 160), (160, 64)):
        for factors in (Dense("bf16"), Integers(8, None)):
            limit = 0.5 * Dense("bf16").bytes(shape)
            rank = most_rank(shape, factors, limit)
            assert LowRank(rank, factors).bytes(shape) <= limit
            assert LowRank(rank + 1, factors).bytes(shape) > limit
    assert most_rank((64, 64), Dense("bf16"), 10) == 0


def test_the_right_factor_follows_the_rounded_left() -> None:
    """Integer factors: taking B anew for the rounded A is closer than rounding both alone."""
    w, h = problem(48, 64)
    basis = decompose(w, Root(h))
    left, right = basis.left(12), basis.right(12)
    for bits in (3, 4):
        kind = Integers(bits, None, scale="fp32")
        made = storage.to_dense(hold_factors(w, left, right, LowRank(12, kind)))
        alone = storage.to_dense(storage.held_in(left, kind)) @ storage.to_dense(
            storage.held_in(right, kind)
        )
        assert lost(w, made, h) < lost(w, alone, h)
    eight = storage.to_dense(
        hold_factors(w, left, right, LowRank(12, Integers(8, None, scale="fp32")))
    )
    assert lost(w, eight, h) < 1.02 * lost(w, left @ right, h)


# Remainders ---------------------------------------------------------------------------------------


def structured(seed: int = 0, outliers: float = 10.0) -> tuple[Tensor, Tensor]:
    """A few strong directions, a few strong single weights, and noise; and a Hessian."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(128, 4, generator=generator) @ torch.randn(4, 128, generator=generator)
    chosen = torch.rand(128, 128, generator=generator) < 0.03
    w += outliers * chosen * torch.randn(128, 128, generator=generator)
    w += 0.3 * torch.randn(128, 128, generator=generator)
    return w, problem(2, 128, 600, seed)[1]


def test_sparse_plus_low_rank_is_below_each_alone() -> None:
    """At no more bytes than either; and turns find both."""
    w, h = structured()
    both = LowRank(8, Dense("bf16"), Sparse(Dense("bf16"), 0.9))
    room = both.bytes((128, 128))
    settings = LowRankPlus(8, rest="sparse", bits=None, factor_bits=None, share=0.9, rounds=8)
    found = lost(w, made_of(w, h, both, settings), h)
    rank = most_rank((128, 128), Dense("bf16"), room)
    directions = lost(w, pair(w, h, rank), h)
    share = next(s / 1000 for s in range(999)
                 if Sparse(Dense("bf16"), s / 1000).bytes((128, 128)) <= room)  # fmt: skip
    mask = kept(w.abs() * h.diagonal().sqrt(), Sparse(Dense("bf16"), share))
    weights = lost(w, w * mask, h)
    assert found < 0.6 * directions and found < 0.6 * weights
    once = made_of(w, h, both, replace(settings, rounds=1))
    assert found < lost(w, once, h)


@pytest.mark.parametrize("rest", ["rtn", "gptq"])
def test_quantized_plus_low_rank_is_below_each_alone(rest: str) -> None:
    """At no more bytes than finer groups, and than factors alone."""
    w, h = structured(1, outliers=0.0)
    both = LowRank(4, Integers(8, None), Integers(3, 128))
    settings = LowRankPlus(4, rest=rest, bits=3, rounds=4)  # type: ignore[arg-type]
    found = lost(w, made_of(w, h, both, settings), h)
    room = both.bytes((128, 128))
    finer = Integers(3, 32)
    assert finer.bytes((128, 128)) <= room
    if rest == "rtn":
        quantized = reference.to_dense(reference.round_to_nearest(w, finer))
    else:
        solution = solve(w, h, finer, Rounding())
        held = reference.hold(solution.codes, solution.scale, solution.zero, finer)
        quantized = reference.to_dense(held)
    rank = most_rank((128, 128), Integers(8, None), room)
    assert found < lost(w, quantized, h) and found < lost(w, pair(w, h, rank), h)
    once = LowRankPlus(4, rest=rest, bits=3, rounds=1)  # type: ignore[arg-type]
    assert found <= lost(w, made_of(w, h, both, once), h) * (1 + 1e-5)


def test_patterns_and_integers_in_the_remainder() -> None:
    w, h = structured(2)
    for name in ("lowrank8(bf16)+sparse2:4(bf16)", "lowrank8(int8-row)+sparse0.5(int4-g64)"):
        format = parse_format(name)
        assert isinstance(format, LowRank)
        settings = LowRankPlus(8, rest="sparse", rounds=2)
        made = alternate(w, h, Root(h), format, settings)
        assert made.format == format
        alone = storage.held_in(w * kept(w.abs() * h.diagonal().sqrt(), format.rest), format.rest)  # type: ignore[arg-type]
        assert lost(w, storage.to_dense(made), h) < lost(w, storage.to_dense(alone), h)


# The passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [
    Recipe("whitened", (Factorize(share=0.5),)),
    Recipe("plain", (Factorize("plain", rank=5, factor_bits=8),)),
    Recipe("energy", (Factorize("activation", energy=0.7),)),
    Recipe("lqer", (LowRankPlus(8, bits=3, group=32),)),
    Recipe("sparse", (LowRankPlus(8, rest="sparse", bits=4, share=0.6, rounds=1),)),
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
    wanted = "relative_weight_error" if recipe.name == "plain" else "relative_output_error"
    assert {"format", wanted} <= rows
    planned = report.value("output_bytes", "plan")
    written = file_bytes(Checkpoint(tmp_path / "streamed"))
    assert written == planned or (recipe.name == "energy" and written < int(planned))  # type: ignore[arg-type]


def test_what_does_not_pay_stays_dense(tiny: Path, tmp_path: Path) -> None:
    """Random matrices need nearly every direction: they are left as they are, and that is said."""
    recipe = Recipe("energy", (Factorize("plain", energy=0.99),))
    report = compress(prepare(tiny, tmp_path / "out", recipe, Settings()))
    made, before = load_model(tmp_path / "out"), load_model(tiny)
    for (name, a), (_, b) in zip(made.linears(), before.linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name
    assert report.value("rank") == 128


@pytest.mark.parametrize("make", [
    Factorize, lambda: Factorize(rank=4, share=0.5), lambda: Factorize(rank=0),
    lambda: Factorize(share=1.5), lambda: Factorize(energy=0.0), lambda: Factorize(rank=4, factor_bits=9),
    lambda: LowRankPlus(0), lambda: LowRankPlus(bits=None), lambda: LowRankPlus(rounds=0),
    lambda: LowRankPlus(metric="plain"), lambda: LowRankPlus(rest="sparse", share=1.0),
    lambda: LowRankPlus(share=-1.0), lambda: LowRankPlus(pattern="2:4"),
    lambda: Factorize(rank=3, strength=2.0),
])  # fmt: skip
def test_bad_settings(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadRequest):
        make()


@pytest.mark.parametrize("make", [lambda: Factorize(rank=100), lambda: LowRankPlus(rank=100)])
def test_a_rank_above_the_matrix(make, tiny: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadRequest, match=r"rank of 100 is above that of a matrix \[64, 128\]"):
        prepare(tiny, tmp_path / "out", Recipe("r", (make(),)), Settings())
    assert not (tmp_path / "out").exists()


def test_infinite_weights_are_named(tiny: Path) -> None:
    model = load_model(tiny)
    name, linear = next(model.linears())
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(FailedWork, match=name.rpartition(".")[2]):
        apply(model, Recipe("r", (Factorize("plain", rank=3),)), None)


def test_formats_are_those_of_the_model() -> None:
    """Factors of a float32 model are float32."""
    format = LowRankPlus(8, rest="sparse", bits=None, factor_bits=None).format_for((64, 64))
    wanted: Format = LowRank(8, Dense("fp32"), Sparse(Dense("fp32"), 0.5))
    assert format.stored_in("fp32") == wanted


def test_named_recipes() -> None:
    for name in ("svd-50", "svd-whitened-50", "lowrank-32-gptq-int4", "lowrank-32-sparse-50"):
        assert find_recipe(name).good_for
