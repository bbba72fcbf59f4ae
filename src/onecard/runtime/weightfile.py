"""A file of parts that is mapped instead of read: checked in full when it is opened, or not believed.

    64 bytes   magic, version, length of the JSON, sha256 of these and of the JSON
    JSON       {"key", "model", "folder", "layout", "parts": [[name, about, checksum], ...]}
    parts      in that order, each at the next multiple of 4096, and nothing behind them

`about` says what a part is: ["matrix", rows, columns, bits, block, dtype, zero_point, kind, slots] in the
kernel layout, or ["array", dtype, count]. No offset or size is stored: both follow from `about`, which
has to be one that the reader expects, so a file cannot send a reader anywhere. Checksums (csrc/onecard.h)
of all parts are compared at memory speed. What is damaged, cut off, foreign or older is simply not there.

A file appears by rename when it is whole and on the disk. Several processes may write the same one,
each under a name of its own; the last rename wins. A temporary is locked by its writer while that
lives, so that what a killed one left is known and removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import DTYPE_BYTES
from onecard.kernels import layout
from onecard.kernels.structs import Matrix

Bytes = NDArray[np.uint8]
About = tuple[Any, ...]
Fill = Callable[[int, Bytes], None]

MAGIC, VERSION = b"onecard\n", 3
START = struct.Struct("<8sQQ8x32s")
PAGE = 4096
LONGEST = 256 << 20  # bytes of JSON
SUFFIX = ".weights"
SLACK = 16 << 20  # bytes that are left free on a disk


@dataclass(frozen=True)
class Header:
    """What a file is for: the key it is found by, the model's hash, the folder it was made from, and
    which layout it has.
    """

    key: str
    model: str
    folder: str
    layout: str


@dataclass(frozen=True)
class Mapped:
    """Parts in memory that is mapped from a file, or anonymous: name -> (about, its bytes)."""

    memory: Bytes
    parts: Mapping[str, tuple[About, Bytes]]
    path: Path | None = None


def matrix(about: About) -> Matrix:
    """The description of a part that is a matrix, without its address."""
    _, rows, columns, bits, block, dtype, zero_point, kind, slots = about
    return Matrix(rows=rows, columns=columns, bits=bits, block=block, dtype=dtype,
                  zero_point=zero_point, kind=kind, slots=slots)  # fmt: skip


def about_matrix(m: Matrix) -> About:
    return (
        "matrix", m.rows, m.columns, m.bits, m.block, m.dtype, m.zero_point, m.kind, m.slots,
    )  # fmt: skip


def size(about: About) -> int:
    """Bytes of a part."""
    if about[0] == "matrix":
        return layout.size(matrix(about))
    _, dtype, count = about
    return int(DTYPE_BYTES[dtype] * count)


def _laid(header: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each part begins behind a header, and where the last one ends."""
    places, end = [], header
    for count in sizes:
        begin = -(-end // PAGE) * PAGE
        places.append(begin)
        end = begin + count
    return places, end


# Reading ------------------------------------------------------------------------------------------


def opened(
    path: Path, key: str, wanted: Sequence[tuple[str, Sequence[About]]], threads: int
) -> Mapped | None:
    """The parts of a file, mapped read-only, or None where it is not whole or not what is wanted.

    `wanted`: every part by name, in order, with the descriptions that it may have.
    """
    try:
        with _regular(path) as (file, length):
            text = _text(file, length)
            parts = _parts(text, key, wanted)
            places, end = _laid(START.size + len(text), [size(about) for _, about, _ in parts])
            if end != length:
                return None
            memory = _mapped(file, length)
    except (OSError, ValueError, BadRequest):
        return None
    found: dict[str, tuple[About, Bytes]] = {}
    for (name, about, checksum), begin in zip(parts, places, strict=True):
        data = memory[begin : begin + size(about)]
        if f"{layout.checksum(data, threads):016x}" != checksum:
            return None
        found[name] = about, data
    return Mapped(memory, found, path)


def header_of(path: Path) -> Header | None:
    """What a file says it is for; None where its header is not whole."""
    try:
        with _regular(path) as (file, length):
            text = _text(file, length)
        return _header(json.loads(text))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def _regular(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, length) of an ordinary file; a pipe or a device could keep us waiting."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a file")
        yield file, about.st_size
    finally:
        os.close(file)


def _text(file: int, length: int) -> bytes:
    """The JSON of a file whose header is whole. Raises ValueError."""
    start = os.pread(file, START.size, 0)
    if len(start) < START.size:
        raise ValueError("cut off")
    magic, version, count, digest = START.unpack(start)
    if magic != MAGIC or version != VERSION or count > min(LONGEST, length - START.size):
        raise ValueError("foreign")
    text = os.pread(file, count, START.size)
    if len(text) < count or hashlib.sha256(_signed(start[:32], text)).digest() != digest:
        raise ValueError("damaged")
    return text


def _signed(start: bytes, text: bytes) -> bytes:
    return start + text


def _header(found: Any) -> Header:
    if not isinstance(found, dict):
        raise ValueError("not an object")
    values = [found.get(name) for name in ("key", "model", "folder", "layout")]
    if not all(isinstance(value, str) for value in values):
        raise ValueError("not a header")
    return Header(*values)  # type: ignore[arg-type]


def _parts(
    text: bytes, key: str, wanted: Sequence[tuple[str, Sequence[About]]]
) -> list[tuple[str, About, str]]:
    """(name, about, checksum) of every part, each as wanted. Raises ValueError."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("too deep") from error
    rows = found.get("parts") if isinstance(found, dict) else None
    if _header(found).key != key or not isinstance(rows, list) or len(rows) != len(wanted):
        raise ValueError("another model's")
    parts = []
    for row, (name, choices) in zip(rows, wanted, strict=True):
        if not isinstance(row, list) or len(row) != 3 or row[0] != name:
            raise ValueError("another part")
        about = next((about for about in choices if list(about) == row[1]), None)
        if about is None or not isinstance(row[2], str):
            raise ValueError("another part")
        parts.append((name, about, row[2]))
    return parts


def _mapped(file: int, length: int) -> Bytes:
    memory = mmap.mmap(file, length, mmap.MAP_SHARED, mmap.PROT_READ)
    for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
        with suppress(OSError, AttributeError):
            memory.madvise(getattr(mmap, advice))
    return np.frombuffer(memory, np.uint8)


def map_file(path: Path, begin: int, end: int) -> Bytes:
    """The bytes [begin, end) of a file, mapped read-only. BadRequest if it has fewer, FailedWork where
    there is no room for them.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise BadRequest(f"{path} is shorter than when it was opened", do="load it again")
        first = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            memory = mmap.mmap(
                file.fileno(), end - first, mmap.MAP_SHARED, mmap.PROT_READ, offset=first
            )
        except OSError as error:
            raise _no_memory(end - first) from error
    return np.frombuffer(memory, np.uint8)[begin - first :]


def _no_memory(count: int) -> FailedWork:
    return FailedWork(
        f"there is no memory for {count} bytes of weights",
        do="free some, or raise the limit of this process (ulimit -v)",
    )


# Writing ------------------------------------------------------------------------------------------


def write(
    path: Path, header: Header, parts: Sequence[tuple[str, About]], fill: Fill, threads: int
) -> None:
    """The file at `path`, at once or not at all. `fill(i, out)` writes part i to aligned memory.

    Memory: the largest part. Raises OSError, also where the disk has no room.
    """
    sizes = [size(about) for _, about in parts]
    sums = ["0" * 16] * len(parts)
    begin = len(_encoded(header, parts, sums))
    places, end = _laid(begin, sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < end + SLACK:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    buffer = _aligned(max(sizes, default=0))
    with _temporary(path) as file:
        for i, (place, count) in enumerate(zip(places, sizes, strict=True)):
            out = buffer[:count]
            fill(i, out)
            sums[i] = f"{layout.checksum(out, threads):016x}"
            _put(file, out.data, place)
        _put(file, memoryview(_encoded(header, parts, sums)), 0)
        os.ftruncate(file, end)


def in_memory(parts: Sequence[tuple[str, About]], fill: Fill) -> Mapped:
    """The same parts in anonymous memory. Raises FailedWork where there is not enough."""
    sizes = [size(about) for _, about in parts]
    places, end = _laid(0, sizes)
    try:
        memory = mmap.mmap(-1, max(end, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_memory(end) from error
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole, found = np.frombuffer(memory, np.uint8), {}
    for i, ((name, about), place, count) in enumerate(zip(parts, places, sizes, strict=True)):
        out = whole[place : place + count]
        fill(i, out)
        found[name] = about, out
    return Mapped(whole, found)


def _encoded(header: Header, parts: Sequence[tuple[str, About]], sums: Sequence[str]) -> bytes:
    rows = [[name, about, total] for (name, about), total in zip(parts, sums, strict=True)]
    text = json.dumps({**vars(header), "parts": rows}, separators=(",", ":")).encode()
    start = START.pack(MAGIC, VERSION, len(text), b"")
    digest = hashlib.sha256(_signed(start[:32], text)).digest()
    return start[:32] + digest + text


def _aligned(count: int) -> Bytes:
    try:
        memory = np.empty(count + layout.LINE, np.uint8)
    except MemoryError as error:
        raise _no_memory(count) from error
    begin = -memory.ctypes.data % layout.LINE
    return memory[begin : begin + count]


def _put(file: int, data: memoryview, place: int) -> None:
    while len(data):
        done = os.pwrite(file, data, place)
        data, place = data[done:], place + done


@contextmanager
def _temporary(path: Path) -> Iterator[int]:
    """A locked file under a name of its own that becomes `path` if all goes well."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.part")
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
        os.fsync(file)
        _forget(file)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _forget(file: int) -> None:
    """Lets the system drop its copy of a file, which was written in small pages.

    Whoever maps the file next asks for huge pages, and what is read anew then lies in them, for every
    process: with small ones a quarter of decoding's time went to looking up addresses.
    """
    with suppress(OSError, AttributeError):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sweep(home: Path, keep: Callable[[Header | None], bool]) -> None:
    """Removes from a folder the files that are not to be kept, and what killed writers left."""
    with suppress(OSError):
        for path in home.glob(f"*{SUFFIX}"):
            if not keep(header_of(path)):
                path.unlink(missing_ok=True)
        for path in home.glob(".*.part"):
            with suppress(OSError), _regular(path) as (file, _):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
