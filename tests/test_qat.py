"""Quantization-aware training: the gradients of the papers, what is stored, that it beats rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_llama

from onecard.calibrate.data import Calibration
from onecard.calibrate.losses import soft_targets
from onecard.calibrate.train import Training, training_ids
from onecard.checkpoint.load import load_model
from onecard.core.errors import BadRequest
from onecard.core.format import Integers, Levels
from onecard.kernels import convert, reference
from onecard.nn.model import Model
from onecard.passes import GPTQ, QAT, Prune, Recover, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.qat import LearnedGrid, LevelGrid, StraightGrid
from onecard.passes.walked import apply

TRAINING = Training(40, batch=4, length=32, rate=1e-3, dtype="fp32")


def test_learned_step_size_gradient() -> None:
    """LSQ equation 3, scaled by 1 / sqrt(n Q); the weight's gradient ends with the grid."""
    torch.manual_seed(0)
    w = torch.randn(3, 64, requires_grad=True)
    grid = LearnedGrid(w.detach(), Integers(3, 32, scale="fp32"))
    with torch.no_grad():
        grid.scale.uniform_(0.1, 0.6)
    upstream = torch.randn(3, 64)
    (grid(w) * upstream).sum().backward()
    v = w.detach().view(3, 2, 32) / grid.scale.detach()[..., None]
    inside = (v > -4) & (v < 3)
    slope = torch.where(inside, torch.round(v) - v, torch.where(v <= -4, -4.0, 3.0))
    expected = (slope * upstream.view(3, 2, 32)).sum(-1) / math.sqrt(32 * 3)
    assert grid.scale.grad is not None and w.grad is not None
    torch.testing.assert_close(grid.scale.grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(w.grad.view(3, 2, 32), upstream.view(3, 2, 32) * inside)


def test_learned_step_size_starts_as_the_paper_says() -> None:
    w = torch.randn(3, 64)
    grid = LearnedGrid(w, Integers(4, None, scale="fp32"))
    torch.testing.assert_close(grid.scale[:, 0], 2 * w.abs().mean(1) / math.sqrt(7))


def test_the_best_binary_scale() -> None:
    """argmin over s, B of ||W - s B||^2 is mean|W|, sign W; what is left is ||W||^2 - ||W||_1^2 / n."""
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    held = LevelGrid(w, Levels("binary", None, "fp32")).store(w)
    error = (w - convert.to_dense(held)).square().sum(1)
    torch.testing.assert_close(error, w.square().sum(1) - w.abs().sum(1).square() / 64)
    w[0, 0] = 0.0
    assert float(LevelGrid(w, Levels("binary", None)).forward(w)[0, 0]) > 0  # sign 0 is 1


def test_ternary_is_bitnets() -> None:
    w = torch.tensor([[0.1, -0.9, 0.5, 0.3] * 8])
    grid = LevelGrid(w, Levels("ternary", None, "fp32"))
    mean = w.abs().mean()
    torch.testing.assert_close(grid(w), mean * torch.round(w / mean).clamp(-1, 1))
    w.requires_grad_()
    grid(w).sum().backward()
    assert w.grad is not None and bool((w.grad == 1).all())  # also beyond the grid


def test_binary_latents_are_kept_where_the_gradient_passes() -> None:
    w = torch.tensor([[2.0, -3.0, 0.5, 0.1] * 8], requires_grad=True)
    grid = LevelGrid(w.detach(), Levels("binary", None, "fp32"))
    grid(w).sum().backward()
    assert w.grad is not None and w.grad[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0]
    kept = w.detach().clone()
    grid.settle(kept)
    assert kept[0, :4].tolist() == pytest.approx([1.0, -1.0, 0.5, 0.1])


GRIDS = {
    "lsq": lambda w: LearnedGrid(w, Integers(2, 32, scale="bf16")),
    "straight": lambda w: StraightGrid(w, Integers(3, 64, scale="bf16")),
    "straight-zp": lambda w: StraightGrid(w, Integers(3, 64, zero_point=True, scale="bf16")),
    "ternary": lambda w: LevelGrid(w, Levels("ternary", 32, "bf16")),
    "binary": lambda w: LevelGrid(w, Levels("binary", 64, "bf16")),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_what_multiplies_is_what_is_stored(kind: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 64) * (torch.rand(6, 64) > 0.3)
    grid = GRIDS[kind](w)
    moved = w + 0.2 * torch.randn(6, 64)
    held = grid.store(moved)
    assert torch.equal(convert.to_dense(held), grid(moved))
    if kind != "binary":
        assert bool((convert.to_dense(held)[w == 0] == 0).all())


@pytest.mark.parametrize("kind, format", [
    ("lsq", "int2-g128"), ("straight", "int2-g128"), ("ternary", "ternary-g128"), ("binary", "binary-g128"),
])  # fmt: skip
def test_the_result_is_packed_and_closer_than_rounding(
    tmp_path: Path, text_file: Path, kind: str, format: str
) -> None:
    folder = make_llama(tmp_path / "m")
    ids = ids_of(load_model(folder), text_file)
    qat = QAT(kind, bits=2, hard=0.0, training=replace(TRAINING, rate=5e-4))  # type: ignore[arg-type]
    made, rounded = load_model(folder), load_model(folder)
    report = apply(made, Recipe("q", (qat,)), ids)
    apply(
        rounded,
        Recipe("r", (QAT(kind, bits=2, training=replace(TRAINING, steps=1, rate=1e-9)),)),
        ids,
    )  # type: ignore[arg-type]
    assert {linear.format.name for _, linear in made.linears()} == {format}
    assert report.value("format", "blocks.0.attention.q") == format
    assert kl(made, folder, ids) < 0.9 * kl(rounded, folder, ids)


def ids_of(model: Model, text_file: Path) -> torch.Tensor:
    return training_ids(model.tokenizer, text_file, TRAINING, model.spec.vocab_size)


def kl(model: Model, folder: Path, ids: torch.Tensor) -> float:
    with torch.no_grad():
        said = load_model(folder, "fp32").network(ids)
        return float(soft_targets(model.network(ids), said))


def test_streamed_and_saved(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Folder to folder the result is the same as in memory, and loads."""
    recipe = Recipe("q", (Prune(share=0.5), QAT("ternary", training=replace(TRAINING, steps=6))))
    job = prepare(tiny, tmp_path / "out", recipe, Settings(Calibration(24, 32), text_file, "bf16"))
    compress(job)
    made, model = load_model(tmp_path / "out"), load_model(tiny)
    apply(model, recipe, job.ids)
    for (name, a), (_, b) in zip(made.linears(), model.linears(), strict=True):
        assert a.format.name == "ternary-g128", name
        assert torch.equal(a.matrix(), b.matrix()), name
        assert float((a.matrix() == 0).float().mean()) >= 0.5


def test_learning_goes_on_after_qat(tiny: Path, text_file: Path) -> None:
    """A model that is ternary already is recovered on its own grid."""
    model = load_model(tiny)
    ids = ids_of(model, text_file)
    short = replace(TRAINING, steps=4)
    recipe = Recipe(
        "q", (QAT("ternary", training=short), Recover(training=replace(short, rate=1e-2)))
    )
    apply(model, recipe, ids)
    assert {linear.format.name for _, linear in model.linears()} == {"ternary-g128"}
    assert all(bool(torch.isfinite(linear.matrix()).all()) for _, linear in model.linears())


def test_order_conflicts() -> None:
    for passes, what in [
        ((QAT(), GPTQ()), "quantizes twice"), ((QAT(), Prune()), "changes weights after quantizing"),
        ((RoundToNearest(4), QAT()), "quantizes twice"),
    ]:  # fmt: skip
        with pytest.raises(BadRequest, match=what):
            Recipe("r", passes).check(load_model("demo").spec)


WRONG = (
    {"bits": 1}, {"bits": 9}, {"group": 48}, {"soft": -1.0}, {"soft": 0.0, "hard": 0.0},
    {"temperature": 0.0}, {"temperature": 1e300}, {"hard": 1e300},
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_bad_settings(wrong: dict) -> None:
    with pytest.raises(BadRequest):
        QAT(**wrong)


def test_grids_are_rounding_to_nearest_before_they_learn() -> None:
    w = torch.randn(8, 64)
    format = Integers(4, 32, scale="bf16")
    expected = reference.to_dense(reference.round_to_nearest(w, format))
    assert torch.equal(StraightGrid(w, format)(w), expected)
