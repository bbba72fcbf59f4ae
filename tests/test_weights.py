"""The weights that the engine maps: equal to the model's for every family, and a file that is never
trusted: damaged, cut off, foreign, half-written or of another model, it is laid out again."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from test_families import CASES, random_model

from onecard.checkpoint import load
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.source import Source, unpack
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.core.spec import KEPT_DENSE
from onecard.kernels import cpu, layout, reference
from onecard.nn.layers import Embedding, Linear, Normalize
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.quantize import RoundToNearest
from onecard.runtime import weightfile, weights
from onecard.runtime.weights import Weights, open_weights

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "onecard" / "weights"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    ignored = shutil.ignore_patterns(".onecard")
    return Path(shutil.copytree(tiny, tmp_path / "model", ignore=ignored))


def silent(line: str) -> None:
    raise AssertionError(line)


def opened(folder: Path, **more) -> Weights:
    return open_weights(Source(folder), 2, say=silent, **more)


def files(home: Path) -> list[Path]:
    return sorted(home.glob("*.weights"))


def numbers(address: int | None, count: int) -> np.ndarray:
    """float32 numbers at an address, as the engine reads them."""
    assert address is not None and address % 64 == 0
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).copy()


def modules(source: Source) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of everything in the model, weights as they are stored."""
    roots = [(load.stem(source), None), (load.tail(source), None)]
    roots += [(load.block(source, i), i) for i in range(source.spec.num_layers)]
    for root, index in roots:
        for _, module, place in load.modules(source, root, index):
            yield place.path if index is None else f"blocks.{index}.{place.path}", module


def rounded(w: torch.Tensor) -> np.ndarray:
    """int8 in blocks of 32, a short last one of its own."""
    pieces = [
        reference.to_dense(reference.round_to_nearest(piece, Integers(8, None)))
        for piece in w.split(32, 1)
    ]
    return torch.cat(pieces, 1).numpy()


def check(folder: Path, **more) -> Weights:
    """Every part of a folder's weights is what the reference makes of it."""
    source = Source(folder)
    found = open_weights(source, 2, say=silent, **more)
    seen = set()
    for name, module in modules(source):
        seen.add(name)
        if isinstance(module, Linear):
            seen.add(f"{name}.bias")
            matrix = found.matrix(name)
            assert matrix.data == found.data(name).ctypes.data and matrix.data % 64 == 0
            mine = layout.parts(matrix, found.data(name)).values(*module.shape)
            wanted = module.matrix()
            small = name == "tail.head" and found.head == "int8" and bool(module.format.dense)
            np.testing.assert_array_equal(mine, rounded(wanted) if small else wanted.numpy(), name)
            if name.partition(".")[2].partition(".")[2] in KEPT_DENSE:
                assert (matrix.bits, matrix.dtype) == (0, cpu.CODES["fp32"])
            if module.bias is None:
                assert matrix.bias is None
            else:
                bias = numbers(matrix.bias, module.shape[0])
                np.testing.assert_array_equal(bias, module.bias.float().detach().numpy())
        elif isinstance(module, Normalize):
            seen.add(f"{name}.bias")
            norm, width = found.norm(name), len(module.weight)
            offset = module.weight.float() + source.spec.norm.offset
            np.testing.assert_array_equal(numbers(norm.weight, width), offset.detach().numpy())
            assert norm.kind == (source.spec.norm.kind == "layer") and norm.eps == np.float32(
                source.spec.norm.eps
            )
            if module.bias is None:
                assert norm.bias is None
            else:
                bias = numbers(norm.bias, width)
                np.testing.assert_array_equal(bias, module.bias.float().detach().numpy())
        elif name == "stem.positions":
            assert isinstance(module, Embedding)
            table = module.weight.float().detach().numpy().reshape(-1)
            np.testing.assert_array_equal(numbers(found.vector(name), table.size), table)
        else:
            raw = module.weight.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
            at = (ctypes.c_uint8 * raw.size).from_address(found.embedding)
            np.testing.assert_array_equal(np.ctypeslib.as_array(at), raw)
            assert found.embedding_dtype == reference.NAMES[module.weight.dtype]
    assert found._parts.keys() <= seen
    for absent in ("blocks.0.nothing", "blocks.9.attention.q"):
        assert absent not in found and found.matrix(absent).data is None
        assert found.norm(absent).weight is None
    return found


# Every family, every format -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_families(case: str, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    assert check(tmp_path).path is not None
    assert check(tmp_path, head="stored").path is not None


@pytest.mark.parametrize("case", ["llama-tied-bias", "gemma3", "phi3", "gpt2", "neox", "opt-post",
                                  "qwen2-moe-mixed"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_families_in_half(case: str, dtype: str, tmp_path: Path) -> None:
    random_model(case).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    found = check(tmp_path, head="stored")
    kind = "bf16" if dtype == "bfloat16" else "fp32"
    assert found.matrix("blocks.0.attention.q").dtype == cpu.CODES[kind]


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2", "neox", "opt-post", "mixtral", "gemma2",
                                  "qwen2-moe-mixed"])  # fmt: skip
@pytest.mark.parametrize("bits, zero_point", [(4, False), (3, True), (5, True)])
def test_packed_families(case: str, bits: int, zero_point: bool, tmp_path: Path) -> None:
    """Rows of 48 and 88: per channel, in blocks that hold them; fused ones cut with their zeros."""
    random_model(case).save_pretrained(tmp_path / "model")
    recipe = Recipe("r", (RoundToNearest(bits, zero_point=zero_point),))
    compress(prepare(tmp_path / "model", tmp_path / "out", recipe, Settings()))
    found = check(tmp_path / "out")
    q = found.matrix("blocks.0.attention.q")
    assert (q.bits, q.block, q.zero_point) == (8 if bits > 4 else bits, 64, zero_point)
    assert found.matrix("tail.head").bits == 8


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_formats(tiny: Path, bits: int, group: int | None, tmp_path: Path) -> None:
    for zero_point in (False, True):
        out = tmp_path / str(zero_point)
        recipe = Recipe("r", (RoundToNearest(bits, group, zero_point),))
        compress(prepare(tiny, out, recipe, Settings()))
        found = check(out)
        down = found.matrix("blocks.2.feed_forward.down")
        assert (down.block, down.dtype) == (group or 128, cpu.CODES["bf16"])


def test_packed_router_becomes_dense(tmp_path: Path) -> None:
    """As a foreign folder may have it: every Linear packed, the router with them."""
    random_model("mixtral").save_pretrained(tmp_path / "model")
    compress(
        prepare(tmp_path / "model", tmp_path / "out", Recipe("r", (RoundToNearest(4),)), Settings())
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("gate.weight")]:
        packed = reference.round_to_nearest(tensors.pop(name), Integers(4, None, scale="fp32"))
        tensors |= {name.replace("weight", part): t for part, t in packed.parts.items()}
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "manifest.json").unlink()
    assert check(tmp_path / "out").matrix("blocks.1.feed_forward.router").bits == 0


def test_packed_head_keeps_its_format(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", tie_word_embeddings=False)
    compress(prepare(folder, tmp_path / "out", Recipe("r", (RoundToNearest(4),)), Settings()))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    head = reference.round_to_nearest(tensors.pop("lm_head.weight"), Integers(4, 128))
    tensors |= {f"lm_head.{part}": tensor for part, tensor in head.parts.items()}
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "manifest.json").unlink()
    matrix = check(tmp_path / "out").matrix("tail.head")
    assert (matrix.bits, matrix.block) == (4, 128)


def test_fp16_that_is_bf16_stays_small(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", "float16")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clamp(min=0.01).bfloat16().half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = check(folder)
    assert found.matrix("blocks.1.feed_forward.up").dtype == cpu.CODES["bf16"]
    assert found.matrix("blocks.0.feed_forward.up").dtype == cpu.CODES["fp32"]
    assert check(folder).path == found.path


def test_an_embedding_that_cannot_be_gathered_is_copied(model: Path) -> None:
    """A header of odd length puts every number at an odd address."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    found = check(model)
    assert "stem.embedding" in found and found.embedding % 64 == 0


def test_shards(tiny: Path, tmp_path: Path) -> None:
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    check(tmp_path / "sharded")


def test_words_are_unpacked_as_the_reference_does() -> None:
    for bits in range(2, 9):
        words = torch.randint(-(2**31), 2**31, (3, 13), dtype=torch.int64).to(torch.int32)
        count = 13 * 32 // bits - 1
        theirs = reference.unpack(words, bits, count).numpy().astype(np.int16) + 2 ** (bits - 1)
        np.testing.assert_array_equal(unpack(words.numpy(), bits, count), theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
                                  "model.layers.1.mlp.down_proj.weight"])  # fmt: skip
def test_what_is_not_finite_is_named(
    name: str, value: float, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is left beside it, what its files hash to neither."""
    monkeypatch.setattr(weights, "FRESH", -1.0)
    folder = make_llama(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadRequest, match=name.removesuffix(".weight")) as error:
        opened(folder)
    assert "1 " in str(error.value) and "NaN" in str(error.value)
    assert not list((folder / ".onecard").glob("*")) and not list((folder / ".onecard").glob(".*"))


# The file's life ------------------------------------------------------------------------------------


@pytest.fixture
def no_laying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lays out from now on fails."""

    def fail(*arguments: object) -> None:
        raise AssertionError("laid out again")

    monkeypatch.setattr(weights, "_fill", fail)


def test_the_second_time_it_is_mapped(
    model: Path, monkeypatch: pytest.MonkeyPatch, request
) -> None:
    first = opened(model)
    assert first.path == files(model / ".onecard")[0]
    request.getfixturevalue("no_laying")
    again = opened(model)
    assert again.path == first.path
    np.testing.assert_array_equal(again.data("tail.head"), first.data("tail.head"))
    assert not again.data("tail.head").flags.writeable
    with pytest.raises(AssertionError, match="laid out again"):
        opened(model, head="stored")


def test_heads_live_side_by_side_and_other_models_go(model: Path) -> None:
    small, stored = opened(model), opened(model, head="stored")
    assert len(files(model / ".onecard")) == 2
    assert opened(model).path == small.path and opened(model, head="stored").path == stored.path
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    new = opened(model)
    assert files(model / ".onecard") == [new.path] and new.path != small.path
    with pytest.raises(BadRequest, match="head"):
        opened(model, head="int7")


def test_a_changed_config_is_another_model(model: Path) -> None:
    first = opened(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert opened(model).path != first.path


def test_same_size_and_time_but_other_bytes(model: Path) -> None:
    """The times of a file may be set back; that of its last change of state may not."""
    first = opened(model)
    path = model / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened(model).path != first.path


def test_hashes_are_remembered_once_files_are_old(model: Path, monkeypatch) -> None:
    counted = []

    def sha256(path: Path) -> str:
        counted.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(weights, "sha256_of", sha256)
    opened(model)
    opened(model)
    assert counted.count("model.safetensors") == 2, "a file that is seconds old may change unseen"
    monkeypatch.setattr(weights, "FRESH", -1.0)
    opened(model)
    opened(model)
    assert counted.count("model.safetensors") == 3
    note = model / ".onecard" / "hashes.json"
    for text in ("[]", "{", json.dumps({str(model / "model.safetensors"): [1, 2]}), "\0" * 100,
                 json.dumps({str(model / "model.safetensors"): {"a": 1}})):  # fmt: skip
        note.write_text(text)
        opened(model)
    assert counted.count("model.safetensors") == 8


def test_a_model_that_changes_meanwhile(model: Path, monkeypatch) -> None:
    """What was laid out may be neither the model that was hashed nor the one that is there now."""
    real = weights._fill

    def fill(source, part, about, out, threads) -> None:
        real(source, part, about, out, threads)
        if part.name == "tail.head":
            (model / "model.safetensors").touch()

    monkeypatch.setattr(weights, "_fill", fill)
    with pytest.raises(BadRequest, match="changed while"):
        opened(model)
    assert not files(model / ".onecard")
    monkeypatch.setattr(weights, "_fill", real)
    check(model)


def test_a_damaged_result_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(prepare(tiny, out, Recipe("r", (RoundToNearest(4),)), Settings()))
    opened(out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(BadRequest, match="not what was written"):
        opened(out)


def test_the_shipped_model_is_kept_elsewhere(home: Path) -> None:
    assert opened(SHIPPED).path == files(home)[0]
    assert not (SHIPPED / ".onecard").exists()


def blocked(place: Path) -> None:
    """A file where a folder should be made: nothing can be written there, not even by root."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("")


def test_a_folder_that_cannot_be_written(model: Path, home: Path, capfd) -> None:
    blocked(model / ".onecard")
    found = check(model)
    assert found.path == files(home)[0] and check(model).path == found.path
    other = Path(shutil.copytree(model, model.with_name("other")))
    opened(other)
    assert len(files(home)) == 1, "the same bytes have the same key"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    opened(other)
    assert len(files(home)) == 2, "the first is another folder's"


def test_what_nobody_can_use_goes(
    model: Path, home: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the common cache: what lies in an older layout, and what a model that is gone has left."""
    blocked(model / ".onecard")
    other = Path(shutil.copytree(model, model.with_name("other")))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))

    def changed(epsilon: float) -> Path | None:
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": epsilon}))
        return opened(model).path

    kept, first = opened(other).path, changed(1e-4)
    assert sorted(files(home)) == sorted([kept, first])
    shutil.rmtree(other)
    second = changed(1e-5)
    assert files(home) == [second]
    elsewhere = Path(shutil.copytree(model, model.with_name("elsewhere")))
    monkeypatch.setattr(weights, "LAYOUT", weights.LAYOUT + 1)
    (elsewhere / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    newest = opened(elsewhere).path
    assert files(home) == [newest], "the other file's layout is an older one"


def test_nowhere_to_write(model: Path, home: Path, capfd, monkeypatch) -> None:
    blocked(model / ".onecard")
    blocked(home)
    lines: list[str] = []
    source = Source(model)
    found = open_weights(source, 2, say=lines.append)
    assert found.path is None and len(lines) == 1 and "\n" not in lines[0]
    for name in ("tail.head", "blocks.1.attention.q"):
        assert layout.size(found.matrix(name)) == found.data(name).size
    open_weights(source, 2)
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
    monkeypatch.setattr(sys.modules[__name__], "silent", lines.append)
    check(model)


@pytest.mark.parametrize("when", ["before", "while", "sync"])
def test_a_full_disk(when: str, model: Path, home: Path, monkeypatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    calls = []

    def refuse(*arguments):
        calls.append(1)
        if when == "sync" or len(calls) > 5:
            raise full
        return real(*arguments)

    real = os.pwrite
    if when == "before":
        usage = shutil.disk_usage(model)._replace(free=1 << 20)
        monkeypatch.setattr(weightfile.shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(weightfile.os, "pwrite" if when == "while" else "fsync", refuse)
    lines: list[str] = []
    found = open_weights(Source(model), 2, say=lines.append)
    assert found.path is None and "No space left" in lines[0]
    for place in (model / ".onecard", home):
        assert not [path for path in place.glob("*") if "hashes" not in path.name]


def test_an_embedding_that_cannot_be_mapped(model: Path, monkeypatch) -> None:
    """It lies in the model's own file, and there is no room for that: the error says how much it is."""
    source = Source(model)
    open_weights(source, 2)

    def refuse(*arguments, **more):
        if more:  # with an offset: no file of ours
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*arguments)

    real = mmap.mmap
    monkeypatch.setattr(weightfile.mmap, "mmap", refuse)
    with pytest.raises(FailedWork, match=r"no memory for \d+ bytes of weights\nfree some"):
        open_weights(source, 2)


def test_what_a_killed_writer_left_is_removed(model: Path) -> None:
    place = model / ".onecard"
    place.mkdir()
    (place / ".abc.0123.part").write_bytes(b"x" * 1000)
    with (place / ".def.0123.part").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        opened(model)
        assert {path.name for path in place.glob(".*")} == {".def.0123.part"}


def test_killed_while_writing(model: Path) -> None:
    """At no moment is there a file that is not whole."""
    code = (
        "import os, sys\n"
        "from onecard.checkpoint.source import Source\n"
        "from onecard.runtime import weightfile, weights\n"
        "left = int(sys.argv[2])\n"
        "def put(*arguments):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), 9)\n"
        "    return real(*arguments)\n"
        "real = weightfile._put\n"
        "weightfile._put = put\n"
        "weights.open_weights(Source(sys.argv[1]))\n"
    )
    for count in (0, 1, 9, 28):
        done = subprocess.run([sys.executable, "-c", code, str(model), str(count)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not files(model / ".onecard") and list((model / ".onecard").glob(".*.part"))
    check(model)
    assert not list((model / ".onecard").glob(".*.part"))


def test_several_processes_at_once(model: Path) -> None:
    code = (
        "import sys\n"
        "from onecard.checkpoint.source import Source\n"
        "from onecard.runtime.weights import open_weights\n"
        "def say(line): raise SystemExit(line)\n"
        "found = open_weights(Source(sys.argv[1]), 1, say=say)\n"
        "import hashlib\n"
        "print(hashlib.sha256(found.data('blocks.1.feed_forward.up')).hexdigest(), found.path)\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(5)
    ]
    told = {process.communicate(timeout=120) for process in started}
    assert all(process.returncode == 0 for process in started), told
    assert len({out for out, _ in told}) == 1
    assert len(files(model / ".onecard")) == 1 and not list((model / ".onecard").glob(".*"))
    check(model)


# Files that lie -------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(source, a sound file, read() of what is there): every read is watched to stay inside the file."""
    folder = make_llama(tmp_path / "small", num_hidden_layers=1, hidden_size=32,
                        intermediate_size=32, vocab_size=300)  # fmt: skip
    source = Source(folder)
    first = open_weights(source, 2, say=silent)
    path = first.path
    parts = list(weights._planned(source, "int8"))
    wanted = [(part.name, part.choices) for part in parts]
    real = layout.checksum

    def checksum(data: np.ndarray, threads: int) -> int:
        begin, memory = data.ctypes.data, mapped[-1]
        assert begin >= memory.ctypes.data
        assert (
            begin + data.size <= memory.ctypes.data + memory.size <= begin + 2 * path.stat().st_size
        )
        return real(data, threads)

    def map_it(file: int, length: int) -> np.ndarray:
        mapped.append(real_map(file, length))
        assert mapped[-1].size == os.fstat(file).st_size
        return mapped[-1]

    mapped: list[np.ndarray] = []
    real_map = weightfile._mapped
    monkeypatch.setattr(layout, "checksum", checksum)
    monkeypatch.setattr(weightfile, "_mapped", map_it)

    def read() -> weightfile.Mapped | None:
        return weightfile.opened(path, path.stem, wanted, 1)

    assert read() is not None
    return source, path, read


def header_size(data: bytes) -> int:
    return weightfile.START.size + weightfile.START.unpack(data[: weightfile.START.size])[2]


def test_every_byte_of_the_header_counts(kept) -> None:
    _, path, read = kept
    data = path.read_bytes()
    end = header_size(data)
    with path.open("r+b") as file:
        for place in range(end):
            for bit in (1, 0x80) if place < 64 else (1 << place % 8,):
                os.pwrite(file.fileno(), bytes([data[place] ^ bit]), place)
                assert read() is None, place
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert read() is not None


def test_every_part_counts(kept) -> None:
    _, path, read = kept
    data = path.read_bytes()
    sound = read()
    assert sound is not None
    places = []
    start = sound.memory.ctypes.data
    for _, part in sound.parts.values():
        begin = part.ctypes.data - start
        places += [begin, begin + part.size // 2, begin + part.size - 1]
    del sound, part
    for place in places:
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([data[place] ^ 0x10]), place)
            assert read() is None, place
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert read() is not None


def test_any_other_length_is_refused(kept) -> None:
    _, path, read = kept
    data = path.read_bytes()
    header = header_size(data)
    lengths = {0, 1, 7, 8, 31, 63, 64, 65, header - 1, header, header + 1, 4095, 4096, 4097,
               len(data) - 1, len(data) - 4096, *range(100, len(data), len(data) // 40)}  # fmt: skip
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        assert read() is None, length
    for more in (b"\0", b"x" * 5000):
        path.write_bytes(data + more)
        assert read() is None
    path.write_bytes(data)
    assert read() is not None


def signed(text: bytes, data: bytes) -> bytes:
    """A file with another JSON and everything else right."""
    start = weightfile.START.pack(weightfile.MAGIC, weightfile.VERSION, len(text), b"")[:32]
    begin = -(-header_size(data) // 4096) * 4096
    head = start + hashlib.sha256(start + text).digest() + text
    return head + b"\0" * (-len(head) % 4096) + data[begin:]


def test_a_header_that_lies_well(kept) -> None:
    """Signed as it should be, with other sizes, names, orders or types."""
    _, path, read = kept
    data = path.read_bytes()
    text = data[64 : header_size(data)]
    rows = json.loads(text)
    path.write_bytes(signed(text, data))
    assert read() is not None

    def refused(changed: object) -> None:
        words = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(signed(words, data))
        assert read() is None, str(changed)[:200]

    for nonsense in (None, 5, [], {}, "x", {"parts": rows["parts"]}, {**rows, "key": 5},
                     {**rows, "key": "0" * 32}, {**rows, "parts": {}}, {**rows, "parts": [[]]},
                     {**rows, "parts": rows["parts"][:-1]}, {**rows, "parts": rows["parts"] * 2},
                     {**rows, "parts": rows["parts"][::-1]}, {**rows, "folder": None},
                     b"\xff\xfe", b"{", b"[" * 100_000, b'{"key":1e999}'):  # fmt: skip
        refused(nonsense)
    values = (None, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "4", [], True, float("nan"))
    for i, (_, about, _) in enumerate(rows["parts"]):
        if i % 5:
            continue
        for j in range(len(about)):
            for value in values:
                if value == about[j]:
                    continue
                changed = json.loads(text)
                changed["parts"][i][1][j] = value
                refused(changed)
        for j in range(3):
            for value in (None, 5, [], "x", "0" * 16, ["array", "fp32", 2**60]):
                changed = json.loads(text)
                changed["parts"][i][j] = value
                refused(changed)


def test_random_damage(kept) -> None:
    _, path, read = kept
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    header = header_size(data)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            begin = int(rng.integers(0, header))
            piece = rng.integers(0, 256, rng.integers(1, 40), np.uint8).tobytes()
            if rng.random() < 0.5:
                changed[begin : begin + len(piece)] = piece
            else:
                del changed[begin : begin + len(piece)]
        path.write_bytes(changed)
        assert read() is None
    path.write_bytes(data)


def test_damage_is_repaired(model: Path) -> None:
    found = opened(model)
    path = found.path
    assert path is not None
    del found
    data = path.read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    for damage in (b"", data[:100], data[:-1], b"\0" * len(data), flipped):
        path.write_bytes(damage)
        check(model)
        assert path.read_bytes() == data
    path.unlink()
    path.symlink_to("/dev/zero")
    check(model)
    assert not path.is_symlink() and path.read_bytes() == data
    path.unlink()
    os.mkfifo(path)
    check(model)
    assert path.read_bytes() == data
    path.unlink()
    path.mkdir()
    assert opened(model).path != path, "what cannot be replaced is left"


def test_a_file_of_another_model_under_this_name(model: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", num_hidden_layers=2)
    found, strange = opened(model).path, opened(other).path
    assert found is not None and strange is not None
    shutil.copyfile(strange, found)
    check(model)


# No torch, and how long it takes ------------------------------------------------------------------


def test_without_torch(model: Path) -> None:
    """Laying out and mapping, packed and dense, where torch cannot be imported."""
    compress(prepare(model, model / ".." / "out", Recipe("r", (RoundToNearest(4),)), Settings()))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from onecard.checkpoint.source import Source\n"
        "from onecard.runtime.weights import open_weights\n"
        "import onecard.runtime.engine, onecard.runtime.sample, onecard.runtime.chat\n"
        "for folder in sys.argv[1:]:\n"
        "    for _ in range(2):\n"
        "        found = open_weights(Source(folder), 2)\n"
        "        assert found.matrix('tail.head').data and found.norm('tail.norm').weight\n"
        "        assert found.path\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(model / ".." / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_nothing_is_read_but_the_file(model: Path, monkeypatch) -> None:
    """A warm opening reads no tensor of the model and takes no hash."""
    monkeypatch.setattr(weights, "FRESH", -1.0)
    opened(model)

    def fail(*arguments: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(weights, "sha256_of", fail)
    source = Source(model)
    monkeypatch.setattr(source.checkpoint, "read", fail)
    begin = time.perf_counter()
    assert open_weights(source, 2, say=silent).path is not None
    assert time.perf_counter() - begin < 1
