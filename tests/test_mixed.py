"""Mixed bits: the budget holds, the choice is the best one, and it follows what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from test_walk import SETTINGS, ids_of, same

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.passes import GPTQ, Mixed
from onecard.passes.base import Recipe
from onecard.passes.job import compress, prepare
from onecard.passes.judge import Judge
from onecard.passes.mixed import allot, rounded
from onecard.passes.plan import Settings
from onecard.passes.walked import apply


def test_allotment_is_the_best_of_all() -> None:
    """Against trying every combination, in budgets that fit no choice evenly."""
    generator = torch.Generator().manual_seed(0)
    choices, counts = [2, 3, 4, 8], [64, 128, 32, 96, 64]
    for mean in (2.0, 2.7, 3.3, 5.1, 8.0):
        harm = (torch.rand(5, 4, generator=generator).sort(1, descending=True).values).tolist()
        room = mean * sum(counts)
        best = min(
            sum(harm[i][c] for i, c in enumerate(pick))
            for pick in itertools.product(range(4), repeat=5)
            if sum(choices[c] * n for c, n in zip(pick, counts, strict=True)) <= room
        )
        found = allot(harm, counts, choices, mean)
        assert sum(b * n for b, n in zip(found, counts, strict=True)) <= room
        assert sum(harm[i][choices.index(b)] for i, b in enumerate(found)) == pytest.approx(best)


def test_bits_go_where_the_harm_is(tiny: Path, text_file: Path) -> None:
    """A block whose weights matter (its outputs are made large) gets more than the one behind it."""
    model, ids = load_model(tiny, "fp32"), ids_of(tiny, text_file)
    with torch.no_grad():
        for linear in (
            model.network.blocks[1].attention.o,
            model.network.blocks[1].feed_forward.down,
        ):
            linear.weight *= 8  # type: ignore[operator, union-attr]
    report = apply(model, Recipe("m", (Mixed(group=32, mean=3.5, tried=200),)), ids)
    bits = {row.where: int(row.value) for row in report.rows if row.what == "bits"}  # type: ignore[arg-type]
    assert len(bits) == 12
    mean = [sum(v for k, v in bits.items() if k.startswith(f"blocks.{i}.")) / 4 for i in range(3)]
    assert mean[1] > mean[2] + 1  # what block 2 adds is small beside what block 1 has left
    shapes = {name: linear.format.name for name, linear in model.linears()}
    assert {f"int{bits['blocks.1.attention.out']}-g32"} == {shapes["blocks.1.attention.o"]}


def test_harm_leaves_the_model_as_it_was_and_falls_with_bits(tiny: Path) -> None:
    model, ids = load_model(tiny, "fp32"), torch.randint(0, 300, (2, 40))
    before = {name: linear.matrix().clone() for name, linear in model.linears()}
    judge = Judge(model, ids)
    harm = [rounded(judge, 1, ("attention.q", "attention.k"), bits, Mixed()) for bits in (2, 4, 8)]
    assert harm[0] > harm[1] > harm[2] >= -1e-6
    assert all(torch.equal(before[name], linear.matrix()) for name, linear in model.linears())


def test_equal_choices_are_gptq(tiny: Path, text_file: Path) -> None:
    ids = ids_of(tiny, text_file)
    models = [load_model(tiny), load_model(tiny)]
    apply(models[0], Recipe("a", (Mixed(group=32, mean=4.0, least=4, most=4, tried=60),)), ids)
    apply(models[1], Recipe("b", (GPTQ(4, 32),)), ids)
    for (name, a), (_, b) in zip(models[0].linears(), models[1].linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name


def test_streamed_equals_in_memory(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe("m", (Mixed(group=32, mean=3.6, tried=100),))
    compress(prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    formats = {linear.format.name for _, linear in load_model(tmp_path / "streamed").linears()}
    assert len(formats) > 1


@pytest.mark.parametrize("settings", [{"mean": 1.0}, {"mean": 5.0, "most": 4}, {"tried": 0}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(BadRequest):
        Mixed(**settings)
