"""Checkpoints as they come: sharded, tied or not, mixed dtypes, extra tensors; and what we write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from onecard.checkpoint import save
from onecard.checkpoint.load import Source, load_model, verify
from onecard.checkpoint.shards import Buffers, Checkpoint, read_header, write_file
from onecard.core.errors import BadRequest
from onecard.passes import Prune, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare

IDS = torch.arange(3, 40)[None]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, "fp32", tokenizer=False).network(IDS)


def test_sharded_is_single(tiny: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(Checkpoint(tmp_path / "sharded").files) > 2
    assert torch.equal(logits(tmp_path / "sharded"), logits(tiny))


def test_large_results_are_sharded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above SINGLE_FILE a result is one shard per part, with an index that transformers reads."""
    recipe = Recipe("r", (RoundToNearest(8),))
    compress(prepare(tiny, tmp_path / "one", recipe, Settings()))
    monkeypatch.setattr(save, "SINGLE_FILE", 1000)
    compress(prepare(tiny, tmp_path / "many", recipe, Settings()))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and all((tmp_path / "many" / name).is_file() for name in files)
    assert index["metadata"]["total_size"] == Checkpoint(tmp_path / "one").nbytes
    assert torch.equal(logits(tmp_path / "many"), logits(tmp_path / "one"))
    verify(tmp_path / "many")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
    with torch.no_grad():
        assert (peer(IDS).logits - logits(tmp_path / "many")).abs().max() < 1e-4


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    """The library reads what we write, bit for bit, empty and scalar tensors included."""
    from onecard.checkpoint.load import as_array

    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7), "empty": torch.empty(0, 4),
               "half": torch.randn(2, 2).half(), "flag": torch.tensor([True, False]),
               "scalar": torch.tensor(2.5)}  # fmt: skip
    path = tmp_path / "x.safetensors"
    write_file(path, {name: as_array(tensor) for name, tensor in tensors.items()})
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_headers_of_the_library_are_read(tmp_path: Path) -> None:
    save_file(
        {"a": torch.randn(2, 3), "c": torch.ones(5, dtype=torch.int8)}, tmp_path / "x.safetensors"
    )
    entries = read_header(tmp_path / "x.safetensors")
    assert (
        entries["a"].shape == (2, 3) and entries["a"].dtype == "fp32" and entries["c"].nbytes == 5
    )


def test_untied_and_tied_heads(tmp_path: Path) -> None:
    untied = make_llama(tmp_path / "untied", tie_word_embeddings=False)
    found = load_file(untied / "model.safetensors")
    assert "lm_head.weight" in found
    compress(prepare(untied, tmp_path / "out", Recipe("r", (RoundToNearest(8),)), Settings()))
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(kept["lm_head.weight"], found["lm_head.weight"])
    # config says untied, the head is missing: it is the embedding, as transformers does
    del found["lm_head.weight"]
    save_file(found, untied / "model.safetensors", {"format": "pt"})
    network = load_model(untied, tokenizer=False).network
    assert network.tail.head.weight is network.stem.embedding.weight
    compress(prepare(untied, tmp_path / "said", Recipe("r", (RoundToNearest(8),)), Settings()))
    assert (
        json.loads((tmp_path / "said" / "config.json").read_text())["tie_word_embeddings"] is True
    )


def test_mixed_dtypes(tiny: Path, tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 weights: read, run, and kept as they are."""
    folder = Path(shutil.copytree(tiny, tmp_path / "mixed"))
    found = load_file(folder / "model.safetensors")
    mixed = {k: v.float() if "norm" in k else v for k, v in found.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    assert Source(folder).dtype == "bf16"
    assert torch.equal(logits(folder), logits(tiny))
    compress(prepare(folder, tmp_path / "out", Recipe("p", (Prune(stored="dense"),)), Settings()))
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.dtype for k, v in kept.items()} == {k: v.dtype for k, v in mixed.items()}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_scales_follow_the_stored_dtype(tmp_path: Path, dtype: str) -> None:
    folder = make_llama(tmp_path / "model", dtype)
    report = compress(
        prepare(folder, tmp_path / "out", Recipe("r", (RoundToNearest(4),)), Settings())
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    scales = {str(v.dtype) for k, v in found.items() if k.endswith("weight_scale")}
    assert scales == {f"torch.{dtype}"}
    size = sum(v.nbytes for v in found.values())
    assert report.value("bits_per_weight") == 8 * size / report.value("parameters")
    assert report.value("file_bytes") == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_extra_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "extra"))
    found = load_file(folder / "model.safetensors")
    found |= {
        "vision.tower.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    assert Source(folder).extra == ("vision.tower.weight",)
    report = compress(
        prepare(folder, tmp_path / "out", Recipe("r", (RoundToNearest(8),)), Settings())
    )
    assert any("vision.tower.weight" in text for _, text in report.notes)


def test_tensor_in_two_shards_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "twice"))
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(found, folder / name, {"format": "pt"})
    index = {"weight_map": {k: f"{'ab'[i % 2]}.safetensors" for i, k in enumerate(found)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequest, match="also in"):
        Source(folder)


def test_everything_is_carried_over(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("mine")
    out = tmp_path / "out"
    compress(prepare(folder, out, Recipe("r", (RoundToNearest(8),)), Settings()))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"model.safetensors", "config.json", "recipe.yaml"} <= manifest["files"].keys()
    assert manifest["source"].keys() == {"model.safetensors", "config.json"}
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_buffers_are_used_again_only_when_nobody_refers_to_them() -> None:
    buffers = Buffers()
    first = buffers.empty(64)
    place = first.ctypes.data
    tensor = torch.frombuffer(first.data, dtype=torch.bfloat16)[8:]
    del first
    second = buffers.empty(64)
    assert second.ctypes.data != place
    del tensor
    assert buffers.empty(64).ctypes.data == place
    assert buffers.empty(32).size == 32
