"""Recipes of several stages: cuts and whole-model passes between walks, streamed, killed, resumed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import call
from safetensors.torch import load_file

from onecard.calibrate.data import Calibration
from onecard.calibrate.train import Training
from onecard.checkpoint.journal import partial_of
from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.shards import read_json, sha256_of
from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.nn.model import Model
from onecard.passes import (
    GPTQ,
    QAT,
    Activations,
    Cluster,
    CutUnits,
    Distil,
    DropLayers,
    Factorize,
    GPTQLevels,
    Mixed,
    Prune,
    Recover,
    RoundToNearest,
    SparseGPT,
    Tables,
    recipe_of,
)
from onecard.passes.base import Data, ModelPass, Recipe
from onecard.passes.job import Settings, compress, file_bytes, prepare
from onecard.passes.layers import Influence, dropped
from onecard.passes.memory import look
from onecard.passes.walked import apply

CHAIN = Recipe("chain", (DropLayers(count=1, most=None), Prune(share=0.3), GPTQ(4, 64)))


@dataclass(frozen=True)
class Double(ModelPass):
    """Doubles the head and says how many ids it was given: a whole-model pass as small as can be."""

    key = "double"
    title = "doubling"
    paper = "none"

    def check(self, spec: Spec) -> None:
        pass

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        assert data.ids is not None
        assert data.original is not None
        with torch.no_grad():
            old = data.original().network.tail.norm.weight  # type: ignore[union-attr]
            model.network.tail.norm.weight.copy_(2 * old)  # type: ignore[union-attr]
        return model, [Row("model", "tokens", data.ids.numel())]

    def model_bytes(self, spec: Spec, ids: torch.Tensor | None) -> int:
        return 0


def settings(text_file: Path) -> Settings:
    return Settings(Calibration(4, 32), text_file, "bf16")


def result(out: Path) -> dict[str, str]:
    """The hash of every file that has to be the same."""
    files = [p for p in out.iterdir() if p.name not in ("report.json", "report.html")]
    return {p.name: sha256_of(p) for p in files}


def same(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("recipe", [
    CHAIN,
    Recipe("whole", (Prune(share=0.3), Double(), RoundToNearest(4))),
    Recipe("late", (RoundToNearest(4), DropLayers(layers=(0,), most=None))),
    Recipe("twice", (DropLayers(layers=(1,), most=None), DropLayers(layers=(0,), most=None))),
], ids=lambda r: r.name)  # fmt: skip
def test_streamed_equals_in_memory(
    tiny: Path, text_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    job = prepare(tiny, tmp_path / "streamed", recipe, settings(text_file))
    report = compress(job)
    model = load_model(tiny)
    apply(model, recipe, job.ids)
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    dropped = sum(isinstance(p, DropLayers) for p in recipe.passes)
    assert load_model(tmp_path / "streamed").spec.num_layers == 3 - dropped
    assert not list(tmp_path.glob(".*")), "nothing is left behind"
    assert not list((tmp_path / "streamed").glob("*stage-*"))
    assert any(row.where.startswith("stage 2: ") for row in report.rows)


@pytest.mark.parametrize("settings, said", [
    (DropLayers(count=0, most=None), "0 of 3"), (DropLayers(share=0.3, most=None), "1 of 3"),
])  # fmt: skip
def test_how_many_layers_went_is_told(tiny: Path, settings: DropLayers, said: str) -> None:
    found = apply(load_model(tiny), Recipe("d", (settings,)),
                  torch.arange(40).view(2, 20))  # fmt: skip
    assert found.value("dropped", "layers") == said


def test_dropping_is_leaving_out(tiny: Path, text_file: Path) -> None:
    """The hidden states skip the dropped layer and nothing else changes."""
    model, whole = load_model(tiny, "fp32"), load_model(tiny, "fp32")
    ids = torch.arange(40).view(2, 20)
    apply(model, Recipe("d", (DropLayers(layers=(1,), most=None),)), ids)
    with torch.no_grad():
        h, context = whole.network.start(ids)
        for index in (0, 2):
            h = whole.network.blocks[index](h, context)
        assert torch.equal(model.network(ids), whole.network.tail(h))


def test_influence_is_one_minus_cosine(tiny: Path) -> None:
    model, ids = load_model(tiny, "fp32"), torch.arange(60).view(3, 20)
    found = look(model, Influence(3, 2), ids)
    with torch.no_grad():
        states, context = [model.network.start(ids)[0]], model.network.start(ids)[1]
        for block in model.blocks():
            states.append(block(states[-1], context))
    for index, value in enumerate(found["influence"]):
        x, y = states[index], states[index + 1]
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert value == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    assert len(found["distance"]) == 2


def test_which_layers_go() -> None:
    influence = [0.5, 0.1, 0.3, 0.1, 0.2, 0.6]
    assert dropped(DropLayers(count=3), 6, influence, ()) == {3, 1, 4}
    assert dropped(DropLayers(count=3, by="even"), 6, influence, ()) == {1, 3, 5}
    run = DropLayers(count=2, by="consecutive")
    assert dropped(run, 6, influence, [0.3, 0.2, 0.1, 0.4, 0.5]) == {2, 3}
    assert dropped(DropLayers(count=0), 6, influence, ()) == set()


class Killed(Exception):
    pass


def test_stopped_at_every_write(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of three stages dies at its n-th rename, for every n; a second run completes it."""
    recipe = Recipe("three", (Prune(share=0.2), Double(), DropLayers(count=1, most=None)))
    compress(prepare(tiny, tmp_path / "whole", recipe, settings(text_file)))
    wanted, real, points = result(tmp_path / "whole"), os.replace, 0
    for stop in range(1, 99):
        out, count = tmp_path / f"out{stop}", 0

        def dying(source: object, target: object, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise Killed
            real(source, target)  # type: ignore[call-overload]

        monkeypatch.setattr(os, "replace", dying)
        try:
            compress(prepare(tiny, out, recipe, settings(text_file)))
            died = False
        except Killed:
            died = True
        monkeypatch.setattr(os, "replace", real)
        if not died:
            break
        points += 1
        assert not out.exists() and partial_of(out).is_dir()
        compress(prepare(tiny, out, recipe, settings(text_file)))
        assert result(out) == wanted, f"died at {stop}"
    assert points > 20


def test_plan_says_what_needs_the_whole_model(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe("whole", (Prune(), Double()))
    job = prepare(tiny, tmp_path / "out", recipe, settings(text_file))
    assert job.plan.in_memory == (False, True)
    assert ("in_memory", "the whole model, in stage 2") in [
        (r.what, r.value) for r in job.plan.rows()
    ]
    small = Settings(Calibration(4, 32), text_file, memory=1 << 20)
    with pytest.raises(BadRequest, match="smallest cap that works"):
        prepare(tiny, tmp_path / "out", recipe, small)


def test_a_wreck_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe("w", (DropLayers(count=2, most=1.0),))
    model, ids = load_model(tiny), torch.arange(64).view(2, 32)
    with pytest.raises(BadRequest, match=r"wrecks this model: perplexity .* before"):
        apply(model, recipe, ids)
    assert model.spec.num_layers == 3, "and the model is as it was"
    text = tmp_path / "ids.json"
    text.write_text(str(ids.tolist()))
    with pytest.raises(BadRequest, match="wrecks"):
        compress(prepare(tiny, tmp_path / "out", recipe, Settings(data=text, dtype="bf16")))
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]


@pytest.mark.parametrize("passes, said", [
    ((DropLayers(count=3),), "leave at least one"),
    ((DropLayers(count=2), DropLayers(count=1)), "leave at least one"),
    ((DropLayers(layers=(3,)),), "no layer 3"),
    ((GPTQ(4), DropLayers(count=1), GPTQ(4)), "quantizes twice"),
    ((GPTQ(4), Double()), "put doubling first"),
])  # fmt: skip
def test_impossible_chains_are_explained(tiny: Path, passes: tuple, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Recipe("bad", passes).check(Source(tiny).spec)


def test_neighbours_share_a_walk() -> None:
    prune, drop, gptq = Prune(), DropLayers(), GPTQ()
    assert Recipe("r", (prune, gptq)).stages() == ((prune, gptq),)
    assert Recipe("r", (drop, prune, gptq)).stages() == (drop, (prune, gptq))
    assert Recipe("r", (gptq, drop)).stages() == ((gptq,), drop)


def test_from_a_recipe_file(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    text = "passes:\n- drop_layers: {count: 1, most: null}\n- rtn: {bits: 4}\n"
    (tmp_path / "r.yaml").write_text(text)
    done = call("compress", tiny, tmp_path / "out", "--recipe", tmp_path / "r.yaml",
                "--data", text_file, "--samples", 4, "--length", 32, "--no-prove", "--json")  # fmt: skip
    assert done == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["num_hidden_layers"] == 2
    with pytest.raises(BadRequest, match="share"):
        recipe_of({"passes": [{"drop_layers": {"share": 1.0}}]}, "here")


SHORT = Training(1, batch=2, length=16)


@pytest.mark.parametrize("passes", [
    (RoundToNearest(4, 32),), (GPTQ(4, 64, True), Activations("int8-static")), (GPTQLevels("nvfp4"),),
    (QAT(training=SHORT),), (QAT("ternary", training=SHORT), Tables(4, 32)), (GPTQ(4, 64), Tables(6, 32)),
    (Prune(share=0.5), QAT(training=SHORT)), (GPTQ(3, 32), DropLayers(count=1, most=None)),
    (CutUnits("head", "l2", 0.2, budget="global", most=None), GPTQ(4, 32)),
    (CutUnits("hidden", "l2", 0.5, most=None), Cluster(4), Distil(training=SHORT)),
    (Factorize("plain", share=0.5), Recover(training=SHORT)),
], ids=lambda passes: " ".join(p.key for p in passes))  # fmt: skip
def test_the_size_that_is_planned_is_the_size_that_comes(
    tiny: Path, tmp_path: Path, text_file: Path, passes: tuple
) -> None:
    """To the byte, headers counted, whatever the stages before left."""
    planned, made = planned_and_made(tiny, tmp_path / "out", passes, text_file)
    assert made == planned


@pytest.mark.parametrize("passes", [
    (Prune(share=0.5),), (Prune(share=0.3, budget="global"), GPTQ(8, 32)),
    (Prune("l1", 0.5), Mixed(group=32, mean=4.0, tried=64)), (Mixed(group=32, mean=3.5, tried=64),),
    (SparseGPT(0.5), Recover(training=SHORT), GPTQ(8, 32)), (SparseGPT(0.6), Tables(6, 32)),
    (CutUnits("neuron", "l2", 0.3, budget="sensitivity", multiple=32, most=None), GPTQ(4, 32)),
], ids=lambda passes: " ".join(p.key for p in passes))  # fmt: skip
def test_what_the_weights_decide_is_planned_to_a_hundredth(
    tiny: Path, tmp_path: Path, text_file: Path, passes: tuple
) -> None:
    """How many zeros there are, and which site gets how many bits, is only known afterwards."""
    planned, made = planned_and_made(tiny, tmp_path / "out", passes, text_file)
    assert made == pytest.approx(planned, rel=0.01)


def planned_and_made(
    folder: Path, out: Path, passes: tuple, text_file: Path
) -> tuple[int, int]:  # fmt: skip
    """The size of a result as its plan says it, and as it is."""
    job = prepare(folder, out, Recipe("r", passes), settings(text_file))
    compress(job)
    planned = next(row.value for row in job.plan.rows() if row.what == "output_bytes")
    assert isinstance(planned, int)
    return planned, file_bytes(Source(out).checkpoint)
