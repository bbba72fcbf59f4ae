"""Cutting units by score: what goes, budgets, refusals, chains; streamed equals in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from onecard.calibrate.data import Calibration
from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.nn.model import Model
from onecard.passes import (
    GPTQ,
    CutUnits,
    Distil,
    DropLayers,
    Fuse,
    Prune,
    Recover,
    Rotate,
    find_recipe,
    recipe_of,
)
from onecard.passes.base import Recipe
from onecard.passes.distill import Targets
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.memory import look
from onecard.passes.structure import best
from onecard.passes.walked import apply

IDS = torch.arange(256).view(8, 32)


def cut(folder: Path, *passes: Any) -> Model:
    model = load_model(folder, "fp32")
    apply(model, Recipe("r", passes), IDS)
    return model


def useless(folder: Path, out: Path) -> Path:
    """A model some of whose units do nothing: nothing reads them."""
    model = load_model(folder, "fp32")
    for block in model.blocks():
        block.linear("feed_forward.down").weight.data[:, ::4] = 0  # type: ignore[union-attr]
        block.linear("attention.o").weight.data[:, 32:64] = 0  # type: ignore[union-attr]
    return save_model(model, out)


@pytest.mark.parametrize("by", ["wanda", "gradient", "taylor"])
@pytest.mark.parametrize("budget", ["uniform", "global", "sensitivity"])
def test_useless_neurons_go_first(tiny: Path, tmp_path: Path, by: str, budget: str) -> None:
    folder = useless(tiny, tmp_path / "useless")
    whole = load_model(folder, "fp32")
    model = cut(folder, CutUnits("neuron", by, 0.25, budget=budget))  # type: ignore[arg-type]
    assert [layer.feed_forward.width for layer in model.spec.layers] == [192] * 3
    with torch.no_grad():
        assert torch.allclose(model.network(IDS), whole.network(IDS), atol=1e-4)


def test_useless_heads_go_first(tiny: Path, tmp_path: Path) -> None:
    """Of every two heads that share keys one does nothing (head 1), or stays (of the other two)."""
    folder = useless(tiny, tmp_path / "useless")
    survey = CutUnits("head", "taylor", 0.5).survey(Source(folder).spec)
    found = look(load_model(folder, "fp32"), survey, IDS)
    assert all(row["attention"][1] == 0 < min(row["attention"][::2]) for row in found)
    assert best([5.0, 1.0, 2.0, 3.0], 2, runs=2).tolist() == [0, 3]
    model = cut(folder, CutUnits("head", "taylor", 0.5, most=None))
    assert {layer.attention.num_heads for layer in model.spec.layers} == {2}


def test_sensitive_layers_keep_more(tiny: Path) -> None:
    """A layer that hardly reads its neurons loses more of them, and about as many go as were asked for."""
    model = load_model(tiny, "fp32")
    for block, factor in zip(model.blocks(), (1.0, 0.01, 1.0), strict=True):
        block.linear("feed_forward.down").weight.data *= factor  # type: ignore[union-attr]
    by = CutUnits("neuron", "random", 0.4, budget="sensitivity", multiple=8, most=None)
    apply(model, Recipe("r", (by,)), IDS)
    first, second, third = (layer.feed_forward.width for layer in model.spec.layers)
    assert second == 104 < max(first, third)  # 0.6 is the most that is tried
    assert abs(first + second + third - 0.6 * 3 * 256) <= 24


@pytest.mark.parametrize("unit", ["head", "kv_group", "neuron", "hidden"])
@pytest.mark.parametrize("by", ["l1", "l2", "random", "wanda", "taylor"])
def test_every_unit_by_every_score(tiny: Path, unit: str, by: str) -> None:
    model = cut(tiny, CutUnits(unit, by, 0.5, most=None))  # type: ignore[arg-type]
    layer = model.spec.layers[0]
    assert (layer.attention.num_heads, layer.attention.num_kv_heads) == {
        "head": (2, 2), "kv_group": (2, 1)}.get(unit, (4, 2))  # fmt: skip
    assert layer.feed_forward.width == (128 if unit == "neuron" else 256)
    assert model.spec.hidden == (64 if unit == "hidden" else 128)
    with torch.no_grad():
        assert torch.isfinite(model.network(IDS)).all()


def test_global_budgets_differ_by_layer(tiny: Path, tmp_path: Path, text_file: Path) -> None:
    recipe = Recipe("r", (CutUnits("neuron", "taylor", 0.3, budget="global", multiple=8, most=None),
                          DropLayers(layers=(0,), most=None), GPTQ(4, None)))  # fmt: skip
    settings = Settings(Calibration(4, 32), text_file, "bf16")
    job = prepare(tiny, tmp_path / "out", recipe, settings)
    assert job.plan.in_memory == (True, False, False)
    compress(job)
    streamed, model = load_model(tmp_path / "out"), load_model(tiny)
    apply(model, recipe, job.ids)
    assert streamed.spec == model.spec
    widths = [layer.feed_forward.width for layer in model.spec.layers]
    assert len(set(widths)) > 1 or widths[0] != 256
    assert all(width % 8 == 0 for width in widths)
    save_model(model, tmp_path / "memory")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "memory"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("budget", ["global", "sensitivity"])
def test_heads_that_go_many_at_a_time_are_taken_from_some_layers(tiny: Path, budget: str) -> None:
    settings = CutUnits("head", "l2", 0.2, budget=budget, most=None)  # type: ignore[arg-type]
    planned = settings.leaves(
        Source(tiny).spec
    )  # of 3 layers with 4 heads, of which 2 go at a time
    model = load_model(tiny, "fp32")
    rows = apply(model, Recipe("r", (settings,)), IDS).rows
    for spec in (planned, model.spec):
        assert sorted(layer.attention.num_heads for layer in spec.layers) == [2, 4, 4]
    assert [r.value for r in rows if (r.where, r.what) == ("heads", "dropped")] == ["2 of 12"]


@pytest.mark.parametrize("multiple, share", [(1, 0.3), (7, 0.3), (100, 0.5), (100, 0.9)])
def test_a_global_budget_is_met_as_nearly_as_pieces_allow(
    tiny: Path, multiple: int, share: float
) -> None:
    spec, width = Source(tiny).spec, 256
    settings = CutUnits("neuron", "random", share, budget="global", multiple=multiple)
    draw = torch.Generator().manual_seed(0)
    found = [{"feed_forward": torch.rand(width, generator=draw).tolist()} for _ in range(3)]
    left = [row["feed_forward"] for row in settings.counts(spec, found)]
    wanted = min(share * 3 * width, 3 * (width - multiple))  # a layer keeps what goes at a time
    assert abs(3 * width - sum(left) - wanted) <= multiple / 2
    assert all(n % multiple == 0 or n == width for n in left) and min(left) >= multiple


@pytest.mark.parametrize("name", ["heads-20", "heads-neurons-gptq-int4"])
def test_named_cuts_of_heads_suit_the_shipped_model(name: str) -> None:
    recipe, spec = find_recipe(name), Source("demo").spec
    recipe.check(spec)
    heads = recipe.passes[0]
    assert isinstance(heads, CutUnits)
    counts = [sum(layer.attention.num_heads for layer in s.layers)
              for s in (spec, heads.leaves(spec))]  # fmt: skip
    assert abs(counts[0] - counts[1] - heads.share * counts[0]) <= 2  # 4 go at a time


@pytest.mark.parametrize("by", ["l2", "wanda"])
def test_streamed_width(tiny: Path, tmp_path: Path, text_file: Path, by: str) -> None:
    recipe = Recipe("r", (CutUnits("hidden", by, 0.25, most=None, multiple=32),))  # type: ignore[arg-type]
    job = prepare(tiny, tmp_path / "out", recipe, Settings(Calibration(4, 32), text_file, "bf16"))
    compress(job)
    model = load_model(tiny)
    apply(model, recipe, job.ids)
    save_model(model, tmp_path / "memory")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "memory"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert load_model(tmp_path / "out").spec.hidden == 96


def test_apoz_counts_what_relu_gives(tmp_path: Path) -> None:
    """Neurons that are never on (a bias far below zero) go."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    model = load_model(tmp_path / "opt", "fp32", tokenizer=False)
    for block in model.blocks():
        block.linear("feed_forward.up").bias.data[::2] = -9  # type: ignore[union-attr]
    ids = torch.randint(0, 300, (4, 32))
    with torch.no_grad():
        wanted = model.network(ids)
        apply(model, Recipe("r", (CutUnits("neuron", "apoz", 0.5),)), ids)
        assert model.spec.layers[0].feed_forward.width == 32
        assert torch.allclose(model.network(ids), wanted, atol=1e-5)


def test_experts_stay_equally_wide(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, shared_expert_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    for budget in ("uniform", "global", "sensitivity"):
        model = load_model(tmp_path / "moe", "fp32", tokenizer=False)
        apply(
            model, Recipe("r", (CutUnits("neuron", "taylor", 0.4, budget=budget, most=None),)), IDS
        )  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.isfinite(model.network(IDS)).all()
        again = load_model(save_model(model, tmp_path / budget), "fp32", tokenizer=False)
        assert again.spec == model.spec


def test_a_wreck_says_its_number(stories: Path, data: Path) -> None:
    """Half of a small model's neurons by magnitude: refused; as `most: null` it is delivered."""
    model = load_model(stories, "fp32")
    text = (data / "tinystories" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    ids = torch.tensor(model.tokenizer.encode(text[:20000])[: 8 * 256]).view(8, 256)
    with pytest.raises(BadRequest, match=r"structured pruning wrecks this model: perplexity"):
        apply(model, Recipe("r", (CutUnits("neuron", "l1", 0.5),)), ids)
    report = apply(model, Recipe("r", (CutUnits("neuron", "l1", 0.5, most=None),)), ids)
    row = next(row for row in report.rows if row.what == "perplexity")
    assert float(row.value) > 3 * float(row.before)  # type: ignore[arg-type]


@pytest.mark.parametrize("item, said", [
    ({"share": 1.0}, "share"), ({"unit": "head", "by": "apoz"}, "neurons"),
    ({"unit": "hidden", "budget": "global"}, "uniform"), ({"keep": 0}, "keep"),
    ({"multiple": 0}, "multiple"), ({"unit": "row"}, "unit"), ({"most": 0.5}, "most"),
])  # fmt: skip
def test_bad_settings(item: dict, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        recipe_of({"passes": [{"cut": item}]}, "here")


@pytest.mark.parametrize("passes, said", [
    ((CutUnits("head", "l2", keep=3),), "a multiple of 2"),
    ((CutUnits("kv_group", "l2", keep=3),), "up to 2"),
    ((CutUnits("neuron", "apoz"),), "silu gives none"),
    ((GPTQ(4), CutUnits()), "put structured pruning first"),
    ((Prune(), CutUnits()), "stored without their zeros"),
    ((Prune(), Fuse()), "put folding of norms and biases first"), ((Prune(), Rotate()), "put rotation first"),
    ((DropLayers(count=1), Recover("blocks")), "2 blocks 128 wide, 3 of 128"),
    ((Rotate(), Recover("blocks")), "residual: never"),
    ((CutUnits("kv_group", "l2", share=0.5), Distil(Targets(attention=1.0))), "use relations"),
    ((CutUnits("head", "l2", share=0.1),), "takes none of the heads\nthere are 4, and 2 go at a time\n"
     "share: 0.5 is the nearest"),
    ((CutUnits("head", "l2", share=0.05, budget="global"),), "there are 12 in all, and 2 go at a time\n"
     "share: 0.167 is the nearest"),
    ((CutUnits("head", "l2", multiple=4),), "lower multiple"),
    ((DropLayers(share=0.1),), "takes none of 3 layers\ncount: 1"),
    ((CutUnits(multiple=10**9, budget="global"),), "takes none of the neurons"),
])  # fmt: skip
def test_what_does_not_suit_the_model(tiny: Path, passes: tuple, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Recipe("bad", passes).check(Source(tiny).spec)
