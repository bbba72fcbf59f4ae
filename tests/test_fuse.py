"""Folding changes no logit; what is listed is what was folded; what the engine fuses is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import call
from test_families import CASES, random_model

from onecard.checkpoint.load import load_model
from onecard.core.fusions import fusions
from onecard.core.report import Report
from onecard.core.spec import Spec
from onecard.nn.families import spec_of
from onecard.nn.layers import Normalize
from onecard.passes import Fuse, RoundToNearest
from onecard.passes.base import Data, Recipe
from onecard.passes.job import Settings, apply, compress, prepare

IDS = torch.arange(3, 11)[None]


@pytest.mark.parametrize("case", CASES)
def test_every_family_says_the_same(case: str, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    model = load_model(tmp_path, "fp32", tokenizer=False)
    with torch.no_grad():
        before = model.network(IDS)
        _, rows = Fuse().model(model, Data())
        after = model.network(IDS)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-4
    found = {row.what: row.value for row in rows}
    assert found["logit_difference_float32"] < 1e-4  # type: ignore[operator]
    told = {(row.where, str(row.value).split(" ")[0]) for row in rows if row.what == "folded"}
    offset = model.spec.norm.offset
    for block in model.blocks():
        for name in ("norm_attention_in", "norm_feed_forward_in"):
            norm = getattr(block, name)
            if isinstance(norm, Normalize) and (f"blocks.{block.index}", name) in told:
                assert bool((norm.weight == 1 - offset).all())
                assert norm.bias is None or not bool(norm.bias.any())
            elif isinstance(norm, Normalize):  # its bias has nowhere to go
                assert norm.bias is not None
    assert told or model.spec.layers[0].order == "post"


def test_biases_that_softmax_passes_on_or_hides(tmp_path: Path) -> None:
    random_model("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path, "fp32", tokenizer=False)
    _, rows = Fuse(norms=False).model(model, Data())
    assert [row.value for row in rows if row.where == "blocks.0"] == [
        "bias of attention.v -> bias of attention.o",
        "bias of attention.k -> nothing: softmax does not see it",
    ]
    for block in model.blocks():
        assert not bool(block.attention.v.bias.any()) and not bool(block.attention.k.bias.any())


def test_folded_then_rounded(tiny: Path, tmp_path: Path) -> None:
    """As a stage before a quantizer, from folder to folder and in memory."""
    recipe = Recipe("r", (Fuse(), RoundToNearest(bits=8)))
    report = compress(prepare(tiny, tmp_path / "out", recipe, Settings()))
    assert report.value("folded", "stage 1: blocks.0") == (
        "norm_attention_in -> attention.q, attention.k, attention.v"
    )
    assert 0 < float(report.value("logit_difference_stored") or 0) < 0.05
    model = load_model(tiny)
    apply(model, recipe, None)
    made = load_model(tmp_path / "out")
    for (name, a), (_, b) in zip(made.linears(), model.linears(), strict=True):
        assert torch.equal(a.matrix(), b.matrix()), name


def spec_named(case: str) -> Spec:
    return spec_of(random_model(case).config.to_dict() | {"architectures": [CASES[case][0]]})


@pytest.mark.parametrize(
    "case", ["llama", "gemma2", "gpt2", "neox", "opt-post", "mixtral", "qwen2-moe"]
)
def test_what_the_engine_fuses_follows_the_spec(case: str) -> None:
    spec = spec_named(case)
    found = [(where, " + ".join(f.parts)) for where, f in fusions(spec)]
    text = "\n".join(parts for _, parts in found)
    layer = spec.layers[0]
    assert "attention.q + attention.k + attention.v" in text
    assert ("gate" in text) == layer.feed_forward.gated
    assert ("rope" in text) == (layer.attention.rope is not None)
    assert ("attention.o + residual sum" in text) == (layer.order == "pre")
    assert ("sum of both branches" in text) == (layer.order == "parallel")
    assert ("each expert" in text) == (layer.feed_forward.experts is not None)
    assert ("their offset" in text) == (spec.norm.offset != 0)
    assert ("head + soft cap" in text) == (spec.final_soft_cap is not None)
    blocks = {where for where, _ in found if where != "model"}
    assert len(blocks) == len(set(spec.layers))


def test_every_fusion_names_a_function_of_the_engine() -> None:
    import re

    from onecard.core import fusions as module

    engine = Path(module.__file__).parents[1] / "kernels" / "csrc"
    text = "".join((engine / name).read_text() for name in ("forward.cpp", "attention.cpp"))
    for case in ("llama", "gemma2", "mixtral", "neox"):
        for _, fusion in fusions(spec_named(case)):
            name = fusion.by.rpartition("::")[2]
            if name != "laying out":
                assert re.search(rf"\b{name}\(", text), name


def test_inspect_lists_them(capsys: pytest.CaptureFixture) -> None:
    assert call("inspect", "demo", "--fusions", "--json") == 0
    report = Report.from_json(capsys.readouterr().out)
    rows = {(row.where, row.what) for row in report.rows}
    assert ("blocks.0-7", "attention.q + attention.k + attention.v") in rows
    assert ("model", "cos and sin of all layers") in rows
