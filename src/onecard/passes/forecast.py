"""What every stage of a job will take: memory, disk, time, output, from headers alone.

The plan of a recipe is that of its worst stage for memory; disk holds what a stage reads, when it is
the result of the stage before, beside what it writes. Sizes of stages behind a cut come from the Spec
that the settings foretell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from onecard.calibrate.walk import compares, peak_bytes, weight_count
from onecard.checkpoint.load import compute_dtype
from onecard.checkpoint.packed import must_split
from onecard.checkpoint.source import Source
from onecard.core.device import resident, resident_peak
from onecard.core.format import DTYPE_BYTES, Dense
from onecard.core.scheme import Scheme
from onecard.core.spec import Spec, linear_shapes, sites
from onecard.kernels.reference import DTYPES
from onecard.passes.base import (
    BlockPass,
    ModelPass,
    Recipe,
    Stage,
    Survey,
    needs_of,
    output_bytes,
    splits,
)
from onecard.passes.cut import Cut
from onecard.passes.outline import Outline, behind, outline_of
from onecard.passes.plan import (
    Plan,
    Settings,
    beyond_cap,
    disk_bytes,
)

SLACK, LIBRARIES = 48 << 20, 64 << 20
"""Allowance for the allocator, and for what matrix libraries keep once they have run."""


def estimate_seconds(spec: Spec, ids: Tensor, dtype: str, replay: bool) -> float:
    """From two matrix products timed on the spot, and the operation counts of the walk."""
    seconds = 0.0
    fast, slow = _rate(DTYPES[dtype]), _rate(torch.float32)
    tokens = ids.numel()
    for layer in spec.layers:
        shapes = linear_shapes(spec, layer)
        seconds += 2 * tokens * weight_count(spec, layer) * (2 if replay else 1) / fast
        for site in sites(layer):
            rows = sum(shapes[name][0] for name in site.linears)
            columns = shapes[site.linears[0]][1]
            products = 2 * tokens * columns**2 / fast
            rounding = columns**3 / 3 + 4 * rows * columns**2 + 4000 * rows * columns
            seconds += products + rounding / slow
    return seconds


def product_seconds(weights: int, tokens: float, dtype: str) -> float:
    """Of the products of so many tokens with linears of so many weights."""
    return 2 * tokens * weights / _rate(DTYPES[dtype])


@cache
def _rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of 512, the best of ten or of half a second; once a process."""
    a, best, begun = torch.ones(512, 512, dtype=dtype), float("inf"), time.perf_counter()
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > 0.5:
            break
    return 2 * 512**3 / best


@dataclass(frozen=True)
class Before:
    """A model that a stage starts from, and what its passes have to know of it.

    Bytes of its files, of everything but the linears of its blocks, of its embedding, of its largest tensor.
    """

    outline: Outline
    nbytes: int
    rest: int
    stem: int
    largest: int

    @property
    def spec(self) -> Spec:
        return self.outline.source.spec

    @property
    def stored(self) -> str:
        return self.outline.stored


def before_of(source: Source) -> Before:
    """The model that the first stage starts from."""
    entries = source.checkpoint.entries
    name = source.name(source.family.outer["stem.embedding"].name)
    stem = max(entries[n].nbytes for n in entries if n.startswith(name))
    largest = max(entry.nbytes for entry in entries.values())
    return before(outline_of(source), stem, largest)


def before(outline: Outline, stem: int, largest: int) -> Before:
    """The same of what a stage leaves."""
    spec, stored, nbytes = outline.source.spec, outline.stored, outline.file_bytes
    linears = 0
    for layer, schemes in zip(spec.layers, outline.schemes, strict=True):
        for name, shape in linear_shapes(spec, layer).items():
            linears += schemes.get(name, Scheme(Dense(stored))).bytes(shape, stored)
    return Before(outline, nbytes, nbytes - linears, stem, largest)


def make_plan(source: Source, recipe: Recipe, settings: Settings, ids: Tensor | None) -> Plan:
    """What the job will take. BadRequest when it cannot stay under the memory cap."""
    memory = settings.memory
    dtype = compute_dtype(source, settings.dtype) if recipe.calibrated else source.dtype
    begun, base = before_of(source), resident()
    peaks, replays, wholes, disk, seconds = [], [], [], 0, source.checkpoint.nbytes / 0.6e9
    stages = recipe.stages()
    for number, stage in enumerate(stages):
        peak, replay, whole = stage_peak(begun, stage, ids, dtype, base, memory)
        after = after_stage(begun, stage)
        seconds += stage_seconds(begun, stage, ids, dtype, replay)
        kept = begun.nbytes if number else 0
        output = after.nbytes
        streams = 2 if isinstance(stage, tuple) and stage and compares(stage) else 1
        state = 0 if ids is None else ids.numel() * begun.spec.hidden * DTYPE_BYTES[dtype] * streams
        disk = max(disk, kept + disk_bytes(output, state))
        peaks.append(peak)
        replays.append(replay)
        wholes.append(whole)
        begun = after
    peak = max(resident_peak(), *peaks)
    if memory is not None and peak > memory:
        worst = peaks.index(max(peaks))
        where = f"stage {worst + 1} of {len(stages)}" if len(stages) > 1 else ""
        if wholes[worst]:
            where = f"{where + ' ' if where else ''}needs the whole model in memory"
        advice = "raise --memory" + (", or lower --samples or --length" if ids is not None else "")
        raise beyond_cap(source, recipe, memory, peak, base, advice, where)
    threads = torch.get_num_threads() if recipe.calibrated else 0
    return Plan(peak, disk, begun.nbytes, seconds, dtype, tuple(replays), tuple(wholes), threads)


def after_stage(begun: Before, stage: Stage) -> Before:
    """The model that a stage leaves."""
    passes = (stage,) if isinstance(stage, ModelPass) else stage
    split = begun.outline.split
    if isinstance(stage, tuple):
        split = split or splits(stage)
    left = behind(begun.outline, passes, split)
    if isinstance(stage, ModelPass) and not isinstance(stage, Cut):
        formats = [scheme.format for block in left.schemes for scheme in block.values()]
        left = replace(left, split=must_split(formats))
    return before(left, begun.stem, begun.largest)


def linear_weights(spec: Spec) -> int:
    return sum(weight_count(spec, layer) for layer in spec.layers)


def needs_memory(stage: Stage, surveys: Sequence[Survey]) -> bool:
    """Whether a stage needs the whole model at once."""
    if any(survey.whole for survey in surveys):
        return True
    return isinstance(stage, ModelPass) and not isinstance(stage, Cut)


def surveys_of(stage: Stage, spec: Spec) -> list[Survey]:
    passes: Sequence[BlockPass | ModelPass] = (stage,) if isinstance(stage, ModelPass) else stage
    return [p.survey(spec) for p in passes if p.surveys]


def runs_blocks(stage: Stage, spec: Spec) -> bool:
    """Whether a stage runs the model on the calibration text."""
    if isinstance(stage, tuple) and needs_of(stage):
        return True
    return any(s.runs or s.whole for s in surveys_of(stage, spec))


def stage_peak(
    before: Before, stage: Stage, ids: Tensor | None, dtype: str, base: int, memory: int | None
) -> tuple[int, bool, bool]:
    """Peak bytes of a stage, whether its walk replays sites, whether it holds the whole model."""
    spec, element, stored = before.spec, DTYPE_BYTES[dtype], DTYPE_BYTES[before.stored]
    surveys = surveys_of(stage, spec)
    whole = needs_memory(stage, surveys)
    weights = linear_weights(spec)
    if whole:
        extra = stage.model_bytes(spec, ids) if isinstance(stage, ModelPass) else 0
        extra = max([extra, *(s.whole_bytes(spec, ids) for s in surveys)])
        held = weights * stored + before.rest  # packed linears are counted as what they expand to
        return base + SLACK + LIBRARIES + held + extra, False, True
    needs = needs_of(stage) if isinstance(stage, tuple) else frozenset()
    needs = needs.union(*(s.needs for s in surveys))
    runs = runs_blocks(stage, spec)
    passes = stage if isinstance(stage, tuple) else ()

    def site_bytes(rows: int, columns: int) -> int:
        return max((p.site_bytes(rows, columns) for p in passes), default=8 * rows * columns)

    def peak(replay: bool) -> int:
        compute = element if runs else stored
        walking = peak_bytes(spec, ids if runs else None, needs or frozenset({"mean"}), compute,
                             replay, site_bytes)  # fmt: skip
        if runs:
            assert ids is not None
            streams = 2 if compares(passes) else 1
            state = ids.numel() * spec.hidden * element * streams
            stem = before.stem * element // stored
            if surveys:  # what goes into a block is kept beside what comes out
                walking += state
            return base + SLACK + LIBRARIES + max(walking, stem + state, before.largest)
        aside = max(  # the block being read meanwhile, and what the finished one becomes
            weight_count(spec, layer) * stored + output_bytes(passes, spec, layer, before.stored)
            for layer in set(spec.layers)
        )
        return base + SLACK + max(walking + aside, before.largest if not passes else 0)

    replay = memory is not None and bool(needs) and peak(False) > memory
    return peak(replay), replay, False


def stage_seconds(
    before: Before, stage: Stage, ids: Tensor | None, dtype: str, replay: bool
) -> float:
    """Seconds of the walks of a stage; a ModelPass that learns says its own while it works."""
    spec, found = before.spec, 0.0
    if ids is None:
        return found
    for survey in surveys_of(stage, spec):
        if survey.runs or survey.whole:
            found += product_seconds(linear_weights(spec), ids.numel(), dtype) * (
                3 if survey.whole else 1
            )
    if isinstance(stage, tuple) and needs_of(stage):
        found += estimate_seconds(spec, ids, dtype, replay)
    return found
