"""Stages streamed from a folder to a folder: blocks are read one by one, finished ones are journaled.

A stage reads a Source and writes parts (the stem, every block, the tail) into a Journal. Between two
stages lies an ordinary model folder inside the working folder, removed when the next stage is done.
What a stage found before it began (a survey) and what it measured lie beside it, so that a killed job
begins neither again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.calibrate.walk import SitePass, batches, walk
from onecard.checkpoint.journal import Journal
from onecard.checkpoint.load import as_array, is_finite, load_model, read, stored_arrays
from onecard.checkpoint.load import block as read_block
from onecard.checkpoint.load import stem as read_stem
from onecard.checkpoint.load import tail as read_tail
from onecard.checkpoint.save import packed_formats
from onecard.checkpoint.shards import (
    Array,
    Buffers,
    Bytes,
    copy_range,
    fresh,
    pread,
    read_header,
)
from onecard.checkpoint.source import Source
from onecard.core.format import Format, parse_format
from onecard.core.report import Row, write_text
from onecard.core.spec import sites
from onecard.kernels.reference import DTYPES
from onecard.nn.graph import Surgery, cut_block, cut_outer
from onecard.nn.transformer import Block, positions_of
from onecard.passes.base import BlockPass, Data, ModelPass, Survey, needs_of
from onecard.passes.cut import Cut, judge, loss_of
from onecard.passes.memory import Watched, look, run_stage


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


# One stage ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One stage of a job: what it reads, where its parts go, how it is done.

    `notes` is a path without ending for what has to outlive a kill beside the parts.
    """

    source: Source
    journal: Journal
    notes: Path
    ids: Tensor | None
    dtype: str
    replay: bool
    in_memory: bool
    data: Data


@dataclass(frozen=True)
class Made:
    """What a stage left: the layout it was written in, formats by stored name, what was measured."""

    source: Source
    formats: Mapping[str, Format]
    rows: list[Row]


def run(stage: tuple[BlockPass, ...] | ModelPass, work: Work) -> Made:
    """Every part of a stage into its journal."""
    if work.in_memory:
        return whole(stage, work)
    if isinstance(stage, Cut):
        return cut(stage, work)
    assert isinstance(stage, tuple)
    return walked(stage, work)


def walked(stage: tuple[BlockPass, ...], work: Work) -> Made:
    """The stem is copied, blocks are walked one by one into the journal, the tail is copied."""
    source, journal = work.source, work.journal
    chosen: list[SitePass] = []
    for number, p in enumerate(stage):
        known = p.informed(surveyed(p.survey(source.spec), work, str(number))) if p.surveys else p
        chosen.append(known)
    copy_outer(source, journal, "stem")
    first = sum(part_name(i) in journal for i in range(source.spec.num_layers))
    dtype = DTYPES[work.dtype] if needs_of(stage) else None
    blocks = StreamedBlocks(source, journal, dtype)
    hidden = _hidden(work, dtype) if needs_of(stage) else []
    walk(blocks, chosen, hidden, first, work.replay, work.data.progress)
    copy_outer(source, journal, "tail")
    rows = noted(journal, source.spec.num_layers)
    return Made(source, {**held_formats(source), **output_formats(source, rows)}, rows)


def cut(stage: Cut, work: Work) -> Made:
    """What stays is decided first; then every block that stays is read, cut and written."""
    source, journal = work.source, work.journal
    found = surveyed(stage.survey(source.spec), work, "0")
    plan, rows = stage.decide(source.spec, found)
    target = source.shaped(plan.spec)
    rows += judged(stage, plan, work)
    outer(source, target, plan, journal, "stem")
    before, formats = held_formats(source), dict[str, Format]()
    for index, old in enumerate(plan.layers):
        work.data.progress(index, len(plan.layers), f"block {index}")
        mine = {place.path: before.get(place.stored.name) for place in source.places(old)}
        for place in target.places(index):
            format = mine.get(place.path)
            if format is not None:
                formats[place.stored.name] = format
        if part_name(index) not in journal:
            block = cut_block(read_block(source, old), plan, index)
            journal.add(part_name(index), stored_arrays(target, block, index), [])
    outer(source, target, plan, journal, "tail")
    return Made(target, formats, rows)


def judged(stage: Cut, plan: Surgery, work: Work) -> list[Row]:
    """Perplexity on the first of the calibration text, whole and cut; a wreck is refused."""
    path = work.notes.with_suffix(".judged.json")
    if not path.is_file():
        source, dtype = work.source, DTYPES[work.dtype]
        ids = work.ids
        assert ids is not None, "a cut is judged on text"
        stem, tail = read_stem(source, dtype), read_tail(source, dtype)
        count = source.spec.num_layers
        whole = (read_block(source, i, dtype) for i in range(count))
        less = (cut_block(read_block(source, old, dtype), plan, new)
                for new, old in enumerate(plan.layers))  # fmt: skip
        before = loss_of(stem, whole, tail, source.spec, ids)
        after = loss_of(cut_outer(stem, plan), less, cut_outer(tail, plan), plan.spec, ids)
        write_text(path, json.dumps([before, after]))
    before, after = json.loads(path.read_text(encoding="utf-8"))
    return judge(stage, before, after)


def outer(source: Source, target: Source, plan: Surgery, journal: Journal, part: str) -> None:
    """The stem or the tail of a cut model."""
    if plan.hidden is None:
        copy_outer(source, journal, part)
    elif part not in journal:
        root = cut_outer(read_stem(source) if part == "stem" else read_tail(source), plan)
        journal.add(part, stored_arrays(target, root, None), [])


def whole(stage: tuple[BlockPass, ...] | ModelPass, work: Work) -> Made:
    """The whole model is read, changed in memory, and written part by part."""
    source, journal, path = work.source, work.journal, work.notes.with_suffix(".rows.json")
    model, rows = run_stage(load_model(source.folder), stage, work.data)
    target = source.shaped(model.spec)
    roots: list[tuple[str, nn.Module, int | None]] = [("stem", model.network.stem, None)]
    roots += [(part_name(i), block, i) for i, block in enumerate(model.blocks())]
    roots += [("tail", model.network.tail, None)]
    formats: dict[str, Format] = {}
    journal.restart()
    for part, root, index in roots:
        journal.add(part, stored_arrays(target, root, index), [])
        formats |= packed_formats(target, root, index)
    write_text(path, json.dumps(notes_of(rows)))
    return Made(target, formats, rows)


def surveyed(survey: Survey, work: Work, name: str) -> Any:
    """What a survey finds, once: it is kept beside the parts as plain data."""
    path = work.notes.with_suffix(f".survey-{name}.json")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    source, progress = work.source, work.data.progress
    if survey.gradients:
        found = look(load_model(source.folder, "fp32"), survey, work.ids, progress)
    else:
        dtype = DTYPES[work.dtype] if survey.runs else None
        hidden = first_inputs(source, work.ids, dtype) if survey.runs else []
        blocks = StreamedBlocks(source, work.journal, dtype)
        walk(Watched(blocks, survey, hidden), (survey,), hidden, 0, work.replay, progress)
        found = survey.result()
    text = json.dumps(found)
    write_text(path, text)
    return json.loads(text)


def noted(journal: Journal, layers: int) -> list[Row]:
    """What was noted with every part."""
    parts = ["stem", *(part_name(i) for i in range(layers)), "tail"]
    return [Row(*row) for part in parts for row in journal.rows(part)]


def notes_of(rows: list[Row]) -> list[list[Any]]:
    """Rows as plain data that `Row(*note)` takes back."""
    return [[r.where, r.what, r.value, r.unit, r.before] for r in rows]


def first_inputs(source: Source, ids: Tensor | None, dtype: torch.dtype | None) -> list[Tensor]:
    """The inputs of the first block, per batch."""
    assert ids is not None, "this stage needs text"
    stem = read_stem(source, dtype)
    with torch.no_grad():
        return [stem(b, positions_of(b, None, 0)) for b in batches(ids)]


def _hidden(work: Work, dtype: torch.dtype | None) -> list[Tensor]:
    """The inputs of the next block: from the journal's state, or from the stem."""
    path = work.journal.state()
    if path is None:
        return first_inputs(work.source, work.ids, dtype)
    entries = read_header(path)
    found = ((e, pread(e.path, e.begin, fresh(e.nbytes))) for _, e in sorted(entries.items()))
    return [torch.frombuffer(data, dtype=DTYPES[e.dtype]).view(e.shape) for e, data in found]


def held_formats(source: Source) -> dict[str, Format]:
    """stored name -> Format of what is packed already."""
    places = (place for index in source.parts() for place in source.places(index))
    found = ((place.stored.name, source.format_at(place)) for place in places)
    return {name: format for name, format in found if format is not None}


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
