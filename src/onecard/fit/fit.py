"""The loop of a fit: inspect, look, plan, compress, judge, mend, recover, measure, report.

    prepare   everything that headers and texts can answer: budgets that contradict each other, what cannot
              fit in any format, what is compressed already; nothing is written
    look      what each candidate of each place does to the answers (sensitivity.py); remembered
    plan      the least harm within the budgets (planner.py), looked at again from close by (around.py);
              whole blocks go where that was measured to be better, or where nothing else is possible
    compress  the plan as an ordinary journaled job (passes/layers.py, passes/planned.py)
    judge     held-out text and the original's own words (gates.py). Where the quality asked for is missed,
              the harm that is allowed is lowered by what was missed and the plan is made anew;
              sensitivities, texts and earlier results stay (mend.py)
    recover   the original is distilled back into what was kept (passes/distill.py), for so many minutes

All that is unfinished lies in `.OUT.fit` beside OUT: killed anywhere, the same command goes on. OUT appears
by rename, with `report.json`, `report.html` and `fit.json` (result.py) in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from onecard import __version__, cost
from onecard.calibrate.data import Calibration
from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import check_still, remove
from onecard.core.errors import BadRequest
from onecard.core.report import Report, write_text
from onecard.core.spec import parameter_count
from onecard.fit import gates as judge
from onecard.fit import story, timing
from onecard.fit.candidates import LARGE
from onecard.fit.choose import (
    Planning,
    looked_around,
    plan_for,
    recalled,
    recipe_for,
    remembered,
    require_sense,
    short_of,
)
from onecard.fit.goal import MEASURES
from onecard.fit.job import Job, Quiet
from onecard.fit.mend import Round, best_of, raised, shortfall
from onecard.fit.result import FILE, FitResult, Gate, Said
from onecard.fit.sensitivity import Sensitivity, default_home, look
from onecard.passes import job as jobs
from onecard.runtime.cpu import CpuSettings

ATTEMPTS = 4
LOCK = "lock"
TOO_FAST = 2.0
"""Times faster than promised, from which the kernels' figures of this machine are not believed any more."""
LITTLE = 0.9
"""A gate is missed by little where this share of the harm would do."""

Page = Callable[[Path, Report, FitResult], None]


@dataclass
class Clock:
    """Seconds of every step."""

    began: float = field(default_factory=time.perf_counter)
    steps: dict[str, float] = field(default_factory=dict)

    def step(self, name: str) -> None:
        now = time.perf_counter()
        self.steps[name] = self.steps.get(name, 0.0) + now - self.began
        self.began = now

    def said(self) -> tuple[Said, ...]:
        return tuple(Said(name, f"{seconds:.1f}") for name, seconds in self.steps.items())


def carried_out(
    job: Job, planning: Planning, name: str, minutes: float = 0.0, progress: Progress = Quiet
) -> tuple[Path, Report]:  # fmt: skip
    """The folder that a plan became, and its report; at once where it was finished before a kill."""
    folder, recipe = job.work / name, recipe_for(job, planning, minutes)
    settings = jobs.Settings(
        Calibration(*job.ids.shape), job.request.data, memory=job.request.cap, force=True
    )  # fmt: skip
    kept = job.work / f"{name}.report.json"  # the one in the folder becomes that of the fit
    if kept.is_file() and jobs.is_finished(job.source.folder, folder, recipe, settings):
        return folder, Report.from_json(kept.read_text(encoding="utf-8"))
    report = jobs.compress(jobs.prepare(job.source.folder, folder, recipe, settings), progress)
    write_text(kept, report.to_json())
    return folder, report


def fit(
    job: Job, progress: Progress = Quiet, page: Page | None = None,
    measure: bool = True, warn: Callable[[str], None] = lambda text: None,
) -> FitResult:  # fmt: skip
    """Carry out a prepared job; OUT appears when it is complete, whatever the gates said: `kept` tells.

    `page(folder, report, result)` may add files to the finished folder before it gets its name. `warn` is
    told what a plan is predicted to miss, before it is carried out.
    """
    with working(job):
        return _fit(job, progress, page, measure, warn)


@contextmanager
def working(job: Job) -> Iterator[None]:
    """The working folder, for this process alone, with what an interrupted run of the same fit left there.
    Raises BadRequest where another process has it."""
    if job.work.exists() and not job.work.is_dir():
        raise BadRequest(f"{job.work} is a file", "unfinished work is kept in a folder of that name",
                         "move it away, or give another output")  # fmt: skip
    fresh, begun = not job.work.exists(), job.work / "goal.json"
    job.work.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    wanted = {
        "onecard": __version__,
        "goal": asdict(job.goal),
        "inputs": job.inputs,
        "threads": threads,
    }
    with (job.work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadRequest(f"another process is fitting into {job.request.out}",
                             do="wait for it, or give another output") from error  # fmt: skip
        if judge.noted(begun) != wanted:
            for path in job.work.iterdir():
                if path.name != LOCK:
                    remove(path)
        write_text(begun, json.dumps(wanted))
        try:
            yield
        except BadRequest:
            if fresh:
                shutil.rmtree(job.work, ignore_errors=True)
            raise


def _fit(
    job: Job, progress: Progress, page: Page | None, measure: bool, warn: Callable[[str], None]
) -> FitResult:  # fmt: skip
    clock = Clock()
    clock.step("inspect")
    found = look(job.source, job.ids, job.trial, job.request.home or default_home(), progress)
    clock.step("sensitivities")
    planning = plan_for(job, found)
    clock.step("plan")
    planning = recalled(job, planning) or remembered(job, looked_around(job, planning, progress))
    try:
        require_sense(job, planning)
    except BadRequest:
        shutil.rmtree(job.work, ignore_errors=True)
        raise
    clock.step("look around")
    if said := short_of(job, planning):
        warn(said)
    texts = judge.texts_of(
        job.source, job.request.held_out, gate_tokens(job), job.work / "texts.json",
        job.request.task, progress,
    )  # fmt: skip
    tried: list[Round] = []
    for number in range(ATTEMPTS):
        tried.append(one_try(job, planning, texts, f"attempt-{number + 1}", "as planned", progress))
        clock.step("compress and judge")
        again = raised(job, found, tried)
        if again is None:
            break
        planning = again
    best = best_of(job, tried)
    if job.goal.recover:
        what = f"recovered for {job.goal.recover:g} minutes"
        minutes = job.goal.recover
        tried.append(one_try(job, best.planning, texts, "recovered", what, progress, minutes))
        clock.step("recover")
        best = best_of(job, tried)
    seen = timing.measured(job, best.folder, best.runs) if measure else timing.Seen()
    slow = best.planning.plan.seconds + job.fixed.seconds
    if job.costs.machine is not None and (seen.decode or 0.0) * slow > TOO_FAST:
        cost.forget()  # they were measured beside something else
    clock.step("measure")
    result = story.told(job, found, best, tried, seen, clock.said())
    write_text(best.folder / FILE, result.to_json())
    report = story.report_of(job, best, result)
    write_text(best.folder / "report.json", report.to_json())
    if page is not None:
        page(best.folder, report, result)
    publish(job, best.folder)
    return result


def plan_only(job: Job, progress: Progress = Quiet) -> tuple[Planning, Sensitivity]:
    """The plan of a job, and what it rests on; nothing is made."""
    found = look(job.source, job.ids, job.trial, job.request.home or default_home(), progress)
    return require_sense(job, looked_around(job, plan_for(job, found), progress)), found


def advice(result: FitResult) -> str:
    """What to do about a result that does not keep what was asked."""
    missed = {promise.what for promise in result.promises if promise.kept is False}
    if missed & MEASURES.keys():
        budgets = f"{result.nearest}; or " if result.nearest else ""
        return f"{budgets}try --effort thorough, --recover 10, or lower --quality"
    return "lower --speed" if missed == {"decode"} else "give more room, or --effort thorough"


def gate_tokens(job: Job) -> int:
    """Tokens that the gates read of each text, about: fewer of a large model."""
    most = {"quick": 4096, "normal": 8192, "thorough": 32768}[job.goal.effort]
    return most if parameter_count(job.source.spec) <= LARGE else most // 4


def one_try(
    job: Job, planning: Planning, texts: judge.Texts, name: str, what: str, progress: Progress,
    minutes: float = 0.0,
) -> Round:  # fmt: skip
    """Carry a plan out and judge it.

    Where the gate is missed by little it is judged besides with inputs that are not rounded; as that is
    slower, it is chosen only where it keeps what was asked, the speed too.
    """
    folder, report = carried_out(job, planning, name, minutes, progress)
    goal, runs = job.goal, running(planning)
    gates = judgement(job, folder, texts, runs, name, progress)
    seen = judge.quality(gates, goal.measure)
    if goal.quality is None:
        return Round(planning, folder, report, gates, None, what, runs)
    if seen < goal.quality and job.costs.here and shortfall(goal, seen) > LITTLE:
        exact = replace(runs, exact=("all",))
        others = judgement(job, folder, texts, exact, f"{name}-exact", progress)
        enough = judge.quality(others, goal.measure) >= goal.quality
        if enough and timing.is_fast(job, folder, exact):
            what = f"{what}, inputs not rounded"
            return Round(planning, folder, report, others, True, what, exact)
    return Round(planning, folder, report, gates, seen >= goal.quality, what, runs)


def running(planning: Planning) -> CpuSettings:
    """How the engine is to run a plan."""
    cache = planning.chosen()["cache"].format
    return CpuSettings(cache=None if cache == "fp16" else cache)


def judgement(
    job: Job, folder: Path, texts: judge.Texts, runs: CpuSettings, name: str, progress: Progress
) -> tuple[Gate, ...]:
    """What the gates see of a folder that is run so; remembered as long as the folder is the same."""
    kept = job.work / f"{name}.gates.json"
    gates = judge.read_kept(kept)
    if gates is None or os.path.getmtime(kept) < os.path.getmtime(folder / "manifest.json"):
        gates = judge.judged(job.source.folder, folder, texts, runs, job.costs.here, progress)
        judge.keep(kept, gates)
    return gates


def publish(job: Job, folder: Path) -> None:
    """The chosen folder becomes OUT, in one step; then the working folder goes."""
    out, old = job.request.out, job.work / "replaced"
    check_still(out, folder, job.request.force)
    if out.is_dir() and any(out.iterdir()):
        os.replace(out, old)
    elif out.is_dir():
        out.rmdir()
    os.replace(folder, out)
    shutil.rmtree(job.work, ignore_errors=True)
