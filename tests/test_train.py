"""The loop: exact resume, the schedule, NaN, and that what is trained stays in its format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from onecard.calibrate.grids import FreeGrid, IntegerGrid, grid_of
from onecard.calibrate.latent import LatentLinear, trainable
from onecard.calibrate.losses import next_token
from onecard.calibrate.train import STATE, Training, batch_of, checked_ids, train, training_ids
from onecard.checkpoint.load import load_model
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.kernels import reference
from onecard.nn.layers import Linear
from onecard.nn.model import Model

SHORT = Training(6, batch=4, length=32, rate=1e-2, save_minutes=0.0, dtype="fp32")


class Killed(Exception):
    pass


def windows(model: Path, text_file: Path, settings: Training = SHORT) -> torch.Tensor:
    loaded = load_model(model)
    return training_ids(loaded.tokenizer, text_file, settings, loaded.spec.vocab_size)


def trained(
    folder: Path, ids: torch.Tensor, settings: Training, state: Path | None = None, stop: int = 0
) -> dict[str, torch.Tensor]:
    """The weights of a model after training, killed (in the middle of a step) after `stop` steps."""
    model = load_model(folder, "fp32")

    def progress(done: int, total: int, what: str) -> None:
        if done == stop:
            raise Killed

    with trainable(model) as trainee:
        train(trainee.parameters, lambda ids: next_token(model.network(ids), ids), ids, settings,
              folder=state, progress=progress, settle=trainee.settle)  # fmt: skip
    return {name: p.clone() for name, p in model.network.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_gives_the_same_bits(
    tiny: Path, text_file: Path, tmp_path: Path, optimizer: str
) -> None:
    settings = Training(6, batch=4, length=32, rate=1e-2, save_minutes=0.0, dtype="fp32",
                        optimizer=optimizer, accumulate=2)  # type: ignore[arg-type]  # fmt: skip
    ids = windows(tiny, text_file)
    whole = trained(tiny, ids, settings)
    for stop in (2, 5):
        with pytest.raises(Killed):
            trained(tiny, ids, settings, tmp_path, stop)
    resumed = trained(tiny, ids, settings, tmp_path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = dict(load_model(tiny, "fp32").network.named_parameters())
    assert all(not torch.equal(whole[name], before[name]) for name in whole)


def test_a_finished_state_is_not_trained_again(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    ids = windows(tiny, text_file)
    first = trained(tiny, ids, SHORT, tmp_path)
    again = trained(tiny, ids, SHORT, tmp_path, stop=1)  # would be killed at its first step
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_state_of_another_training(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    ids = windows(tiny, text_file)
    trained(tiny, ids, SHORT, tmp_path)
    with pytest.raises(BadRequest, match="it differs in: ids"):
        trained(tiny, ids[1:], SHORT, tmp_path)
    slower = Training(8, batch=4, length=32, rate=1e-3, save_minutes=0.0, dtype="fp32")
    with pytest.raises(BadRequest, match=r"rate, steps\n.*--resume"):
        trained(tiny, ids, slower, tmp_path)
    assert (tmp_path / STATE).is_file()


def test_adopting_a_state_goes_on_with_other_settings(tmp_path: Path) -> None:
    x = nn.Parameter(torch.tensor([4.0]))
    ids = torch.zeros(1, 2, dtype=torch.int64)

    def course(steps: int, adopt: bool) -> list[float]:
        settings = Training(steps, batch=1, length=2, rate=0.1, warmup=0, decay=0, save_minutes=0)
        return list(train({"x": x}, lambda ids: x.square().sum(), ids, settings, folder=tmp_path,
                          adopt=adopt).losses)  # fmt: skip

    first = course(3, False)
    assert course(5, True)[:3] == first


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    """The weights go back to the last that gave a number, in memory and on disk."""
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for folder in (None, tmp_path):
        x = nn.Parameter(torch.tensor([4.0]))
        seen: list[float] = []

        def loss(ids: torch.Tensor, x: nn.Parameter = x, seen: list[float] = seen) -> torch.Tensor:
            seen.append(float(x.detach()))
            return x.square().sum() * (float("nan") if len(seen) == 4 else 1.0)

        settings = Training(9, batch=1, length=2, rate=0.5, save_minutes=0.0, warmup=0.0)
        with pytest.raises(FailedWork, match="no number at step 3") as failure:
            train({"x": x}, loss, ids, settings, folder=folder)
        assert "weights of step 2" in str(failure.value)
        assert float(x.detach()) == seen[2] != seen[3]


def test_what_the_last_update_made_is_looked_at() -> None:
    """Three finite losses, and weights behind them that give none: they are not delivered."""
    x = nn.Parameter(torch.tensor([4.0]))
    calls: list[int] = []

    def loss(ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.square().sum() * (float("inf") if len(calls) == 4 else 1.0)

    settings = Training(3, batch=1, length=2, rate=0.5, warmup=0.0)
    with pytest.raises(FailedWork, match="no number at step 3"):
        train({"x": x}, loss, torch.zeros(4, 2, dtype=torch.int64), settings)
    assert float(x.detach()) == 4.0


def test_a_loss_that_never_was_a_number_is_not_the_rates_fault() -> None:
    x = nn.Parameter(torch.tensor([float("nan")]))
    with pytest.raises(FailedWork, match="before the first update") as failure:
        train({"x": x}, lambda ids: x.sum(), torch.zeros(4, 2, dtype=torch.int64),
              Training(3, batch=1, length=2))  # fmt: skip
    assert "rate" not in str(failure.value)


@pytest.mark.parametrize("settings", [
    {"weight_decay": 1e9}, {"rate": 0.5, "weight_decay": 2.0}, {"weight_decay": -1.0}, {"rate": 2.0},
    {"batch": 0}, {"length": 1}, {"accumulate": 9},
], ids=str)  # fmt: skip
def test_settings_that_ruin_a_model_are_refused(settings: dict) -> None:
    with pytest.raises(BadRequest) as failure:
        Training(**settings)
    assert failure.value.do


def test_the_rate_rises_stays_and_falls() -> None:
    settings = Training(rate=0.5, warmup=0.1, decay=0.5)
    rates = [settings.rate_at(f) for f in (0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.5, 0.5, 0.25, 0.0])
    assert Training(rate=0.5, warmup=0.0, decay=0.0).rate_at(0.0) == 0.5


def test_every_epoch_visits_every_window() -> None:
    ids = torch.arange(10)[:, None].expand(10, 4)
    settings = Training(batch=5, length=4, seed=3)
    epochs = [
        torch.cat([batch_of(ids, 2 * e + i, settings)[:, 0] for i in range(2)]) for e in (0, 1)
    ]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_accumulating_is_the_whole_batch(tiny: Path, text_file: Path) -> None:
    ids = windows(tiny, text_file)
    ways = [trained(tiny, ids, Training(2, batch=4, length=32, accumulate=n, dtype="fp32"))
            for n in (1, 4)]  # fmt: skip
    for name in ways[0]:
        torch.testing.assert_close(ways[0][name], ways[1][name], rtol=1e-3, atol=2e-5)


def test_minutes_end_it() -> None:
    x = nn.Parameter(torch.tensor([4.0]))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    course = train({"x": x}, lambda ids: x.square().sum(), ids,
                   Training(minutes=0.005, batch=1, length=2))  # fmt: skip
    assert 0.3 <= course.seconds < 5 and len(course.losses) > 10
    assert {row.what for row in course.rows("x")} >= {"training_loss", "training_seconds"}


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"minutes": 0.0}, {"batch": 0}, {"rate": 0.0}, {"accumulate": 9}, {"warmup": 1.0},
    {"length": 1}, {"clip": 0.0}, {"minutes": float("nan")}, {"minutes": float("inf")}, {"minutes": 1e300},
    {"steps": 10**12},
], ids=str)  # fmt: skip
def test_impossible_settings(wrong: dict) -> None:
    with pytest.raises(BadRequest) as failure:
        Training(**wrong)
    assert failure.value.do


def test_text_too_short(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    with pytest.raises(BadRequest, match="one step needs 8"):
        windows(tiny, tmp_path / "short.txt", Training(length=32))
    assert checked_ids(
        torch.zeros(4, 64, dtype=torch.int64), Training(length=16, batch=16)
    ).shape == (16, 16)


# What is trained stays in its format --------------------------------------------------------------


def linear_of(w: torch.Tensor) -> Linear:
    with torch.device("meta"):
        linear = Linear((w.shape[0], w.shape[1]), False, w.dtype)
    linear.replace(reference.from_dense(w))
    return linear


def test_zeros_stay_zero(tiny: Path, text_file: Path) -> None:
    model = load_model(tiny)
    for _, linear in model.linears():
        w = linear.matrix()
        linear.replace(reference.from_dense((w * (w.abs() > w.abs().median())).bfloat16()))
    zeros = {name: linear.matrix() == 0 for name, linear in model.linears()}
    ids = windows(tiny, text_file)
    with trainable(model) as trainee:
        train(trainee.parameters, lambda ids: next_token(model.network(ids), ids), ids, SHORT)
    for name, linear in model.linears():
        assert linear.held().parts["weight"].dtype == torch.bfloat16
        assert torch.equal(linear.matrix() == 0, zeros[name])


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("zero_point", [False, True])
def test_integers_stay_on_their_grid(
    tiny: Path, text_file: Path, rank: int, zero_point: bool
) -> None:
    """Scales and zero points are untouched, codes change, and what was trained is what is stored."""
    model = load_model(tiny)
    for _, linear in model.linears():
        linear.replace(reference.round_to_nearest(linear.matrix(), Integers(3, 32, zero_point)))
    before = {name: reference.codes(linear.held()) for name, linear in model.linears()}
    ids = windows(tiny, text_file)
    with trainable(model, rank=rank) as trainee:
        train(trainee.parameters, lambda ids: next_token(model.network(ids), ids), ids, SHORT)
        last = {name: latent.grid(latent.matrix()) for name, latent in trainee.linears.items()}
    changed = 0
    for name, linear in model.linears():
        codes, scale, zero = reference.codes(linear.held())
        assert torch.equal(scale, before[name][1]) and torch.equal(zero, before[name][2])
        changed += int((codes != before[name][0]).sum())
        torch.testing.assert_close(linear.matrix(), last[name], rtol=0, atol=0)
    assert changed > 100


def test_straight_through_gradient_ends_with_the_grid() -> None:
    weight = reference.round_to_nearest(torch.randn(4, 64), Integers(3, 32))
    grid = IntegerGrid(weight)
    w = reference.to_dense(weight)
    w[0, 0], w[0, 1] = 99.0, -99.0
    w.requires_grad_()
    grid(w).sum().backward()
    assert w.grad is not None
    assert w.grad[0, 0] == w.grad[0, 1] == 0 and bool((w.grad[1:] == 1).all())


def test_sparse_integers_keep_their_zeros() -> None:
    w = torch.randn(8, 64) * (torch.rand(8, 64) > 0.5)
    linear = linear_of(w)
    linear.replace(reference.round_to_nearest(w, Integers(4, 32)))
    zeros = linear.matrix() == 0
    grid = grid_of(linear.held(), zeros=True)
    moved = linear.matrix() + 0.3
    assert torch.equal(grid(moved) == 0, (grid(moved) == 0) | zeros)
    assert torch.equal(reference.to_dense(grid.store(moved)), grid(moved))


def test_merged_low_rank_is_what_was_trained() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 32) * (torch.rand(8, 32) > 0.5)
    linear, x = linear_of(w), torch.randn(5, 32)
    latent = LatentLinear(linear, FreeGrid(w), 4, seed=1)
    assert torch.equal(latent(x), linear(x))
    with torch.no_grad():
        latent.b.normal_()
    linear.replace(latent.grid.store(latent.matrix()))
    assert torch.equal(latent(x), linear(x)) and torch.equal(linear.matrix() == 0, w == 0)


def test_a_failure_leaves_stored_weights(tiny: Path) -> None:
    model: Model = load_model(tiny)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    with pytest.raises(Killed), trainable(model):
        raise Killed
    after = dict(model.network.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and not after[name].requires_grad
               and before[name].dtype == after[name].dtype for name in before)  # fmt: skip
