"""Criteria, pieces and budgets of pruning; SparseGPT; identities of the papers and orderings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from safetensors.torch import load_file
from torch import Tensor

from onecard.calibrate.data import Calibration
from onecard.calibrate.stats import HESSIAN, NORM, Statistics
from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.report import Report
from onecard.nn.model import Model
from onecard.passes import (
    GPTQ,
    AutoRound,
    CutUnits,
    DropLayers,
    Fuse,
    Mixed,
    Prune,
    Rotate,
    SparseGPT,
    read_recipe,
    recipe_of,
)
from onecard.passes.base import Pass, Recipe
from onecard.passes.budget import (
    allocate,
    convex,
    global_shares,
    histogram,
    mean_gradients,
    sensitive_shares,
)
from onecard.passes.criteria import CRITERIA, Seen, Shape, keep_mask, second_order
from onecard.passes.job import Settings, compress, file_bytes, prepare
from onecard.passes.sparsegpt import solve
from onecard.passes.walked import apply

IDS = torch.arange(256).view(8, 32)


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spread(columns: int, tokens: int = 400) -> Tensor:
    """Inputs [tokens, columns] that depend on one another, of different strength."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix


def seen(x: Tensor) -> Seen:
    stats = Statistics(x.shape[1], {HESSIAN, NORM})
    stats.add(x)
    return Seen("here", stats)


def zeros(model: Model) -> dict[str, float]:
    return {name: float((linear.matrix() == 0).float().mean()) for name, linear in model.linears()}


def run(folder: Path, *passes: object, dtype: str = "fp32") -> Model:
    model = load_model(folder, dtype)
    apply(model, Recipe("r", passes), IDS)  # type: ignore[arg-type]
    return model


# Criteria -----------------------------------------------------------------------------------------


def test_wanda_with_unit_norms_is_magnitude_per_row() -> None:
    w, shape = weight(12, 32), Shape(scope="row")
    eye = seen(torch.eye(32))
    wanda = keep_mask(CRITERIA["wanda"].score(w, eye), 0.4, shape)
    assert torch.equal(wanda, keep_mask(w.abs(), 0.4, shape))


def test_second_order_is_what_removing_one_weight_costs() -> None:
    """The least error of the output when one weight is zero and the others are free."""
    w, x = weight(1, 8), spread(8)
    one = seen(x)
    h = one.stats.hessian
    h = h + 0.01 * h.diagonal().mean() * torch.eye(8)  # the damping that the score has
    score = second_order(w, one)
    for j in range(8):
        rest = [k for k in range(8) if k != j]
        moved = torch.linalg.solve(h[rest][:, rest], h[rest, j] * w[0, j])
        d = torch.zeros(8)
        d[j], d[rest] = w[0, j], -moved
        assert float(score[0, j]) == pytest.approx(float(d @ h @ d) / 2, rel=1e-4)


def test_idle_inputs_are_scored_by_magnitude(tmp_path: Path) -> None:
    from onecard.passes.criteria import scored

    w, idle = weight(4, 8), Seen("here", Statistics(8, {NORM}))
    assert torch.equal(scored(w, idle, "wanda"), w.square())


def test_random_is_the_seeds_and_other_in_every_matrix() -> None:
    w, stats = weight(4, 8), Statistics(8, set())
    score = CRITERIA["random"].score
    assert torch.equal(score(w, Seen("a", stats, 1)), score(w, Seen("a", stats, 1)))
    assert not torch.equal(score(w, Seen("a", stats, 1)), score(w, Seen("b", stats, 1)))
    assert not torch.equal(score(w, Seen("a", stats, 1)), score(w, Seen("a", stats, 2)))


def test_gradients_are_those_of_the_loss(tiny: Path) -> None:
    """The mean gradient of a weight is what moving it does to the mean loss."""
    model = load_model(tiny, "fp32")
    found = mean_gradients(model, IDS, lambda *said: None)
    linear = model.network.blocks[1].linear("feed_forward.up")  # type: ignore[operator]
    assert linear.weight is not None
    assert not linear.weight.requires_grad
    assert linear.weight.grad is None
    at = int(found["blocks.1.feed_forward.up"][0].abs().argmax())

    def loss(step: float) -> float:
        linear.weight.data.view(-1)[at] += step
        with torch.no_grad():
            logits = model.network(IDS)[:, :-1].flatten(0, 1).double()
        linear.weight.data.view(-1)[at] -= step
        return float(torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten()))

    slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert slope == pytest.approx(
        float(found["blocks.1.feed_forward.up"][0].view(-1)[at]), rel=0.02
    )


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("budget", ["uniform", "global", "sensitivity"])
def test_every_criterion_under_every_budget(tiny: Path, criterion: str, budget: str) -> None:
    model = run(tiny, Prune(criterion, 0.4, budget=budget))  # type: ignore[arg-type]
    whole, found = load_model(tiny, "fp32"), zeros(model)
    total = sum(linear.shape[0] * linear.shape[1] for _, linear in model.linears())
    gone = sum(found[n] * m.shape[0] * m.shape[1] for n, m in model.linears())
    assert gone / total == pytest.approx(0.4, abs=2e-3)
    apart = max(found.values()) - min(found.values())
    assert apart < 1e-3 if budget == "uniform" else apart > 1e-3
    for (_, linear), (_, old) in zip(model.linears(), whole.linears(), strict=True):
        kept = linear.matrix() != 0
        assert torch.equal(linear.matrix()[kept], old.matrix()[kept])


# Pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece, scope", [("1x8", "row"), ("1x8", "matrix"), ("4x4", "matrix")])
def test_pieces_go_as_one(tiny: Path, piece: str, scope: str) -> None:
    model = run(tiny, Prune("l2", 0.5, piece=piece, scope=scope))  # type: ignore[arg-type]
    down, across = map(int, piece.split("x"))
    for _, linear in model.linears():
        zero = linear.matrix().unflatten(1, (-1, across)).unflatten(0, (-1, down)) == 0
        whole = zero.all(3).all(1)
        assert torch.equal(whole, zero.any(3).any(1))
        assert float(whole.float().mean()) == pytest.approx(0.5, abs=0.02)
        if scope == "row":
            assert (whole.sum(1) == whole.shape[1] // 2).all()


# Budgets ------------------------------------------------------------------------------------------


def test_global_is_one_threshold() -> None:
    """Shares from histograms are those of sorting everything, to the width of a bin."""
    scores = {
        "a": weight(40, 50).abs(),
        "b": 3 * weight(30, 20, 1).abs(),
        "c": weight(9, 9, 2) ** 2,
    }
    shares = global_shares({name: histogram(score) for name, score in scores.items()}, 0.3)
    everything = torch.cat([score.flatten() for score in scores.values()])
    edge = everything.sort().values[round(0.3 * len(everything))]
    for name, score in scores.items():
        assert shares[name] == pytest.approx(float((score < edge).float().mean()), abs=0.01)
    gone = sum(shares[name] * score.numel() for name, score in scores.items())
    assert gone == pytest.approx(0.3 * len(everything), abs=1)


def test_global_with_equal_scores() -> None:
    same = {"a": histogram(torch.ones(10, 10)), "b": histogram(torch.ones(5, 10))}
    assert global_shares(same, 0.4) == pytest.approx({"a": 0.4, "b": 0.4})


def test_cheap_blocks_lose_more() -> None:
    curves = [[(0.25, 1.0), (0.5, 4.0), (0.75, 9.0)], [(0.25, 0.1), (0.5, 0.4), (0.75, 0.9)]]
    given = allocate(curves, [100, 100], 0.5)
    assert sum(given) / 2 == pytest.approx(0.5)
    assert given[1] > given[0] >= 0.25 - 1e-9
    assert allocate(curves, [100, 100], 0.0) == [0.0, 0.0]
    one = allocate([[(0.5, 1.0)], [(0.5, 1.0)]], [300, 100], 0.25)
    assert (3 * one[0] + one[1]) / 4 == pytest.approx(0.25)
    assert convex([(0.5, 1.0), (1.0, 1.2)]) == [(0.5, 2.0), (1.0, 2.0)], "slopes never fall"


def test_sensitive_blocks_keep_more(tiny: Path) -> None:
    """A block that does nothing (its outputs are zero) gives all it may."""
    model = load_model(tiny, "fp32")
    for name in ("attention.o", "feed_forward.down"):
        model.network.blocks[1].linear(name).weight.data.mul_(1e-4)  # type: ignore[operator]
    settings = Prune("l1", 0.4, budget="sensitivity").survey(model.spec).settings  # type: ignore[attr-defined]
    stats = Statistics(1, set())
    looked = {where: Seen(where, stats) for where, _ in model.linears()}
    shares = sensitive_shares(model, IDS, settings, looked, lambda *said: None)
    assert shares["blocks.1.attention.q"] == pytest.approx(0.6)
    others = [shares["blocks.0.attention.q"], shares["blocks.2.attention.q"]]
    assert sum(others) == pytest.approx(0.6)


# SparseGPT ----------------------------------------------------------------------------------------


def test_identity_hessian_is_magnitude_per_block() -> None:
    w = weight(20, 96)
    q = solve(w, torch.eye(96), 0.5, block=32)
    for start in range(0, 96, 32):
        own = w[:, start : start + 32]
        kept = keep_mask(own.abs(), 0.5, Shape())
        assert torch.equal(q[:, start : start + 32] != 0, kept)
        assert torch.allclose(q[:, start : start + 32], own * kept, atol=1e-6)
    q = solve(w, torch.eye(96), 0.5, "2:4")
    assert torch.allclose(q, w * keep_mask(w.abs(), 0.5, Shape("2:4")), atol=1e-6)


def test_sparsegpt_is_the_papers_loop() -> None:
    """Column by column with the inverse Hessian, as the paper writes it, in float64."""
    w, x, block, damp = weight(6, 24), spread(24), 8, 0.01
    h = seen(x).stats.hessian
    wide = h.double() + damp * h.diagonal().mean() * torch.eye(24)
    u = torch.linalg.cholesky(torch.linalg.inv(wide), upper=True)
    left = w.double().clone()
    for start in range(0, 24, block):
        own = slice(start, start + block)
        score = (left[:, own] / u.diagonal()[own]).square()
        gone = ~keep_mask(score, 0.5, Shape())
        for j in range(start, start + block):
            q = left[:, j].masked_fill(gone[:, j - start], 0)
            error = (left[:, j] - q) / u[j, j]
            left[:, j:] -= error[:, None] * u[j, j:]
            left[:, j] = q
    mine = solve(w, h, 0.5, block=block, damp=damp)
    assert torch.allclose(mine.double(), left, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_sparsegpt_has_the_least_error(pattern: str | None) -> None:
    w, x = weight(32, 64), spread(64)
    looked, shape = seen(x), Shape(pattern, "row")
    h = looked.stats.hessian

    def error(q: Tensor) -> float:
        return float(torch.linalg.vecdot((w - q) @ h, w - q).sum())

    wanda = w * keep_mask(CRITERIA["wanda"].score(w, looked), 0.5, shape)
    plain = w * keep_mask(w.abs(), 0.5, shape)
    best = solve(w, h, 0.5, pattern, block=16)
    assert error(best) < error(wanda) < error(plain)
    assert float((best == 0).float().mean()) == pytest.approx(0.5, abs=1e-6)
    if pattern:
        of = int(pattern.split(":")[1])
        assert ((best != 0).unflatten(1, (-1, of)).sum(-1) == of // 2).all()


def test_a_share_of_nothing_changes_nothing() -> None:
    w = weight(8, 16)
    assert torch.equal(solve(w, seen(spread(16)).stats.hessian, 0.0), w)


def test_survivors_are_rounded_by_gptq(tiny: Path) -> None:
    model = run(tiny, SparseGPT(pattern="2:4"), GPTQ(4, 64), dtype="bf16")
    for _, linear in model.linears():
        w = linear.matrix()
        assert ((w != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


# Orderings ----------------------------------------------------------------------------------------


def perplexity(model: Model, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model.network(ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_ordering_on_a_trained_model(stories: Path, data: Path, pattern: str | None) -> None:
    """Dense < SparseGPT < Wanda < magnitude, and random is worst, on text that was not seen."""
    text = next((data / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    model = load_model(stories, "fp32")
    ids = torch.tensor(model.tokenizer.encode(text[:60000])[: 48 * 256]).view(48, 256)
    found = [perplexity(model, ids[32:])]
    for p in (SparseGPT(0.5, pattern), Prune("wanda", 0.5, pattern, "row"),
              Prune("l1", 0.5, pattern), Prune("random", 0.5, pattern)):  # fmt: skip
        model = load_model(stories, "fp32")
        apply(model, Recipe("r", (p,)), ids[:32])
        found.append(perplexity(model, ids[32:]))
    print(pattern, [round(value, 3) for value in found])
    assert found == sorted(found)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("item, said", [
    ({"prune": {"share": 1.0}}, "share"), ({"prune": {"share": -0.1}}, "share"),
    ({"sparsegpt": {"share": 1.0}}, "share"), ({"prune": {"pattern": "4:2"}}, "kept:of"),
    ({"sparsegpt": {"pattern": "4:4"}}, "kept:of"), ({"prune": {"piece": "0x4"}}, "piece"),
    ({"prune": {"pattern": "²:4"}}, "kept:of"), ({"prune": {"piece": "²x4"}}, "piece"),
    ({"prune": {"pattern": "2:4", "budget": "global"}}, "budget"),
    ({"prune": {"pattern": "2:4", "piece": "1x4"}}, "piece"),
    ({"prune": {"piece": "4x4", "scope": "row"}}, "scope"),
    ({"prune": {"criterion": "wonda"}}, "wanda"), ({"sparsegpt": {"damp": 0.0}}, "damp"),
])  # fmt: skip
def test_bad_settings(item: dict, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        recipe_of({"passes": [item]}, "here")


def test_pieces_that_do_not_divide(tiny: Path) -> None:
    spec = load_model(tiny).spec
    for p in (Prune(piece="1x3"), Prune(piece="3x1"), SparseGPT(pattern="2:3")):
        with pytest.raises(BadRequest, match="do not divide"):
            Recipe("r", (p,)).check(spec)


def test_gradients_need_the_whole_model(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("passes: [{prune: {criterion: taylor, budget: global}}]\n")
    done = call("compress", tiny, tmp_path / "out", "--recipe", tmp_path / "r.yaml", "--no-prove",
                "--data", text_file, "--samples", 4, "--length", 32, "--json")  # fmt: skip
    assert done == 0
    model = load_model(tmp_path / "out")
    assert len(set(zeros(model).values())) > 5


# Stored without zeros -----------------------------------------------------------------------------


def made(folder: Path, out: Path, text_file: Path, *passes: object) -> Source:
    """What a recipe makes of a folder, streamed; the same as in memory."""
    recipe = Recipe("r", passes)  # type: ignore[arg-type]
    job = prepare(folder, out, recipe, Settings(Calibration(4, 32), text_file, "bf16"))
    compress(job)
    model = load_model(folder)
    apply(model, recipe, job.ids)
    memory = save_model(model, out.with_name("memory"))
    first, second = (load_file(f / "model.safetensors") for f in (out, memory))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    return Source(out)


@pytest.mark.parametrize("passes, name", [
    ((Prune("wanda", 0.5, scope="row"),), "sparse0.5(bf16)"),
    ((Prune("wanda", pattern="2:4"),), "sparse2:4(bf16)"),
    ((SparseGPT(0.5),), "sparse0.5(bf16)"),
    ((SparseGPT(pattern="2:4"), GPTQ(4, 64)), "sparse2:4(int4-g64)"),
    ((Prune("l1", 0.02),), None),
    ((Prune("l1", 0.5, stored="dense"),), None),
    ((Prune("l1", 0.5), GPTQ(4, 64, True)), "int4-g64-zp"),
], ids=["row", "2:4", "sparsegpt", "both", "few", "dense", "zero-point"])  # fmt: skip
def test_zeros_are_not_stored(
    tiny: Path, tmp_path: Path, text_file: Path, passes: tuple, name: str | None
) -> None:
    source = made(tiny, tmp_path / "out", text_file, *passes)
    assert source.format_names() == ([name] if name else [])
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    planned, size = report.value("output_bytes"), file_bytes(source.checkpoint)
    assert size == pytest.approx(planned, rel=0.01)
    dense = load_model(tiny)
    model = load_model(tmp_path / "out")
    if name is None or name.endswith("(bf16)"):
        plain = load_model(tiny)
        p = replace(passes[0], stored="dense")
        apply(plain, Recipe("r", (p,)), ids_of(tmp_path / "out", text_file, tiny))
        for (_, one), (_, two) in zip(model.linears(), plain.linears(), strict=True):
            assert torch.equal(one.matrix(), two.matrix())
    assert dense.parameters == model.parameters or name is not None


def ids_of(out: Path, text_file: Path, folder: Path) -> Tensor:
    job = prepare(folder, out.with_name("never"), Recipe("g", (GPTQ(),)),
                  Settings(Calibration(4, 32), text_file))  # fmt: skip
    assert job.ids is not None
    return job.ids


def test_a_later_stage_keeps_zeros_out(tiny: Path, tmp_path: Path, text_file: Path) -> None:
    """Pruned, a layer dropped, then rounded: the zeros stay, and stay out of the file."""
    source = made(tiny, tmp_path / "out", text_file, SparseGPT(pattern="2:4"),
                  DropLayers(layers=(1,), most=None), GPTQ(4, 64))  # fmt: skip
    assert source.format_names() == ["sparse2:4(int4-g64)"]
    for _, linear in load_model(tmp_path / "out").linears():
        assert ((linear.matrix() != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()


def test_a_pattern_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "passes: [{prune: {pattern: 2:4}}, {gptq: {bits: 4, damp: 0.02}}]\n"
    )
    assert read_recipe(tmp_path / "r.yaml").passes == (Prune(pattern="2:4"), GPTQ(4, damp=0.02))


@pytest.mark.parametrize("later", [
    Prune("taylor", 0.6, budget="global"), Prune("wanda", 0.6, budget="sensitivity"),
    Mixed(group=32, mean=3.5, tried=64),
], ids=["gradients", "sensitivity", "mixed"])  # fmt: skip
def test_what_is_stored_without_zeros_is_looked_at_whole(
    tiny: Path, tmp_path: Path, text_file: Path, later: Pass
) -> None:
    """Gradients and sensitivities behind a pruning: its zeros stay zero, and out of the file."""
    source = made(tiny, tmp_path / "out", text_file, Prune("wanda", 0.5, scope="row"), later)
    assert all(name.startswith("sparse") for name in source.format_names())
    assert min(zeros(load_model(tmp_path / "out")).values()) >= 0.49


@pytest.mark.parametrize("rounding", [
    GPTQ(4, 32, correct=1.0), Mixed(group=32, mean=3.5, tried=64, correct=1.0),
    AutoRound(4, 32, steps=5), AutoRound(4, 32, steps=5, start="rtn", correct=0.0),
], ids=["gptq", "mixed", "autoround", "from rtn"])  # fmt: skip
def test_rounding_that_aims_elsewhere_keeps_what_was_pruned(
    tiny: Path, tmp_path: Path, text_file: Path, rounding: Pass
) -> None:
    source = made(tiny, tmp_path / "out", text_file, Prune("wanda", 0.5, scope="row"), rounding)
    assert all(name.startswith("sparse") for name in source.format_names())
    assert min(zeros(load_model(tmp_path / "out")).values()) >= 0.49


@pytest.mark.parametrize("later", [Rotate(), Fuse(), CutUnits("neuron", "l2")], ids=lambda p: p.key)
def test_what_needs_whole_matrices_is_refused_without_them(tiny: Path, later: Pass) -> None:
    model = load_model(tiny)
    apply(model, Recipe("p", (Prune(share=0.5),)), None)
    before = zeros(model)
    with pytest.raises(BadRequest, match="stored without its zeros"):
        apply(model, Recipe("r", (later,)), IDS)
    assert zeros(model) == before
