"""Verbs that make a model smaller: by a recipe, or by teaching a smaller one.

Both write a folder that appears when everything is done, go on after an interruption, and end alike: quality
beside the model that it was made from where that is wanted (`Proving`), a page, and a word on where all lies.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from onecard.core.errors import BadRequest
from onecard.core.report import Report, write_text
from onecard.core.settings import parse_size
from onecard.running import Whole
from onecard.terminal import Progress, say
from onecard.verbs.shared import WRITING, Flag, Json, Name, Writing, app, show, show_finished

if TYPE_CHECKING:
    from onecard.calibrate.data import Calibration
    from onecard.checkpoint.source import Source


@Parameter(name="*")
@dataclass(frozen=True)
class Windows:
    """How a calibration text is cut."""

    samples: Annotated[
        Whole | None,
        Parameter(help="windows of calibration text", show_default=lambda _: "128"),
    ] = None
    length: Annotated[
        Whole | None, Parameter(help="tokens per window", show_default=lambda _: "512")
    ] = None

    def of(self, data: Path | None) -> Calibration:
        """What is taken of `data`. BadRequest where that holds its windows itself."""
        from onecard.calibrate.data import Calibration

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if given and data is not None and data.suffix == ".json":
            flags = " and ".join(f"--{name}" for name in given)
            raise BadRequest(f"{data} holds the windows themselves",
                             do=f"leave out {flags}: they are for text")  # fmt: skip
        return Calibration(**given)


Proof = Callable[[Path, Report, Progress], Report]


@Parameter(name="*")
@dataclass(frozen=True)
class Proving:
    """Whether and on what a result is proven."""

    prove: Annotated[
        bool | None,
        Parameter(
            help="measure quality against MODEL, or TEACHER, and show samples; by itself for small "
            "models only"
        ),
    ] = None
    held_out: Annotated[
        Path | None, Parameter(help="text to prove it on; without it, the shipped held-out text")
    ] = None

    def of(self, source: Source, cap: int | None) -> Proof | None:
        """What adds quality to the report of a result made of `source`; None where that is not wanted.

        Raises BadRequest where it could not be done.
        """
        if self.prove is False:
            return None
        from onecard import prove

        if self.prove is None and not prove.is_small(source, cap):
            return None
        prove.check(source, self.held_out, cap)
        return lambda folder, made, progress: prove.prove(
            source.folder, folder, made, self.held_out, progress
        )


@Parameter(name="*")
@dataclass(frozen=True)
class Teaching(Writing):
    """The same of a student, which may go on otherwise than it was begun."""

    resume: Annotated[
        bool,
        Flag,
        Parameter(
            help="go on from unfinished work also with other settings; where OUT is finished "
            "already, say so"
        ),
    ] = False
    force: Annotated[bool, Flag, Parameter(help="replace OUT, and throw away unfinished work")] = (
        False
    )


@Parameter(name="*")
@dataclass(frozen=True)
class Pace:
    """How a student is trained."""

    steps: Annotated[Whole, Parameter(help="updates")] = 1000
    minutes: Annotated[float | None, Parameter(help="train that long instead")] = None
    batch: Annotated[Whole, Parameter(help="windows per update")] = 8
    length: Annotated[Whole, Parameter(help="tokens per window")] = 256
    accumulate: Annotated[Whole, Parameter(help="pieces a batch is taken in, to save memory")] = 1
    rate: Annotated[float, Parameter(help="learning rate")] = 3e-4
    warmup: Annotated[float, Parameter(help="share of the training in which the rate rises")] = 0.05
    decay: Annotated[float, Parameter(help="share of it in which the rate falls to zero")] = 0.5
    optimizer: Annotated[Literal["adamw", "muon"], Parameter(help="muon takes the matrices")] = (
        "adamw"
    )
    weight_decay: Annotated[float, Parameter(help="of matrices")] = 0.0
    clip: Annotated[float, Parameter(help="largest norm of a gradient")] = 1.0
    seed: Annotated[Whole, Parameter(help="the same seed gives the same student")] = 0
    checkpointing: Annotated[bool, Parameter(negative="", help="less memory, more time")] = False


@Parameter(name="*")
@dataclass(frozen=True)
class Learned:
    """What a student learns from its teacher: weights in the loss."""

    soft: Annotated[float, Parameter(help="what the teacher says of the next token")] = 1.0
    hard: Annotated[float, Parameter(help="the next token itself")] = 0.0
    hidden: Annotated[float, Parameter(help="hidden states")] = 0.0
    attention: Annotated[float, Parameter(help="attention of the last layer")] = 0.0
    relations: Annotated[float, Parameter(help="relations of queries, keys, values there")] = 0.0
    relational: Annotated[float, Parameter(help="distances and angles between positions")] = 0.0
    temperature: Annotated[float, Parameter(help="softens what both say")] = 1.0
    direction: Annotated[
        Literal["forward", "reverse"], Parameter(help="of the KL: cover all, or keep to the best")
    ] = "forward"


WINDOWS, PROVING, TEACHING = Windows(), Proving(), Teaching()
STEADY, SOFT = Pace(), Learned()


@app.command
def compress(
    model: Name,
    out: Path,
    /,
    *,
    recipe: str = "gptq-int4",
    data: Path | None = None,
    windows: Windows = WINDOWS,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    memory: str | None = None,
    writing: Writing = WRITING,
    proving: Proving = PROVING,
    json: Json = False,
) -> None:
    """Compress MODEL into the folder OUT by a recipe. Run it again to go on after an interruption.

    Parameters
    ----------
    out
        the folder to write; it appears when everything is done
    recipe
        a name from `onecard recipes`, or a YAML file
    data
        calibration text (UTF-8), or a .json list of lists of token ids; without it, shipped text
    dtype
        what blocks are run in while calibrating
    memory
        cap for the whole process, 3GiB say; refused at once where it cannot be kept
    """
    from onecard.passes import find_recipe
    from onecard.passes import job as jobs

    cap = None if memory is None else parse_size(memory)
    settings = jobs.Settings(windows.of(data), data, dtype, cap, writing.force)
    if writing.resume and jobs.is_finished(model, out, find_recipe(recipe), settings):
        show_finished(out, json)
        return
    prepared = jobs.prepare(model, out, find_recipe(recipe), settings)
    proof = proving.of(prepared.source, cap)
    if writing.dry_run:
        notes = jobs.calibrated_on(prepared)
        show(Report(prepared.plan.rows(), title="Plan, nothing was done", notes=notes), json)
        return
    with Progress("compressing") as progress, ThreadPoolExecutor(1) as aside:
        aside.submit(import_module, "onecard.render")
        found = jobs.compress(prepared, progress, finished(proof, progress))
    tell(found, out, model, json, measured=proof is not None or proving.prove is not None)


@app.command
def distill(
    teacher: Name,
    student: Annotated[
        str, Parameter(help="a model to go on from, or the config.json of a new one")
    ],
    out: Path,
    /,
    *,
    data: Path | None = None,
    documents: str | None = None,
    start: Literal["teacher", "fresh"] = "teacher",
    rank: Whole = 0,
    keep_zeros: Annotated[bool, Flag] = False,
    learned: Learned = SOFT,
    pace: Pace = STEADY,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    memory: str | None = None,
    writing: Teaching = TEACHING,
    proving: Proving = PROVING,
    json: Json = False,
) -> None:
    """Teach STUDENT what TEACHER says, into the folder OUT. Run it again to go on after an interruption.

    Parameters
    ----------
    out
        the folder to write; it appears when everything is done
    data
        text to learn on (UTF-8), or a .json list of lists of token ids; without it, shipped text
    documents
        cut the text at this separator; each document begins with the model's begin token
    start
        what a new student begins with: parts of the teacher, or random weights
    rank
        train a change of this rank in every linear and merge it (0: train every weight)
    keep_zeros
        zeros among packed integers stay zero
    dtype
        what is multiplied in
    memory
        cap for the whole process, 3GiB say; refused at once where it cannot be kept
    """
    from onecard.calibrate.train import Training
    from onecard.passes import student as students
    from onecard.passes.distill import Distil, Targets

    cap = None if memory is None else parse_size(memory)
    training = Training(**asdict(pace), dtype=dtype)
    settings = Distil(Targets(**asdict(learned)), rank, keep_zeros, training)

    def prepared(force: bool) -> students.Job:
        return students.prepare_distillation(
            teacher, student, out, settings, data, documents, start, cap, force
        )

    if writing.resume and students.is_taught(out) and students.is_taught(out, prepared(True)):
        show_finished(out, json)
        return
    job = prepared(writing.force)
    proof = proving.of(job.teacher, cap)
    if writing.dry_run:
        show(Report(job.plan(), title="Plan, nothing was done"), json)
        return
    with Progress("distilling") as progress:
        found = students.teach(job, writing.resume, progress, finished(proof, progress))
    tell(found, out, teacher, json, measured=proof is not None or proving.prove is not None)


def finished(proof: Proof | None, progress: Progress) -> Callable[[Path, Report], Report]:
    """The last steps in a result's folder before it gets its name: the proof and the page."""

    def finish(folder: Path, made: Report) -> Report:
        from onecard.render import to_html

        if proof is not None:
            made = proof(folder, made, progress)
        write_text(folder / "report.html", to_html(made))
        return made

    return finish


def tell(found: Report, out: Path, model: str, json: bool, measured: bool) -> None:
    """The report of a result, where it lies, and what was not `measured`."""
    show(found, json)
    if not measured:
        say(f"its quality was not measured: onecard eval {out} --against {model}")
    say(f"model: {out}\nreport: {out / 'report.html'}")
