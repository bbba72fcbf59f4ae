"""Compressing a model from a folder to a folder, under a memory cap.

The plan is made and checked from headers alone; then every part of the result is written into the
journal, and the folder gets its name. A second run of the same command goes on behind the last part
that was finished. How parts come about is the recipe's: what only rounds goes from file to file
(rounding.py), everything else goes stage by stage over blocks (walked.py). Both offer

    make_plan(source, recipe, settings, ids)   what it will take, BadRequest where the cap is too small
    fill(job, journal, progress)               every part that the journal lacks, and what they are
    facts()                                    what the report says of the machinery
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from onecard import __version__
from onecard.calibrate.data import calibration_ids, digest
from onecard.checkpoint.journal import Journal, check_space, check_target, fingerprint
from onecard.checkpoint.save import assemble, complete, config_with, source_hashes
from onecard.checkpoint.shards import Checkpoint, read_json
from onecard.checkpoint.source import MANIFEST, Source, verify
from onecard.core.device import resident_peak
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import BITS_PER_WEIGHT, Report, Row, environment, write_text
from onecard.core.settings import format_size
from onecard.core.spec import parameter_count
from onecard.kernels import cpu, forms
from onecard.passes import rounding, to_yaml
from onecard.passes.base import Recipe
from onecard.passes.plan import Plan, Prepared, Settings

if TYPE_CHECKING:
    from onecard.calibrate.walk import Progress

__all__ = ["Plan", "Prepared", "Settings", "calibrated_on", "compress", "file_bytes", "is_finished",
           "prepare"]  # fmt: skip


def way_of(recipe: Recipe) -> ModuleType:
    """What carries a recipe out."""
    if rounding.suits(recipe):
        return rounding
    from onecard.passes import walked

    return walked


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
        for p in recipe.passes:
            p.reads(ids)
    elif (source.folder / "tokenizer.json").is_file():
        source.tokenizer()  # it is carried over: a broken one is told of now
    plan = way_of(recipe).make_plan(source, recipe, settings, ids)
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
    with Journal(job.out, job.key(), job.settings.force) as journal:
        try:
            last = way_of(recipe).fill(job, journal, progress)
        except BadRequest:
            if journal.fresh:
                journal.discard()
            raise
        about = {"source": source_hashes(source), **made(job)}
        if fingerprint(source.checkpoint) != journal.key["source"]:
            raise FailedWork(
                f"{source.called} changed while it was compressed",
                seen="a weight file has another size or time than when this began",
                do="once it stays as it is, run this again with --force",
            )
        folder = journal.result
        weights = assemble(folder, journal.hashes())
        write_text(folder / "recipe.yaml", to_yaml(recipe))
        config = config_with(last.source, last.schemes, last.split)
        complete(folder, source, config, weights, about)
        report = summary(job, last.rows, folder, time.perf_counter() - started)
        report = finish(folder, report)
        write_text(folder / "report.json", report.to_json())
        journal.publish(job.settings.force)
    return report


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


def calibrated_on(job: Prepared) -> tuple[tuple[str, str], ...]:
    """Notes on what a job learns from; of a short text there are fewer windows than were asked for."""
    if job.ids is None:
        return ()
    (samples, length), asked = job.ids.shape, job.settings.calibration.samples
    data = job.settings.data
    text = f"{samples} windows of {length} tokens from {data.name if data else 'the shipped text'}"
    if samples < asked and not (data and data.suffix == ".json"):
        text += f", which is too short for the {asked} asked for"
    notes = [("convention: calibration", text)]
    for p in job.recipe.passes:
        if told := p.reads(job.ids):
            notes.append((f"convention: {p.title}", told))
    return tuple(dict.fromkeys(notes))  # several passes may say the same


def summary(job: Prepared, rows: list[Row], folder: Path, seconds: float) -> Report:
    """The report of a finished job, whose result lies in `folder`."""
    source, made = job.source, Checkpoint(folder)
    before, after = file_bytes(source.checkpoint), file_bytes(made)
    result = Source(folder)
    count, left = parameter_count(source.spec), parameter_count(result.spec)
    notes = [(f"reference: {p.title}", p.paper) for p in job.recipe.passes]
    notes.append(("convention: bits per weight", BITS_PER_WEIGHT))
    notes += calibrated_on(job)
    if cpu.available():
        notes += forms.not_time(result.format_names())
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
            model=source.called, recipe=job.recipe.name, onecard=__version__,
            dtype=job.plan.dtype, **way_of(job.recipe).facts(),
            calibration_samples=0 if job.ids is None else job.ids.shape[0],
            calibration_tokens=0 if job.ids is None else job.ids.numel(),
        ),
        f"{source.called} by {job.recipe.name}: {format_size(before)} to {format_size(after)}",
        tuple(notes),
    )  # fmt: skip


def file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weight files on disk."""
    return sum(path.stat().st_size for path in checkpoint.files)


def is_finished(model: str | Path, out: str | Path, recipe: Recipe, settings: Settings) -> bool:
    """OUT holds the result of this very job: same source bytes, same recipe, same calibration."""
    out = Path(out)
    if not (out / MANIFEST).is_file() or not (out / "report.json").is_file():
        return False
    unforced = prepare(model, out, recipe, replace(settings, force=True))
    manifest = read_json(out / MANIFEST)
    verify(out)
    about = {"source": source_hashes(unforced.source), **made(unforced)}
    wanted = json.loads(json.dumps(about))  # as the manifest has it: tuples become lists
    return all(manifest.get(key) == value for key, value in wanted.items())
