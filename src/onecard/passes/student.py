"""Distilling into a smaller model: a student is made from its Spec, or opened, then taught and saved.

A student given as a config.json starts from the teacher: layers at even distances, the first and the
last among them, of each the heads, neurons and numbers of the residual stream with the most weight
(nn/graph.py cuts them), or fresh from random numbers. A student given as a folder keeps its weights,
their zeros and their formats.

A job works in `.OUT.training` beside OUT: the state of the training lies there (calibrate/train.py), so
that a killed job goes on, and the result, until it is complete and gets its name.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onecard import __version__
from onecard.calibrate.data import digest
from onecard.calibrate.train import STATE, training_ids
from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import check_space, check_still, check_target, fingerprint
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.shards import Checkpoint, read_json
from onecard.checkpoint.source import MANIFEST, Source, verify
from onecard.core.device import resident, resident_peak
from onecard.core.errors import BadRequest
from onecard.core.format import DTYPE_BYTES
from onecard.core.report import Report, Row, environment, write_text
from onecard.core.settings import format_size
from onecard.core.spec import Spec, block_modules, outer_modules, parameter_count
from onecard.nn.families import family_of
from onecard.nn.graph import (
    Kind,
    Side,
    groups,
    hidden_sides,
    require_hidden,
    surgery,
)
from onecard.nn.model import Model
from onecard.nn.transformer import Transformer, initialize
from onecard.passes.base import Data
from onecard.passes.cut import cut_model
from onecard.passes.distill import Distil, check_pair, distil
from onecard.passes.recover import check_length, training_bytes

Start = Literal["teacher", "fresh"]


# A student from its Spec --------------------------------------------------------------------------


def inherit(teacher: Model, spec: Spec) -> Model:
    """A model of the Spec made of the teacher's most weighty parts. BadRequest where it has too few."""
    require_smaller(teacher.spec, spec)
    model, count = teacher, spec.num_layers
    old = teacher.spec.num_layers
    layers = [round(i * (old - 1) / max(count - 1, 1)) for i in range(count)]
    whole: list[dict[str, Tensor]] = [{}] * count
    if count < old:
        model = cut_model(model, surgery(model.spec, layers, whole, "neuron"))
    sizes: dict[Kind, list[int]] = {
        "kv_group": [layer.attention.num_kv_heads for layer in spec.layers],
        "head": [layer.attention.num_heads for layer in spec.layers],
        "neuron": [layer.feed_forward.width for layer in spec.layers],
    }
    for kind, wanted in sizes.items():
        kept = []
        for block, left in zip(model.blocks(), wanted, strict=True):
            found = [group for group in groups(block.layer, kind) if group.count > left]
            kept.append({g.name: heaviest(weight_of(block, g.sides, g.count), left, g.runs)
                         for g in found})  # fmt: skip
        if any(kept):
            model = cut_model(model, surgery(model.spec, range(count), kept, kind))
    if spec.hidden < model.spec.hidden:
        require_hidden(model.spec)
        hidden = heaviest(residual_weight(model), spec.hidden, 1)
        model = cut_model(model, surgery(model.spec, range(count), whole, "hidden", hidden))
    return model


def require_smaller(teacher: Spec, spec: Spec) -> None:
    """BadRequest where a Spec is no part of the teacher's."""
    fresh = "start it fresh (--start fresh)"
    if spec.num_layers > teacher.num_layers or spec.hidden > teacher.hidden:
        raise BadRequest(
            f"a student of {spec.num_layers} layers, {spec.hidden} wide, is larger than its teacher "
            f"of {teacher.num_layers}, {teacher.hidden} wide", do=fresh,
        )  # fmt: skip
    for layer in spec.layers:
        for other in set(teacher.layers):
            a, b, f, g = layer.attention, other.attention, layer.feed_forward, other.feed_forward
            same = (a.head_dim, a.bias, f.gated, f.bias) == (b.head_dim, b.bias, g.gated, g.bias)
            if not same or bool(f.experts) != bool(g.experts):
                raise BadRequest("the student's heads or feed-forwards are not like the teacher's",
                                 do=fresh)  # fmt: skip
            if a.num_heads > b.num_heads or a.num_kv_heads > b.num_kv_heads or f.width > g.width:
                raise BadRequest("a layer of the student is wider than its teacher's", do=fresh)
            if a.num_heads // a.num_kv_heads > b.num_heads // b.num_kv_heads:
                raise BadRequest("more heads of the student share a key than of the teacher",
                                 do=fresh)  # fmt: skip


def weight_of(root: nn.Module, sides: tuple[Side, ...], count: int) -> Tensor:
    """Sum of squares [count] of the weights of each unit, over all its sides."""
    total = torch.zeros(count)
    for side in sides:
        w = root.get_submodule(side.path).weight.detach().float()  # type: ignore[union-attr, operator]
        total += w.movedim(side.axis, 0).flatten(1).square().sum(1).view(count, -1).sum(1)
    return total


def residual_weight(model: Model) -> Tensor:
    """The same of the numbers of the residual stream, over the whole model but the norms."""
    total = torch.zeros(model.spec.hidden)
    roots = [(block, block_modules(model.spec, block.layer)) for block in model.blocks()]
    for root, modules in [*roots, (model.network, outer_modules(model.spec))]:
        sides = tuple(s for s in hidden_sides(modules) if modules[s.path].kind != "norm")
        total += weight_of(root, sides, model.spec.hidden)  # type: ignore[arg-type]
    return total


def heaviest(weight: Tensor, count: int, runs: int) -> Tensor:
    """The `count` units with the most weight, in order, equally many of each run."""
    rows = weight.view(runs, -1).topk(count // runs, -1).indices
    return (rows + torch.arange(runs)[:, None] * (len(weight) // runs)).flatten().sort().values


def fresh(teacher: Model, spec: Spec, seed: int) -> Model:
    """A model of the Spec with random weights, in the dtype of the teacher."""
    dtype = next(teacher.network.parameters()).dtype
    network = Transformer(spec)
    initialize(network, seed)
    config = teacher.family.config(teacher.config, spec)
    return replace(teacher, network=network.to(dtype).requires_grad_(False).eval(), spec=spec,
                   config=config)  # fmt: skip


# The job ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A distillation that was checked: everything it needs, nothing done yet."""

    teacher: Source
    student: Source | None
    spec: Spec
    start: Start
    out: Path
    settings: Distil
    ids: Tensor
    text: str
    force: bool
    peak: int

    def made(self) -> dict[str, Any]:
        """How the result comes about, for the manifest and for knowing it again."""
        sources = [source for source in (self.teacher, self.student) if source is not None]
        return {"distilled": {
            "sources": [fingerprint(source.checkpoint) for source in sources],
            "spec": repr(self.spec), "start": None if self.student else self.start,
            "settings": asdict(self.settings), "ids": digest(self.ids),
        }}  # fmt: skip

    def plan(self) -> tuple[Row, ...]:
        training = self.settings.training
        tokens = training.steps * training.batch * self.ids.shape[1]
        return (
            Row("plan", "planned_peak_bytes", self.peak, "B"),
            Row("plan", "teacher_parameters", parameter_count(self.teacher.spec)),
            Row("plan", "student_parameters", parameter_count(self.spec)),
            Row("plan", "training_windows", len(self.ids)),
            Row("plan", "training_tokens", tokens) if training.minutes is None
            else Row("plan", "training_seconds", 60 * training.minutes, "s"),
        )  # fmt: skip


def prepare_distillation(
    teacher: str | Path,
    student: str | Path,
    out: str | Path,
    settings: Distil,
    data: Path | None = None,
    documents: str | None = None,
    start: Start = "teacher",
    memory: int | None = None,
    force: bool = False,
) -> Job:
    """Check what can be checked before any work. Raises BadRequest."""
    source, out = Source(teacher), Path(out).expanduser().resolve()
    verify(source.folder)
    opened = None if config_of(student) else Source(student)
    if opened is None:
        spec = spec_of(source, config_of(student) or {}, str(student))
        if start == "teacher":
            require_smaller(source.spec, spec)
    else:
        spec = opened.spec
        verify(opened.folder)
        check_target(out, opened.folder, force)
        if opened.tokenizer().backend.get_vocab() != source.tokenizer().backend.get_vocab():
            raise BadRequest("teacher and student have different vocabularies",
                             do="the student needs the teacher's tokenizer")  # fmt: skip
    check_target(out, source.folder, force)
    check_pair(spec, source.spec, settings.targets)
    for one in (spec, source.spec):
        check_length(settings.training, one)
    settings.check(spec)
    ids = training_ids(
        source.tokenizer(), data, settings.training, source.spec.vocab_size, documents
    )
    stored = DTYPE_BYTES[source.dtype] * (parameter_count(source.spec) + parameter_count(spec))
    teacher_bytes = 4 * parameter_count(source.spec)
    peak = resident() + stored + teacher_bytes + training_bytes(
        spec, settings.training, settings.rank, teacher=True) + (128 << 20)  # fmt: skip
    if memory is not None and peak > memory:
        raise BadRequest(
            f"distilling {source.called} does not fit into {format_size(memory)}",
            f"the smallest cap that works is {format_size(peak)}",
            "raise --memory, lower --batch or --length, raise --accumulate, or give --checkpointing",
        )
    check_space(out, DTYPE_BYTES[source.dtype] * parameter_count(spec) + 12 * parameter_count(spec))
    return Job(source, opened, spec, start, out, settings, ids, data.name if data else "shipped",
               force, peak)  # fmt: skip


def config_of(student: str | Path) -> dict[str, Any] | None:
    """The config.json of a student that has no weights yet; None where it is a model."""
    path = Path(student)
    if path.suffix == ".json":
        return read_json(path)
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return read_json(path / "config.json")
    return None


def spec_of(teacher: Source, config: dict[str, Any], where: str) -> Spec:
    """The Spec of a student's config. BadRequest where it is not of the teacher's family."""
    family = family_of(config)
    if family.architecture != teacher.family.architecture:
        raise BadRequest(
            f"{where} is a {family.architecture}, the teacher a {teacher.family.architecture}",
            do="give a config.json of the teacher's family, or a folder with weights",
        )
    return family.spec(config)


def is_taught(out: Path, job: Job | None = None) -> bool:
    """OUT holds the result of a distillation, or of this very one."""
    if not (out / MANIFEST).is_file() or not (out / "report.json").is_file():
        return False
    found = read_json(out / MANIFEST).get("distilled")
    return found is not None and (job is None or found == as_stored(job.made())["distilled"])


def as_stored(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data as it comes back from JSON."""
    return json.loads(json.dumps(data))


def teach(
    job: Job,
    adopt: bool = False,
    progress: Progress = lambda done, total, what: None,
    finish: Callable[[Path, Report], Report] = lambda folder, report: report,
) -> Report:
    """Carry out a distillation; OUT appears when it is complete. Killed, a second call goes on.

    `adopt` goes on from unfinished work of other settings too; `finish` is that of `job.compress`.
    """
    started = time.perf_counter()
    with workplace(job.out, job.force) as folder:
        teacher = load_model(job.teacher.folder)
        student = opened_student(job, teacher)
        data = Data(job.ids, None, folder, progress)
        course = distil(student, teacher, job.ids, job.settings, data, adopt)
        result = folder / "result"
        shutil.rmtree(result, ignore_errors=True)
        save_model(student, result, job.made())
        made = Checkpoint(result)
        sizes = [
            sum(p.stat().st_size for p in files)
            for files in (made.files, job.teacher.checkpoint.files)
        ]
        counts = parameter_count(job.spec), parameter_count(job.teacher.spec)
        report = Report(
            (
                Row.of("model", "file_bytes", *sizes),
                Row.of("model", "bits_per_weight", 8 * made.nbytes / counts[0],
                       8 * job.teacher.checkpoint.nbytes / counts[1]),
                Row.of("model", "parameters", *counts),
                *job.plan(),
                *course.rows("distil"),
                Row("distil", "seconds", round(time.perf_counter() - started, 2), "s"),
                Row.of("distil", "peak_memory_bytes", resident_peak()),
            ),
            environment(
                teacher=job.teacher.called, threads=torch.get_num_threads(),
                torch=torch.__version__, onecard=__version__, training_text=job.text,
            ),
            f"{job.teacher.called} distilled: {format_size(sizes[1])} to {format_size(sizes[0])}",
            ((f"reference: {Distil.title}", Distil.paper),),
        )  # fmt: skip
        report = finish(result, report)
        write_text(result / "report.json", report.to_json())
        publish(result, job.out, job.force)
        (folder / STATE).unlink(missing_ok=True)
    return report


def opened_student(job: Job, teacher: Model) -> Model:
    """The student as training begins; the teacher is left as it is."""
    if job.student is not None:
        return load_model(job.student.folder)
    if job.start == "fresh":
        return fresh(teacher, job.spec, job.settings.training.seed)
    made = inherit(teacher, job.spec)
    return replace(made, network=copy.deepcopy(made.network))  # parts of it are the teacher's own


@contextmanager
def workplace(out: Path, force: bool) -> Iterator[Path]:
    """The working folder of a job, held by one process; gone again when nothing worth keeping is in it."""
    folder = out.parent / f".{out.name}.training"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(
                f"another process is working on {out}", do="wait for it, or give another folder"
            ) from error
        if force:
            (folder / STATE).unlink(missing_ok=True)
        try:
            yield folder
        finally:
            if not (folder / STATE).is_file():
                shutil.rmtree(folder, ignore_errors=True)


def publish(result: Path, out: Path, force: bool) -> None:
    """A complete folder gets its name; the result that was there before goes."""
    check_still(out, result, force)
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.is_dir():
        os.replace(out, old)
    os.replace(result, out)
    shutil.rmtree(old, ignore_errors=True)
