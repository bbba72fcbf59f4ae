"""What to do about a gate that is missed: the next plan, the best of those tried, the budgets that would do.

Harms are taken to be off by as much as they were in the plan that was carried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onecard.core.errors import BadRequest
from onecard.core.report import Report
from onecard.fit import gates as judge
from onecard.fit.choose import Planning, enough_for, plan_for
from onecard.fit.goal import Goal
from onecard.fit.job import Job
from onecard.fit.result import Gate
from onecard.fit.sensitivity import Sensitivity
from onecard.runtime.cpu import CpuSettings

OVERSHOOT = 0.85
"""A missed gate is aimed at again with this share of the harm that would just do."""


@dataclass(frozen=True)
class Round:
    """One round: the plan, the folder it was carried out into, what the gates saw."""

    planning: Planning
    folder: Path
    report: Report
    gates: tuple[Gate, ...]
    passed: bool | None
    what: str
    runs: CpuSettings


def raised(job: Job, found: Sensitivity, tried: Sequence[Round]) -> Planning | None:
    """The next plan where the last one missed its gate and bytes allow a better one; None where not."""
    last = tried[-1]
    if last.passed is not False or job.harm is None or job.limits(None).costs():
        return None
    harm, factor = aim(job, last, 1.0)
    try:
        planning = plan_for(job, found, factor, harm)
    except BadRequest:
        return None
    return None if planning.plan.picks == last.planning.plan.picks else planning


def aim(job: Job, last: Round, least: float) -> tuple[float, float]:
    """The KL to aim at behind a round that missed its gate, and by how much harms have to be multiplied: as
    they were off in it, but by `least` at least."""
    assert job.harm is not None
    worst = max(gate.kl for gate in last.gates)
    missed = judge.quality(last.gates, job.goal.measure)
    harm = min(job.harm, worst * shortfall(job.goal, missed)) * OVERSHOOT
    return harm, last.planning.factor * max(least, worst / max(last.planning.harm, 1e-12))


def shortfall(goal: Goal, quality: float) -> float:
    """By which share the KL has to fall so that the measure reaches what is asked."""
    assert goal.quality is not None
    if goal.measure in judge.CHOICES:
        return ((1 - goal.quality) / max(1 - quality, 1e-9)) ** 2
    return math.log(goal.quality) / min(math.log(max(quality, 1e-9)), -1e-12)


def nearest(job: Job, best: Round) -> str:
    """The byte budgets that are predicted to keep a quality that was missed, in words; empty where none was,
    or where no format keeps it. Harms are taken to be off by as much as they were in this plan, but never to
    come to less than half of what is predicted: the smaller they get, the truer they are."""
    goal = job.goal
    if best.passed is not False or job.harm is None or not (goal.size or goal.memory):
        return ""
    harm, factor = aim(job, best, 0.5)
    said = enough_for(job, best.planning, harm / factor)
    return f"{said} would do, as predicted from what this plan came to" if said else ""


def best_of(job: Job, tried: Sequence[Round]) -> Round:
    """The smallest that passed, else the one of the best quality."""
    good = [t for t in tried if t.passed]
    if good and not job.limits(None).costs():
        return min(
            good, key=lambda t: (t.planning.plan.size, -judge.quality(t.gates, job.goal.measure))
        )
    return max(tried, key=lambda t: judge.quality(t.gates, job.goal.measure))
