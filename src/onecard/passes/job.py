"""Compressing a model: in memory, or streamed from a folder to a folder under a memory cap.

Both ways drive the same stages, and give the same bits. Streamed: the plan is made and checked from
headers alone; then stage after stage reads a folder and writes the next, and the last one's folder
gets its name. A second run of the same command goes on behind the last block that was finished.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from onecard import __version__
from onecard.calibrate.data import Calibration, calibration_ids, digest
from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import Journal, check_space, check_target, fingerprint, remove
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import assemble, complete, config_with, source_hashes
from onecard.checkpoint.shards import Checkpoint, read_json
from onecard.checkpoint.source import MANIFEST, Source, verify
from onecard.core.device import resident_peak
from onecard.core.errors import BadRequest
from onecard.core.report import Report, Row, environment, write_text
from onecard.core.settings import format_size
from onecard.nn.model import Model
from onecard.passes import to_yaml
from onecard.passes.base import Data, ModelPass, Recipe
from onecard.passes.cut import Cut
from onecard.passes.memory import quiet, run_stage
from onecard.passes.plan import Plan, compute_dtype, make_plan
from onecard.passes.stream import Made, Work, notes_of, require_finite, run


@dataclass(frozen=True)
class Settings:
    """How to go about it. `dtype` is what blocks are run in while calibrating."""

    calibration: Calibration = field(default_factory=Calibration)
    data: Path | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    memory: int | None = None
    force: bool = False


def apply(model: Model, recipe: Recipe, ids: Tensor | None) -> Report:
    """Apply a recipe to a model in memory. `ids` [samples, length] calibrate it, if it needs any.

    The object is changed: it holds what the last stage made, which may have other sizes.
    """
    recipe.check(model.spec)
    if any(not linear.format.dense for _, linear in model.linears()):
        raise BadRequest("the model is compressed already", do="start from the original model")
    if recipe.calibrated and ids is None:
        raise BadRequest(f"the recipe {recipe.name} needs calibration text")
    rows: list[Row] = []
    stages, original = recipe.stages(), kept_original(model, recipe)
    for number, stage in enumerate(stages):
        made, found = run_stage(model, stage, Data(ids, original))
        model.network, model.spec, model.config = made.network, made.spec, made.config
        rows += staged(found, number, len(stages))
    return Report(tuple(rows), environment(recipe=recipe.name), title=recipe.name)


def kept_original(model: Model, recipe: Recipe) -> Callable[[], Model]:
    """The model before the recipe, for passes that learn from it: read again, or kept as it is."""
    if not any(isinstance(p, ModelPass) and not isinstance(p, Cut) for p in recipe.passes):
        return lambda: model
    if model.source is not None:
        folder = model.source
        return lambda: load_model(folder, tokenizer=False)
    kept = copy.deepcopy(model)
    return lambda: kept


def staged(rows: list[Row], number: int, count: int) -> list[Row]:
    """Rows of a stage; where there are several, `where` says which."""
    if count == 1:
        return rows
    return [replace(row, where=f"stage {number + 1}: {row.where}") for row in rows]


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
            "threads": torch.get_num_threads() if self.recipe.calibrated else 0,
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
    if recipe.calibrated:
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
    dtype = compute_dtype(source, settings.dtype) if recipe.calibrated else source.dtype
    plan = make_plan(source, recipe, ids, dtype, settings.memory)
    check_space(out, plan.disk)
    return Prepared(source, out, recipe, settings, ids, plan)


def compress(
    job: Prepared,
    progress: Progress = quiet,
    finish: Callable[[Path, Report], Report] = lambda folder, report: report,
) -> Report:
    """Carry out a prepared job; OUT appears when it is complete. Killed, a second call goes on.

    `finish(folder, report)` sees the completed folder before it gets its name: it may add files, such
    as a page, and returns the report to keep.
    """
    started = time.perf_counter()
    source, recipe = job.source, job.recipe
    if recipe.calibrated:
        require_finite(source, list(source.checkpoint.entries))
    journal = Journal(job.out, job.key(), job.settings.force)
    with ThreadPoolExecutor(1) as aside:
        hashes = aside.submit(source_hashes, source)
        try:
            last, rows = _stages(job, journal, progress)
        except BadRequest:
            if journal.fresh:
                journal.discard()
            raise
        weights = assemble(journal.folder, journal.hashes())
        write_text(journal.folder / "recipe.yaml", to_yaml(recipe))
        about = {"source": hashes.result(), **made(job)}
        complete(journal.folder, source, config_with(last.source, last.formats), weights, about)
    report = summary(job, rows, journal.folder, time.perf_counter() - started)
    report = finish(journal.folder, report)
    write_text(journal.folder / "report.json", report.to_json())
    journal.publish(job.settings.force)
    return report


def _stages(job: Prepared, journal: Journal, progress: Progress) -> tuple[Made, list[Row]]:
    """All stages, each from the folder of the one before; the last one's parts lie in `journal`."""
    stages, rows, source = job.recipe.stages(), list[Row](), job.source
    for number, stage in enumerate(stages):
        notes = journal.folder / f"stage-{number + 1}"
        last = number == len(stages) - 1
        later = any(
            (journal.folder / f"stage-{n + 1}").is_dir() for n in range(number, len(stages))
        )
        if not last and later:  # done before this process
            noted = json.loads(notes.with_suffix(".rows.json").read_text(encoding="utf-8"))
            rows += staged([Row(*note) for note in noted], number, len(stages))
            source = Source(notes) if notes.is_dir() else source
            continue
        own = journal if last else Journal(notes, {**job.key(), "stage": number})
        if number:
            verify(source.folder)
        done = run(stage, Work(
            source, own, notes, job.ids, job.plan.dtype, job.plan.replay[number],
            job.plan.in_memory[number],
            Data(job.ids, lambda: load_model(job.source.folder, tokenizer=False),
                 notes.with_suffix(".work"), _told(progress, number, len(stages))),
        ))  # fmt: skip
        rows += staged(done.rows, number, len(stages))
        if not last:
            weights = assemble(own.folder, own.hashes())
            complete(own.folder, job.source, config_with(done.source, done.formats), weights, {})
            write_text(notes.with_suffix(".rows.json"), json.dumps(notes_of(done.rows)))
            own.publish(replace=True)
            if number:
                remove(source.folder)
            source = Source(notes)
    return done, rows


def _told(progress: Progress, number: int, count: int) -> Progress:
    """Progress that says which stage it is of."""
    if count == 1:
        return progress
    return lambda done, total, what: progress(done, total, f"stage {number + 1} of {count}, {what}")


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


def summary(job: Prepared, rows: list[Row], folder: Path, seconds: float) -> Report:
    """The report of a finished job, whose result lies in `folder`."""
    source, made = job.source, Checkpoint(folder)
    before, after = file_bytes(source.checkpoint), file_bytes(made)
    count, left = parameter_count(source), parameter_count(Source(folder))
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
            Row.of("model", "bits_per_weight", 8 * made.nbytes / left, 8 * source.checkpoint.nbytes / count),
            Row.of("model", "parameters", left, count if count != left else None),
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
