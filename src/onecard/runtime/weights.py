"""A model's weights as the engine multiplies them: laid out once, kept in a file, mapped from then on.

Every linear is in the kernel layout (kernels/layout.py and forms.py), norms (their offset added), biases
and learned positions are float32. The embedding is not copied: its rows are gathered from the model's
own file, mapped. The router and the gate of shared experts are dense float32. The head is rounded to int8 in
blocks of 32 where it is dense, unless `head` is "stored". A packed embedding is expanded, to bf16 where the
model is stored in it, else to float32.

The file is `MODEL/.onecard/KEY.weights`, or lies in `$XDG_CACHE_HOME/onecard/weights` where the model's
folder cannot be written (or is the package's own); where neither has room it is memory of this
process. KEY is a hash of the config, of every tensor file, of the choice of head and of the layout's
version. A layout is the same for every instruction-set class; but a format may take one or another by what
the processor can do, so that is part of KEY where there are formats.

Hashing gigabytes at each start would be slow: `hashes.json` beside the file remembers the sha256 of files
by path, size, inode, and times of the last change. A result of ours is checked against its manifest.

Memory while laying out: the largest stored tensor, the part that is made of it, and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onecard import __version__
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.shards import read_json, sha256_of
from onecard.checkpoint.source import KINDS, MANIFEST, Place, Source, verify
from onecard.core.device import usable_cores
from onecard.core.errors import BadRequest
from onecard.core.format import DTYPE_BYTES, Format, Integers, LowRank, Shape
from onecard.core.report import write_text
from onecard.core.spec import KEPT_DENSE
from onecard.kernels import cpu, forms, layout, structs
from onecard.kernels.structs import Matrix, Norm
from onecard.runtime import weightfile
from onecard.runtime.weightfile import About, Bytes, Header, Mapped

LAYOUT = 3
"""Raised whenever the kernel layout or what is laid out changes."""
HEADS = ("int8", "stored")
PIECES = {"left_": "", "right_": ":right", "rest_": ":rest"}
"""Of a product of two: how the parts of the file are named behind the linear's own name."""
HEAD_BLOCK = 32
HASHES = "hashes.json"
PAGE = 4096  # bytes, the smallest of any system
FRESH = 2.0  # seconds in which a second change of a file might leave its times as they are
PIECE = 1 << 20  # numbers that are looked at together

Head = Literal["int8", "stored"]
Formats = Format | Mapping[str, Format]
Say = Callable[[str], None]


def open_weights(
    source: Source, threads: int | None = None, head: Head = "int8", say: Say | None = None
) -> Weights:
    """The weights of a model folder, from the file where there is a sound one, else laid out now.

    `say` is given one line where they cannot be kept (by default it goes to standard error). Raises
    BadRequest where a tensor holds NaN or infinite values or a file is not what its manifest names.
    """
    if head not in HEADS:
        raise BadRequest(f"there is no head {head!r}", do=f"known: {', '.join(HEADS)}")
    threads = threads or usable_cores()
    parts = list(_planned(source, head))
    homes = homes_of(source.folder)
    before = _identities(source)
    model, hashed = _model_hash(source, homes, threads)
    key = _digest([model, head])
    wanted = [(part.name, part.choices) for part in parts]
    for home in homes:
        found = weightfile.opened(_file(home, key), key, wanted, threads)
        if found is not None:
            _remember(hashed, homes)
            return Weights(source, head, found).read_in()
    header = Header(key, model, str(source.folder.resolve()), f"{LAYOUT}, onecard {__version__}")
    made = _made(source, parts, header, homes, threads, say or _to_stderr)
    if _identities(source) != before:
        if made.path is not None:
            made.path.unlink(missing_ok=True)
        raise BadRequest(f"{source.folder} changed while it was read", do="load it again")
    _remember(hashed, homes)  # not before: beside a model that is refused nothing is left
    return Weights(source, head, made).read_in()


def planned_weights(
    source: Source, head: Head = "int8", formats: Formats | None = None
) -> Weights:  # fmt: skip
    """The weights as they would be laid out, of which nothing is: sizes without memory, for planning.

    `formats` instead of what is stored: one of all linears of blocks that may be packed, or each by its path.
    """
    parts: dict[str, tuple[About, Bytes]] = {}
    for part in _planned(source, head, formats):
        about = part.choices[-1]
        unreal = np.broadcast_to(np.zeros(1, np.uint8), (weightfile.size(about),))
        parts[part.name] = about, unreal
    return Weights(source, head, Mapped(np.empty(0, np.uint8), parts))


class Weights:
    """Addresses and descriptions of everything by module path: `blocks.3.attention.q`, `tail.head` ...

    They hold as long as this object is alive. `path` is the mapped file, None where the weights lie in
    memory of this process.
    """

    def __init__(self, source: Source, head: Head, mapped: Mapped) -> None:
        self.source, self.head, self.path = source, head, mapped.path
        self._parts = mapped.parts
        self._kept: list[Matrix] = []  # that others point to
        self._fed = dict(_fed(source))
        embedding = next(p for p in source.places(None) if p.path == "stem.embedding")
        if "stem.embedding" in self._parts:
            about, self._embedding = self._parts["stem.embedding"]
            self.embedding_dtype = str(about[1])
        else:
            entry = source.checkpoint.entries[f"{embedding.stored.name}.weight"]
            self.embedding_dtype = entry.dtype
            self._embedding = weightfile.map_file(entry.path, entry.begin, entry.end)

    def read_in(self) -> Weights:
        """Touches every page of the embedding, which nothing has read yet. So no step waits for a disk, and
        memory is what it stays: how much a single row brings in is the system's choice."""
        self._embedding[::PAGE].max(initial=0)
        return self

    def __contains__(self, path: str) -> bool:
        return path in self._parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and of the embedding."""
        return sum(self.sizes().values())

    def linears(self) -> dict[str, int]:
        """Bytes of the matrix, or matrices, of every linear."""
        sizes: dict[str, int] = {}
        for path, (about, data) in self._parts.items():
            if about[0] != "array":
                linear = path.partition(":")[0]
                sizes[linear] = sizes.get(linear, 0) + data.size
        return sizes

    def linear(self, path: str) -> list[Matrix]:
        """The descriptions of a linear's matrix, or of the two or three that it is made of."""
        ends = [path + end for end in PIECES.values() if path + end in self._parts]
        return [weightfile.matrix(self._parts[name][0]) for name in ends]

    def sizes(self) -> dict[str, int]:
        """Bytes of every part and of the embedding, by path."""
        found = {path: data.size for path, (_, data) in self._parts.items()}
        return {"stem.embedding": self._embedding.size} | found

    def matrix(self, path: str, exact: bool = False) -> Matrix:
        """The oc_matrix of a linear with its bias; one without data where the model has none such."""
        if path not in self._parts:
            return Matrix()
        about, data = self._parts[path]
        found = weightfile.matrix(about)
        found.data, found.exact = data.ctypes.data, int(exact)
        found.bias = self.vector(f"{path}.bias")
        if f"{path}:right" not in self._parts:  # its inputs are the linear's
            how = self._fed.get(path.partition(":")[0], (structs.BY_BLOCK, 0.0))
            found.rounding, found.input_scale = how
        for end in (":right", ":rest"):
            if path + end in self._parts:
                inner = self.matrix(path + end, exact)
                self._kept.append(inner)
                setattr(found, end[1:], ctypes.addressof(inner))
        return found

    def norm(self, path: str) -> Norm:
        """The oc_norm of a norm; one without weight where the model has none such."""
        norm = self.source.spec.norm
        kind = {"rms": structs.RMS, "layer": structs.LAYER}[norm.kind]
        return Norm(self.vector(path), self.vector(f"{path}.bias"), kind, norm.eps)

    def vector(self, path: str) -> int | None:
        """The address of float32 numbers: a norm, a bias, `stem.positions`; None where there is none."""
        return self._parts[path][1].ctypes.data if path in self._parts else None

    @property
    def embedding(self) -> int:
        """The address of the row-major table, of `embedding_dtype`."""
        return int(self._embedding.ctypes.data)

    def data(self, path: str) -> Bytes:
        """The bytes of a part, or of the embedding."""
        return self._embedding if path == "stem.embedding" else self._parts[path][1]


def _fed(source: Source) -> Iterator[tuple[str, tuple[int, float]]]:
    """How the inputs of linears are rounded where the folder says it. Floats of 8 bits are not among
    it: what a folder wants rounded so is rounded to int8 per block, like all that it says nothing of."""
    for index in source.parts():
        for place in source.places(index):
            inputs = source.inputs_at(place)
            if inputs is None or inputs.kind != "int8":
                continue
            name = place.path if index is None else f"blocks.{index}.{place.path}"
            if inputs.static:
                yield name, (structs.BY_SCALE, source.input_scale(place))
            else:
                yield name, (structs.BY_ROW, 0.0)


# What there is to lay out -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """One part of the file: which tensor of which module, and the forms that it may take there.

    There are two for fp16 alone: its values decide whether bf16 holds them.
    """

    name: str
    place: Place
    tensor: Literal["weight", "bias"]
    choices: tuple[About, ...]
    piece: str = ""  # of a product of two: `left_`, `right_` or `rest_`


def _planned(source: Source, head: Head, other: Formats | None = None) -> Iterator[Part]:
    """Every part in its order, from headers alone; linears in other formats, if there are any."""
    for index in source.parts():
        for place in source.places(index):
            name = place.path if index is None else f"blocks.{index}.{place.path}"
            kind = place.module.kind
            format = _format(source, place, index, name, other) if kind == "linear" else None
            if isinstance(format, LowRank) and place.path not in KEPT_DENSE:
                stored = (place.total, place.module.shape[1])
                rows = place.module.shape[0]
                for piece, made in matrices(format, (rows, stored[1]), stored).items():
                    about = (weightfile.about_matrix(made),)
                    yield Part(name + PIECES[piece], place, "weight", about, piece)
            elif kind == "linear":
                yield Part(name, place, "weight", _matrices(source, place, head, format))
            elif kind == "norm" or place.path == "stem.positions":
                yield Part(name, place, "weight", (_floats(place.module.shape),))
            elif not _gathered(source, place):
                rows, columns = place.module.shape
                about = (("array", _table_dtype(source, place), rows * columns),)
                yield Part(name, place, "weight", about)
            if place.module.bias:
                yield Part(f"{name}.bias", place, "bias", (_floats(place.module.shape[:1]),))


def _format(
    source: Source, place: Place, index: int | None, name: str, other: Formats | None
) -> Format | None:
    """What a linear is held in: as `other` says, else as it is stored."""
    if isinstance(other, Mapping):
        if name in other:
            return other[name]
    elif other is not None and index is not None:
        return other.for_row(place.module.shape[1])
    return source.format_at(place)


def matrices(format: Format, shape: Shape, stored: Shape | None = None) -> dict[str, Matrix]:
    """What the engine multiplies for a matrix of `shape` (rows of a `stored` one): one under "", or, of a
    product of two, `left_`, `right_` and perhaps `rest_`."""
    stored = stored or shape
    if not isinstance(format, LowRank):
        return {"": _layout(format, shape, stored)}
    found = {}
    for piece, (own, size) in format.pieces(stored).items():
        rows = size[0] if piece == "right_" else shape[0]
        found[piece] = _layout(own, (rows, size[1]), size)
    return found


def _floats(shape: tuple[int, ...]) -> About:
    return ("array", "fp32", int(np.prod(shape, dtype=np.int64)))


def _matrices(source: Source, place: Place, head: Head, format: Format | None) -> tuple[About, ...]:
    shape = place.module.shape[0], place.module.shape[1]
    if place.path in KEPT_DENSE:
        made = [layout.dense(shape, "fp32")]
    elif format is not None:
        made = [_layout(format, shape, (place.total, shape[1]))]
    elif place.path == "tail.head" and head == "int8":
        made = [layout.rounded(shape, HEAD_BLOCK)]
    else:
        dtype = source.checkpoint.entries[f"{place.stored.name}.weight"].dtype
        held = ("bf16", "fp32") if dtype == "fp16" else (dtype,)
        made = [layout.dense(shape, name) for name in held]
    return tuple(weightfile.about_matrix(m) for m in made)


def _layout(format: Format, shape: Shape, stored: Shape) -> Matrix:
    """The kernel layout of rows of a stored matrix in a format."""
    if isinstance(format, Integers):
        return layout.integers(shape, format)
    if format.dense:
        return layout.dense(shape, "fp32" if format.dense == "fp16" else format.dense)
    return forms.form(format, shape, stored)


def _gathered(source: Source, place: Place) -> bool:
    """Whether rows of the embedding can be read where they lie."""
    if source.format_at(place) is not None:
        return False
    entry = source.checkpoint.entries[f"{place.stored.name}.weight"]
    whole = not place.stored.transposed and not place.stored.of
    return whole and entry.begin % DTYPE_BYTES[entry.dtype] == 0


def _table_dtype(source: Source, place: Place) -> str:
    """The dtype of the copy of an embedding that cannot be read where it lies."""
    if source.format_at(place) is not None:
        return "bf16" if source.dtype == "bf16" else "fp32"
    return source.checkpoint.entries[f"{place.stored.name}.weight"].dtype


# Laying out ---------------------------------------------------------------------------------------


def _made(
    source: Source, parts: Sequence[Part], header: Header, homes: Sequence[Path], threads: int, say: Say
) -> Mapped:  # fmt: skip
    """The parts laid out, in the first home that takes them, else in memory."""
    settled = [(part.name, _settled(source, part)) for part in parts]
    _check_embedding(source)

    def fill(i: int, out: Bytes) -> None:
        _fill(source, parts[i], settled[i][1], out, threads)

    wanted = [(name, (about,)) for name, about in settled]
    seen: OSError | None = None
    for home in homes:
        path = _file(home, header.key)
        try:
            weightfile.write(path, header, settled, fill, threads)
        except OSError as error:
            seen = error
            continue
        own = home == source.folder / HOME
        weightfile.sweep(home, lambda found: _current(found, header, own))  # noqa: B023
        mapped = weightfile.opened(path, header.key, wanted, threads)
        if mapped is not None:
            return mapped
    why = f": {seen.strerror}" if seen and seen.strerror else ""
    say(f"the weights are laid out anew at each start, they could not be kept in {homes[-1]}{why}")
    return weightfile.in_memory(settled, fill)


def _settled(source: Source, part: Part) -> About:
    """The form that a part takes: of fp16, the smallest that loses nothing."""
    if len(part.choices) == 1:
        return part.choices[0]
    _, weight = source.array(f"{part.place.stored.name}.{part.tensor}")
    return part.choices[0 if layout.exactly_bf16(weight) else 1]


def _fill(source: Source, part: Part, about: About, out: Bytes, threads: int) -> None:
    place, kind = part.place, about[0]
    if kind == "array":
        dtype, array = _array(source, part)
        name = f"{place.stored.name}.{part.tensor}"
        _require_finite(name, dtype, array.reshape(-1))
        if place.module.kind != "embedding" or place.path == "stem.positions":
            array = layout.floats(array, dtype)
            if place.module.kind == "norm" and part.tensor == "weight":
                array = array + np.float32(source.spec.norm.offset)
        out[:] = array.reshape(-1).view(np.uint8)
        return
    matrix, format = weightfile.matrix(about), source.format_at(place)
    try:
        if format is None:
            layout.fill_dense(matrix, source.dense(place)[1], out, threads)
            return
        if isinstance(format, LowRank) and part.piece:
            _fill_piece(source, part, format, matrix, out, threads)
            return
        if not isinstance(format, Integers):
            if matrix.bits:
                stored = (place.total, place.module.shape[1])
                parts = source.parts_of(place, format)
                forms.fill(matrix, parts, place.rows, stored, format, out, threads)
            else:
                layout.fill_dense(matrix, source.expanded(place, format), out, threads)
            return
        packed, scale, zero = source.packed(place, format)
        if matrix.bits:
            layout.fill_integers(matrix, packed, scale, zero, format, out, threads)
            return
        rows, columns = place.module.shape
        dense = np.empty((rows, columns), np.float32)
        cpu.to_dense(
            packed.ctypes.data, scale.ctypes.data, format.scale,
            None if zero is None else zero.ctypes.data, rows, columns, format,
            dense.ctypes.data, "fp32", threads,
        )  # fmt: skip
        layout.fill_dense(matrix, dense, out, threads)
    except BadRequest as problem:
        raise BadRequest(
            f"{place.stored.name}: {problem.what}", problem.seen, problem.do
        ) from problem


def _array(source: Source, part: Part) -> tuple[str, NDArray[Any]]:
    """What is laid out as it is; a packed embedding in the dtype of its copy."""
    format = source.format_at(part.place) if part.place.path == "stem.embedding" else None
    if format is None:
        return source.dense(part.place, part.tensor)
    table, dtype = source.expanded(part.place, format), _table_dtype(source, part.place)
    return dtype, table if dtype == "fp32" else layout.to_bf16(table)


def _fill_piece(
    source: Source, part: Part, format: LowRank, matrix: Matrix, out: Bytes, threads: int
) -> None:
    place = part.place
    own, size = format.pieces((place.total, place.module.shape[1]))[part.piece]
    stored = source.parts_of(place, format)
    parts = {name: stored[part.piece + name] for name in own.parts(size)}
    forms.fill(matrix, parts, slice(None) if part.piece == "right_" else place.rows, size, own, out,
               threads)  # fmt: skip


def _check_embedding(source: Source) -> None:
    """The embedding is finite, where nothing else reads it."""
    place = next(p for p in source.places(None) if p.path == "stem.embedding")
    if source.format_at(place) is not None:
        return
    name = f"{place.stored.name}.weight"
    entry = source.checkpoint.entries[name]
    table = weightfile.map_file(entry.path, entry.begin, entry.end)
    step = PIECE * DTYPE_BYTES[entry.dtype]
    for begin in range(0, table.size, step):
        piece = table[begin : begin + step].copy().view(KINDS[entry.dtype])
        _require_finite(name, entry.dtype, piece)


def _require_finite(name: str, dtype: str, array: NDArray[Any]) -> None:
    infinity = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F800000}[dtype]
    patterns: NDArray[Any] = array.view(np.uint32 if dtype == "fp32" else np.uint16)
    bad = int(((patterns & infinity) == infinity).sum())
    if bad:
        raise BadRequest(
            f"{name} holds {bad} values that are NaN or infinite",
            do="the checkpoint is damaged or was trained into overflow: fetch it again",
        )


# Where it is kept ---------------------------------------------------------------------------------

HOME = ".onecard"


def homes_of(folder: Path) -> list[Path]:
    """Where the weights of a model may lie, the best place first."""
    base = os.environ.get("XDG_CACHE_HOME")
    homes = [] if folder.resolve() == SHIPPED.resolve() else [folder / HOME]
    with suppress(RuntimeError):  # a user without a home
        cache = Path(base) if base else Path.home() / ".cache"
        homes.append(cache / "onecard" / "weights")
    return homes


def _file(home: Path, key: str) -> Path:
    return home / f"{key}{weightfile.SUFFIX}"


def _current(found: Header | None, mine: Header, own: bool) -> bool:
    """Whether a file may stay: made of the very same model (another head, say), or another folder's that
    is still there. One of another layout would never be read again.
    """
    if found is None or found.layout != mine.layout:
        return False
    others = not own and found.folder != mine.folder and Path(found.folder).is_dir()
    return found.model == mine.model or others


Rows = dict[str, list[Any]]


def _model_hash(source: Source, homes: Sequence[Path], threads: int) -> tuple[str, Rows]:
    """A hash of all that the parts are made of, but for the choice of head; what may be remembered of it."""
    names = {source.folder / "config.json", *source.checkpoint.files}
    if (source.folder / MANIFEST).is_file():
        listed = read_json(source.folder / MANIFEST).get("files")
        listed = listed if isinstance(listed, dict) else {}
        names |= {p for p in (source.folder / Path(name).name for name in listed) if p.is_file()}
    hashes, rows = _hashes(sorted(names), homes, threads)
    verify(source.folder, lambda file: hashes[file] if file in hashes else sha256_of(file))
    tensors = [hashes[file] for file in source.checkpoint.files]
    made_of = [
        LAYOUT,
        weightfile.VERSION,
        __version__,
        hashes[source.folder / "config.json"],
        tensors,
        *((forms.expands(), forms.looks_far()) if source.format_names() else ()),
    ]
    return _digest(made_of), rows


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _hashes(
    files: Sequence[Path], homes: Sequence[Path], threads: int
) -> tuple[dict[Path, str], Rows]:
    """The sha256 of each file, from memory where nothing about it changed; what is new to remember."""
    known: dict[str, Any] = {}
    for home in homes:
        with suppress(BadRequest):
            known |= read_json(home / HASHES)
    identities = {file: _identity(file) for file in files}
    hashes: dict[Path, str] = {}
    for file, (place, about) in identities.items():
        row = known.get(place)
        if isinstance(row, list) and row[:-1] == about and isinstance(row[-1], str):
            hashes[file] = row[-1]
    missing = [file for file in files if file not in hashes]
    now = time.time()
    with ThreadPoolExecutor(threads) as pool:
        hashes |= dict(zip(missing, pool.map(sha256_of, missing), strict=True))
    rows: Rows = {}
    for file in missing:
        place, about = identities[file]
        if now - max(about[1], about[2]) / 1e9 > FRESH and _identity(file) == identities[file]:
            rows[place] = [*about, hashes[file]]
    return hashes, rows


def _identities(source: Source) -> list[tuple[str, list[int]]]:
    return [_identity(file) for file in source.checkpoint.files]


def _identity(file: Path) -> tuple[str, list[int]]:
    """(path, what changes when the file does)."""
    about = file.stat()
    return str(file.resolve()), [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _remember(rows: Rows, homes: Sequence[Path]) -> None:
    """Adds to the first `hashes.json` that can be written; those of files that are gone are dropped."""
    for home in homes if rows else ():
        known: dict[str, Any] = {}
        with suppress(BadRequest):
            known = read_json(home / HASHES)
        kept = {place: row for place, row in known.items() if Path(place).is_file()}
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            write_text(home / HASHES, json.dumps(kept | rows, indent=1))
            return


def _to_stderr(line: str) -> None:
    print(f"onecard: {line}", file=sys.stderr)
