"""safetensors read lazily and written by rename. No torch here.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
the data. Every number of the header is checked against the file before it is believed, because a
header may claim anything. Tensors are read by position (pread), not mapped, so that what is resident
is what was asked for and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest
from onecard.core.format import DTYPE_BYTES
from onecard.kernels import cpu
from onecard.kernels.layout import checksum

Bytes = NDArray[np.uint8]
HEADER_LIMIT = 100 << 20
SAFETENSORS = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "fp8",
}  # fmt: skip
CODES = {name: code for code, name in SAFETENSORS.items()}
PIECE = 1 << 20
"""Bytes of a tensor that are read at once where it is only passed on: they stay in a core's cache."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, Entry]:
    """name -> Entry of one file. Raises BadRequest for anything that does not add up."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _broken(path, f"the header claims {length} bytes, the file has {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, row, 8 + length, size) for name, row in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"the header cannot be read ({error})") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _broken(path, f"{name} begins at byte {entry.begin}, not at {end}")
        end = entry.end
    if end != size:
        raise _broken(path, f"tensors end at byte {end}, the file at {size}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header; of two tensors with one name, readers would differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(path: Path, name: str, row: Mapping[str, Any], base: int, size: int) -> Entry:
    code = row["dtype"]
    known = code in SAFETENSORS
    if not known and re.fullmatch("[A-Z][A-Z0-9_]{1,15}", code):
        raise BadRequest(
            f"{path}: dtype {code} is not read yet", seen=f"tensor {name}",
            do="readable: " + ", ".join(SAFETENSORS),
        )  # fmt: skip
    if not known:
        raise ValueError(f"unknown dtype {code!r}")
    dtype, shape = SAFETENSORS[code], tuple(row["shape"])
    begin, end = row["data_offsets"]
    for number in (*shape, begin, end):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"impossible number {number!r}")
    if base + end > size:
        raise _broken(path, f"{name} ends at byte {base + end}, the file at {size}")
    for number in (*shape, begin):
        if number > size:
            raise ValueError(f"impossible number {number!r}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
    return Entry(path, dtype, shape, base + begin, base + end)


def _broken(path: Path, seen: str) -> BadRequest:
    return BadRequest(f"{path} is not a whole safetensors file", seen, "fetch or copy it again")


class Checkpoint:
    """The tensors of a model folder, single file or sharded; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.empty: Callable[[int], Bytes] = fresh  # where the bytes that are read go
        self.entries: dict[str, Entry] = {}
        self._sums: dict[str, int] = {}  # of the tensors that were read in pieces from end to end
        for path in self.files:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise _broken(path, f"{name} is also in {self.entries[name].path.name}")
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> tuple[Entry, Bytes]:
        """The raw bytes of a tensor."""
        entry = self.entries[name]
        return entry, pread(entry.path, entry.begin, self.empty(entry.nbytes))

    def pieces(self, name: str) -> Iterator[Bytes]:
        """The bytes of a tensor as copy_range gives them; their sum is known once all were taken."""
        sums: list[int] | None = [] if cpu.available() else None
        for piece in copy_range(self.entries[name]):
            if sums is not None:
                sums.append(checksum(piece, 1))
            yield piece
        if sums is not None:
            self._sums[name] = _sum_of_sums(sums)

    def sum_of(self, file: Path) -> str:
        """A 64-bit sum of one of the files at about the speed of reading them; sha256 without the library.

        It is the sum (kernels.layout.checksum) of that of the header and those of the tensors, each the sum
        of its pieces' sums. What `pieces` gave already is not read again. Of two files that differ it tells
        all but one pair in 2^64, unless somebody made them to be mistaken for each other.
        """
        if not cpu.available():
            return sha256_of(file)
        entries = {name: entry for name, entry in self.entries.items() if entry.path == file}
        order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end, name))
        for name in order:
            if name not in self._sums:
                for _ in self.pieces(name):
                    pass
        begin = min((entry.begin for entry in entries.values()), default=file.stat().st_size)
        header = checksum(pread(file, 0, fresh(begin)), 1)
        return f"sum64:{_sum_of_sums([header, *(self._sums[name] for name in order)]):016x}"


def fresh(count: int) -> Bytes:
    """Memory for `count` bytes."""
    return np.empty(count, np.uint8)  # a bytearray would be zeroed first


class Buffers:
    """Memory for tensors that come and go in the same sizes: what nobody refers to is used again.

    Touching fresh pages takes longer than copying a tensor into them. For one thread at a time.
    """

    def __init__(self) -> None:
        self._held: defaultdict[int, list[Bytes]] = defaultdict(list)
        alone = [fresh(0)]
        self._idle = sys.getrefcount(alone[0])

    def empty(self, count: int) -> Bytes:
        """`count` bytes, taken until the array and all that shares its memory is gone."""
        held = self._held[count]
        for i in range(len(held)):
            if sys.getrefcount(held[i]) == self._idle:
                return held[i][:]
        held.append(fresh(count))
        return held[-1][:]


def pread(path: Path, offset: int, data: Bytes) -> Bytes:
    """Fills `data` from `offset` on; a short file is an error, never a short answer."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        _read_into(file, data, path)
    return data


def _read_into(file: FileIO, data: Bytes, path: Path) -> None:
    view, done = data.data, 0
    while done < data.size:
        got = file.readinto(view[done:])
        if not got:
            raise _broken(path, f"it ends {data.size - done} bytes early")
        done += got


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's model."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
        if pickled:
            raise BadRequest(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded",
                do="convert them once where you trust them: load with transformers and "
                "model.save_pretrained(DIR), which writes safetensors",
            )
        raise BadRequest(
            f"{folder} holds no model", "neither model.safetensors nor an index of shards",
            _instead(folder),
        )  # fmt: skip
    paths = [folder / name for name in _shards(index)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadRequest(
            f"{folder} lacks {len(missing)} of {len(paths)} shards", seen=", ".join(missing[:4]),
            do="fetch the missing files",
        )  # fmt: skip
    return paths


def _instead(folder: Path) -> str:
    """What to do about weights that are there under another name."""
    if parts := sorted(folder.glob("*.safetensors")):
        return f"{parts[0].name} is there: fetch model.safetensors.index.json as well"
    if other := sorted(folder.glob("*.gguf")):
        return f"{other[0].name} is not read: fetch the model as safetensors"
    return ""


def _shards(index: Path) -> list[str]:
    """The file names in an index, none of which may lead out of its folder."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise BadRequest(
            f"{index} cannot be read", seen="its weight_map is not an object of file names"
        )
    if not named:
        raise BadRequest(f"{index} names no shard", do="fetch or copy it again")
    names = sorted(set(named.values()))
    for name in names:
        if not name or "\0" in name or Path(name).name != name:
            raise BadRequest(f"{index} names a file outside its folder: {name[:200]!r}")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of modest size."""
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError("it is too large")
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("it is not an object")
        return data
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{path} cannot be read", seen=str(error)) from error


Array = tuple[str, tuple[int, ...], Any]
"""(dtype name, shape, bytes-like, an iterator of them, or the Entry to copy from) of one tensor on its
way to a file."""


def header_of(arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The header for tensors of known dtype and shape, and the order their bytes follow in."""
    order = sorted(arrays, key=lambda name: (-DTYPE_BYTES[arrays[name][0]], name))
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = arrays[name]
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        rows[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def write_file(path: Path, arrays: Mapping[str, Array]) -> str:
    """Write tensors under `path` at once or not at all; returns the sha256 of the file."""
    header, order = header_of({name: (a[0], a[1]) for name, a in arrays.items()})

    def chunks() -> Iterator[Any]:
        yield header
        for name in order:
            data = arrays[name][2]
            if isinstance(data, Entry):
                yield from copy_range(data)
            elif isinstance(data, Iterator):
                yield from data
            else:
                yield data

    return write_chunks(path, chunks())


def write_chunks(path: Path, chunks: Iterable[Any]) -> str:
    """Bytes-like chunks under `path` by temporary name and rename; their sha256."""
    temporary = path.with_name(f".{path.name}.part")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                digest.update(view)
                while len(view):
                    view = view[file.write(view) :]
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def whole_rows(entry: Entry) -> int:
    """Bytes of as many rows of a matrix as a piece takes; of anything else, and of longer rows, a piece."""
    row = entry.shape[-1] * DTYPE_BYTES[entry.dtype] if len(entry.shape) == 2 else 1
    return PIECE // row * row if 0 < row <= PIECE else PIECE


def copy_range(entry: Entry, chunk: int = 0) -> Iterator[Bytes]:
    """The bytes of a tensor in pieces of `chunk`, or of whole_rows, for copying without holding it; each
    takes the last's place."""
    chunk = chunk or whole_rows(entry)
    data = fresh(min(chunk, entry.nbytes))
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        for done in range(0, entry.nbytes, chunk):
            piece = data[: entry.nbytes - done]
            _read_into(file, piece, entry.path)
            yield piece


def _sum_of_sums(sums: list[int]) -> int:
    return checksum(np.array(sums, "<u8").view(np.uint8), 1)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
