"""The command line: every kind of bad input gets a short error, exit code 2, and touches nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, make_llama
from safetensors.torch import load_file, save_file

from onecard.calibrate.data import Calibration
from onecard.checkpoint.journal import mount_points, partial_of
from onecard.core.errors import BadRequest, nearest
from onecard.core.settings import parse_size


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite_header(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the header of the safetensors file and keep its data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_header_bits(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[40] ^= 0x10
    data[60] ^= 0x04
    path.write_bytes(data)


def absurd_sizes(folder: Path) -> None:
    def change(header: dict) -> None:
        header["model.norm.weight"]["shape"] = [2**60]

    rewrite_header(folder, change)


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 2**62)
    path.write_bytes(data)


def overlapping(folder: Path) -> None:
    def change(header: dict) -> None:
        first, second = sorted(k for k in header if k != "__metadata__")[:2]
        header[first]["data_offsets"] = header[second]["data_offsets"]
        header[first]["shape"] = header[second]["shape"]

    rewrite_header(folder, change)


def not_a_number(folder: Path) -> None:
    found = tensors(folder)
    found["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(found, folder / "model.safetensors")


def infinite(folder: Path) -> None:
    found = tensors(folder)
    found["model.embed_tokens.weight"][3, 4] = float("inf")
    save_file(found, folder / "model.safetensors")


def list_for_header(folder: Path) -> None:
    data = b"[1, 2]"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)


def missing_tensor(folder: Path) -> None:
    found = tensors(folder)
    del found["model.layers.1.mlp.up_proj.weight"]
    save_file(found, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    found = tensors(folder)
    found["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)
    save_file(found, folder / "model.safetensors")


def missing_shard(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(tensors(folder), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def other_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def unknown_family(folder: Path) -> None:
    edit_config(folder, architectures=["SuperGPTForCausalLM"])


def negative_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=-3)


def text_for_number(folder: Path) -> None:
    edit_config(folder, hidden_size="128; import os")


def gigantic_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=10**9)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def edit_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("damage, said", [
    (truncate, ", the file at "), (list_for_header, "it is not an object"), (flip_header_bits, "safetensors"),
    (absurd_sizes, "not a whole safetensors file"), (huge_header, "the header claims"),
    (overlapping, "not a whole safetensors file"),
    (not_a_number, "model.layers.1.mlp.up_proj.weight"), (infinite, "model.embed_tokens.weight"),
    (missing_tensor, "model.layers.1.mlp.up_proj.weight"), (wrong_shape, "model.norm.weight"),
    (missing_shard, "lacks 1 of 1 shards"), (shard_outside, "outside"), (pickled, "pickled"),
    (no_index, "fetch model.safetensors.index.json"), (other_format, "model.gguf is not read"),
    (no_config, "config.json"), (config_is_list, "config.json"), (deep_config, "config.json"),
    (unknown_family, "LlamaForCausalLM"), (negative_layers, "num_hidden_layers"),
    (text_for_number, "hidden_size"), (gigantic_layers, "num_hidden_layers"),
    (no_tokenizer, "tokenizer.json"), (broken_tokenizer, "tokenizer.json"),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_damaged_models_are_refused(
    model: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture,
    damage: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    damage(model)
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    out = tmp_path / "out"
    code = call("compress", model, out, "--data", text_file, "--samples", 2, "--length", 32)
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error, error
    assert 1 <= len(error.strip().splitlines()) <= 3
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()} == before
    assert not out.exists() and not partial_of(out).exists()


@pytest.mark.parametrize("words, said", [
    (("compress", "nowhere", "out"), "there is no folder"),
    (("compress", "MODEL", "out", "--recipe", "gptq-int5"), "did you mean"),
    (("compress", "MODEL", "out", "--memory", "2 potatoes"), "a size was expected"),
    (("compress", "MODEL", "out", "--memory", "20MiB", "--data", "TEXT", "--samples", 2,
      "--length", 32), "smallest cap that works"),
    (("compress", "MODEL", "out", "--samples", 0), "samples"),
    (("compress", "MODEL", "out", "--samples", "many"), "samples"),
    (("compress", "MODEL", "out", "--data", "none.txt"), "there is no text file"),
    (("compress", "MODEL", "out", "--data", "EMPTY"), "tokens"),
    (("compress", "MODEL", "out", "--data", "BINARY"), "UTF-8"),
    (("compress", "MODEL", "out", "--data", "TEXT", "--length", 4096), "tokens"),
    (("compress", "MODEL", "out", "--data", "IDS"), "knows 300 tokens"),
    (("compress", "MODEL", "out", "--data", "FEW"), "at least 32"),
    (("fit", "MODEL", "out", "--size", "1MB", "--calibration", "FEW"), "at least 32"),
    (("compress", "MODEL", "out", "--data", "IDS", "--samples", 128, "--length", 8),
     "leave out --samples and --length"),
    (("compress", "MODEL", "MODEL"), "lies in the source"),
    (("compress", "MODEL", "FULL"), "not empty"),
    (("compress", "MODEL", "EMPTY"), "is a file"),
    (("compress", "MODEL", "out", "--recipe", "KEY"), "did you mean 'group'"),
    (("compress", "MODEL", "out", "--recipe", "TWICE"), "bits is there twice, line 2"),
    (("compress", "MODEL", "out", "--recipe", "PASS"), "did you mean 'passes'"),
    (("compress", "MODEL", "out", "--recipe", "SEARCH"), "blocks of 1 to 4096"),
    (("compress", "MODEL", "out", "--recipe", "BITS"), "2 to 8 bits"),
    (("compress", "MODEL", "out", "--recipe", "GROUP"), "group"),
    (("compress", "MODEL", "out", "--recipe", "TEXT"), "list of passes"),
    (("compress", "MODEL", "out", "--recipe", "CODE"), "cannot be read"),
    (("compress", "MODEL"), "OUT"),
    (("run", "MODEL", "hi", "--temperature", "-1"), "temperature"),
    (("run", "MODEL", "hi", "--temperature", "nan"), "temperature"),
    (("run", "MODEL", "hi", "--max-tokens", 100000), "context"),
    (("run", "MODEL", "hi", "--max-tokens", "1.5"), "no whole number"),
    (("run", "MODEL", "hi", "there"), "in quotes"),
    (("run", "MODEL", "hi", "--threads", "2.5"), "no whole number"),
    (("bench", "MODEL", "--prompt", "8", "--prompt", "2.5"), "no whole number"),
    (("compress", "MODEL", "out", "--recipe", "zzz"), "onecard recipes"),
    (("compress", "MODEL", "o\udcfft"), "not UTF-8"),
    (("compress", "MODEL", "/proc"), "disk is mounted"),
    (("run", "MODEL", "hi", "--device", "tpu"), "tpu"),
    (("run", "MODEL", "hi", "--dtype", "bf16"), "reference"),
    (("run", "MODEL", "hi", "--engine", "reference", "--context", 64), "native"),
    (("run", "MODEL", "hi", "--engine", "native", "--device", "cuda"), "CPU"),
    (("run", "MODEL", "hi", "--exact", "down,atention"), "did you mean"),
    (("run", "MODEL", "hi", "--threads", 0), "threads"),
    (("run", "MODEL", "hi", "--context", 0), "context"),
    (("run", "MODEL", "hi", "--context", 40, "--max-tokens", 60), "a context of 40"),
    (("run", "MODEL", "hi", "--max-tokens", 256), "a context of 256"),
    (("eval", "MODEL", "--data", "TEXT", "--cache", "int5"), "cache"),
    (("eval", "MODEL", "--data", "TEXT", "--window", 99999), "context"),
    (("eval", "MODEL", "--data", "TEXT", "--window", 64, "--stride", 128), "stride"),
    (("eval", "MODEL", "--data", "EMPTY", "--bos", "none"), "too few"),
    (("eval", "MODEL", "--data", "TEXT", "--limit", -1), "is possible"),
    (("eval", "demo", "--data", "TEXT", "--window", 600), "--window 512"),
    (("eval", "MODEL", "--data", "TEXT", "--documents", "x", "--stride", 8), "--stride"),
    (("eval", "MODEL", "--stride", 8), "--stride"),
    (("eval", "MODEL", "--task", "TEXT"), "line 1"),
    (("run", "MODEL", "h\udcfft", "--seed", 1), "not UTF-8"),
    (("run", "MODEL", "hi", "--seed", "9" * 30), "too large"),
    (("inspect", "org/name/more"), "no folder"),
    (("inspect", "MODEL", "--context", "-1"), "context"),
    (("inspect", "MODEL", "--device", "auto", "--batch", 10**6), "positions in all"),
    (("inspect", "MODEL", "--device", "zzzzzzzz"), "DDR4-3200, 2 channels; DDR5"),
    (("report", "MODEL"), "no report"),
    (("report", "REPORT", "--out", "nowhere/page.html"), "there is no folder nowhere"),
    (("report", "REPORT", "--out", "full"), "is a folder"),
    (("report", "BINARY"), "BINARY.txt is not UTF-8"), (("report", "IDS"), "IDS.json: this is not"),
    (("recipes", "gptq"), "did you mean"),
    (("frobnicate",), "frobnicate"),
])  # fmt: skip
def test_bad_requests(
    tiny: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch, words: tuple, said: str,
) -> None:  # fmt: skip
    files = {
        "REPORT": b'{"rows": [], "environment": {}}',
        "EMPTY": b"", "BINARY": b"\xff\xfe\x00\x01" * 50, "IDS": b"[[1, 2, 300]]",
        "FEW": b"[[1, 2, 3]]",
        "KEY": b"passes: [{gptq: {groupp: 64}}]", "BITS": b"passes: [{rtn: {bits: 9}}]",
        "GROUP": b"passes: [{gptq: {group: 48}}]", "PASS": b"pass: [{gptq: {bits: 4}}]",
        "TWICE": b"passes:\n  - rtn: {bits: 4, bits: 3}", "SEARCH": b"passes: [{gptq: {block: 0}}]",
        "CODE": b"passes: !!python/object/apply:os.system ['true']",
    }  # fmt: skip
    names = {"MODEL": str(tiny), "TEXT": str(text_file)}
    for name, data in files.items():
        suffix = {
            "IDS": ".json",
            "FEW": ".json",
            "REPORT": ".json",
            "EMPTY": ".txt",
            "BINARY": ".txt",
        }.get(name, ".yaml")
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        names[name] = str(path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    names["FULL"] = str(tmp_path / "full")
    monkeypatch.chdir(tmp_path)
    code = call(*(names.get(str(word), word) for word in words))
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error, error
    assert 1 <= len(error.strip().splitlines()) <= 3, error
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()
    assert (tmp_path / "full" / "thing").read_text() == "mine"


def test_group_that_does_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_llama(tmp_path / "model", intermediate_size=176)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes: [{rtn: {bits: 4, group: 128}}]")
    assert call("compress", folder, tmp_path / "out", "--recipe", recipe) == 2
    error = capsys.readouterr().err
    assert "feed_forward.down" in error and "176" in error


@pytest.mark.parametrize("where", ["parent", "cwd", "home", "stranger"])
def test_force_replaces_only_results(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """--force never removes the source, a folder above it, where one stands, or a stranger's folder."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")
    source = tiny
    if where == "parent":
        source = Path(shutil.copytree(tiny, folder / "model"))
    elif where == "cwd":
        monkeypatch.chdir(folder)
    elif where == "home":
        monkeypatch.setenv("HOME", str(folder))
    for words in (("compress", source, folder, "--recipe", "rtn-int8", "--force"),
                  ("demo", folder, "--force")):  # fmt: skip
        assert call(*words) == 2, words
    assert (folder / "notes.txt").read_text() == "precious"
    assert where != "parent" or (source / "model.safetensors").is_file()
    assert len(capsys.readouterr().err.strip().splitlines()) <= 6


@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt", "LICENSE", "report.pdf"])
def test_force_keeps_what_was_added_to_a_result(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    """A result is replaced with what onecard put there and with nothing else."""
    out = tmp_path / "out"
    words = ("compress", tiny, out, "--recipe", "rtn-int8", "--no-prove", "--force")
    assert call(*words) == 0
    made = (out / "model.safetensors").stat().st_mtime_ns
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    for refused in (
        words,
        ("fit", tiny, out, "--size", "1MB", "--force"),
        ("demo", out, "--force"),
    ):
        capsys.readouterr()
        assert call(*refused) == 2, refused
        said = capsys.readouterr().err
        assert f"holds {Path(name).parts[0]}, which is not" in said and "move it away" in said
    assert (out / name).read_text() == "precious" and not list(tmp_path.glob(".out*"))
    assert (out / "model.safetensors").stat().st_mtime_ns == made


def test_force_replaces_all_that_is_a_results_own(model: Path, tmp_path: Path) -> None:
    """What was carried over from the source, what ran it and what was written beside it are."""
    out = tmp_path / "out"
    (model / "LICENSE").write_text("free")
    words = ("compress", model, out, "--recipe", "rtn-int8", "--force")
    assert call(*words) == 0
    assert call("run", out, "The", "--max-tokens", 2) == 0 and call("report", out) == 0
    kept = {"LICENSE", "recipe.yaml", "report.html"}
    assert kept < {path.name for path in out.iterdir()}
    assert call(*words) == 0


def test_a_bound_folder_is_no_output(tiny: Path, tmp_path: Path) -> None:
    """It cannot be replaced, so nothing is begun; os.path.ismount does not see it on the same disk."""
    out = tmp_path / "a folder"
    assert call("compress", tiny, out, "--recipe", "rtn-int8", "--no-prove") == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    words = [sys.executable, "-m", "onecard", "compress", str(tiny), str(out), "--no-prove",
             "--recipe", "rtn-int4", "--force"]  # fmt: skip
    script = 'mount --bind "$0" "$0" || exit 99; "$@"'
    bound = ["unshare", "-rm", "sh", "-c", script, str(out), *words]
    try:
        done = subprocess.run(bound, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode not in (0, 2) and "onecard" not in done.stderr:
        pytest.skip(f"nothing can be bound here: {done.stderr}")
    assert done.returncode == 2 and "disk is mounted" in done.stderr, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_mounts_are_read(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw - ext4 /dev/a rw\n23 22 8:1 /x /a\\040b\\134c rw - ext4 /dev/a rw\n\n"
    )
    assert mount_points(table) == {"/", "/a b\\c"}
    assert mount_points(tmp_path / "none") == set()


def test_a_broken_tokenizer_is_not_carried_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rounding does not read it, who runs the result does; without one there is nothing to check."""
    words = ("compress", model, tmp_path / "out", "--recipe", "rtn-int8", "--no-prove")
    broken_tokenizer(model)
    assert call(*words) == 2
    assert "tokenizer.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()
    no_tokenizer(model)
    assert call(*words) == 0


@pytest.mark.parametrize("gone", [
    ("model.layers.1.mlp.up_proj.weight",),
    ("model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
], ids=len)  # fmt: skip
def test_inspect_counts_missing_tensors(
    model: Path, capsys: pytest.CaptureFixture, gone: tuple[str, ...]
) -> None:
    assert call("inspect", model, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert "missing_tensors" not in {row["what"] for row in whole["rows"]}
    found = tensors(model)
    save_file({k: v for k, v in found.items() if k not in gone}, model / "model.safetensors")
    assert call("inspect", model, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {r["what"]: r["value"] for r in report["rows"]}["missing_tensors"] == len(gone)
    assert any(name in json.dumps(report["notes"]) for name in gone)
    assert call("run", model, "hi", "--max-tokens", 1) == 2
    said = capsys.readouterr().err
    assert "lacks the tensor" in said and ("and 2 more" in said) == (len(gone) == 3)


def test_what_is_measured_once_is_said_once(
    tiny: Path, told: list[str], capsys: pytest.CaptureFixture
) -> None:
    for said in (True, False):
        assert call("inspect", tiny, "--device", "auto", "--context", 64, "--json") == 0
        shown = capsys.readouterr()
        json.loads(shown.out)
        assert ("timing this machine's kernels" in shown.err) == said and (
            "onecard.cost" in told
        ) == said
        told.clear()


def test_inspect_says_what_keeps_a_model_from_being_loaded(
    model: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong_shape(model)
    assert call("inspect", model) == 0
    assert "model.norm.weight has shape [7]" in capsys.readouterr().out.replace("\n", " ")


def test_output_through_a_link(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert call("compress", tiny, tmp_path / "link", "--recipe", "rtn-int8", "--no-prove") == 0
    assert (tmp_path / "real" / "config.json").is_file()
    assert (
        call(
            "compress", tiny, tmp_path / "real" / ".." / "two", "--recipe", "rtn-int8", "--no-prove"
        )
        == 0
    )
    assert (tmp_path / "two" / "report.html").is_file()
    assert call("compress", tiny, tmp_path / ("x" * 250), "--recipe", "rtn-int8") == 2


def test_alias_bombs_are_refused(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)
    ]
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("\n".join([*lines, "good_for: *j", "passes: [rtn: {bits: 8}]"]))
    assert call("compress", tiny, tmp_path / "out", "--recipe", bomb) == 2
    assert "aliases" in capsys.readouterr().err


def test_prompt_from_standard_input(tiny: Path, capsys: pytest.CaptureFixture,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("The quick"))
    assert call("run", tiny, "-", "--max-tokens", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_chat(tiny: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation longer than the context goes on without its oldest turns; --json is one report."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\n" * 6))
    assert call("chat", tiny, "--max-tokens", 60, "--seed", 1) == 0
    assert "left out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert call("chat", tiny, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.parametrize("flags", [
    (), ("--threads", 1), ("--cache", "bf16"), ("--cache", "int8"), ("--exact", "all"),
    ("--head", "stored"), ("--exact", "q,attention.o", "--exact", "down"), ("--context", 64),
], ids=lambda flags: " ".join(map(str, flags)))  # fmt: skip
def test_run_on_either_engine(tiny: Path, capsys: pytest.CaptureFixture, flags: tuple) -> None:
    """The native engine writes what torch writes, whatever way it is told to run."""
    said = []
    for more in (flags, ("--engine", "reference", "--dtype", "fp32")):
        words = ("run", tiny, "The quick brown", "--max-tokens", 12, "--temperature", 0, "--json")
        assert call(*words, *more) == 0
        report = json.loads(capsys.readouterr().out)
        said.append(dict(report["notes"])["text"])
        engine = report["environment"]["engine"]
        assert engine.startswith("reference" if "reference" in more else "native")
    assert said[0] == said[1]


def test_eval_on_either_engine(tiny: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:  # fmt: skip
    small = tmp_path / "small"
    assert call("compress", tiny, small, "--recipe", "rtn-int4", "--no-prove") == 0
    capsys.readouterr()
    found = []
    for more in (
        (),
        ("--exact", "all", "--head", "stored"),
        ("--engine", "reference", "--dtype", "fp32"),
    ):
        assert (
            call(
                "eval",
                small,
                "--data",
                text_file,
                "--window",
                64,
                "--against",
                tiny,
                "--json",
                *more,
            )
            == 0
        )
        report = json.loads(capsys.readouterr().out)
        found.append({row["what"]: row["value"] for row in report["rows"]})
    rounded, exact, wanted = found
    assert rounded["predicted_tokens"] == wanted["predicted_tokens"]
    assert rounded["perplexity"] == pytest.approx(wanted["perplexity"], rel=2e-3)
    assert exact["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert exact["kl"] == pytest.approx(wanted["kl"], rel=1e-2)


def test_help_describes_every_option(capsys: pytest.CaptureFixture) -> None:
    assert call("compress", "--help") == 0
    text = capsys.readouterr().out
    for words in ("calibration text", "cap for the whole process", "print the plan"):
        assert words in text
    assert call("bench", "--help") == 0
    text += capsys.readouterr().out
    for noise in ("[default: False]", "[default: None]", "default: ()", "--empty-"):
        assert noise not in text
    for default in (Calibration.samples, Calibration.length):
        assert f"[default: {default}]" in text


def test_unexpected_errors_are_short(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onecard import inspect

    def broken(*ignored: object) -> None:
        raise KeyError("inner")

    monkeypatch.setattr(inspect, "inspect_model", broken)
    assert call("inspect", "demo") == 1
    error = capsys.readouterr().err
    assert "--debug" in error and "Traceback" not in error


def test_no_space_left(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert call("compress", tiny, tmp_path / "out", "--recipe", "rtn-int4") == 2
    assert "are free" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_smallest_cap_that_works_works(tiny: Path, tmp_path: Path, text_file: Path,
                                       capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    """The cap named in the error is accepted by the same command."""
    words = ("compress", tiny, tmp_path / "out", "--data", text_file, "--samples", 4, "--length", 64,
             "--dry-run")  # fmt: skip
    assert call(*words, "--memory", "1MiB") == 2
    error = capsys.readouterr().err
    named = error.split("that works is ")[1].split(" (")[0].replace(" ", "")
    roomy = f"{parse_size(named) + (16 << 20)}"
    assert call(*words, "--memory", roomy) == 0
    assert not (tmp_path / "out").exists()


def test_compress_report_run_eval(tiny: Path, tmp_path: Path, text_file: Path,
                                  capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    """The way a user goes: compress, look again, measure against the original, run."""
    out = tmp_path / "out"
    assert call("compress", tiny, out, "--recipe", "gptq-int4", "--data", text_file, "--samples", 4,
                "--length", 64, "--json") == 0  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert {"rows", "environment"} <= printed.keys()
    proven = {row["what"]: row for row in printed["rows"] if row["where"] == "model"}
    assert proven["perplexity"]["before"] > 1 and proven["kl"]["value"] > 0
    assert [title for title, _ in printed["notes"]].count("sample: compressed") == 1
    assert (out / "report.html").read_text().lower().startswith("<!doctype html>")
    assert call("report", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == printed["rows"]
    assert call("eval", out, "--data", text_file, "--against", tiny, "--json") == 0
    rows = {row["what"]: row["value"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["kl"] > 0 and 0 < rows["top1_agreement"] <= 1 and rows["perplexity"] > 1
    assert call("run", out, "The quick", "--max-tokens", 5, "--seed", 1, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert call("run", out, "The quick", "--max-tokens", 5, "--seed", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == first["notes"]
    assert call("inspect", out, "--json") == 0
    assert "int4-g128" in capsys.readouterr().out
    assert call("compress", out, tmp_path / "again", "--recipe", "rtn-int8") == 2
    assert "compressed already" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ("--held-out", "EMPTY"), ("--held-out", "nowhere.txt"), ("--prove", "--memory", "900MiB"),
    ("tokenizer",),
], ids=" ".join)  # fmt: skip
def test_a_proof_that_cannot_be_made_is_refused_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple[str, ...]
) -> None:
    (tmp_path / "EMPTY").write_text("")
    out, rest = tmp_path / "out", [str(tmp_path / w) if w == "EMPTY" else w for w in words]
    if words == ("tokenizer",):
        (model / "tokenizer.json").unlink()
        rest = []
    assert call("compress", model, out, "--recipe", "rtn-int8", *rest) == 2
    assert not out.exists() and not partial_of(out).exists()
    assert 1 <= len(capsys.readouterr().err.strip().splitlines()) <= 3
    if not rest:
        assert call("compress", model, out, "--recipe", "rtn-int8", "--no-prove") == 0


def test_interrupted_in_its_proof_a_job_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result without the proof that belongs to it gets no final name."""
    from onecard import prove

    def interrupted(*ignored: object) -> None:
        raise KeyboardInterrupt

    out, words = tmp_path / "out", ("compress", tiny, tmp_path / "out", "--recipe", "rtn-int8")
    with monkeypatch.context() as patch:
        patch.setattr(prove, "prove", interrupted)
        assert call(*words) == 130
    assert not out.exists() and partial_of(out).is_dir()
    assert call(*words) == 0
    assert json.loads((out / "report.json").read_text())["rows"][3]["what"] == "perplexity"
    assert "perplexity" in (out / "report.html").read_text()


def test_force_and_resume(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    words = ("compress", tiny, out, "--recipe", "rtn-int8")
    assert call(*words) == 0
    first = (out / "model.safetensors").stat().st_mtime_ns
    assert call(*words) == 2
    assert call(*words, "--resume") == 0 and "finished" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == first
    assert call("compress", tiny, out, "--recipe", "rtn-int4", "--resume") == 2
    assert call("compress", tiny, out, "--recipe", "rtn-int4", "--force") == 0
    assert not list(tmp_path.glob(".out*"))


def test_damaged_result_is_noticed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert call("compress", tiny, out, "--recipe", "rtn-int8") == 0
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    assert call("run", out, "hi", "--max-tokens", 2) == 2
    assert "sha256" in capsys.readouterr().err


def test_dry_run_touches_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        call("compress", tiny, tmp_path / "out", "--recipe", "rtn-int4", "--dry-run", "--json") == 0
    )
    rows = {row["what"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows == {"planned_peak_bytes", "disk_bytes", "output_bytes", "seconds"}
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tells_what_it_learns_from(
    tiny: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture
) -> None:
    few = tmp_path / "few.txt"
    few.write_text(text_file.read_text()[:400])
    for text, samples, said in ((text_file, 3, "3 windows of 32 tokens from "),
                                (few, 900, "which is too short for the 900 asked for")):  # fmt: skip
        words = ("--data", text, "--samples", samples, "--length", 32, "--dry-run")
        assert call("compress", tiny, tmp_path / "out", *words) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert said in shown and ("short" in said) is ("too short" in shown)


def test_what_is_told_of_a_long_word_is_short(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"passes: [{{rtn: {{bits: {'9' * 100_000}x}}}}]\n")
    assert call("compress", tiny, tmp_path / "out", "--recipe", recipe) == 2
    said = capsys.readouterr().err
    assert len(said) < 1000 and "a whole number is needed" in said


@pytest.mark.parametrize("word, said", [
    ("fp8", "did you mean 'fp8-row' or 'fp8-tensor'?"), ("nf5", "did you mean 'nf4'?"),
    ("", "known: fp8-row, fp8-tensor, nf4"), ("zzz", "known: fp8-row, fp8-tensor, nf4"),
])  # fmt: skip
def test_the_nearest_word(word: str, said: str) -> None:
    assert nearest(word, ("nf4", "fp8-row", "fp8-tensor")) == said


def test_one_recipe_is_told_whole(capsys: pytest.CaptureFixture) -> None:
    assert call("recipes", "rtn-int4") == 0
    text = capsys.readouterr().out
    assert call("recipes", "rtn-int4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [["recipe", text]]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture) -> None:
    assert call("inspect", "nowhere", "--debug") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and "error: there is no folder 'nowhere'" in error
    assert call("--debug", "run") == 2


def test_more_threads_than_cores_are_told_of(
    model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onecard.core.device.usable_cores", lambda: 1)
    assert call("run", model, "hi", "--max-tokens", 1, "--threads", 2) == 0
    assert "--threads 2: 1 can run" in capsys.readouterr().err
    assert call("run", model, "hi", "--max-tokens", 1, "--threads", 1) == 0
    assert "--threads" not in capsys.readouterr().err


def test_poisoned_config_runs_nothing(model: Path, tmp_path: Path) -> None:
    """Fields that make other loaders import code are not looked at."""
    marker = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(model, auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True,
                _attn_implementation="evil/kernels")  # fmt: skip
    assert call("inspect", model) == 0 and call("run", model, "hi", "--max-tokens", 1) == 0
    assert not marker.exists()


@pytest.mark.parametrize("text, size", [
    ("6GiB", 6 << 30), ("6g", 6 << 30), ("6GB", 6 * 10**9), ("1.5 MiB", 3 << 19), ("123", 123),
])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1GiB", "0", "1e99", "nan", "6 QiB", "1" * 400])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadRequest):
        parse_size(text)


def test_passes_are_listed() -> None:
    import onecard.passes

    assert {"GPTQ", "RoundToNearest", "find_recipe"} <= set(dir(onecard.passes))


def test_public_names_are_no_modules() -> None:
    """A name that is also a file's would be one or the other, by what was imported before."""
    import onecard

    for name in onecard.__all__:
        assert not isinstance(getattr(onecard, name), types.ModuleType), name


@pytest.mark.parametrize("passes", [["rtn"], "rtn", None, 5, {"rtn": {}}, [None]], ids=str)
def test_what_is_no_chain_of_passes(passes: object) -> None:
    from onecard import Recipe

    with pytest.raises(BadRequest, match="a tuple of passes"):
        Recipe("mine", passes)  # type: ignore[arg-type]


def test_a_chain_of_passes_is_a_tuple() -> None:
    from onecard import Recipe
    from onecard.passes import RoundToNearest

    one = RoundToNearest(4)
    assert Recipe("mine", [one]) == Recipe("mine", one) == Recipe("mine", (one,))  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="bits is '4'"):
        RoundToNearest("4")  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [
    [[1, 2]], "text",
    torch.zeros(8, dtype=torch.int64), torch.zeros(2, 8), torch.zeros(2, 0, dtype=torch.int64),
    torch.full((2, 8), 10**6), torch.full((2, 8), -1), torch.zeros(1, 9999, dtype=torch.int64),
], ids=lambda ids: f"{list(getattr(ids, 'shape', ids))}-{getattr(ids, 'dtype', '')}")  # fmt: skip
def test_ids_that_no_model_reads(tiny: Path, ids: torch.Tensor) -> None:
    from onecard import Recipe, apply, load_model
    from onecard.passes import GPTQ

    with pytest.raises(BadRequest):
        apply(load_model(tiny), Recipe("g", (GPTQ(4),)), ids)


def test_what_a_model_is_held_in(tiny: Path) -> None:
    from onecard import load_model

    with pytest.raises(BadRequest, match="int3"):
        load_model(tiny, "int3")
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match="CUDA"):
            load_model(tiny, device="cuda:0")


def test_imports_are_light() -> None:
    """`import onecard` and `onecard --help` load neither torch nor NumPy."""
    for code in (
        "",
        "from onecard.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ):
        heavy = (
            "import sys; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
        )
        words = [sys.executable, "-c", f"import onecard\n{code}\n{heavy}"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("words", [
    ("--help",), ("demo", "OUT"), ("run", "demo", "The", "--max-tokens", "400"),
], ids=lambda words: words[0])  # fmt: skip
def test_ctrl_c_is_quiet(tmp_path: Path, words: tuple[str, ...], delay: float) -> None:
    """130 and no traceback, unless it was done by then, or Python itself had not started yet."""
    words = tuple(word.replace("OUT", str(tmp_path / "out")) for word in words)
    # Whoever runs the tests may ignore it, a shell's background job does: children would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "-m", "onecard", *words], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if "Traceback" in error and "onecard/verbs/" not in error:
        started = re.search(r'onecard/cli\.py", line \d+, in main', error)
        assert not started and delay < 0.4, error
        return
    done = process.returncode == 0 or "ended by" in error  # the reply's last line
    # From a signal that no handler takes a shell makes 130 too.
    assert done or process.returncode in (130, -signal.SIGINT), error
    assert error == "" or error.startswith("interrupted;") or done, error


def test_hub_ids_offline(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    start = time.monotonic()
    assert call("inspect", "nobody/nothing") == 2
    error = capsys.readouterr().err
    assert "could not be fetched" in error and "*.safetensors" in error
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("words, code", [
    (("inspect", "demo"), 0), (("run", "demo", "-", "--max-tokens", "2"), 0), (("inspect", "no"), 2),
], ids=str)  # fmt: skip
def test_closed_streams(words: tuple[str, ...], code: int) -> None:
    """Started without standard streams it works, and no file that it opens is taken for one."""
    command = [sys.executable, "-m", "onecard", *words]
    script = "import os, sys; os.closerange(0, 3); os.execv(sys.argv[1], sys.argv[1:])"
    assert subprocess.run([sys.executable, "-c", script, *command], check=False).returncode == code


def test_nobody_reads_on() -> None:
    """Where the reader of a table is gone the work is done all the same."""
    command = [sys.executable, "-m", "onecard", "recipes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


def test_a_terminal_without_the_characters() -> None:
    """What it cannot show is replaced; the work was done."""
    command = [sys.executable, "-m", "onecard", "inspect", "demo", "--device", "RTX 4090"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"bug" not in done.stderr, done.stderr
    assert b"?" in done.stdout and done.stdout.isascii()


def test_tensors_that_are_not_used_are_named(model: Path, capsys: pytest.CaptureFixture) -> None:
    edit_config(model, num_hidden_layers=2)
    assert call("run", model, "hi", "--max-tokens", 2) == 0
    said = capsys.readouterr().err
    assert "does not use: model.layers.2.input_layernorm.weight" in said and ", ...\n" in said


def test_what_files_say_cannot_steer_a_terminal(model: Path, capsys: pytest.CaptureFixture) -> None:
    row = {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}
    rewrite_header(model, lambda header: header.update({"\x1b]0;x\x07\u202e": row}))
    assert call("inspect", model) == 2
    said = capsys.readouterr().err
    assert "\ufffd" in said and said.replace("\n", "").isprintable()
    assert str(BadRequest("名字 ünï\tx")) == "名字 ünï x"
