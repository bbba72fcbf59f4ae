"""GPTQ on tables of levels: rounding where inputs are independent, less error where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_gptq import output_error, problem
from test_walk import ids_of

from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.format import TABLES, Levels, parse_format
from onecard.kernels import storage
from onecard.passes import (
    QAT,
    Cluster,
    Factorize,
    GPTQLevels,
    Hash,
    LowRankPlus,
    Prune,
    RoundToLevels,
    SparseGPT,
)
from onecard.passes.base import Pass, Recipe
from onecard.passes.criteria import Shape, keep_mask
from onecard.passes.gptq_levels import search_scales, solve
from onecard.passes.walked import apply

NAMES = ["nf4-g32", "fp4-g64", "mxfp4", "nvfp4", "ternary-g32", "binary-g32"]


@pytest.mark.parametrize("name", NAMES)
def test_identities(name: str) -> None:
    w, h = problem(columns=128)
    format = parse_format(name)
    assert isinstance(format, Levels)
    plain = storage.round_to_levels(w, format)
    diagonal = solve(w, torch.diag(torch.arange(1.0, 129.0)), format, 0.01, 0)
    for part, values in plain.parts.items():
        assert torch.equal(diagonal.parts[part].view(torch.uint8), values.view(torch.uint8)), part
    nearest = output_error(w, storage.to_dense(plain), h)
    mine = output_error(w, storage.to_dense(solve(w, h, format, 0.01, 0)), h)
    searched = output_error(w, storage.to_dense(solve(w, h, format, 0.01, 12)), h)
    assert mine < 0.9 * nearest and searched < nearest


@pytest.mark.parametrize("name", ["nf4-g32", "fp4-g64", "mxfp4", "ternary-g32"])
def test_search_never_raises_the_weighted_error(name: str) -> None:
    w, h = problem(columns=128)
    format = parse_format(name)
    assert isinstance(format, Levels)
    levels, errors = torch.tensor(TABLES[format.table].levels), []
    for steps in (0, 12):
        _, scale = search_scales(w, h.diagonal(), format, steps)
        blocks = w.unflatten(1, (scale.shape[1], -1))
        q = levels[storage.nearest_level(blocks / scale[..., None], levels)] * scale[..., None]
        errors.append(float(((q - blocks).square().flatten(1) * h.diagonal()).sum()))
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_zeros_of_a_pruned_matrix_stay_and_are_made_good(name: str) -> None:
    w, h = problem(columns=128)
    gone = keep_mask(w.abs(), 0.5, Shape(None, "row", "1x1")).logical_not()
    format = parse_format(name)
    assert isinstance(format, Levels)
    pruned = w.masked_fill(gone, 0.0)
    made = storage.to_dense(solve(pruned, h, format, 0.01, 12))
    assert not made[gone].any()
    nearest = storage.to_dense(storage.round_to_levels(pruned, format))
    assert output_error(pruned, made, h) < output_error(pruned, nearest, h)


@pytest.mark.parametrize("later", [
    GPTQLevels("binary"), RoundToLevels("binary"), Cluster(8, vector=2), Hash(8), Factorize(share=0.5),
    LowRankPlus(8), QAT("binary"),
], ids=lambda p: p.title)  # fmt: skip
@pytest.mark.parametrize("first", [Prune(stored="dense"), SparseGPT()], ids=lambda p: p.key)
def test_what_has_no_zeros_does_not_follow_pruning(tiny: Path, first: Pass, later: Pass) -> None:
    with pytest.raises(BadRequest, match="set to zero would not stay so") as failure:
        Recipe("r", (first, later)).check(Source(tiny).spec)
    assert failure.value.do
    for stays in (GPTQLevels("ternary"), RoundToLevels("fp8-row"), Cluster(4), QAT("ternary")):
        Recipe("r", (first, stays)).check(Source(tiny).spec)


@pytest.mark.parametrize("settings", [{"table": "nf4"}, {"table": "mxfp4", "correct": 1.0}])
def test_saved_and_loaded(tiny: Path, text_file: Path, tmp_path: Path, settings: dict) -> None:
    model, ids = load_model(tiny), ids_of(tiny, text_file)
    report = apply(model, Recipe("g", (GPTQLevels(**settings),)), ids)
    assert any(row.what == "relative_output_error" for row in report.rows)
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.network(ids[:1]), model.network(ids[:1]))


@pytest.mark.parametrize("settings", [{"table": "fp8-row"}, {"damp": 2.0}, {"table": "nf5"}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(BadRequest):
        GPTQLevels(**settings)
