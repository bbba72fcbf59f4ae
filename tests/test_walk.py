"""The walk: shared passes equal separate ones, streamed equals in memory, replay equals suspended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_llama

from onecard.calibrate.data import Calibration
from onecard.calibrate.stats import HESSIAN
from onecard.calibrate.walk import compress_block, walk
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.report import Report
from onecard.core.spec import sites
from onecard.passes import GPTQ, Prune, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.memory import ModelBlocks
from onecard.passes.walked import apply

SETTINGS = Calibration(6, 48)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def ids_of(folder: Path, text_file: Path) -> torch.Tensor:
    return prepare(folder, folder.parent / "never", Recipe("g", (GPTQ(),)),
                   Settings(SETTINGS, text_file)).ids  # type: ignore[return-value]  # fmt: skip


@pytest.mark.parametrize("recipe", [
    Recipe("rtn", (RoundToNearest(4),)),
    Recipe("gptq", (GPTQ(4, 64),)),
    Recipe("chain", (Prune(share=0.3), GPTQ(3, 32))),
    Recipe("prune", (Prune(pattern="2:4"),)),
], ids=lambda r: r.name)  # fmt: skip
def test_streamed_equals_in_memory(
    tiny: Path, text_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    compress(prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")


def test_one_walk_equals_two(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Pruning and then GPTQ in one walk gives what two walks over the whole model give."""
    ids = ids_of(tiny, text_file)
    first, second = Prune(share=0.4), GPTQ(4, 64)
    joined, separate = load_model(tiny), load_model(tiny)
    apply(joined, Recipe("both", (first, second)), ids)
    apply(separate, Recipe("first", (first,)), ids)
    apply(separate, Recipe("second", (second,)), ids)
    save_model(joined, tmp_path / "a")
    save_model(separate, tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "b")


def test_replay_equals_suspended(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    ids = ids_of(tiny, text_file)
    for name, replay in (("a", False), ("b", True)):
        model = load_model(tiny)
        with torch.no_grad():
            hidden = [model.network.start(ids)[0]]
        walk(ModelBlocks(model), (GPTQ(4, 64),), hidden, replay=replay)
        save_model(model, tmp_path / name)
    assert same(tmp_path / "a", tmp_path / "b")


def test_statistics_follow_the_compressed_model(tiny: Path, text_file: Path) -> None:
    """What a site sees comes from everything before it, already compressed, its own block included."""
    model = load_model(tiny, "fp32")
    ids = ids_of(tiny, text_file)
    seen: dict[str, torch.Tensor] = {}

    class Spy:
        needs = frozenset({HESSIAN})

        def site(self, site):  # type: ignore[no-untyped-def]
            seen[f"{site.block}.{site.name}"] = site.stats.hessian
            yield from RoundToNearest(3).site(site)

    with torch.no_grad():
        hidden = [model.network.start(ids)[0]]
        walk(ModelBlocks(model), (Spy(),), hidden)  # type: ignore[arg-type]
        h, context = model.network.start(ids)  # the model is compressed now: run it plainly
        for block in model.blocks():
            stages = block.stages(h, context)
            for site in sites(block.layer):
                name, x = next(stages)
                x = x.flatten(0, -2)
                wanted = 2 * x.T @ x / x.shape[0]
                got = seen[f"blocks.{block.index}.{name}"]
                assert name == site.name and torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)
            h = block(h, context)


def test_experts_without_tokens(tmp_path: Path, text_file: Path) -> None:
    """With few tokens some of many experts stay idle: they are rounded, and the report says so."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_experts=16,
        num_experts_per_tok=1, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, decoder_sparse_step=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    model = load_model(tmp_path / "moe", "fp32", tokenizer=False)
    report = apply(model, Recipe("g", (GPTQ(4, 32),)), torch.randint(0, 300, (1, 6)))
    idle = [row.where for row in report.rows if row.what == "calibration_tokens"]
    assert idle and all("expert" in where for where in idle)
    assert all(not linear.format.dense for _, linear in model.linears())
    with torch.no_grad():
        assert torch.isfinite(model.network(torch.randint(0, 300, (1, 6)))).all()


def test_sites_cover_all_linears_of_a_block(tiny: Path) -> None:
    model = load_model(tiny)
    block = next(model.blocks())
    named = {name for site in sites(block.layer) for name in site.linears}
    prefix = "blocks.0."
    assert {n.removeprefix(prefix) for n, _ in model.linears() if n.startswith(prefix)} == named


def test_walk_without_needs_runs_no_block(tiny: Path) -> None:
    model = load_model(tiny)
    block = next(model.blocks())
    found: list = []
    assert compress_block(ModelBlocks(model), block, (RoundToNearest(8),), [], found) == []
    assert all(not module.format.dense for module in [block.attention.q, block.feed_forward.down])  # type: ignore[union-attr]


@pytest.mark.parametrize("passes, said", [
    ((), "no passes"),
    ((GPTQ(4), RoundToNearest(4)), "quantizes twice"),
    ((GPTQ(4), Prune()), "put"),
])  # fmt: skip
def test_order_conflicts_are_explained(tiny: Path, passes: tuple, said: str) -> None:
    model = load_model(tiny)
    with pytest.raises(BadRequest, match=said):
        apply(model, Recipe("bad", passes), None)


def test_pruning_shares_and_patterns(tiny: Path) -> None:
    for settings in (Prune(share=0.5), Prune(share=0.25, scope="row"), Prune(pattern="2:4"),
                     Prune(criterion="l2", pattern="4:8")):  # fmt: skip
        model, before = load_model(tiny), load_model(tiny)
        apply(model, Recipe("p", (settings,)), None)
        for (name, linear), (_, old) in zip(model.linears(), before.linears(), strict=True):
            w, o = linear.matrix(), old.matrix()
            kept = w != 0
            assert torch.equal(w[kept], o[kept]), name
            if settings.pattern:
                of = int(settings.pattern.split(":")[1])
                assert (kept.unflatten(1, (-1, of)).sum(-1) <= of // 2).all()
                lost = o.abs().masked_fill(kept, 0).unflatten(1, (-1, of)).amax(-1)
                least = o.abs().masked_fill(~kept, 9).unflatten(1, (-1, of)).amin(-1)
                assert (lost <= least).all()
            elif settings.scope == "row":
                assert ((~kept).sum(1) == round(0.25 * w.shape[1])).all()
            else:
                assert o[~kept].abs().max() <= w[kept].abs().min()
                assert (~kept).float().mean() == pytest.approx(0.5, abs=0.01)


def test_report_rows_are_json(tiny: Path, tmp_path: Path) -> None:
    report = compress(
        prepare(tiny, tmp_path / "out", Recipe("r", (RoundToNearest(8),)), Settings())
    )
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["what"] for row in again["rows"]} >= {"file_bytes", "bits_per_weight", "format"}
    assert report.value("file_bytes") == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("recipe", ["rtn-int4", "gptq-int4", "magnitude-50"])
def test_peak_is_what_was_planned(tmp_path: Path, recipe: str) -> None:
    """A process of its own stays under its plan, and the plan is no mere upper bound."""
    model = make_llama(tmp_path / "model", hidden_size=1024, intermediate_size=2816)
    command = [sys.executable, "-m", "onecard", "compress", str(model), str(tmp_path / "out"),
               "--recipe", recipe, "--samples", "16", "--length", "128", "--no-prove", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=True)
    report = Report.from_json(done.stdout.decode())
    planned = float(report.value("planned_peak_bytes"))  # type: ignore[arg-type]
    peak = float(report.value("peak_memory_bytes"))  # type: ignore[arg-type]
    assert peak <= planned <= 1.25 * peak
