"""GPTQ on tables of levels: rounding where inputs are independent, less error where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_gptq import output_error, problem
from test_walk import ids_of

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.format import TABLES, Levels, parse_format
from onecard.kernels import storage
from onecard.passes import GPTQLevels
from onecard.passes.base import Recipe
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
