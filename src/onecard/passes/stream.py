"""Stages streamed from a folder to a folder: blocks are read one by one, finished ones are journaled.

A stage reads a Source and writes parts (the stem, every block, the tail) into a Journal. Between two
stages lies an ordinary model folder inside the working folder, removed when the next stage is done.
What a stage found before it began (a survey) and what it measured lie beside it, so that a killed job
begins neither again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.calibrate.walk import SitePass, batches, walk
from onecard.checkpoint.journal import Journal
from onecard.checkpoint.load import as_array, load_model, stored_arrays
from onecard.checkpoint.load import block as read_block
from onecard.checkpoint.load import stem as read_stem
from onecard.checkpoint.load import tail as read_tail
from onecard.checkpoint.packed import must_split
from onecard.checkpoint.save import packed_schemes
from onecard.checkpoint.shards import (
    Array,
    Buffers,
    fresh,
    pread,
    read_header,
)
from onecard.checkpoint.source import Source
from onecard.core.format import DENSE
from onecard.core.report import Row, write_text
from onecard.core.scheme import Scheme
from onecard.core.spec import sites
from onecard.kernels.reference import DTYPES
from onecard.nn.graph import Surgery, cut_block, cut_outer
from onecard.nn.transformer import Block, positions_of
from onecard.passes.base import BlockPass, Data, ModelPass, Survey, needs_of, splits
from onecard.passes.cut import Cut, judge, loss_of
from onecard.passes.memory import Watched, run_stage
from onecard.passes.plan import Made, made_of, outer_arrays, part_name
from onecard.passes.sparse import Keeper


class StreamedBlocks:
    """Blocks read from a folder one by one, finished ones written to the journal."""

    def __init__(
        self, source: Source, journal: Journal, dtype: torch.dtype | None, split: bool = False,
        stage: Sequence[BlockPass] = (),
    ) -> None:  # fmt: skip
        self.source, self.journal, self.dtype, self.split = source, journal, dtype, split
        self.spec, self.stored = source.spec, source.dtype
        self.keeper = Keeper(stage, self.stored)
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
        block = read_block(self.source, index, self.dtype)
        self.keeper.opened(block, self.dtype)
        return block

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        self.keeper.closed(block, rows)
        state = {f"hidden.{i:05d}": as_array(h) for i, h in enumerate(hidden)}
        notes = [[r.where, r.what, r.value, r.unit] for r in rows]
        arrays = compressed_arrays(self.source, block, index, rows, self.split)
        self.journal.add(part_name(index), arrays, notes, state or None)


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
    split = splits(stage) or source.split
    blocks = StreamedBlocks(source, journal, dtype, split, stage)
    hidden = _hidden(work, dtype) if needs_of(stage) else []
    walk(blocks, chosen, hidden, first, work.replay, work.data.progress)
    copy_outer(source, journal, "tail")
    return made_of(source, journal, split, held_schemes(source))


def cut(stage: Cut, work: Work) -> Made:
    """What stays is decided first; then every block that stays is read, cut and written."""
    source, journal = work.source, work.journal
    found = surveyed(stage.survey(source.spec), work, "0")
    plan, rows = stage.decide(source.spec, found)
    target = source.shaped(plan.spec)
    rows += judged(stage, plan, work)
    outer(source, target, plan, journal, "stem")
    before = held_schemes(source)
    outside = {place.stored.name for place in source.places(None)}
    schemes = {name: scheme for name, scheme in before.items() if name in outside}
    for index, old in enumerate(plan.layers):
        work.data.progress(index, len(plan.layers), f"block {index}")
        mine = {place.path: before.get(place.stored.name) for place in source.places(old)}
        for place in target.places(index):
            scheme = mine.get(place.path)
            if scheme is not None:
                schemes[place.stored.name] = scheme
        if part_name(index) not in journal:
            block = cut_block(read_block(source, old), plan, index)
            journal.add(part_name(index), stored_arrays(target, block, index, source.split), [])
    outer(source, target, plan, journal, "tail")
    return Made(target, schemes, rows, source.split)


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
    schemes: dict[str, Scheme] = {}
    split = must_split([linear.format for _, linear in model.linears() if not linear.format.dense])
    journal.restart()
    for part, root, index in roots:
        journal.add(part, stored_arrays(target, root, index, split), [])
        schemes |= packed_schemes(target, root, index, split)
    write_text(path, json.dumps(notes_of(rows)))
    return Made(target, schemes, rows, split)


def copy_outer(source: Source, journal: Journal, part: str) -> None:
    """The stem or the tail, as the source has it."""
    if part not in journal:
        journal.add(part, outer_arrays(source, part), [])


def surveyed(survey: Survey, work: Work, name: str) -> Any:
    """What a survey finds, once: it is kept beside the parts as plain data."""
    path = work.notes.with_suffix(f".survey-{name}.json")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    source, progress = work.source, work.data.progress
    dtype = DTYPES[work.dtype] if survey.runs else None
    hidden = first_inputs(source, work.ids, dtype) if survey.runs else []
    blocks = StreamedBlocks(source, work.journal, dtype)
    walk(Watched(blocks, survey, hidden), (survey,), hidden, 0, work.replay, progress)
    text = json.dumps(survey.result())
    write_text(path, text)
    return json.loads(text)


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


def held_schemes(source: Source) -> dict[str, Scheme]:
    """stored name -> Scheme of what is packed already."""
    places = [place for index in source.parts() for place in source.places(index)]
    found = ((place, source.format_at(place)) for place in places)
    return {p.stored.name: Scheme(f, source.inputs_at(p)) for p, f in found if f is not None}
