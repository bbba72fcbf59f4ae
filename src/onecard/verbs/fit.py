"""Verbs that find what fits: from what there is room for to a proven model, and the demo of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from onecard.core.errors import FailedWork
from onecard.core.report import Report, write_text
from onecard.running import Whole
from onecard.terminal import Progress, say
from onecard.verbs.shared import (
    Flag,
    Json,
    Name,
    Writing,
    app,
    say_what_is_measured,
    show,
    show_finished,
)

if TYPE_CHECKING:
    from onecard.fit.job import Job, Request


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


@Parameter(name="*")
@dataclass(frozen=True)
class Planning(Writing):
    """The same of a fit, whose plan is measured."""

    dry_run: Annotated[
        bool, Flag, Parameter(help="measure sensitivities, print the plan, and stop")
    ] = False
    force: Annotated[bool, Flag, Parameter(help="replace OUT")] = False


BUDGETS, PLANNING = Budgets(), Planning()


@app.command
def fit(
    model: Name,
    out: Path,
    /,
    *,
    budgets: Budgets = BUDGETS,
    effort: Literal["quick", "normal", "thorough"] = "normal",
    recover: float = 0.0,
    calibration: Path | None = None,
    held_out: Path | None = None,
    task: Path | None = None,
    cap: str | None = None,
    explain: Annotated[bool, Flag] = False,
    writing: Planning = PLANNING,
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
        memory that the work itself may take, beside the files that are mapped to judge by
    explain
        say why each place got what it got
    """
    from onecard.fit import job as jobs
    from onecard.fit.goal import bytes_of, goal_of

    given = asdict(budgets)
    goal = goal_of(given.pop("memory"), given.pop("size"), **given, effort=effort, recover=recover)
    most = bytes_of("cap", cap)
    request = jobs.Request(model, out, goal, calibration, held_out, most, writing.force, task=task)
    if writing.resume and jobs.is_finished(request):
        show_finished(out, json)
        return
    job = checked(request)
    if writing.dry_run:
        plan_only(job, explain, json)
    else:
        fitted(job, explain, json)


def checked(request: Request) -> Job:
    """A fit that can be begun, with what there is to be said before."""
    from onecard.fit import job as jobs

    if request.goal.speed and request.goal.device == "auto":
        say_what_is_measured()
    job = jobs.prepare(request)
    for warning in job.warnings:
        say(f"warning: {warning}")
    effort, seconds = request.goal.effort, jobs.seconds(job)
    told = f"about {math.ceil(seconds)} s" if seconds else "known already"
    say(f"sensitivities of {job.source.called} at {effort} effort: {told}")
    return job


def plan_only(job: Job, explain: bool, json: bool) -> None:
    """Measure, plan, and stop."""
    from onecard.fit import fit as fits
    from onecard.fit import story

    with Progress("planning") as progress:
        planning, found = fits.plan_only(job, progress)
    why = story.explained(story.places(job, found, planning)) if explain else None
    show_both(story.dry(job, planning), why, json)


def show_both(found: Report, why: Report | None, json: bool) -> None:
    """A report, and why each place got what it got; one report where it is JSON."""
    if why is None or json:
        show(found if why is None else found.with_rows(*why.rows), json)
        return
    show(found, json)
    show(why, json)


def fitted(job: Job, explain: bool, json: bool) -> None:
    """Carry a fit out, and show it; FailedWork where the result does not keep what was asked."""
    from onecard import fitting
    from onecard.fit import fit as fits
    from onecard.fit import story
    from onecard.render import fit_report

    out = job.request.out
    with Progress("fitting") as progress:
        result = fitting.fitted(job, progress, lambda text: say(f"warning: {text}"))
    made = Report.from_json((out / "report.json").read_text(encoding="utf-8"))
    why = story.explained(result.places) if explain else None
    show_both(made if json else fit_report(result), why, json)
    say(f"model: {out}\nreport: {out / 'report.html'}")
    if not result.kept:
        raise FailedWork(result.answer, do=fits.advice(result))


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
        from onecard.demo import request

        fitted(checked(request(out or Path("onecard-demo"), force)), False, json)
        return
    from onecard.methods import run_methods
    from onecard.render import to_html

    out = out or Path("onecard-methods")
    with Progress("methods") as progress:
        found = run_methods(out, force, progress)
    write_text(out / "report.html", to_html(found))
    show(found, json)
    say(f"report: {out / 'report.html'}")
