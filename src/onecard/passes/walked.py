"""Carrying out a recipe stage by stage: on a model in memory, or streamed from folder to folder.

Both give the same bits. Streamed: each stage but the last leaves an ordinary model folder inside the
working folder, which the next one reads and then removes. A second run of the same job goes on behind
the last block that was finished, in the stage where it was stopped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import Journal, remove
from onecard.checkpoint.load import load_model, read
from onecard.checkpoint.save import assemble, complete, config_with
from onecard.checkpoint.source import Source, verify
from onecard.core.errors import BadRequest
from onecard.core.format import Sparse
from onecard.core.report import Report, Row, Value, environment, write_text
from onecard.core.spec import Spec
from onecard.nn.model import Model
from onecard.passes.base import Data, ModelPass, Recipe
from onecard.passes.cut import Cut
from onecard.passes.forecast import make_plan
from onecard.passes.memory import run_stage
from onecard.passes.plan import Made, Prepared, quantized
from onecard.passes.stream import Work, notes_of, run

__all__ = ["apply", "facts", "fill", "make_plan"]


def facts() -> dict[str, Value]:
    """What the report says of the machinery."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}


def apply(model: Model, recipe: Recipe, ids: Tensor | None) -> Report:
    """Apply a recipe to a model in memory. `ids` [samples, length] calibrate it, if it needs any.

    The object is changed: it holds what the last stage made, which may have other sizes. Raises
    BadRequest before that where recipe, model and ids do not go together.
    """
    recipe.check(model.spec)
    if ids is not None:
        check_ids(ids, model.spec)
    if any(quantized(linear.format) for _, linear in model.linears()):
        raise BadRequest("the model is compressed already", do="start from the original model")
    first = next((p for p in recipe.passes if not p.takes_sparse), None)
    if first and any(isinstance(linear.format, Sparse) for _, linear in model.linears()):
        raise BadRequest("the model is stored without its zeros", f"{first.title} changes whole matrices",
                         "start from the original model")  # fmt: skip
    if recipe.calibrated and ids is None:
        raise BadRequest(f"the recipe {recipe.name} needs calibration text", do="give ids")
    if ids is not None:
        for p in recipe.passes:
            p.reads(ids)
    rows: list[Row] = []
    stages, original = recipe.stages(), kept_original(model, recipe)
    for number, stage in enumerate(stages):
        made, found = run_stage(model, stage, Data(ids, original))
        model.network, model.spec, model.config = made.network, made.spec, made.config
        rows += staged(found, number, len(stages))
    return Report(tuple(rows), environment(recipe=recipe.name), title=recipe.name)


def check_ids(ids: Tensor, spec: Spec) -> None:
    """BadRequest where they are no samples of tokens that a model can read."""
    if not hasattr(ids, "is_floating_point"):
        raise BadRequest(
            f"ids are a {type(ids).__name__}", do="a tensor int64 [samples, length] is needed"
        )
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel() or ids.shape[1] < 2:
        raise BadRequest(f"ids are {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}",
                         do="int64 [samples, length] is needed, of 2 tokens or more each")  # fmt: skip
    if ids.shape[1] > spec.max_context:
        raise BadRequest(
            f"samples of {ids.shape[1]} tokens, the model's context is {spec.max_context}",
            do="cut them shorter",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= spec.vocab_size:
        raise BadRequest(f"ids from {int(ids.min())} to {int(ids.max())}",
                         do=f"the model knows {spec.vocab_size} tokens, from 0 on")  # fmt: skip


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


def fill(job: Prepared, journal: Journal, progress: Progress) -> Made:
    """All stages, each from the folder of the one before; the last one's parts lie in `journal`."""
    stages, rows, source = job.recipe.stages(), list[Row](), job.source
    if job.recipe.calibrated:  # hours of work follow: better said now
        for name in source.checkpoint.entries:
            read(source, name)
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
            weights = assemble(own.result, own.hashes())
            complete(
                own.result,
                job.source,
                config_with(done.source, done.schemes, done.split),
                weights,
                {},
            )
            write_text(notes.with_suffix(".rows.json"), json.dumps(notes_of(done.rows)))
            own.publish(replace=True)
            if number:
                remove(source.folder)
            source = Source(notes)
    return replace(done, rows=rows)


def _told(progress: Progress, number: int, count: int) -> Progress:
    """Progress that says which stage it is of."""
    if count == 1:
        return progress
    return lambda done, total, what: progress(done, total, f"stage {number + 1} of {count}, {what}")
