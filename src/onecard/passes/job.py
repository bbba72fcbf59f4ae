"""Compressing a model: in memory, or streamed from a folder to a folder under a memory cap.

Both ways drive the same walk, and give the same bits. Streamed: the plan is made and checked from
headers alone; then the stem is copied, blocks are walked one by one into the journal, the tail is
copied, and the folder gets its name. A second run of the same command goes on behind the last block
that was finished.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from onecard import __version__
from onecard.calibrate.data import Calibration, calibration_ids, digest
from onecard.calibrate.walk import Progress, batches, peak_bytes, walk, weight_count
from onecard.checkpoint.journal import Journal, check_space, check_target, fingerprint
from onecard.checkpoint.load import as_array, is_finite, read, stored_arrays
from onecard.checkpoint.load import block as read_block
from onecard.checkpoint.load import stem as read_stem
from onecard.checkpoint.save import (
    SINGLE_FILE,
    assemble,
    complete,
    config_with,
    source_hashes,
)
from onecard.checkpoint.shards import (
    Array,
    Buffers,
    Bytes,
    Checkpoint,
    copy_range,
    fresh,
    pread,
    read_header,
    read_json,
)
from onecard.checkpoint.source import MANIFEST, Source, verify
from onecard.core.device import resident, resident_peak
from onecard.core.errors import BadRequest
from onecard.core.format import DTYPE_BYTES, Format, parse_format
from onecard.core.report import Report, Row, environment, write_text
from onecard.core.settings import format_size
from onecard.core.spec import linear_shapes, sites
from onecard.kernels.reference import DTYPES, NAMES
from onecard.nn.model import Model
from onecard.nn.transformer import Block, positions_of
from onecard.passes import to_yaml
from onecard.passes.base import Recipe

SLACK, LIBRARIES = 32 << 20, 64 << 20
"""Allowance for the allocator, and for what matrix libraries keep once they have run."""
SMALL_FILES = 4 << 20


@dataclass(frozen=True)
class Settings:
    """How to go about it. `dtype` is what blocks are run in while calibrating."""

    calibration: Calibration = field(default_factory=Calibration)
    data: Path | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    memory: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """What a job will take, known before it starts. Bytes and seconds."""

    peak: int
    disk: int
    output: int
    seconds: float
    replay: bool
    dtype: str

    def rows(self) -> tuple[Row, ...]:
        return (
            Row("plan", "planned_peak_bytes", self.peak, "B"),
            Row("plan", "disk_bytes", self.disk, "B"),
            Row("plan", "output_bytes", self.output, "B"),
            Row("plan", "seconds", round(self.seconds, 1), "s"),
        )


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


# Streamed ------------------------------------------------------------------------------------------


class StreamedBlocks:
    """Blocks read from a folder one by one, finished ones written to the journal."""

    def __init__(self, source: Source, journal: Journal, dtype: torch.dtype | None) -> None:
        self.source, self.journal, self.dtype = source, journal, dtype
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
        arrays = compressed_arrays(self.source, block, index, rows)
        self.journal.add(part_name(index), arrays, notes, state or None)


def part_name(index: int) -> str:
    return f"block-{index:05d}"


def outer_names(source: Source, part: str) -> list[str]:
    """The source's tensors that hold the stem or the tail."""
    modules = {p.stored.name for p in source.places(None) if p.path.startswith(f"{part}.")}
    return [name for name in source.checkpoint.entries if name.rpartition(".")[0] in modules]


def compressed_arrays(
    source: Source, block: Block, index: int, rows: Iterable[Row] = ()
) -> dict[str, Array]:
    """A finished block as it will be stored: what was changed, everything else the source's bytes.

    Changed are the weights of linears, and whole modules that a `rescaled` row names.
    """
    arrays = stored_arrays(source, block, index)
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
        elif entry is not None and arrays[name][0] != entry.dtype:
            held = torch.frombuffer(arrays[name][2], dtype=DTYPES[arrays[name][0]])
            arrays[name] = as_array(held.view(arrays[name][1]).to(DTYPES[entry.dtype]))
    return arrays


def require_finite(source: Source, names: list[str]) -> None:
    """BadRequest naming the first tensor with NaN or infinite values."""
    for name in names:
        read(source, name)


def compute_dtype(source: Source, wanted: str) -> str:
    """bf16 where the weights are bf16 and the processor multiplies them, else fp32."""
    if wanted != "auto":
        return wanted
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if source.dtype == "bf16" and fast else "fp32"


def make_plan(source: Source, recipe: Recipe, settings: Settings, ids: Tensor | None) -> Plan:
    """What the job will take. BadRequest when it cannot stay under the memory cap."""
    spec, entries = source.spec, source.checkpoint.entries
    dtype = compute_dtype(source, settings.dtype) if recipe.needs else source.dtype
    element = DTYPE_BYTES[dtype]
    stored = DTYPE_BYTES[source.dtype]
    linears = sum(weight_count(spec, layer) for layer in spec.layers) * stored
    output = source.checkpoint.nbytes - linears
    output += sum(recipe.output_bytes(spec, layer, source.dtype) for layer in spec.layers)
    streams = 2 if recipe.compares else 1
    state = 0 if ids is None else ids.numel() * spec.hidden * element * streams
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
        raise BadRequest(
            f"{recipe.name} on {source.folder.name} does not fit into {format_size(settings.memory)}",
            f"the smallest cap that works is {format_size(peak(bool(recipe.needs)))}"
            f" ({format_size(base)} of it is the running process)",
            "raise --memory" + (", or lower --samples or --length" if state else ""),
        )
    seconds = estimate_seconds(source, recipe, ids, dtype, replay)
    copies = 2 if output <= SINGLE_FILE else 1  # parts are joined while they are still there
    disk = copies * output + 2 * state + SMALL_FILES
    return Plan(peak(replay), disk, output, seconds, replay, dtype)


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


@dataclass(frozen=True)
class Prepared:
    """A job that was checked: everything it needs, nothing done yet."""

    source: Source
    out: Path
    recipe: Recipe
    settings: Settings
    ids: Tensor | None
    plan: Plan

    def key(self) -> dict[str, Any]:
        """What decides the result: another key is another job.

        The number of threads does where blocks are run: the native kernels give the same bits for any,
        but torch's matrix products cut their sums by it (the shipped model by gptq-int4 differs between
        one thread and two).
        """
        return {
            "onecard": __version__,
            "source": fingerprint(self.source.checkpoint),
            "config": self.source.config,
            "recipe": self.recipe.settings(),
            "calibration": digest(self.ids),
            "dtype": self.plan.dtype,
            "threads": torch.get_num_threads() if self.recipe.needs else 0,
        }


def prepare(model: str | Path, out: str | Path, recipe: Recipe, settings: Settings) -> Prepared:
    """Check everything that can be checked from headers, settings and text. Raises BadRequest."""
    source, out = Source(model), Path(out).expanduser().resolve()
    verify(source.folder)
    if source.compressed:
        raise BadRequest(
            f"{source.folder} is compressed already ({', '.join(source.format_names())})",
            do="start from the original model",
        )
    recipe.check(source.spec)
    check_target(out, source.folder, settings.force)
    ids = None
    if recipe.needs:
        given = settings.data is not None and settings.data.suffix == ".json"
        ids = calibration_ids(
            None if given else source.tokenizer(), settings.data, settings.calibration,
            source.spec.vocab_size,
        )  # fmt: skip
        if ids.shape[1] > source.spec.max_context:
            raise BadRequest(
                f"samples of {ids.shape[1]} tokens, the model's context is {source.spec.max_context}",
                do="lower --length",
            )
    plan = make_plan(source, recipe, settings, ids)
    check_space(out, plan.disk)
    return Prepared(source, out, recipe, settings, ids, plan)


def compress(
    job: Prepared,
    progress: Progress = lambda done, total, what: None,
    finish: Callable[[Path, Report], Report] = lambda folder, report: report,
) -> Report:
    """Carry out a prepared job; OUT appears when it is complete. Killed, a second call goes on.

    `finish(folder, report)` sees the completed folder before it gets its name: it may add files, such
    as a page, and returns the report to keep.
    """
    started = time.perf_counter()
    source, recipe = job.source, job.recipe
    if recipe.needs:
        require_finite(source, list(source.checkpoint.entries))
    journal = Journal(job.out, job.key(), job.settings.force)
    with ThreadPoolExecutor(1) as aside:
        hashes = aside.submit(source_hashes, source)
        try:
            rows = _walk_into(job, journal, progress)
        except BadRequest:
            if journal.fresh:
                journal.discard()
            raise
        formats = output_formats(source, rows)
        weights = assemble(journal.folder, journal.hashes())
        write_text(journal.folder / "recipe.yaml", to_yaml(recipe))
        about = {"source": hashes.result(), **made(job)}
        complete(journal.folder, source, config_with(source, formats), weights, about)
    report = summary(job, rows, Checkpoint(journal.folder), time.perf_counter() - started)
    report = finish(journal.folder, report)
    write_text(journal.folder / "report.json", report.to_json())
    journal.publish(job.settings.force)
    return report


def _walk_into(job: Prepared, journal: Journal, progress: Progress) -> list[Row]:
    """Every part into the journal: the stem, the blocks by one walk, the tail. Returns all rows."""
    source, recipe = job.source, job.recipe
    parts = ["stem", *(part_name(i) for i in range(source.spec.num_layers)), "tail"]
    copy_outer(source, journal, "stem")
    first = sum(part_name(i) in journal for i in range(source.spec.num_layers))
    dtype = DTYPES[job.plan.dtype] if recipe.needs else None
    blocks = StreamedBlocks(source, journal, dtype)
    walk(blocks, recipe.passes, _hidden(job, journal, dtype), first, job.plan.replay, progress)
    copy_outer(source, journal, "tail")
    return [Row(*row) for part in parts for row in journal.rows(part)]


def copy_outer(source: Source, journal: Journal, part: str) -> None:
    """The stem or the tail, as the source has it."""
    if part in journal:
        return
    arrays: dict[str, Array] = {}
    for name in outer_names(source, part):
        entry = source.checkpoint.entries[name]
        if not (part == "tail" and source.spec.tied and _is_embedding(source, name)):
            arrays[name] = (entry.dtype, entry.shape, _checked(source, name))
    journal.add(part, arrays, [])


def _checked(source: Source, name: str) -> Iterator[Bytes]:
    """A tensor's bytes for copying. BadRequest where a value is NaN or infinite."""
    entry = source.checkpoint.entries[name]
    for piece in copy_range(entry):
        if not is_finite(torch.frombuffer(piece, dtype=DTYPES[entry.dtype])):
            read(source, name)  # says how many
        yield piece


def _is_embedding(source: Source, name: str) -> bool:
    return name.rpartition(".")[0] == source.name(source.family.outer["stem.embedding"].name)


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


def output_formats(source: Source, rows: list[Row]) -> dict[str, Format]:
    """stored name -> Format, from the `format` rows of the blocks."""
    named = {row.where: parse_format(str(row.value)) for row in rows if row.what == "format"}
    formats = {}
    for index in range(source.spec.num_layers):
        for place in source.places(index):
            format = named.get(f"blocks.{index}.{place.path}")
            if format is not None:
                formats[place.stored.name] = format
    return formats


def made(job: Prepared) -> Mapping[str, Any]:
    """How the result came about, for the manifest."""
    return {
        "recipe": job.recipe.settings(),
        "calibration": None if job.ids is None else {
            "ids": digest(job.ids), "samples": job.ids.shape[0], "length": job.ids.shape[1],
            "text": job.settings.data.name if job.settings.data else "shipped",
        },
        "dtype": job.plan.dtype,
    }  # fmt: skip


def summary(job: Prepared, rows: list[Row], made: Checkpoint, seconds: float) -> Report:
    """The report of a finished job; `made` is its checkpoint."""
    source = job.source
    before, after = file_bytes(source.checkpoint), file_bytes(made)
    count = parameter_count(source)
    notes = [(f"reference: {p.title}", p.paper) for p in job.recipe.passes]
    notes.append(("convention: bits per weight", "8 * bytes of all tensors / parameters, "
                  "embeddings and scales included"))  # fmt: skip
    notes.append(("run", f'onecard run {shlex.quote(str(job.out))} "The"'))
    if source.extra:
        notes.append(
            ("left out", "tensors the architecture does not use: " + ", ".join(source.extra))
        )
    return Report(
        (
            Row.of("model", "file_bytes", after, before),
            Row.of("model", "bits_per_weight", 8 * made.nbytes / count, 8 * source.checkpoint.nbytes / count),
            Row.of("model", "parameters", count),
            *job.plan.rows(),
            Row("walk", "seconds", round(seconds, 2), "s"),
            Row.of("walk", "peak_memory_bytes", resident_peak()),
            *rows,
        ),
        environment(
            model=source.folder.name, recipe=job.recipe.name, threads=torch.get_num_threads(),
            torch=torch.__version__, onecard=__version__, dtype=job.plan.dtype,
            calibration_samples=0 if job.ids is None else job.ids.shape[0],
            calibration_tokens=0 if job.ids is None else job.ids.numel(),
        ),
        f"{source.folder.name} by {job.recipe.name}: {format_size(before)} to {format_size(after)}",
        tuple(notes),
    )  # fmt: skip


def file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files on disk."""
    return sum(path.stat().st_size for path in checkpoint.files)


def parameter_count(source: Source) -> int:
    """Weights of a model from its headers; packed matrices count what they stand for."""
    total = 0
    for index in source.parts():
        for place in source.places(index):
            if not (place.path == "tail.head" and source.spec.tied):
                total += sum(math.prod(shape) for shape in place.module.tensors().values())
    return total


def is_finished(model: str | Path, out: str | Path, recipe: Recipe, settings: Settings) -> bool:
    """OUT holds the result of this very job: same source bytes, same recipe, same calibration."""
    out = Path(out)
    if not (out / MANIFEST).is_file() or not (out / "report.json").is_file():
        return False
    unforced = prepare(model, out, recipe, replace(settings, force=True))
    manifest = read_json(out / MANIFEST)
    verify(out)
    wanted = {"source": source_hashes(unforced.source), **made(unforced)}
    return all(manifest.get(key) == value for key, value in wanted.items())
