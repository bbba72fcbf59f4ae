"""Sign-gradient rounding: no steps change nothing, and steps bring a block nearer to the original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_families import CASES, random_model
from test_walk import SETTINGS, ids_of, same

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.format import parse_format
from onecard.kernels import reference
from onecard.nn.layers import Linear
from onecard.passes import GPTQ, AutoRound, RoundToNearest, Scale
from onecard.passes.autoround import Learned
from onecard.passes.base import Recipe
from onecard.passes.job import compress, prepare
from onecard.passes.plan import Settings
from onecard.passes.walked import apply


@pytest.mark.parametrize("name", ["int3-g32", "int2-g32-zp", "int4-row"])
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_learning_starts_at_the_codes_that_are_held(name: str, spread: float) -> None:
    """Also at codes far from the nearest ones, as GPTQ leaves them, and at the ends of the grid."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 64, generator=generator)
    format = parse_format(name)
    near = reference.round_to_nearest(w, format)
    q, scale, zero = reference.codes(near)
    low, high = format.levels
    moved = torch.round(q + spread * torch.randn(q.shape, generator=generator)).clamp(low, high)
    held = reference.hold(moved, scale, zero, format)
    linear = Linear((8, 64), False, torch.float32)
    linear.replace(held)
    stored = Learned(linear, w).stored()
    for part, values in held.parts.items():
        assert torch.equal(stored.parts[part], values), part


@pytest.mark.parametrize("settings, plain", [
    ({"start": "rtn"}, RoundToNearest(3, 32)), ({"correct": 0.0}, GPTQ(3, 32)),
])  # fmt: skip
def test_no_steps_are_the_start(tiny: Path, text_file: Path, settings: dict, plain) -> None:
    ids = ids_of(tiny, text_file)
    models = [load_model(tiny), load_model(tiny)]
    apply(models[0], Recipe("a", (AutoRound(3, 32, steps=0, **settings),)), ids)
    apply(models[1], Recipe("b", (plain,)), ids)
    for (name, a), (_, b) in zip(models[0].linears(), models[1].linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name


def test_steps_bring_blocks_nearer(tiny: Path, text_file: Path) -> None:
    ids = ids_of(tiny, text_file)
    model, dense = load_model(tiny, "fp32"), load_model(tiny, "fp32")
    recipe = Recipe("a", (AutoRound(3, 32, steps=30, start="rtn"),))
    report = apply(model, recipe, ids)
    rows = [row for row in report.rows if row.what == "relative_block_error"]
    assert len(rows) == 3 and all(row.value < 0.95 * row.before for row in rows)  # type: ignore[operator]
    other = load_model(tiny, "fp32")
    apply(other, Recipe("b", (replace(recipe.passes[0], steps=0),)), ids)  # type: ignore[type-var]
    with torch.no_grad():
        wanted = dense.network(ids)
        off = [float((m.network(ids) - wanted).square().mean()) for m in (model, other)]
    assert off[0] < 0.95 * off[1]


def test_what_does_not_help_is_not_kept(tiny: Path, text_file: Path) -> None:
    """Steps much too long from a good start: the start stays."""
    model, other = load_model(tiny), load_model(tiny)
    ids = ids_of(tiny, text_file)
    report = apply(model, Recipe("a", (AutoRound(4, 32, steps=2, rate=100.0),)), ids)
    apply(other, Recipe("b", (AutoRound(4, 32, steps=0),)), ids)
    assert all(r.value == r.before for r in report.rows if r.what == "relative_block_error")
    for (name, a), (_, b) in zip(model.linears(), other.linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name


@pytest.mark.parametrize("case", ["opt", "gemma2", "neox", "qwen2-moe", "opt-post"])
def test_other_families(case: str, tmp_path: Path) -> None:
    """Biases, norms of every kind, experts without tokens."""
    random_model(case).save_pretrained(tmp_path)
    model = load_model(tmp_path, "fp32", tokenizer=False)
    recipe = Recipe("a", (Scale(3, None, steps=3), AutoRound(3, None, steps=5, start="rtn")))
    apply(model, recipe, torch.randint(3, 101, (2, 20)))
    assert all(not linear.format.dense for _, linear in model.linears()) and case in CASES
    with torch.no_grad():
        assert torch.isfinite(model.network(torch.randint(3, 101, (1, 8)))).all()


def test_streamed_equals_in_memory(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe("a", (AutoRound(4, 64, steps=4),))
    compress(prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")


@pytest.mark.parametrize("settings", [{"steps": -1}, {"bits": 9}, {"correct": 2.0}, {"rate": 0.0}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(BadRequest):
        AutoRound(**settings)
