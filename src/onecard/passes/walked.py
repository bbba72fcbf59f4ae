"""Carrying a recipe out by the walk: on a model in memory, or streamed from a folder to the journal.

Both give the same bits. Streamed: the stem is copied, blocks are walked one by one into the journal,
the tail is copied; a second run of the same job goes on behind the last block that was finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.calibrate.walk import Progress, batches, peak_bytes, walk, weight_count
from onecard.checkpoint.journal import Journal
from onecard.checkpoint.load import as_array, read, stored_arrays
from onecard.checkpoint.load import block as read_block
from onecard.checkpoint.load import stem as read_stem
from onecard.checkpoint.shards import Array, Buffers, fresh, pread, read_header
from onecard.checkpoint.source import Source
from onecard.core.device import resident, resident_peak
from onecard.core.errors import BadRequest
from onecard.core.format import DENSE, DTYPE_BYTES
from onecard.core.report import Report, Row, Value, environment
from onecard.core.spec import linear_shapes, sites
from onecard.kernels.reference import DTYPES, NAMES
from onecard.nn.model import Model
from onecard.nn.transformer import Block, positions_of
from onecard.passes.base import Recipe
from onecard.passes.plan import (
    Plan,
    Prepared,
    Settings,
    beyond_cap,
    disk_bytes,
    outer_arrays,
    output_bytes,
    part_name,
)

SLACK, LIBRARIES = 32 << 20, 64 << 20
"""Allowance for the allocator, and for what matrix libraries keep once they have run."""


# In memory ----------------------------------------------------------------------------------------


@dataclass
class ModelBlocks:
    """The blocks of a model in memory."""

    model: Model

    def __post_init__(self) -> None:
        self.spec = self.model.spec
        self.stored = NAMES[next(self.model.network.parameters()).dtype]

    def load(self, index: int) -> Block:
        block = self.model.network.blocks[index]
        assert isinstance(block, Block)
        return block

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        pass


def apply(model: Model, recipe: Recipe, ids: Tensor | None) -> Report:
    """Apply a recipe to a model in memory. `ids` [samples, length] calibrate it, if it needs any."""
    recipe.check(model.spec)
    if any(not linear.format.dense for _, linear in model.linears()):
        raise BadRequest("the model is compressed already", do="start from the original model")
    hidden: list[Tensor] = []
    if recipe.needs:
        if ids is None:
            raise BadRequest(f"the recipe {recipe.name} needs calibration text")
        with torch.no_grad():
            hidden = [model.network.stem(b, positions_of(b, None, 0)) for b in batches(ids)]
    rows = walk(ModelBlocks(model), recipe.passes, hidden)
    return Report(tuple(rows), environment(recipe=recipe.name), title=recipe.name)


# Streamed ----------------------------------------------------------------------------------------


class StreamedBlocks:
    """Blocks read from a folder one by one, finished ones written to the journal."""

    def __init__(
        self, source: Source, journal: Journal, dtype: torch.dtype | None, split: bool
    ) -> None:
        self.source, self.journal, self.dtype, self.split = source, journal, dtype, split
        self.spec, self.stored = source.spec, source.dtype
        self._aside = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Block]] | None = None
        if dtype is None:
            source.checkpoint.empty = Buffers().empty

    def load(self, index: int) -> Block:
        """Block `index`; where blocks are not run, the next one is read meanwhile."""
        ready = self._next
        block = ready[1].result() if ready and ready[0] == index else self._read(index)
        if self.dtype is None and index + 1 < self.spec.num_layers:
            self._next = (index + 1, self._aside.submit(self._read, index + 1))
        return block

    def _read(self, index: int) -> Block:
        return read_block(self.source, index, self.dtype)

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        state = {f"hidden.{i:05d}": as_array(h) for i, h in enumerate(hidden)}
        notes = [[r.where, r.what, r.value, r.unit] for r in rows]
        arrays = compressed_arrays(self.source, block, index, rows, self.split)
        self.journal.add(part_name(index), arrays, notes, state or None)


def fill(job: Prepared, journal: Journal, progress: Progress) -> None:
    """Every part that the journal lacks: the stem, the blocks by one walk, the tail."""
    source, recipe = job.source, job.recipe
    if recipe.needs:  # hours of work follow: better said now
        for name in source.checkpoint.entries:
            read(source, name)
    if "stem" not in journal:
        journal.add("stem", outer_arrays(source, "stem"), [])
    first = sum(part_name(i) in journal for i in range(source.spec.num_layers))
    dtype = DTYPES[job.plan.dtype] if recipe.needs else None
    blocks = StreamedBlocks(source, journal, dtype, recipe.splits)
    walk(blocks, recipe.passes, _hidden(job, journal, dtype), first, job.plan.replay, progress)
    if "tail" not in journal:
        journal.add("tail", outer_arrays(source, "tail"), [])


def _hidden(job: Prepared, journal: Journal, dtype: torch.dtype | None) -> list[Tensor]:
    """The inputs of the next block: from the journal's state, or from the stem."""
    if job.ids is None or not job.recipe.needs:
        return []
    path = journal.state()
    if path is not None:
        entries = read_header(path)
        found = ((e, pread(e.path, e.begin, fresh(e.nbytes))) for _, e in sorted(entries.items()))
        return [torch.frombuffer(data, dtype=DTYPES[e.dtype]).view(e.shape) for e, data in found]
    stem = read_stem(job.source, dtype)
    with torch.no_grad():
        return [stem(b, positions_of(b, None, 0)) for b in batches(job.ids)]


def compressed_arrays(
    source: Source, block: Block, index: int, rows: Iterable[Row] = (), split: bool = False
) -> dict[str, Array]:
    """A finished block as it will be stored: what was changed, everything else the source's bytes.

    Changed are the weights of linears, and whole modules that a `rescaled` row names.
    """
    arrays = stored_arrays(source, block, index, split)
    touched = {name for site in sites(block.layer) for name in site.linears}
    rescaled = {r.where.removeprefix(f"blocks.{index}.") for r in rows if r.what == "rescaled"}
    changed, whole = (
        {place.stored.name for place in source.places(index) if place.path in paths}
        for paths in (touched, rescaled)
    )
    for name in list(arrays):
        module, _, tensor = name.rpartition(".")
        entry = source.checkpoint.entries.get(name)
        kept = module not in whole and (module not in changed or tensor == "bias")
        if entry is not None and kept:
            arrays[name] = (entry.dtype, entry.shape, entry)
        elif tensor in ("weight", "bias") and arrays[name][0] in DENSE:
            stored = entry.dtype if entry is not None else source.dtype
            if arrays[name][0] != stored:
                held = torch.frombuffer(arrays[name][2], dtype=DTYPES[arrays[name][0]])
                arrays[name] = as_array(held.view(arrays[name][1]).to(DTYPES[stored]))
    return arrays


def compute_dtype(source: Source, wanted: str) -> str:
    """bf16 where the weights are bf16 and the processor multiplies them, else fp32."""
    if wanted != "auto":
        return wanted
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if source.dtype == "bf16" and fast else "fp32"


# What it takes -----------------------------------------------------------------------------------


def facts() -> dict[str, Value]:
    """What the report says of the machinery."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def make_plan(source: Source, recipe: Recipe, settings: Settings, ids: Tensor | None) -> Plan:
    """What the job will take. BadRequest when it cannot stay under the memory cap."""
    spec, entries = source.spec, source.checkpoint.entries
    dtype = compute_dtype(source, settings.dtype) if recipe.needs else source.dtype
    element = DTYPE_BYTES[dtype]
    stored = DTYPE_BYTES[source.dtype]
    state = 0 if ids is None else ids.numel() * spec.hidden * element
    base = resident()
    stem = 0 if ids is None else max(
        entries[n].nbytes * element // DTYPE_BYTES[entries[n].dtype]
        for n in entries if n.startswith(source.name(source.family.outer["stem.embedding"].name))
    )  # fmt: skip
    largest = max(entry.nbytes for entry in entries.values())

    def site_bytes(rows: int, columns: int) -> int:
        return max(p.site_bytes(rows, columns) for p in recipe.passes)

    def peak(replay: bool) -> int:
        walking = peak_bytes(spec, ids, recipe.needs, element, replay, site_bytes)
        if recipe.needs:
            return max(
                resident_peak(), base + SLACK + LIBRARIES + max(walking, stem + state, largest)
            )
        aside = max(  # the block being read meanwhile, and what the finished one becomes
            weight_count(spec, layer) * stored + recipe.output_bytes(spec, layer, source.dtype)
            for layer in set(spec.layers)
        )
        return max(resident_peak(), base + SLACK + walking + aside)

    replay = (
        settings.memory is not None
        and recipe.needs != frozenset()
        and peak(False) > settings.memory
    )
    if settings.memory is not None and peak(replay) > settings.memory:
        do = "raise --memory" + (", or lower --samples or --length" if state else "")
        least = peak(bool(recipe.needs))
        raise beyond_cap(source, recipe, settings.memory, least, base, do)
    seconds = estimate_seconds(source, recipe, ids, dtype, replay)
    output, threads = output_bytes(source, recipe), torch.get_num_threads() if recipe.needs else 0
    disk = disk_bytes(output, state)
    return Plan(peak(replay), disk, output, seconds, dtype, replay, threads)


def estimate_seconds(
    source: Source, recipe: Recipe, ids: Tensor | None, dtype: str, replay: bool
) -> float:
    """From two matrix products timed on the spot, and the operation counts of the walk."""
    seconds = source.checkpoint.nbytes / 0.6e9
    if ids is None or not recipe.needs:
        return seconds
    fast, slow = _rate(DTYPES[dtype]), _rate(torch.float32)
    tokens = ids.numel()
    for layer in source.spec.layers:
        shapes = linear_shapes(source.spec, layer)
        seconds += 2 * tokens * weight_count(source.spec, layer) * (2 if replay else 1) / fast
        for site in sites(layer):
            rows = sum(shapes[name][0] for name in site.linears)
            columns = shapes[site.linears[0]][1]
            products = 2 * tokens * columns**2 / fast
            rounding = columns**3 / 3 + 4 * rows * columns**2 + 4000 * rows * columns
            seconds += products + rounding / slow
    return seconds


def _rate(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product of 1024, best of three."""
    a, best = torch.ones(1024, 1024, dtype=dtype), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
