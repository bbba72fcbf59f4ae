"""Rounding from file to file: the way of a recipe that does nothing else. No torch.

Rows are rounded independently of each other, so a stored matrix passes through in pieces of about a
mebibyte: read, rounded and packed, hashed and written while they lie in a core's cache. A fused matrix
is rounded as it lies, since the order of rows changes nothing; only a transposed one has to be held.
As many parts as there are cores are worked on at a time, and entered into the journal in their order.

    file order of a part: shapes (int64), words and zero points (int32), scales, what is copied

so the scales and zero points of a block are kept until its words are written. The bytes, and the
complaints, are those of the walk (tests/test_rounding.py).

Memory at once, per core: three pieces, a block's scales and zero points, a transposed matrix twice.
Time: reading the source, and the manifest's sum of it from the same pieces; 0.2 to 0.5 ns a weight for
rounding; sha256 of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.finite import count_not_finite, damaged, not_finite
from onecard.checkpoint.journal import Journal
from onecard.checkpoint.shards import PIECE, Array, Bytes, copy_range, fresh
from onecard.checkpoint.source import Place, Source
from onecard.core.device import resident, resident_peak, usable_cores
from onecard.core.format import DTYPE_BYTES, Integers, words
from onecard.core.report import Row, Value
from onecard.core.spec import linear_shapes, sites
from onecard.kernels import cpu
from onecard.passes.base import Recipe
from onecard.passes.outline import behind, outline_of
from onecard.passes.plan import (
    Made,
    Plan,
    Prepared,
    Settings,
    beyond_cap,
    copied,
    disk_bytes,
    made_of,
    outer_arrays,
    part_name,
)
from onecard.passes.quantize import RoundToNearest, scale_overflow

SLACK = 12 << 20
"""Allowance for the allocator, and for what writes the report."""
BYTES_PER_SECOND = 1e9


def suits(recipe: Recipe) -> bool:
    """Whether this is the way to carry a recipe out."""
    return (
        len(recipe.passes) == 1 and isinstance(recipe.passes[0], RoundToNearest) and cpu.available()
    )


def make_plan(source: Source, recipe: Recipe, settings: Settings, ids: None) -> Plan:
    """What the job will take. BadRequest when it cannot stay under the memory cap."""
    base, output = resident(), behind(outline_of(source), recipe.passes, source.split).file_bytes
    kept = turned = 0
    for layer in set(source.spec.layers):
        shapes = linear_shapes(source.spec, layer)
        packed = sum(4 * rows * words(columns, _bits(recipe)) for rows, columns in shapes.values())
        kept = max(kept, recipe.output_bytes(source.spec, layer, source.dtype) - packed)
    for place in (p for index in source.parts()[1:] for p in source.places(index)):
        if place.stored.transposed:
            weight = source.checkpoint.entries[f"{place.stored.name}.weight"]
            turned = max(turned, 2 * weight.nbytes)
    widest = max(entry.shape[-1] * 8 for entry in source.checkpoint.entries.values() if entry.shape)
    each = 3 * max(PIECE, widest) + 2 * kept + turned
    peak = max(resident_peak(), base + SLACK + _workers(source) * each)
    if settings.memory is not None and peak > settings.memory:
        raise beyond_cap(source, recipe, settings.memory, peak, base)
    seconds = source.checkpoint.nbytes / BYTES_PER_SECOND
    return Plan(peak, disk_bytes(output), output, seconds, source.dtype)


def _bits(recipe: Recipe) -> int:
    rtn = recipe.passes[0]
    assert isinstance(rtn, RoundToNearest)
    return rtn.bits


def _workers(source: Source) -> int:
    return min(usable_cores(), source.spec.num_layers + 2)


def facts() -> dict[str, Value]:
    """What the report says of the machinery."""
    return {"threads": usable_cores()}


def fill(job: Prepared, journal: Journal, progress: Any) -> Made:
    """Every part that the journal lacks: written by several threads, entered in order."""
    source = job.source
    names = ["stem", *(part_name(i) for i in range(source.spec.num_layers)), "tail"]
    workers = _workers(source)
    threads = max(1, usable_cores() // workers)

    def write(number: int) -> tuple[str, list[list[Any]]]:
        name = names[number]
        if name in ("stem", "tail"):
            return journal.write(name, outer_arrays(source, name)), []
        arrays, rows = block_arrays(source, number - 1, job.recipe, threads)
        return journal.write(name, arrays), rows

    todo = [number for number, name in enumerate(names) if name not in journal]
    first = sorted(todo, key=lambda number: number not in (0, len(names) - 1))  # they may be large
    pool = ThreadPoolExecutor(workers)
    try:
        written = {number: pool.submit(write, number) for number in first}
        for number in todo:
            progress(max(number - 1, 0), source.spec.num_layers, names[number])
            journal.note(names[number], *written[number].result())
    finally:
        pool.shutdown(cancel_futures=True)
    progress(source.spec.num_layers, source.spec.num_layers, "done")
    return made_of(source, journal)


def block_arrays(
    source: Source, index: int, recipe: Recipe, threads: int
) -> tuple[dict[str, Array], list[list[Any]]]:
    """The tensors of block `index` on their way to its file, and its rows of the report."""
    layer, arrays, rows = source.spec.layers[index], dict[str, Array](), list[list[Any]]()
    touched = [name for site in sites(layer) for name in site.linears]
    places = {place.path: place for place in source.places(index)}
    for path, place in places.items():
        stored = place.stored
        if stored.of and stored.part:
            continue
        for part in place.module.tensors():
            name = f"{stored.name}.{part}"
            if part != "weight" or path not in touched:
                arrays[name] = copied(source, name)
                continue
            format = recipe.output_format((place.module.shape[0], place.module.shape[1]))
            assert isinstance(format, Integers)
            together = [places[other] for other in stored.of] or [place]
            matrix = Rounded(source, index, together, format.scaled(source.dtype), threads)
            arrays |= {f"{stored.name}.{part}": array for part, array in matrix.arrays().items()}
    for path in touched:
        down, across = places[path].module.shape
        format = recipe.output_format((down, across))
        assert isinstance(format, Integers)
        row = Row(f"blocks.{index}.{path}", "format", format.name)
        rows.append([row.where, row.what, row.value, row.unit])
    return arrays, rows


class Rounded:
    """A stored matrix [rows, columns] that is being rounded; `places` are its parts where it is fused."""

    def __init__(
        self, source: Source, index: int, places: list[Place], format: Integers, threads: int
    ) -> None:
        self.source, self.index, self.places = source, index, places
        self.format, self.threads = format, threads
        self.name = f"{places[0].stored.name}.weight"
        self.dtype = source.checkpoint.entries[self.name].dtype
        self.shape = (places[0].total, places[0].module.shape[1])
        self.groups = format.groups(self.shape)
        self.scale: NDArray[np.uint8] = np.empty(0, np.uint8)  # [rows, groups], as bytes
        self.zero: NDArray[np.int8] = np.empty((0, 0), np.int8)  # [rows, groups]

    def arrays(self) -> dict[str, Array]:
        """The parts of its format; bytes are to be taken in the order of a file, words first."""
        held: dict[str, Any] = {
            "weight_shape": np.array(self.shape, np.int64),
            "weight_packed": self._words(),
            "weight_scale": self._scales(),
            "weight_zero_point": self._zeros(),
        }
        parts = self.format.parts(self.shape).items()
        return {part: (dtype, shape, held[part]) for part, (dtype, shape) in parts}

    def _pieces(self) -> Iterator[tuple[int, Bytes]]:
        """(number of rows, their bytes) from first to last."""
        checkpoint = self.source.checkpoint
        entry = checkpoint.entries[self.name]
        row = self.shape[1] * DTYPE_BYTES[self.dtype]
        if self.places[0].stored.transposed:
            held = self.source.array(self.name)[1]
            turned = np.ascontiguousarray(held.T).view(np.uint8).reshape(-1)
            step = max(1, PIECE // row) * row
            for begin in range(0, turned.size, step):
                yield len(turned[begin : begin + step]) // row, turned[begin : begin + step]
            return
        for piece in checkpoint.pieces(self.name) if row <= PIECE else copy_range(entry, row):
            yield piece.size // row, piece

    def _words(self) -> Iterator[Bytes]:
        (rows, columns), format, done = self.shape, self.format, 0
        width, room = 4 * words(columns, format.bits), fresh(0)
        across = self.groups * DTYPE_BYTES[format.scale]
        self.scale, self.zero = fresh(rows * across), np.zeros((rows, self.groups), np.int8)
        for count, piece in self._pieces():
            room = fresh(count * width) if room.size < count * width else room
            if cpu.round_pack(
                piece.ctypes.data, self.dtype, count, columns, format, room.ctypes.data,
                self.scale[done * across :].ctypes.data, self.zero[done:].ctypes.data, self.threads,
            ):  # fmt: skip
                raise damaged(self.name, count_not_finite(self.source.checkpoint, self.name))
            yield room[: count * width]
            done += count

    def _scales(self) -> Iterator[Bytes]:
        bad = not_finite(self.format.scale, self.scale).reshape(self.shape[0], -1)
        for place in self.places if bad.any() else ():
            if bad[place.rows].any():
                raise scale_overflow(self.format, f"blocks.{self.index}.{place.path}")
        yield self.scale

    def _zeros(self) -> Iterator[Bytes]:
        """Zero points are packed along the rows."""
        along = np.ascontiguousarray(self.zero.T)  # [groups, rows]
        rows, bits = self.shape[0], self.format.bits
        packed = np.empty((self.groups, words(rows, bits)), np.int32)
        cpu.pack(along.ctypes.data, self.groups, rows, bits, packed.ctypes.data, self.threads)
        yield np.ascontiguousarray(packed.T).view(np.uint8).reshape(-1)
