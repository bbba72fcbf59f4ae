"""One command per verb. Heavy imports happen inside the verb that needs them.

With `--json` a verb prints one Report on standard output and nothing else there; text for people and
progress go to standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from onecard import __version__
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Report, Value, environment, write_text
from onecard.core.settings import parse_size
from onecard.running import AS_STORED, USUAL, Compute, Native, Whole, Wholes, opened
from onecard.terminal import Progress, Stop, say

if TYPE_CHECKING:
    from onecard.checkpoint.source import Source
    from onecard.fit.fit import Job, Request
    from onecard.fit.result import FitResult
    from onecard.runtime.chat import Conversation
    from onecard.runtime.engine import Piece, Result, Runner
    from onecard.runtime.sample import Sampling


def shown_default(value: object) -> str | None:
    """A default as the help shows it: not at all where nothing is chosen by it."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = App(
    name="onecard",
    help="Make a large model fit and run fast on the one card, or the one CPU, that you have.\n\n"
    "MODEL is a folder, a hub id such as org/name, or `demo` for the shipped model. --json prints one "
    "report; --debug shows the traceback of an error.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=(), show_default=shown_default),
    suppress_keyboard_interrupt=False,  # cli.py says what it means
)

Json = Annotated[
    bool, Parameter(name="--json", negative="", help="print one JSON report, nothing else")
]
Flag = Parameter(negative="")
Name = Annotated[str, Parameter(help="a model folder, hub id, or demo")]


@Parameter(name="*")
@dataclass(frozen=True)
class Choice:
    """How the next token is chosen, beyond its temperature."""

    top_k: Annotated[Whole, Parameter(help="keep the k likeliest tokens (0: all)")] = 0
    top_p: Annotated[float, Parameter(help="keep the likeliest tokens up to this probability")] = (
        0.95
    )
    min_p: Annotated[float, Parameter(help="drop tokens below this share of the likeliest")] = 0.0
    repetition_penalty: Annotated[float, Parameter(help="above 1 makes repeating less likely")] = (
        1.0
    )
    seed: Annotated[Whole | None, Parameter(help="the same seed gives the same text")] = None


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


LIKELY, STEADY, SOFT = Choice(), Pace(), Learned()


# The machine and what lies on disk ---------------------------------------------------------------


@app.command
def info(*, refresh: Annotated[bool, Flag] = False, json: Json = False) -> None:
    """Show this machine: cores, instruction sets, memory, measured bandwidth and peaks, GPU.

    Parameters
    ----------
    refresh
        measure again instead of using the cached figures; those of single kernels when next asked for
    """
    from onecard import cost
    from onecard.kernels import cpu, rates, tune

    if refresh:
        for name in (rates.FILE, cost.FILE):
            cpu.forget(name)
    if cpu.available():
        tune.apply(refresh)
    show(cpu.info(refresh), json)


@app.command
def inspect(
    model: Name,
    /,
    *,
    context: Whole = 2048,
    batch: Whole = 1,
    device: str | None = None,
    fusions: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Show what a model is made of: bytes by part, formats, KV cache. Reads headers only.

    With --device also what it takes there in several formats, whether that fits, and how fast it can be.

    Parameters
    ----------
    context
        tokens of context for the KV cache
    batch
        sequences at once for the KV cache
    device
        `auto` for this machine, or a known one: "RTX 4090", "Raspberry Pi 5" ...
    fusions
        list what the native engine does in one go instead
    """
    from onecard.inspect import inspect_model

    show(inspect_model(model, context, batch, fusions, device), json)


@app.command
def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """List the shipped recipes and what each is good for, or print one as a file.

    Parameters
    ----------
    name
        print this recipe as YAML, to start one of your own from
    """
    from onecard.core.report import Row
    from onecard.passes import SHIPPED, find_recipe, to_yaml

    if name is not None and not json:
        print(to_yaml(find_recipe(name)), end="")
        return
    chosen = [find_recipe(name)] if name is not None else []
    lines = [(r.name, r.good_for) for r in chosen] or [(n, good_for) for n, _, good_for in SHIPPED]
    notes = tuple(("recipe", to_yaml(recipe)) for recipe in chosen)
    rows = tuple(Row(n, "good_for", what) for n, what in lines)
    show(Report(rows, title="Recipes", notes=notes), json)


@app.command
def report(*folders: Path, out: Path | None = None, json: Json = False) -> None:
    """Show a result again and write its page anew; several results on one page, beside each other.

    Parameters
    ----------
    folders
        folders with a fit.json or a report.json
    out
        where the page goes (default: report.html, of one result in its folder, else in this one)
    """
    from onecard.fit.result import FitResult
    from onecard.render import compared, fit_report, fit_to_html, to_html

    if not folders:
        raise BadRequest("no result was named", do="onecard report FOLDER, or several folders")
    found = [(_named(folder), _result(folder)) for folder in folders]
    (_, first), several = found[0], len(found) > 1
    beside = folders[0] if folders[0].is_dir() else folders[0].parent
    page = out or (Path() if several else beside) / "report.html"
    if page.is_dir() or not page.parent.is_dir():
        wrong = "is a folder" if page.is_dir() else f"there is no folder {page.parent}"
        raise BadRequest(f"the page cannot be written to {page}", wrong, "--out FILE.html")
    if several:
        made = compared(found)
    else:
        made = fit_report(first) if isinstance(first, FitResult) else first
    show(made, json)
    alone = isinstance(first, FitResult) and not several
    write_text(page, fit_to_html(first) if alone else to_html(made))  # type: ignore[arg-type]
    say(f"page: {page}")


def _named(folder: Path) -> str:
    return folder.resolve().name if folder.is_dir() else folder.stem


def _result(folder: Path) -> FitResult | Report:
    """What a folder, or one of its files, says of itself."""
    from onecard.fit.result import FILE, FitResult

    path = folder
    if folder.is_dir():
        path = next(
            (folder / name for name in (FILE, "report.json") if (folder / name).is_file()), folder
        )
    if not path.is_file():
        raise BadRequest(f"there is no report at {folder}", do="give a folder that onecard wrote")
    try:
        text = path.read_text(encoding="utf-8")
        return FitResult.from_json(text) if path.name == FILE else Report.from_json(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", seen=str(error)) from error
    except BadRequest as error:
        raise BadRequest(f"{path}: {error.what}", error.seen, error.do) from error


# Making models smaller ----------------------------------------------------------------------------


@app.command
def compress(
    model: Name,
    out: Path,
    /,
    *,
    recipe: str = "gptq-int4",
    data: Path | None = None,
    samples: Whole = 128,
    length: Whole = 512,
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    memory: str | None = None,
    dry_run: Annotated[bool, Flag] = False,
    resume: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    prove: bool | None = None,
    held_out: Path | None = None,
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
    samples
        windows of calibration text
    length
        tokens per window
    dtype
        what blocks are run in while calibrating
    memory
        cap for the whole process, 3GiB say; refused at once where it cannot be kept
    dry_run
        print the plan (peak memory, disk, time, output size) and stop
    resume
        where OUT is finished already by the same command, say so and stop
    force
        replace OUT, and throw away unfinished work of another job
    prove
        measure quality against the original and show samples; by itself for small models only
    held_out
        text to prove it on; without it, the shipped held-out text
    """
    from onecard.calibrate.data import Calibration
    from onecard.passes import find_recipe
    from onecard.passes import job as jobs

    cap = None if memory is None else parse_size(memory)
    settings = jobs.Settings(Calibration(samples, length), data, dtype, cap, force)
    if resume and jobs.is_finished(model, out, find_recipe(recipe), settings):
        say(f"{out} is finished")
        show(Report.from_json((out / "report.json").read_text(encoding="utf-8")), json)
        return
    prepared = jobs.prepare(model, out, find_recipe(recipe), settings)
    proof = proof_of(prepared.source, prove, held_out, cap)
    if dry_run:
        notes = jobs.calibrated_on(prepared)
        show(Report(prepared.plan.rows(), title="Plan, nothing was done", notes=notes), json)
        return
    with Progress("compressing") as progress, ThreadPoolExecutor(1) as aside:
        aside.submit(import_module, "onecard.render")
        found = jobs.compress(prepared, progress, finished(proof, progress))
    tell(found, out, model, json, measured=proof is not None or prove is not None)


@Parameter(name="*")
@dataclass(frozen=True)
class Budgets:
    """What there is room for; at least one of the first four."""

    memory: Annotated[
        str | None, Parameter(help="of the running model with its context, 6GiB say")
    ] = None
    size: Annotated[str | None, Parameter(help="of the saved files, 4GB say")] = None
    speed: Annotated[float | None, Parameter(help="tokens per second while it writes")] = None
    quality: Annotated[
        float | None, Parameter(help="share of --measure that is kept, 0.99 say")
    ] = None
    measure: Annotated[
        Literal["likelihood", "perplexity", "agreement", "accuracy"],
        Parameter(
            help="likelihood: exp(-KL) against the original; perplexity: its over the result's; "
            "agreement: how often both say the same; the worse of held-out text and the original's own. "
            "accuracy: right answers to --task over the original's"
        ),
    ] = "likelihood"
    context: Annotated[
        Whole | None, Parameter(help="tokens that there is to be memory for (none: 2048)")
    ] = None
    batch: Annotated[Whole, Parameter(help="sequences at once")] = 1
    device: Annotated[str, Parameter(help="auto for this machine, or a known one: inspect")] = (
        "auto"
    )


@app.command
def fit(
    model: Name,
    out: Path,
    /,
    *,
    budgets: Budgets = Budgets(),
    effort: Literal["quick", "normal", "thorough"] = "normal",
    recover: float = 0.0,
    calibration: Path | None = None,
    held_out: Path | None = None,
    task: Path | None = None,
    cap: str | None = None,
    dry_run: Annotated[bool, Flag] = False,
    explain: Annotated[bool, Flag] = False,
    resume: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Find the formats in which MODEL keeps budgets, compress it so into OUT, and prove it.

    Exit code 1 where OUT was made and does not keep what was asked.

    Parameters
    ----------
    out
        the folder to write; it appears when everything is done
    effort
        how much is tried before the plan: more takes longer and is surer
    recover
        minutes of distilling the original back into the result
    calibration
        text (UTF-8) to measure on, or a .json list of lists of ids; without it, shipped text
    held_out
        text to judge on; without it, the shipped held-out text
    task
        questions to judge on, too: JSON lines of {question, choices, gold}
    cap
        memory that the work itself may take
    dry_run
        measure sensitivities, print the plan, and stop
    explain
        say why each place got what it got
    resume
        where OUT is finished already by the same command, say so and stop
    force
        replace OUT
    """
    from onecard.fit import fit as fits
    from onecard.fit.goal import goal_of

    given = asdict(budgets)
    goal = goal_of(given.pop("memory"), given.pop("size"), **given, effort=effort, recover=recover)
    most = None if cap is None else parse_size(cap)
    request = fits.Request(
        model, out, goal, calibration, held_out, most, force or resume, task=task
    )
    if resume and fits.is_finished(request):
        say(f"{out} is finished")
        show(Report.from_json((out / "report.json").read_text(encoding="utf-8")), json)
        return
    job = checked(replace(request, force=force))
    if dry_run:
        plan_only(job, explain and not json, json)
    else:
        fitted(job, explain and not json, json)


def checked(request: Request) -> Job:
    """A fit that can be begun, with what there is to be said before."""
    from onecard.fit import fit as fits

    job = fits.prepare(request)
    for warning in job.warnings:
        say(f"warning: {warning}")
    effort, seconds = request.goal.effort, fits.seconds(job)
    say(f"sensitivities of {job.source.called} at {effort} effort: about {seconds:.0f} s")
    return job


def plan_only(job: Job, explain: bool, json: bool) -> None:
    """Measure, plan, and stop."""
    from onecard.fit import fit as fits
    from onecard.fit import story

    with Progress("planning") as progress:
        planning, found = fits.plan_only(job, progress)
    show(story.dry(job, planning), json)
    if explain:
        show(story.explained(story.places(job, found, planning)), False)


def fitted(job: Job, explain: bool, json: bool) -> None:
    """Carry a fit out, and show it; FailedWork where the result does not keep what was asked."""
    from onecard.fit import fit as fits
    from onecard.fit import story
    from onecard.render import fit_report, fit_to_html

    out = job.request.out
    with Progress("fitting") as progress:
        result = fits.fit(job, progress, lambda folder, _, made: write_text(
            folder / "report.html", fit_to_html(made)))  # fmt: skip
    made = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    show(made if json else fit_report(result), json)
    if explain:
        show(story.explained(result.places), False)
    say(f"model: {out}\nreport: {out / 'report.html'}")
    if not result.kept:
        raise FailedWork(result.answer, do=fits.advice(result))


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
    dry_run: Annotated[bool, Flag] = False,
    resume: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    prove: bool | None = None,
    held_out: Path | None = None,
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
    dry_run
        print the plan and stop
    resume
        go on from unfinished work also with other settings; where OUT is finished already, say so
    force
        replace OUT, and throw away unfinished work
    prove
        measure quality against the teacher and show samples; by itself for small models only
    held_out
        text to prove it on; without it, the shipped held-out text
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

    if resume and students.is_taught(out) and students.is_taught(out, prepared(True)):
        say(f"{out} is finished")
        show(Report.from_json((out / "report.json").read_text(encoding="utf-8")), json)
        return
    job = prepared(force)
    proof = proof_of(job.teacher, prove, held_out, cap)
    if dry_run:
        show(Report(job.plan(), title="Plan, nothing was done"), json)
        return
    with Progress("distilling") as progress:
        found = students.teach(job, resume, progress, finished(proof, progress))
    tell(found, out, teacher, json, measured=proof is not None or prove is not None)


Proof = Callable[[Path, Report, Progress], Report]


def proof_of(
    source: Source, wanted: bool | None, text: Path | None, cap: int | None
) -> Proof | None:
    """What adds quality to the report of a result made of `source`; None where that is not `wanted`.

    Raises BadRequest where it could not be done.
    """
    if wanted is False:
        return None
    from onecard import prove

    if wanted is None and not prove.is_small(source, cap):
        return None
    prove.check(source, text, cap)
    return lambda folder, made, progress: prove.prove(source.folder, folder, made, text, progress)


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


@app.command
def demo(
    out: Annotated[Path | None, Parameter()] = None,
    /,
    *,
    methods: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Fit the shipped model into a third of its size at 99 % of its quality, prove it, write a page.

    Parameters
    ----------
    out
        folder to write (default: ./onecard-demo; with --methods ./onecard-methods)
    methods
        compress it in six ways instead, and show what each costs beside the others
    force
        replace OUT
    """
    if not methods:
        from onecard.demo import shipped

        fitted(checked(shipped(out or Path("onecard-demo"), force)), False, json)
        return
    from onecard.methods import run_methods
    from onecard.render import to_html

    out = out or Path("onecard-methods")
    with Progress("methods") as progress:
        found = run_methods(out, force, progress)
    write_text(out / "report.html", to_html(found))
    show(found, json)
    say(f"report: {out / 'report.html'}")


# Proving ------------------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    model: Name,
    /,
    *,
    data: Path | None = None,
    against: str | None = None,
    window: Whole = 0,
    stride: Whole = 0,
    bos: Literal["start", "each", "none"] = "start",
    documents: str | None = None,
    limit: Whole = 0,
    task: Path | None = None,
    template: Literal["question", "plain"] = "question",
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Measure a model: perplexity, bits per byte, KL and agreement with a reference, choice tasks.

    Parameters
    ----------
    data
        text to read; without it, the shipped held-out text
    against
        a reference model for KL and top-1 agreement
    window
        tokens per context (0: the model's own, at most 2048)
    stride
        tokens between windows (0: the window)
    bos
        where the beginning-of-sequence token goes: start, each, none
    documents
        cut the text at this separator; each document is read on its own
    limit
        only the first N documents, windows or questions (0: all)
    task
        JSON lines of {question, choices, gold} instead of a text
    template
        how a question becomes a prompt
    """
    from onecard import evaluate as ev
    from onecard.checkpoint.text import read_text

    if stride and not task and (documents is not None or data is None):
        raise BadRequest(
            "documents are read from their beginnings, with no stride",
            do="--stride is for one stream: --data FILE without --documents",
        )
    reading = ev.Reading(window, stride, bos, documents, limit)
    if task and (data or against or window or stride or documents):
        raise BadRequest("--task answers questions, it reads no text", do="leave out --data, --against, "
                         "--window, --stride and --documents")  # fmt: skip
    questions = ev.read_questions(task)[: limit or None] if task else []
    text = "" if task else read_text(data, "held_out.txt")
    if data is None and documents is None:
        reading = ev.Reading(window, stride, bos, "<|endoftext|>", limit)
    subject = opened(model, compute, native)
    other = None if against is None else opened(against, compute, native)
    longest = None if task or reading.documents else window or 2048
    with Progress("eval") as progress:
        if task:
            found = ev.choose(subject.scorer(), questions, template, progress=progress)
        else:
            reference = None if other is None else other.scorer(longest)
            found = ev.evaluate(
                subject.scorer(longest), text, reading, reference, progress=progress
            )
    name = task.name if task else data.name if data else "the shipped held-out text"
    facts = found.environment | subject.facts()
    show(Report(found.rows, facts, f"{model} on {name}", found.notes), json)


@app.command
def bench(
    model: Name,
    /,
    *,
    prompt: Wholes = (128, 512),
    decode: Wholes = (128,),
    batch: Wholes = (1, 4),
    repeat: Whole = 3,
    against: str | None = None,
    isa: tuple[str, ...] = (),
    serve: Annotated[bool, Flag] = False,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Measure the native engine: prompt and decode speed, memory, shares of what the machine can do.

    Parameters
    ----------
    prompt
        ids of a prompt (may be given several times)
    decode
        ids that are written behind a short prompt (may be given several times)
    batch
        how many at once (may be given several times)
    repeat
        measurements of each, of which the median is shown
    against
        another model, measured in turn with this one; ratios are taken turn by turn
    isa
        instruction-set classes to compare, all for all of them (may be given several times)
    serve
        load the model, say ready, and answer lines such as `prompt 512` and `decode 128` with JSON
    """
    from onecard import bench as benches

    if serve:
        benches.serve(model, native.settings())
        return
    sizes = benches.Sizes(prompt, decode, batch, repeat)
    models = [model] if against is None else [model, against]
    with Progress("bench") as progress:
        found = benches.bench(models, sizes, native.settings(), isa, progress=progress)
    show(found, json)


# Running ------------------------------------------------------------------------------------------


@app.command
def run(
    model: Name,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    max_tokens: Whole = 128,
    temperature: float = 0.8,
    choice: Choice = LIKELY,
    stop: tuple[str, ...] = (),
    ignore_eos: Annotated[bool, Flag] = False,
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Continue PROMPT. The text goes to standard output, speeds to standard error.

    Parameters
    ----------
    prompt
        the text to continue; - reads it from standard input
    max_tokens
        new tokens at most
    temperature
        0 is greedy
    stop
        end where this text appears (may be given several times)
    ignore_eos
        go on behind the model's end token
    """
    from onecard.runtime.engine import generate, prompt_ids
    from onecard.runtime.sample import Sampling

    sampling = Sampling(max_tokens, temperature, stop=stop, ignore_eos=ignore_eos, **asdict(choice))
    text = sys.stdin.read() if prompt == "-" else prompt
    subject = opened(model, compute, native)
    ids = prompt_ids(subject.tokenizer, text)
    runner = subject.runner(len(ids) + max_tokens)
    result = stream(generate(runner, subject.tokenizer, ids, sampling), quiet=json)
    assert result is not None
    finish(result, subject.facts() | {"model": model}, json)


@app.command
def chat(
    model: Name,
    /,
    *,
    system: str | None = None,
    max_tokens: Whole = 512,
    temperature: float = 0.7,
    choice: Choice = LIKELY,
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Talk with a model, line by line. An empty line or end of input ends it, Ctrl-C an answer.

    Parameters
    ----------
    system
        instructions in front of the conversation
    max_tokens
        new tokens per answer at most
    temperature
        0 is greedy
    """
    from onecard.runtime.chat import Conversation
    from onecard.runtime.sample import Sampling

    sampling = Sampling(max_tokens, temperature, **asdict(choice))
    subject = opened(model, compute, native)
    runner = subject.runner()
    talk = Conversation(subject.tokenizer, system)
    result = None
    sampling = replace(sampling, max_tokens=min(max_tokens, max(1, runner.max_context // 2)))
    while question := _ask():
        with Stop() as stop:
            pieces = _reply(talk, runner, question, sampling)
            result = stream(pieces, quiet=json, stop=stop) or result
    if result is not None:
        finish(result, subject.facts() | {"model": model}, json)
    elif json:
        show(Report((), environment(model=model)), True)


def _reply(
    talk: Conversation, runner: Runner, question: str, sampling: Sampling
) -> Generator[Piece, None, None]:
    """The answer; the oldest turns are left out, and that is said, when the context is full."""
    while True:
        try:
            return talk.ask(runner, question, sampling)
        except BadRequest:
            first = 1 if talk.messages and talk.messages[0]["role"] == "system" else 0
            if len(talk.messages) < first + 2:
                raise
            del talk.messages[first : first + 2]
            say("(the context is full: the oldest question and answer were left out)")


def _ask() -> str:
    """The next line of the user, empty at the end."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


def stream(
    pieces: Generator[Piece, None, None], quiet: bool, stop: Stop | None = None
) -> Result | None:
    """Print pieces as they come; the whole result, or None where it was stopped."""
    result = None
    with contextlib.closing(pieces):
        for piece in pieces:
            if not quiet:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            result = piece.result
            if stop and stop.asked:
                break
    if not quiet:
        print(flush=True)
    return result


def finish(result: Result, facts: dict[str, Value], json: bool) -> None:
    """Speeds of the last answer, to standard error or as a report."""
    if json:
        show(Report(result.rows(), environment(**facts), notes=(("text", result.text),)), True)
        return
    rate = result.decode_tokens_per_second
    say(
        f"{result.prompt_tokens} prompt tokens at {result.prompt_tokens_per_second:.0f}/s, "
        f"{result.new_tokens} new"
        + (f" at {rate:.1f}/s" if rate else "")
        + f", first after {result.time_to_first_token * 1000:.0f} ms, ended by {result.finish}"
    )


# Shared -------------------------------------------------------------------------------------------


def show(found: Report, json: bool) -> None:
    """A report on standard output: JSON, or tables for people."""
    if json:
        print(found.to_json())
        return
    from rich.console import Console

    from onecard.render import terminal

    terminal(found, Console())
