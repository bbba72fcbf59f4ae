"""Rounding from file to file gives what the walk gives, byte for byte, and goes on where that stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from conftest import make_llama
from safetensors.torch import load_file, save_file

from onecard.checkpoint import shards
from onecard.checkpoint.journal import partial_of
from onecard.checkpoint.shards import Bytes, Checkpoint, sha256_of, write_file
from onecard.core.errors import BadRequest, FailedWork
from onecard.passes import RoundToNearest, job, rounding, walked
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, file_bytes, prepare

SIZES = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "hidden_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        intermediate_size=96, num_key_value_heads=2, **SIZES)),
    "phi3: fused": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(
        intermediate_size=96, num_key_value_heads=2, pad_token_id=0, **SIZES)),
    "neox: by head": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        intermediate_size=96, **SIZES)),
    "gpt2: transposed": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    "opt: biases": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
        ffn_dim=96, word_embed_proj_dim=64, **SIZES)),
    "moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_key_value_heads=2, head_dim=16, decoder_sparse_step=1, **SIZES)),
}  # fmt: skip
GRIDS = (
    RoundToNearest(4), RoundToNearest(3, 32), RoundToNearest(8, None),
    RoundToNearest(5, 32, zero_point=True), RoundToNearest(2, None, zero_point=True),
)  # fmt: skip


def result(out: Path) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in out.iterdir() if not p.name.startswith("report.")}


def by(way: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on recipes are carried out this way."""
    monkeypatch.setattr(job, "way_of", lambda recipe: way)


def both(model: Path, folder: Path, rtn: RoundToNearest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result of both ways, which are the same."""
    made = []
    for way in (rounding, walked):
        by(way, monkeypatch)
        out = folder / way.__name__
        prepared = prepare(model, out, Recipe("r", (rtn,)), Settings())
        report = compress(prepared)
        assert prepared.plan.output == file_bytes(Checkpoint(out))
        made.append((result(out), [r for r in report.rows if r.what == "format"]))
    assert made[0] == made[1]
    return folder / rounding.__name__


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_layout(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, permuted, transposed matrices, biases and experts, in pieces of a few rows or less than one."""
    for holder in (rounding, shards):
        monkeypatch.setattr(holder, "PIECE", 300 if dtype == torch.float32 else 1000)
    model = tmp_path / "model"
    MODELS[name]().to(dtype).save_pretrained(model)
    for number, rtn in enumerate(GRIDS):
        both(model, tmp_path / str(number), rtn, monkeypatch)


def test_more_than_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded source, and a result of one file per part."""
    from onecard.checkpoint import save
    from onecard.passes import outline

    MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    for module in (save, outline):
        monkeypatch.setattr(module, "SINGLE_FILE", 1)
    out = both(tmp_path / "model", tmp_path, RoundToNearest(4), monkeypatch)
    assert len(list(out.glob("*.safetensors"))) == 4


def test_dtypes_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are in the model's dtype; one that overflows there is named."""
    make_llama(tmp_path / "model", num_hidden_layers=1)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, file, {"format": "pt"})
    both(tmp_path / "model", tmp_path, RoundToNearest(4), monkeypatch)
    tensors[name][3, 5] = 1e6
    save_file(tensors, file, {"format": "pt"})
    said = []
    for way in (rounding, walked):
        by(way, monkeypatch)
        with pytest.raises(FailedWork, match=r"blocks.0.feed_forward.up: a scale is not") as error:
            compress(prepare(tmp_path / "model", tmp_path / way.__name__[-4:], RTN, Settings()))
        said.append(str(error.value))
    assert said[0] == said[1]


RTN = Recipe("r", (RoundToNearest(4),))


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.input_layernorm.weight", "lm_head.weight",
])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_numbers_that_are_none(
    name: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor is named with how many there are, by both ways alike, and nothing is left behind."""
    make_llama(tmp_path / "model", num_hidden_layers=2, tie_word_embeddings=False)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[7::1000] = value
    save_file(tensors, file, {"format": "pt"})
    count = len(tensors[name].view(-1)[7::1000])
    for way in (rounding, walked):
        by(way, monkeypatch)
        with pytest.raises(BadRequest, match=f"{name} holds {count} values that are NaN"):
            compress(prepare(tmp_path / "model", tmp_path / "out", RTN, Settings()))
        assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("way", [rounding, walked])
def test_source_that_changes_meanwhile(
    way: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result of two versions of a model is none, and the manifest would name the later one."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny, model)
    file = model / "model.safetensors"
    by(way, monkeypatch)

    def change(done: int, total: int, what: str) -> None:
        if (
            done == 1
        ):  # in place: other blocks are being read, and a file cut short is another error
            with file.open("r+b") as held:
                held.seek(-2, os.SEEK_END)
                byte = held.read(1)[0]
                held.seek(-2, os.SEEK_END)
                held.write(bytes([byte ^ 1]))

    with pytest.raises(FailedWork, match="changed while it was compressed"):
        compress(prepare(model, out, RTN, Settings()), change)
    assert not out.exists()
    compress(prepare(model, out, RTN, Settings(force=True)))
    assert (out / "manifest.json").is_file()


class Killed(Exception):
    pass


@pytest.mark.parametrize("first, then", [(rounding, walked), (walked, rounding)])
def test_one_way_goes_on_where_the_other_stopped(
    first: ModuleType, then: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = both(tiny, tmp_path, RoundToNearest(4), monkeypatch)
    real, out = shards.write_chunks, tmp_path / "out"
    written: list[str] = []

    def dying(path: Path, chunks: object) -> str:
        if path.name == "block-00001.safetensors":
            raise Killed
        written.append(path.name)
        return real(path, chunks)  # type: ignore[arg-type]

    by(first, monkeypatch)
    monkeypatch.setattr(shards, "write_chunks", dying)
    with pytest.raises(Killed):
        compress(prepare(tiny, out, RTN, Settings()))
    lines = (partial_of(out) / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("part") for line in lines] == [None, "stem", "block-00000"]
    by(then, monkeypatch)
    done = {"stem.safetensors", "block-00000.safetensors"}
    monkeypatch.setattr(shards, "write_chunks", lambda path, chunks: (
        pytest.fail(f"{path} is written again") if path.name in done else real(path, chunks)))  # fmt: skip
    compress(prepare(tiny, out, RTN, Settings()))
    assert result(out) == result(whole)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from onecard.cli import main
main(sys.argv[1:])
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", WITHOUT_TORCH, "compress", *map(str, words), "--no-prove"]


def test_killed_without_torch(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command needs no torch. Killed hard at growing delays until it gets through."""
    whole = both(tiny, tmp_path, RoundToNearest(4), monkeypatch)
    out, kills = tmp_path / "out", 0
    (tmp_path / "r.yaml").write_text("name: r\npasses: [{rtn: {bits: 4}}]\n")
    while not out.exists():
        lines = 0
        process = subprocess.Popen(
            command(tiny, out, "--recipe", tmp_path / "r.yaml"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        journal, deadline = partial_of(out) / "journal.jsonl", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):  # not there yet, or finished just now
                lines = len(journal.read_bytes().splitlines())
            if lines > kills + 1:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        _, said = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), said.decode()
    assert kills >= 2
    assert result(out) == result(whole)


def test_plan_and_cap_without_torch(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(tiny, tmp_path / "out", "--recipe", "rtn-int4", "--dry-run"),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "planned peak" in done.stdout and not (tmp_path / "out").exists()
    done = subprocess.run(
        command(tiny, tmp_path / "out", "--recipe", "rtn-int4", "--memory", "20MiB"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "the smallest cap that works is" in done.stderr
    assert not partial_of(tmp_path / "out").exists()


def test_interrupted(tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it with its message; what was finished is kept."""
    out = tmp_path / "out"
    slow = WITHOUT_TORCH.replace("main(sys", """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from onecard.passes import rounding
real = rounding.block_arrays
def slowly(*words):
    import time
    time.sleep(0.5)
    return real(*words)
rounding.block_arrays = slowly
main(sys""")  # fmt: skip
    words = [sys.executable, "-c", slow, *command(tiny, out, "--recipe", "rtn-int4")[3:]]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal, deadline = partial_of(out) / "journal.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (
        journal.is_file() and len(journal.read_bytes().splitlines()) > 1
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command goes on" in said
    assert journal.is_file() and not out.exists()


def test_sum_of_a_file(tmp_path: Path) -> None:
    """Any byte, the shapes, the names and the order of pieces count, read before or not."""
    data = os.urandom((2 << 20) + 18)
    flat = (len(data) // 2,)
    kinds = {
        "same": ("w", flat, data), "again": ("w", flat, data), "named": ("v", flat, data),
        "shaped": ("w", (2, len(data) // 4), data[: len(data) // 4 * 4]),
        "shorter": ("w", (flat[0] - 1,), data[:-2]), "empty": ("w", (0,), b""),
        "turned": ("w", flat, data[1 << 20 :] + data[: 1 << 20]),
        "changed": ("w", flat, data[: 1 << 20] + bytes([data[1 << 20] ^ 1]) + data[(1 << 20) + 1 :]),
    }  # fmt: skip
    sums = {}
    for kind, (name, shape, held) in kinds.items():
        (tmp_path / kind).mkdir()
        file = tmp_path / kind / "model.safetensors"
        write_file(file, {name: ("bf16", shape, held), "b": ("fp32", (3,), b"x" * 12)})
        unread, begun, read = (Checkpoint(tmp_path / kind) for _ in range(3))
        for _ in begun.pieces(name):
            break
        assert b"".join(bytes(piece) for piece in read.pieces(name)) == held
        sums[kind] = unread.sum_of(file)
        assert begun.sum_of(file) == sums[kind] == read.sum_of(file) == unread.sum_of(file)
    assert sums["same"] == sums["again"]
    assert len(set(sums.values())) == len(kinds) - 1


@pytest.mark.parametrize("name", MODELS)
def test_what_was_rounded_is_not_read_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest's sums come from the pieces that were rounded: each tensor is read in pieces once."""
    model = tmp_path / "model"
    MODELS[name]().to(torch.bfloat16).save_pretrained(model)
    read: list[str] = []
    pieces = Checkpoint.pieces

    def seen(self: Checkpoint, name: str) -> Iterator[Bytes]:
        read.append(name)
        return pieces(self, name)

    monkeypatch.setattr(Checkpoint, "pieces", seen)
    compress(prepare(model, tmp_path / "out", Recipe("r", (RoundToNearest(4, 32),)), Settings()))
    monkeypatch.undo()
    source = Checkpoint(model)
    assert sorted(read) == sorted(source.entries)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (file,) = source.files
    assert manifest["source"][file.name] == source.sum_of(file)
