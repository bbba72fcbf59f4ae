"""Folding changes no logit; what is listed is what was folded; what the engine fuses is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_families import CASES, random_model

from onecard.checkpoint.load import load_model
from onecard.nn.layers import Normalize
from onecard.passes import Fuse, RoundToNearest
from onecard.passes.base import Data, Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.walked import apply

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
