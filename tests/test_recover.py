"""Recovery and distillation as passes: what they lower, what they leave alone, chains with pruning."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_llama

from onecard.calibrate.data import Calibration
from onecard.calibrate.losses import next_token, soft_targets
from onecard.calibrate.train import Training, training_ids
from onecard.checkpoint.load import load_model
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.kernels import reference
from onecard.nn.model import Model
from onecard.passes import Distil, DropLayers, Prune, Recover, recipe_of, to_yaml
from onecard.passes.base import Data, Recipe
from onecard.passes.distill import Targets, counterpart
from onecard.passes.job import Settings, calibrated_on, compress, prepare
from onecard.passes.walked import apply

GENTLE = Training(40, batch=4, length=32, rate=3e-4, dtype="fp32")
SHORT = Training(8, batch=4, length=32, rate=2e-3, dtype="fp32")


def ids_of(model: Model, text_file: Path, training: Training = SHORT) -> torch.Tensor:
    return training_ids(model.tokenizer, text_file, training, model.spec.vocab_size)


def loss_of(model: Model, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(next_token(model.network(ids), ids))


def pruned(folder: Path) -> Model:
    model = load_model(folder)
    apply(model, Recipe("p", (Prune(share=0.5),)), None)
    return model


@pytest.mark.parametrize("how", ["full", "lora"])
def test_recovery_lowers_the_loss_and_keeps_zeros(tiny: Path, text_file: Path, how: str) -> None:
    model = pruned(tiny)
    ids = ids_of(model, text_file)
    before, zeros = loss_of(model, ids), {n: m.matrix() == 0 for n, m in model.linears()}
    outer = model.network.stem.embedding.weight.clone()
    _, rows = Recover(how, rank=4, training=SHORT).model(model, Data(ids))  # type: ignore[arg-type]
    assert loss_of(model, ids) < before - 0.05
    assert all(torch.equal(linear.matrix() == 0, zeros[name]) for name, linear in model.linears())
    assert torch.equal(model.network.stem.embedding.weight, outer) == (how == "lora")
    loss = next(row for row in rows if row.what == "training_loss")
    assert (
        isinstance(loss.before, float)
        and isinstance(loss.value, float)
        and loss.value < loss.before
    )


def test_blocks_are_recovered_towards_the_original(tiny: Path, text_file: Path) -> None:
    original, model = load_model(tiny, "fp32"), pruned(tiny)
    ids = ids_of(model, text_file)
    with torch.no_grad():
        said = original.network(ids)
        before = float(soft_targets(model.network(ids), said))
    data = Data(ids, lambda: load_model(tiny))
    _, rows = Recover("blocks", training=replace(SHORT, steps=16)).model(model, data)
    assert [row.where for row in rows] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(row.value < row.before for row in rows)  # type: ignore[operator]
    with torch.no_grad():
        assert float(soft_targets(model.network(ids), said)) < 0.8 * before
    assert torch.equal(
        model.network.stem.embedding.weight, load_model(tiny).network.stem.embedding.weight
    )


ALL = Targets(soft=1.0, hidden=1.0, attention=1.0, relations=1.0, relational=1.0, temperature=2.0)


@pytest.mark.parametrize("targets", [
    Targets(), Targets(direction="reverse", temperature=2.0), Targets(soft=0, hidden=1), ALL,
], ids=["forward", "reverse", "hidden", "all"])  # fmt: skip
@pytest.mark.parametrize("rank", [0, 4])
def test_distilling_back_comes_closer_to_the_original(
    tiny: Path, text_file: Path, targets: Targets, rank: int
) -> None:
    original, model = load_model(tiny, "fp32"), pruned(tiny)
    ids = ids_of(model, text_file)
    with torch.no_grad():
        said = original.network(ids)
        before = float(soft_targets(model.network(ids), said))
    data = Data(ids, lambda: load_model(tiny))
    Distil(targets, rank, training=GENTLE).model(model, data)
    with torch.no_grad():
        assert float(soft_targets(model.network(ids), said)) < 0.9 * before


def test_a_perfect_student_has_no_loss(tiny: Path, text_file: Path) -> None:
    from onecard.passes.distill import Distillation

    same = load_model(tiny, "fp32")
    loss = Distillation(same, load_model(tiny, "fp32"), ALL, SHORT)
    assert abs(float(loss(ids_of(same, text_file)[:2]).detach())) < 1e-5


def test_distilling_into_integers(tiny: Path, text_file: Path) -> None:
    model = load_model(tiny)
    for _, linear in model.linears():
        linear.replace(reference.round_to_nearest(linear.matrix(), Integers(3, 32)))
    ids, data = ids_of(model, text_file), Data(None, lambda: load_model(tiny))
    with torch.no_grad():
        said = load_model(tiny, "fp32").network(ids)
        before = float(soft_targets(model.network(ids), said))
    Distil(training=GENTLE).model(model, replace(data, ids=ids))
    assert {linear.format.name for _, linear in model.linears()} == {"int3-g32"}
    with torch.no_grad():
        assert float(soft_targets(model.network(ids), said)) < 0.9 * before


def test_layers_look_at_their_counterparts() -> None:
    assert [counterpart(i, 3, 12) for i in range(3)] == [3, 7, 11]
    assert [counterpart(i, 4, 6) for i in range(4)] == [1, 2, 4, 5]
    assert [counterpart(i, 5, 5) for i in range(5)] == list(range(5))


# As recipes ---------------------------------------------------------------------------------------

CHAIN = Recipe("chain", (Prune(share=0.3), Recover(training=SHORT), Prune(share=0.5),
                         Distil(training=SHORT)))  # fmt: skip


def test_a_chain_comes_back_from_its_file(tmp_path: Path) -> None:
    import yaml

    assert recipe_of(yaml.safe_load(to_yaml(CHAIN)), "x").passes == CHAIN.passes
    text = "passes: [{recover: {how: lora, training: {rate: 1e-3, steps: 5}}}]"
    made = recipe_of(yaml.safe_load(text), "x").passes[0]
    assert made == Recover("lora", training=Training(5, rate=1e-3))
    with pytest.raises(BadRequest, match="no setting 'speed'"):
        recipe_of({"passes": [{"recover": {"training": {"speed": 1}}}]}, "x")
    with pytest.raises(BadRequest, match="mapping of settings"):
        recipe_of({"passes": [{"recover": {"training": 3}}]}, "x")


def test_a_chain_streamed_and_in_memory(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Prune, recover, prune, distil: the zeros of the second pruning are there at the end."""
    job = prepare(tiny, tmp_path / "out", CHAIN, Settings(Calibration(24, 32), text_file, "bf16"))
    assert job.plan.peak > 0
    report = compress(job)
    assert report.value("training_steps", "stage 2: recover") == 8
    made = load_model(tmp_path / "out")
    assert all(abs(float((linear.matrix() == 0).float().mean()) - 0.5) < 0.01
               for _, linear in made.linears())  # fmt: skip
    model = load_model(tiny)
    apply(model, CHAIN, job.ids)
    for (name, a), (_, b) in zip(made.linears(), model.linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name


def test_killed_in_the_middle_of_training(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """kill -9 of a chain: the same command goes on and gives the same weights."""
    import os
    import signal
    import time

    from onecard.checkpoint.shards import sha256_of

    recipe = tmp_path / "recipe.yaml"
    passes = (Prune(share=0.5), Recover(training=replace(SHORT, steps=60, save_minutes=0.0)))
    recipe.write_text(to_yaml(Recipe("r", passes)))
    words = [sys.executable, "-m", "onecard", "compress", str(tiny), "OUT", "--recipe", str(recipe), "--data",
             str(text_file), "--samples", "24", "--length", "32", "--no-prove"]  # fmt: skip

    def run(out: Path) -> subprocess.Popen:
        return subprocess.Popen([str(out) if w == "OUT" else w for w in words],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    assert run(tmp_path / "whole").wait() == 0
    process, out = run(tmp_path / "out"), tmp_path / "out"
    state = tmp_path / ".out.partial" / "stage-2.work" / "training.safetensors"
    until = time.monotonic() + 60
    while not state.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert state.is_file()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and run(out).wait() == 0
    first, second = (sha256_of(f / "model.safetensors") for f in (tmp_path / "whole", out))
    assert first == second and not (tmp_path / ".out.partial").exists()
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert any(row["what"] == "training_steps" and row["value"] == 60 for row in rows)


def test_a_loss_that_is_no_number_loses_nothing(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_llama(tmp_path / "m"))
    ids = ids_of(model, text_file)
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    seen: list[int] = []

    def wild(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return next_token(logits, ids) * (float("nan") if len(seen) == 4 else 1.0)

    monkeypatch.setattr("onecard.passes.recover.next_token", wild)
    with pytest.raises(FailedWork, match="no number at step 3"):
        Recover(training=Training(9, batch=4, length=32, dtype="fp32")).model(model, Data(ids))
    after = dict(model.network.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("passes, what", [
    ((Recover("lora", rank=500),), "rank 500"), ((Recover(training=Training(length=512)),), "windows of 512"),
    ((Distil(rank=-1),), "rank -1"),
])  # fmt: skip
def test_settings_that_do_not_suit(tiny: Path, passes: tuple, what: str) -> None:
    with pytest.raises(BadRequest, match=what):
        Recipe("r", passes).check(load_model(tiny).spec)


def test_targets_that_make_no_sense() -> None:
    with pytest.raises(BadRequest, match="at least one target"):
        Targets(soft=0.0)
    for temperature in (0.0, 1e-9, 1e300):
        with pytest.raises(BadRequest, match="temperature"):
            Targets(temperature=temperature)
    for weight in (-1.0, 1e300):
        with pytest.raises(BadRequest, match="in the loss"):
            Targets(hidden=weight)


def test_too_little_text_is_told_before_the_work(tiny: Path, text_file: Path) -> None:
    model = load_model(tiny)
    with pytest.raises(BadRequest, match="one step needs 64"):
        apply(model, Recipe("r", (Recover(training=replace(SHORT, batch=64)),)),
              ids_of(model, text_file)[:8])  # fmt: skip
    recipe = Recipe("r", (DropLayers(count=1, most=None), Recover(training=SHORT)))
    with pytest.raises(BadRequest, match="one step needs 4"):
        prepare(tiny, tiny.with_name("out"), recipe, Settings(Calibration(2, 32), text_file))


@pytest.mark.parametrize("length", [16, 32])
def test_windows_shorter_than_asked_for_are_told(tiny: Path, text_file: Path, length: int) -> None:
    passes = (Recover(training=SHORT), Recover(training=SHORT), Distil(training=SHORT))
    job = prepare(tiny, tiny.with_name("out"), Recipe("r", passes),
                  Settings(Calibration(8, length), text_file))  # fmt: skip
    told = [title for title, text in calibrated_on(job) if "windows of 16 tokens, as long" in text]
    assert told == (["convention: recovery", "convention: distillation"] if length == 16 else [])


def test_layers_dropped_then_distilled(tiny: Path, text_file: Path) -> None:
    """The student has other layers than the original; hidden states find their counterparts."""
    model = load_model(tiny)
    ids = ids_of(model, text_file)
    report = apply(
        model, Recipe("r", (DropLayers(count=1, most=None), Distil(ALL, training=GENTLE))), ids
    )
    assert model.spec.num_layers == 2
    loss = next(row for row in report.rows if row.what == "training_loss")
    assert loss.value < loss.before  # type: ignore[operator]
