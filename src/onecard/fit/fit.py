"""The loop of a fit: inspect, look, plan, compress, judge, mend, recover, measure, report.

    prepare   everything that headers and texts can answer: budgets that contradict each other, what cannot
              fit in any format, what is compressed already; nothing is written
    look      what each candidate of each place does to the answers (sensitivity.py); remembered
    plan      the least harm within the budgets (planner.py), looked at again from close by (around.py);
              whole blocks go where that was measured to be better, or where nothing else is possible
    compress  the plan as an ordinary journaled job (passes/layers.py, passes/planned.py)
    judge     held-out text and the original's own words (gates.py). Where the quality asked for is missed,
              the harm that is allowed is lowered by what was missed and the plan is made anew;
              sensitivities, texts and earlier results stay
    recover   the original is distilled back into what was kept (passes/distill.py), for so many minutes

All that is unfinished lies in `.OUT.fit` beside OUT: killed anywhere, the same command goes on. OUT appears
by rename, with `report.json`, `report.html` and `fit.json` (result.py) in it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from onecard.calibrate.data import Calibration, calibration_ids, digest
from onecard.calibrate.train import Training
from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import check_still, check_target
from onecard.checkpoint.source import Source, verify
from onecard.checkpoint.text import read_text
from onecard.core.device import available_memory
from onecard.core.errors import BadRequest
from onecard.core.report import Report, write_text
from onecard.core.settings import format_size
from onecard.core.spec import linear_shapes, parameter_count
from onecard.fit import gates as judge
from onecard.fit import planner, removal
from onecard.fit.around import Bank, bank_bytes, lighter, search
from onecard.fit.candidates import LARGE, Trial, trial_of
from onecard.fit.costs import Costs, Fixed
from onecard.fit.goal import MEASURES, MOST, Goal
from onecard.fit.planner import GONE, Group, Infeasible, Limits, Option, Plan, summed
from onecard.fit.result import FILE, FitResult, Gate, Said, read_fit
from onecard.fit.sensitivity import Sensitivity, default_home, known, left_out, look, table_formats
from onecard.passes import job as jobs
from onecard.passes.base import Pass, Recipe
from onecard.passes.distill import Distil
from onecard.passes.layers import DropLayers
from onecard.passes.planned import Chosen, Planned
from onecard.passes.tables import Tables
from onecard.runtime.cpu import CpuSettings

ATTEMPTS = 4
LITTLE = 0.9
"""A gate is missed by little where this share of the harm would do."""
OVERSHOOT = 0.85
"""A missed gate is aimed at again with this share of the harm that would just do."""
SUMS_UP = 1.2
"""Harms measured alone come to less than what they do together: 1.08 to 1.37 on the shipped model at 2.25 to
3.5 bits per weight. The first promise is raised by it."""
TOLLS = (0.0, 0.5, 1.0, 2.0, 4.0, 64.0)
"""What leaving a block out costs more than it was measured to, in mean harms of a block."""
SPLIT = 0.02
"""Share of byte tokens above which a calibration text is said not to be the tokenizer's."""

Quiet: Progress = lambda done, total, what: None  # noqa: E731
Page = Callable[[Path, Report, FitResult], None]


@dataclass(frozen=True)
class Request:
    """What to fit, into what, how, and from which texts."""

    model: str
    out: Path
    goal: Goal
    data: Path | None = None
    held_out: Path | None = None
    cap: int | None = None
    force: bool = False
    task: Path | None = None  # questions to judge on, too
    home: Path | None = None  # where sensitivities are kept


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing is done yet, and what can be known from headers is."""

    request: Request
    source: Source
    ids: Tensor
    warnings: tuple[str, ...] = ()

    @property
    def goal(self) -> Goal:
        return self.request.goal

    @property
    def effort(self) -> Trial:
        """What the effort tries of a model of this size."""
        return trial_of(self.goal.effort, parameter_count(self.source.spec))

    @property
    def trial(self) -> Trial:
        """The same, and what it does to leave blocks out where some have to go."""
        return replace(self.effort, left_out=True) if self.cramped else self.effort

    @cached_property
    def cramped(self) -> bool:
        """Whether the budgets are beyond the smallest formats, so that blocks have to go."""
        try:
            planner.solve(list(self.places().values()), self.limits(None))
        except Infeasible:
            return True
        return False

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.source, self.goal)

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Formats of the embedding and head that are choices: rounding them takes the model in memory."""
        room = self.request.cap or available_memory()
        fits = 8 * parameter_count(self.source.spec) < room
        return tuple(f.name for f in table_formats(self.source, self.effort.tables)) if fits else ()

    @cached_property
    def fixed(self) -> Fixed:
        return self.costs.fixed(bool(self.tables))

    def places(self, found: Sensitivity | None = None) -> dict[str, list[Option]]:
        """place -> options; without sensitivities, of which only costs are known."""
        harms = None
        if found is not None:
            harms = {w: {n: SUMS_UP * h for n, h in own.items()} for w, own in found.harms.items()}
        return self.costs.options(self.effort.formats, harms, self.tables)

    def groups(
        self, places: Mapping[str, Sequence[Option]], found: Sensitivity | None = None
    ) -> list[Group]:  # fmt: skip
        """The blocks that may be left out of these places."""
        harms = None
        if found is not None:
            harms = {w: {n: SUMS_UP * h for n, h in own.items()} for w, own in found.harms.items()}
        return self.costs.groups(places, harms)

    def limits(self, harm: float | None) -> Limits:
        """What is left for the options when everything fixed is paid."""
        goal, fixed = self.goal, self.fixed
        return Limits(
            None if goal.size is None else goal.size - fixed.size,
            None if goal.memory is None else goal.memory - fixed.memory,
            None if goal.speed is None else 1 / goal.speed - fixed.seconds,
            harm,
        )

    @property
    def harm(self) -> float | None:
        """The KL that the quality asked for allows, before anything was measured."""
        goal = self.goal
        return None if goal.quality is None else judge.harm_of(goal.quality, goal.measure)

    @property
    def work(self) -> Path:
        return self.request.out.parent / f".{self.request.out.name}.fit"


def prepare(request: Request) -> Job:
    """Check everything that can be checked from headers, settings and text. Raises BadRequest."""
    out = Path(request.out).expanduser().resolve()
    request = replace(request, out=out)
    source, goal = Source(request.model), request.goal
    verify(source.folder)
    if source.compressed:
        raise BadRequest(
            f"{source.called} is compressed already ({', '.join(source.format_names())})",
            "fit starts from the original numbers",
            "fit the original; or go on from this one: onecard distill ORIGINAL "
            f"{source.called} OUT trains it, onecard inspect {source.called} --device auto says what fits",
        )
    if goal.context and goal.context > source.spec.max_context:
        raise BadRequest(f"--context {goal.context}",
                         f"{source.called} is made for {source.spec.max_context} tokens")  # fmt: skip
    check_target(out, source.folder, request.force)
    trial = trial_of(goal.effort, parameter_count(source.spec))
    length = min(trial.length, source.spec.max_context)
    tokenizer = source.tokenizer()
    given = request.data is not None and request.data.suffix == ".json"
    wanted = Calibration(max(1, trial.tokens // length), length)
    ids = calibration_ids(
        None if given else tokenizer, request.data, wanted, source.spec.vocab_size
    )
    judge.require_text(source, request.held_out)
    judge.require_questions(request.task, goal.measure)
    job = Job(request, source, ids, tuple(warned(source, request.data)))
    require_possible(job)
    return job


def warned(source: Source, text: Path | None) -> list[str]:
    """What is odd about a calibration text: one that the tokenizer cuts into bytes."""
    if text is None or text.suffix == ".json":
        return []
    words = read_text(text)[:100_000]
    ids = source.tokenizer().encode(words)
    rate = len(ids) / max(1, len(words.encode("utf-8", "replace")))
    characters = len(ids) / max(1, len(words))
    if characters > 1.0 and rate > SPLIT:
        return [f"the tokenizer cuts {text.name} into {characters:.1f} tokens per character: it does not "
                "know this language, and sensitivities measured on it say little"]  # fmt: skip
    return []


def require_possible(job: Job) -> None:
    """BadRequest where even the cheapest formats are beyond a budget, with every block but one left out: the
    nearest, and what to relax."""
    places = job.places()
    try:
        removal.solve(list(places.values()), job.limits(None), job.groups(places))
    except Infeasible as error:
        raise explained(job, error) from error


def explained(job: Job, error: Infeasible) -> BadRequest:
    """What the nearest possible is, in the words of the goal."""
    goal, fixed = job.goal, job.fixed
    if error.name == "harm":
        least = judge.share_of(error.least, goal.measure)
        return BadRequest(f"no plan keeps {goal.quality:g} of the {goal.measure}",
                          f"the best possible here is {least:.4f}", "lower --quality")  # fmt: skip
    asked = {"size": goal.size, "memory": goal.memory, "seconds": goal.speed}[error.name]
    total = error.least + getattr(fixed, error.name)
    all_blocks = planner.least_cost(list(job.places().values()), error.name)
    all_blocks = max(total, all_blocks + getattr(fixed, error.name))
    if error.name == "seconds":
        return BadRequest(f"--speed {asked:g} tokens/s is beyond {job.costs.device.name}",
                          f"the most that is predicted, in the smallest formats, is {1 / all_blocks:.3g} "
                          f"with all blocks, {1 / total:.3g} with all but one left out",
                          f"--speed {0.95 / all_blocks:.3g}, or a smaller --context")  # fmt: skip
    words = f"{format_size(fixed.memory)} of it is the program, norms and work space; " * (
        error.name == "memory"
    )
    return BadRequest(
        f"{job.source.called} does not fit into --{error.name} {format_size(float(asked or 0))}",
        f"{words}the least possible in any format tried is {format_size(all_blocks)} with all blocks, "
        f"{format_size(total)} with all but one left out",
        f"--{error.name} {roomy(all_blocks)}"
        + (", or a smaller --context or --batch" if error.name == "memory" else ""),
    )  # fmt: skip


def roomy(least: float) -> str:
    """A budget to write on the command line that so many bytes fit into."""
    unit, name = (2**20, "MiB") if least > 2**24 else (2**10, "KiB")
    return f"{math.ceil(1.01 * least / unit)}{name}"


# The loop -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planning:
    """A plan with everything it was made from. `factor`: what predicted harms have to be multiplied by."""

    places: Mapping[str, Sequence[Option]]
    plan: Plan
    factor: float = 1.0
    looked: tuple[float, float] | None = (
        None  # KL on the calibration text before and after looking around
    )
    groups: Sequence[Group] = ()
    """The blocks that may be left out."""

    @property
    def harm(self) -> float:
        return self.plan.harm * self.factor

    def chosen(self) -> dict[str, Option]:
        return dict(zip(self.places, self.plan.options(list(self.places.values())), strict=True))


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


@dataclass(frozen=True)
class Tried:
    """One round: the plan, the folder it was carried out into, what the gates saw."""

    planning: Planning
    folder: Path
    report: Report
    gates: tuple[Gate, ...]
    passed: bool | None
    what: str
    runs: CpuSettings


def plan_for(
    job: Job, found: Sensitivity, factor: float = 1.0, harm: float | None = None
) -> Planning:
    """The plan of least harm within the budgets; without one on bytes or speed, the smallest that is good.

    Blocks are only left out where nothing else is possible: harms of several do not add up, so that such a
    plan has to be measured first (`looked_around`). Where nothing is measured around a plan, at quick effort
    or with a model that does not fit into memory, that is all the removal there is.
    """
    places = job.places(found)
    groups = job.groups(places, found)
    limits = job.limits(None)
    allowed = harm if harm is not None else job.harm
    if not limits.costs():
        limits = replace(limits, harm=None if allowed is None else allowed / factor)
    try:
        plan = removal.solve(list(places.values()), limits, groups if job.cramped else ())
    except Infeasible as error:
        raise explained(job, error) from error
    return Planning(places, plan, factor, groups=groups)


def looked_around(job: Job, planning: Planning, progress: Progress = Quiet) -> Planning:
    """The plan after a look around it, where the model and what is needed fit into memory.

    Where the sums say that a plan does better with blocks left out, that one is looked around too, and it is
    taken only where its KL as measured is below that of the plan without; it is what is promised then.
    """
    spec, rounds = job.source.spec, job.trial.rounds
    free = job.request.cap or available_memory()
    if not rounds or parameter_count(spec) > LARGE or bank_bytes(spec) > 0.7 * free:
        return together(job, planning, progress)
    if not any(o.harm for o in planning.chosen().values()) and not planning.plan.gone:
        return planning
    rows = max(1, job.trial.tried // job.ids.shape[1])
    bank = Bank(job.source, job.ids, job.ids[:rows])
    base, limits = planning, job.limits(None)
    if not limits.costs():  # smaller is what is wanted: the bytes that the plan has are its budget
        limits = Limits(size=planning.plan.size)
    if not planning.plan.gone:
        better = search(bank, planning.places, limits, planning.plan, rounds, progress)
        base = replace(planning, plan=better.plan, looked=(better.before, better.kl))
    return thinned(job, bank, base, progress) or base


def thinned(job: Job, bank: Bank, base: Planning, progress: Progress) -> Planning | None:
    """A plan with blocks left out, where it is measured to be better than the best without at the same
    budgets, or the only one there is; None where not."""
    options, groups = list(base.places.values()), base.groups
    limits, rounds, first = job.limits(None), job.trial.rounds, base.plan
    least = base.looked[1] if base.looked else math.inf
    if not first.gone:
        aim = limits if limits.costs() else Limits(harm=(job.harm or 0.0) / base.factor)
        first = removal.solve(options, aim, groups)
        if not first.gone:
            return None
    if not limits.costs():  # it is smaller; what is best without, at its size?
        limits, least = Limits(size=first.size), job.harm or 0.0
        with suppress(Infeasible):
            kept = planner.solve(options, limits)
            least = min(least, search(bank, base.places, limits, kept, rounds, progress).kl)
    found = lighter(bank, base.places, groups, limits, first, rounds, progress)
    if found.kl >= least:
        return None
    plan = replace(found.plan, harm=found.kl)
    return replace(base, plan=plan, factor=1.0, looked=(found.before, found.kl))


def together(job: Job, planning: Planning, progress: Progress = Quiet) -> Planning:
    """A plan that has to leave blocks out and that nothing can be measured around.

    With a toll on every block that goes, from none to one under which as few go as can, the planner names
    sets of blocks; what each set does to the answers is measured, streamed, in place of the sum of what its
    blocks do alone, and the plan of least harm is taken.
    """
    if not planning.plan.gone:
        return planning
    options, limits, groups = list(planning.places.values()), job.limits(None), planning.groups
    typical = sum(group.harm for group in groups) / len(groups)
    found: dict[tuple[str, ...], Plan] = {}
    for number, toll in enumerate(TOLLS):
        progress(number, len(TOLLS), "measuring with blocks left out")
        dearer = [replace(group, harm=group.harm + toll * typical) for group in groups]
        named = removal.solve(options, limits, dearer)
        gone, plan = named.gone, summed(options, named.picks, groups)
        if gone in found:
            continue
        with suppress(Infeasible):
            plan = removal.with_out(options, limits, groups, gone)
        alone = sum(group.harm for group in groups if group.name in gone)
        harm = SUMS_UP * left_out(job.source, job.ids, job.trial.tried, gone)
        found[gone] = replace(plan, harm=plan.harm - alone + harm)
    return replace(planning, plan=min(found.values(), key=lambda plan: plan.harm))


def recipe_for(job: Job, planning: Planning, minutes: float = 0.0) -> Recipe:
    """The plan as passes: blocks that are left out go first, and the others are counted anew."""
    chosen = {where: option.format for where, option in planning.chosen().items()}
    gone = sorted(int(block.split(".")[1]) for block in planning.plan.gone)
    sites = tuple(
        Chosen(renumbered(w, gone), f)
        for w, f in chosen.items() if w.startswith("blocks.") and f != GONE
    )  # fmt: skip
    quick = job.trial.rounding == "nearest"
    passes: list[Pass] = [DropLayers(layers=tuple(gone), most=None)] if gone else []
    passes.append(Planned(sites, sweeps=0 if quick else 1, correct=0.0 if quick else 1.0))
    table = chosen.get("tables", job.source.dtype)
    if table != job.source.dtype:
        name, group = table.split("-g")
        passes.append(Tables(int(name.removeprefix("int")), int(group)))
    if minutes:
        length = min(256, job.ids.shape[1])
        passes.append(Distil(training=Training(minutes=minutes, batch=4, length=length, rate=3e-4)))
    return Recipe("fit", tuple(passes), "planned for budgets")


def renumbered(where: str, gone: Sequence[int]) -> str:
    """A site, by the number of its block among those that stay."""
    _, index, name = where.split(".", 2)
    return f"blocks.{int(index) - sum(g < int(index) for g in gone)}.{name}"


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
    measure: bool = True,
) -> FitResult:  # fmt: skip
    """Carry out a prepared job; OUT appears when it is complete, whatever the gates said: `kept` tells.

    `page(folder, report, result)` may add files to the finished folder before it gets its name.
    """
    from onecard.fit import story

    clock = Clock()
    job.work.mkdir(parents=True, exist_ok=True)
    wanted = {
        "goal": asdict(job.goal), "model": str(job.source.folder), "ids": digest(job.ids),
        "held out": str(job.request.held_out), "task": judge.name_of(job.request.task),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    begun = job.work / "goal.json"
    if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != wanted:
        shutil.rmtree(job.work)
        job.work.mkdir()
    write_text(begun, json.dumps(wanted))
    clock.step("inspect")
    found = look(job.source, job.ids, job.trial, job.request.home or default_home(), progress)
    clock.step("sensitivities")
    planning = plan_for(job, found)
    clock.step("plan")
    planning = recalled(job, planning) or remembered(job, looked_around(job, planning, progress))
    clock.step("look around")
    texts = judge.texts_of(
        job.source, job.request.held_out, gate_tokens(job), job.work / "texts.json",
        job.request.task, progress,
    )  # fmt: skip
    tried: list[Tried] = []
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
    seen = story.measured(job, best.folder, best.runs) if measure else story.Seen()
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
    return looked_around(job, plan_for(job, found), progress), found


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
) -> Tried:  # fmt: skip
    """Carry a plan out and judge it.

    Where the gate is missed by little it is judged besides with inputs that are not rounded; as that is
    slower, it is chosen only where it keeps what was asked.
    """
    folder, report = carried_out(job, planning, name, minutes, progress)
    goal, runs = job.goal, running(planning)
    gates = judgement(job, folder, texts, runs, name, progress)
    seen = judge.quality(gates, goal.measure)
    if goal.quality is None:
        return Tried(planning, folder, report, gates, None, what, runs)
    if seen < goal.quality and job.costs.here and shortfall(goal, seen) > LITTLE:
        exact = replace(runs, exact=("all",))
        others = judgement(job, folder, texts, exact, f"{name}-exact", progress)
        if judge.quality(others, goal.measure) >= goal.quality:
            what = f"{what}, inputs not rounded"
            return Tried(planning, folder, report, others, True, what, exact)
    return Tried(planning, folder, report, gates, seen >= goal.quality, what, runs)


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


def raised(job: Job, found: Sensitivity, tried: Sequence[Tried]) -> Planning | None:
    """The next plan where the last one missed its gate and bytes allow a better one; None where not."""
    last = tried[-1]
    if last.passed is not False or job.harm is None or job.limits(None).costs():
        return None
    worst = max(gate.kl for gate in last.gates)
    factor = last.planning.factor * max(1.0, worst / max(last.planning.harm, 1e-12))
    missed = judge.quality(last.gates, job.goal.measure)
    harm = min(job.harm, worst * shortfall(job.goal, missed)) * OVERSHOOT
    try:
        planning = plan_for(job, found, factor, harm)
    except BadRequest:
        return None
    return None if planning.plan.picks == last.planning.plan.picks else planning


def shortfall(goal: Goal, quality: float) -> float:
    """By which share the KL has to fall so that the measure reaches what is asked."""
    assert goal.quality is not None
    if goal.measure in judge.CHOICES:
        return ((1 - goal.quality) / max(1 - quality, 1e-9)) ** 2
    return math.log(goal.quality) / min(math.log(max(quality, 1e-9)), -1e-12)


def nearest(job: Job, best: Tried) -> str:
    """The byte budgets that are predicted to keep a quality that was missed, in words; empty where none was,
    or where no format keeps it. Harms are taken to be off by as much as they were in this plan, but never to
    come to less than half of what is predicted: the smaller they get, the truer they are."""
    goal, planning = job.goal, best.planning
    if best.passed is not False or job.harm is None or not (goal.size or goal.memory):
        return ""
    worst = max(gate.kl for gate in best.gates)
    factor = planning.factor * max(0.5, worst / max(planning.harm, 1e-12))
    missed = judge.quality(best.gates, goal.measure)
    harm = min(job.harm, worst * shortfall(goal, missed)) * OVERSHOOT / factor
    options, needs = list(planning.places.values()), dict[str, float]()
    try:
        for name in ("size", "memory"):
            if getattr(goal, name):
                plan = planner.smallest(options, harm, name)
                needs[name] = getattr(plan, name) + getattr(job.fixed, name)
    except Infeasible:
        return ""
    short = {n: need for n, need in needs.items() if need > getattr(goal, n)} or needs
    said = " and ".join(f"--{name} {roomy(need)}" for name, need in short.items())
    return f"{said} would do, as predicted from what this plan came to"


def largest_batch(job: Job, planning: Planning) -> int | None:
    """How many sequences of the context asked for fit into --memory at once with a plan; None without it."""
    goal, plan, most = job.goal, planning.plan, job.goal.memory
    if most is None:
        return None
    cache = planning.chosen()["cache"].format
    gone = [int(block.split(".")[1]) for block in plan.gone]

    def needed(batch: int) -> int:
        costs = Costs(job.source, replace(goal, batch=batch))
        kept = costs.kept(cache) - costs.kept(cache, gone)
        return kept + costs.fixed_memory(bool(job.tables))

    rest = plan.memory + job.fixed.memory - needed(goal.batch)
    low, high = goal.batch, MOST + 1  # the one fits, the other does not or is not offered
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rest + needed(middle) <= most else (low, middle)
    return low


def best_of(job: Job, tried: Sequence[Tried]) -> Tried:
    """The smallest that passed, else the one of the best quality."""
    good = [t for t in tried if t.passed]
    if good and not job.limits(None).costs():
        return min(
            good, key=lambda t: (t.planning.plan.size, -judge.quality(t.gates, job.goal.measure))
        )
    return max(tried, key=lambda t: judge.quality(t.gates, job.goal.measure))


def remembered(job: Job, planning: Planning) -> Planning:
    """The picks of the first plan, kept for a second run."""
    data = {"picks": planning.plan.picks, "harm": planning.plan.harm, "looked": planning.looked}
    write_text(job.work / "plan.json", json.dumps(data))
    return planning


def recalled(job: Job, planning: Planning) -> Planning | None:
    """The first plan of an interrupted run; None where there was none."""
    path = job.work / "plan.json"
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    old = planning.plan
    plan = summed(list(planning.places.values()), data["picks"], planning.groups)
    plan = replace(plan, harm=data["harm"], gap=old.gap, price=old.price, priced=old.priced)
    return replace(planning, plan=plan, looked=tuple(data["looked"]) if data["looked"] else None)


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


def is_finished(request: Request) -> bool:
    """OUT holds the result of this very request."""
    out = Path(request.out)
    if not (out / FILE).is_file():
        return False
    done = read_fit(out)
    return done.goal == request.goal and done.model == Source(request.model).called


def seconds(job: Job) -> float:
    """What the sensitivities will take, from products timed on the spot; 0 where they are known."""
    from onecard.passes.forecast import estimate_seconds

    if known(job.source, job.ids, job.trial, job.request.home or default_home()):
        return 0.0
    spec, trial = job.source.spec, job.trial
    weights = sum(
        rows * columns
        for layer in spec.layers
        for rows, columns in linear_shapes(spec, layer).values()
    )
    walk = estimate_seconds(spec, job.ids, "fp32", False)
    per_token = walk / max(1, job.ids.numel())
    streams = spec.num_layers * (1 if trial.together else 4 * len(trial.anchors)) / 2
    solving = len(trial.formats) * weights * (4e-9 if trial.rounding == "nearest" else 2e-7)
    return walk + streams * trial.tried * per_token + solving
