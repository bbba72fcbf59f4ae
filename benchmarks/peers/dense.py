"""What a peer made, as an ordinary folder in float32 that our evaluator reads, and the bytes it stored.

Imported in the peers' own environments: the standard library and NumPy only. A folder is a config.json
without quantization_config, the source's tokenizer, and model.safetensors with the source's tensor names.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CARRIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1,
         "BOOL": 1, "F8_E4M3": 1, "U32": 4, "U16": 2}  # fmt: skip


def headers(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, where its data begin, entry per tensor) of every safetensors file."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(size))
        entries.pop("__metadata__", None)
        yield path, 8 + size, entries


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors in float32, of F32, F16 and BF16."""
    found = {}
    for path, begin, entries in headers(folder):
        data = np.memmap(path, np.uint8, "r", offset=begin)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            raw = data[first:last]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]])
            found[name] = values.astype(np.float32).reshape(entry["shape"])
    return found


def write(source: Path, out: Path, tensor: Callable[[str], np.ndarray]) -> None:
    """The folder OUT: `tensor(name)` for every name that SOURCE has."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=1))
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    header, arrays, at = {}, [], 0
    for _, _, entries in headers(source):
        for name, entry in entries.items():
            array = np.ascontiguousarray(tensor(name), np.float32)
            assert list(array.shape) == entry["shape"], f"{name} is {array.shape}"
            header[name] = {"dtype": "F32", "shape": entry["shape"],
                            "data_offsets": [at, at + array.nbytes]}  # fmt: skip
            at += array.nbytes
            arrays.append(array)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (out / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(array.tobytes())


def write_module(source: Path, out: Path, module: Any) -> None:
    """The same from a torch module under transformers' names."""
    state = module.state_dict()
    write(source, out, lambda name: state[name].detach().float().cpu().numpy())


def stored(folder: Path, source: Path) -> int:
    """Bytes of the tensors of a folder, to the peer's advantage: a table that the source ties counts once,
    index tables of activation order (g_idx), which static groups do without, not at all, and what it worked
    with in float32 as if in the source's dtype."""
    config = json.loads((source / "config.json").read_text())
    widest = max(BYTES[e["dtype"]] for _, _, found in headers(source) for e in found.values())
    found = 0
    for _, _, entries in headers(folder):
        for name, entry in entries.items():
            twice = name == "lm_head.weight" and config.get("tie_word_embeddings", False)
            if not twice and not name.endswith("g_idx"):
                wide = BYTES[entry["dtype"]]
                wide = min(wide, widest) if entry["dtype"] == "F32" else wide
                found += wide * math.prod(entry["shape"])
    return found
