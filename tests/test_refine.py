"""What follows GPTQ: better scales, coordinate descent, and aiming at what the original model would give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gptq import PLAIN, output_error, problem, value
from test_walk import SETTINGS, ids_of, same

from onecard.calibrate.stats import CROSS, HESSIAN, ORIGINAL, Statistics
from onecard.calibrate.walk import Reached, Whole, walk
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.format import parse_format
from onecard.core.report import Row
from onecard.passes import GPTQ, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.gptq import corrected, refined, solve
from onecard.passes.job import compress, prepare
from onecard.passes.memory import ModelBlocks
from onecard.passes.plan import Settings
from onecard.passes.refine import damped, sweep
from onecard.passes.walked import apply


@pytest.mark.parametrize("name", ["int2-g32-zp", "int3-g32", "int3-row", "int4-g64-zp", "int4-row"])
def test_each_sweep_lowers_the_error_by_what_it_says(name: str) -> None:
    columns = 320 if name.endswith("row") else 128  # a group of several blocks of columns
    w, h = problem(rows=20, columns=columns)
    format, h = parse_format(name), damped(h, 0.01)
    found = solve(w, h, format, PLAIN)
    found = replace(found, scale=found.scale.bfloat16().float())
    found = replace(found, loss=row_errors(w, value(found, format), h))
    errors = [output_error(w, value(found, format), h)]
    for _ in range(3):
        found = refined(w, found, h, format)
        errors.append(output_error(w, value(found, format), h))
        assert float(found.loss.sum()) == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] < 0.97 * errors[0]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


def row_errors(w: torch.Tensor, q: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    d = (q - w).double()
    return torch.linalg.vecdot(d @ h.double(), d).float()


def test_after_sweeps_nothing_alone_can_be_better() -> None:
    """At a fixed point no code and no scale can move, the others given: tried out one by one."""
    w, h = problem(rows=4, columns=64)
    format = replace(parse_format("int3-g32-zp"), scale="fp32")
    h = damped(h, 0.01)
    found = solve(w, h, format, PLAIN)
    for _ in range(60):
        before, found = found, refined(w, found, h, format)
        if torch.equal(before.codes, found.codes) and torch.allclose(
            before.scale, found.scale, 1e-6
        ):
            break
    assert torch.equal(before.codes, found.codes)
    start = row_errors(w, value(found, format), h)
    low, high = format.levels
    for j in range(64):
        for step in (-1, 1):
            codes = found.codes.clone()
            codes[:, j] = (codes[:, j] + step).clamp(low, high)
            moved = row_errors(w, value(replace(found, codes=codes), format), h)
            assert (moved >= start * (1 - 1e-5)).all()
    for g in range(2):
        for factor in (0.99, 1.01):
            scale = found.scale.clone()
            scale[:, g] *= factor
            moved = row_errors(w, value(replace(found, scale=scale), format), h)
            assert (moved >= start * (1 - 1e-5)).all()


def test_the_scale_of_one_group_is_that_of_least_squares() -> None:
    w, h = problem(rows=3, columns=32)
    format = replace(parse_format("int8-row"), scale="fp32")
    found = solve(w, h, format, PLAIN)
    found = replace(found, scale=found.scale * 1.1)  # the codes do not know, and cannot all follow
    _, scale, _ = sweep(w, found.codes, found.scale, found.zero, h, format)
    root = torch.linalg.cholesky(h.double())
    for row in range(3):
        along = root.T @ found.codes[row].double()
        aim = root.T @ w[row].double()
        assert float(scale[row, 0]) == pytest.approx(float(along @ aim / (along @ along)), rel=1e-4)


def test_pruned_zeros_stay() -> None:
    w, h = problem(columns=64)
    keep = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    w = w * keep
    format = parse_format("int4-g32-zp")
    found = solve(w, h, format, PLAIN)
    again = refined(w, found, damped(h, 0.01), format)
    assert (value(again, format)[~keep] == 0).all()


def test_correction_is_the_regression_on_the_inputs_there_are() -> None:
    """W' Y is the least-squares fit of W X; with X = Y it is W, with share 0 too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, generator=generator)
    y = x + 0.4 * torch.randn(500, 16, generator=generator)
    w = torch.randn(5, 16, generator=generator)
    h, cross = 2 * y.T @ y / 500, 2 * x.T @ y / 500
    best = torch.linalg.lstsq(y, x @ w.T).solution.T
    assert torch.allclose(corrected(w, h, cross, 0.0, 1.0), best, atol=2e-2)
    assert torch.equal(corrected(w, h, h, 0.01, 1.0), w)
    assert torch.equal(corrected(w, h, cross, 0.01, 0.0), w)


def test_the_original_runs_alongside(tiny: Path) -> None:
    """What a pass sees of the original model is what that model, left alone, gives."""
    model, plain = load_model(tiny, "fp32"), load_model(tiny, "fp32")
    ids = torch.randint(0, 300, (3, 30))
    seen: dict[str, torch.Tensor] = {}
    targets = []

    class Spy:
        needs = frozenset({HESSIAN, CROSS, ORIGINAL})

        def site(self, site: Reached) -> Iterator[Row]:
            seen[f"{site.block}.{site.name}"] = site.stats.cross
            yield from RoundToNearest(3).site(site)

        def finish(self, whole: Whole) -> Iterator[Row]:
            assert all(linear.format.dense for linear in [whole.original.attention.q])
            targets.append(torch.cat(list(whole.targets)))
            return iter(())

    with torch.no_grad():
        walk(ModelBlocks(model), (Spy(),), [model.network.start(ids)[0]])  # type: ignore[arg-type]
        h, context = model.network.start(ids)
        y, theirs = plain.network.start(ids)
        for block, original in zip(model.blocks(), plain.blocks(), strict=True):
            runs = block.stages(h, context), original.stages(y, theirs)
            for (name, x), (_, other) in zip(*runs, strict=False):
                wanted = 2 * other.flatten(0, -2).T @ x.flatten(0, -2) / 90
                got = seen[f"blocks.{block.index}.{name}"]
                assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4), name
            h, y = block(h, context), original(y, theirs)
            assert torch.allclose(targets[block.index], y, rtol=1e-4, atol=1e-5)


def test_cross_products_follow_scales() -> None:
    x, y, s = torch.randn(40, 8), torch.randn(40, 8), torch.rand(8) + 0.5
    both = [Statistics(8, (CROSS,)) for _ in range(2)]
    both[0].add(x, y)
    both[0].divide(s)
    both[1].add(x / s, y / s)
    assert torch.allclose(both[0].cross, both[1].cross, rtol=1e-4)


def test_streamed_resumed_and_replayed_equal_in_memory(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    """Both streams of hidden states survive in the journal."""
    recipe = Recipe("c", (GPTQ(3, 32, correct=1.0, sweeps=1),))
    settings = Settings(SETTINGS, text_file, "bf16")

    class Killed(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(prepare(tiny, tmp_path / "streamed", recipe, settings), kill)
    compress(prepare(tiny, tmp_path / "streamed", recipe, settings))
    model, replayed = load_model(tiny), load_model(tiny)
    ids = ids_of(tiny, text_file)
    apply(model, recipe, ids)
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    with torch.no_grad():
        hidden = [replayed.network.start(ids)[0]]
        walk(ModelBlocks(replayed), recipe.passes, hidden, replay=True)
    save_model(replayed, tmp_path / "replayed")
    assert same(tmp_path / "replayed", tmp_path / "memory")


def test_correction_and_sweeps_bring_outputs_nearer(stories: Path) -> None:
    """On a trained model, 2 bits: each is nearer to the original's hidden states than plain GPTQ."""
    dense = load_model(stories, "fp32")
    ids = torch.tensor(
        [dense.tokenizer.encode("Once upon a time there was a little dog. " * 12)[:96]]
    )
    with torch.no_grad():
        wanted = torch.log_softmax(dense.network(ids), -1)
        kl = []
        for settings in ({}, {"sweeps": 2}, {"correct": 1.0}, {"correct": 1.0, "sweeps": 2}):
            model = load_model(stories, "fp32")
            apply(model, Recipe("g", (GPTQ(2, None, True, **settings),)), ids)
            logp = torch.log_softmax(model.network(ids), -1)
            kl.append(float((wanted.exp() * (wanted - logp)).sum(-1).mean()))
    assert kl[3] < kl[0] and kl[2] < kl[0]


@pytest.mark.parametrize("settings", [{"sweeps": -1}, {"correct": 1.5}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(BadRequest):
        GPTQ(**settings)
