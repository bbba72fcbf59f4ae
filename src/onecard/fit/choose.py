"""From sensitivities to a plan, and from a plan to a recipe.

plan_for        the least harm within the budgets (planner.py); whole blocks go only where nothing else fits
looked_around   the same from close by (around.py), where the model fits into memory; whole blocks go where
                that was measured to be better
together        where nothing can be measured around a plan that leaves blocks out: sets of them, streamed
recipe_for      the plan as passes of an ordinary journaled job (passes/layers.py, passes/planned.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from onecard.calibrate.train import Training
from onecard.calibrate.walk import Progress
from onecard.core.device import available_memory
from onecard.core.errors import BadRequest
from onecard.core.format import Integers, parse_format
from onecard.core.report import write_text
from onecard.core.spec import parameter_count
from onecard.fit import gates as judge
from onecard.fit import planner, removal
from onecard.fit.around import Bank, bank_bytes, lighter, search
from onecard.fit.candidates import LARGE
from onecard.fit.costs import Costs
from onecard.fit.goal import MOST
from onecard.fit.job import SUMS_UP, Job, Quiet, explained, roomy
from onecard.fit.planner import GONE, Group, Infeasible, Limits, Option, Plan, summed
from onecard.fit.sensitivity import Sensitivity, left_out
from onecard.passes.base import Pass, Recipe
from onecard.passes.distill import Distil
from onecard.passes.layers import DropLayers
from onecard.passes.planned import Chosen, Planned
from onecard.passes.tables import Tables
from onecard.runtime import cpu as engine

POSITIONS = engine.MOST["context"]
WRECK = 0.05
"""A plan that leaves blocks out and keeps less of the likelihood than this has to be asked for."""
TOLLS = (0.0, 0.5, 1.0, 2.0, 4.0, 64.0)
"""What leaving a block out costs more than it was measured to, in mean harms of a block."""


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


def require_sense(job: Job, planning: Planning) -> Planning:
    """The plan itself. BadRequest where it keeps its budgets only by leaving out so many blocks that nothing
    is left of the model, and nobody said by --quality that this is enough."""
    goal, gone = job.goal, len(planning.plan.gone)
    kept = judge.share_of(planning.harm, "likelihood")
    if goal.quality is not None or not gone or kept >= WRECK:
        return planning
    said = f"{gone} of {job.source.spec.num_layers} blocks left out would keep the budgets"
    raise BadRequest(
        f"{said}, and about {kept:.1%} of the likelihood", "that is no model any more",
        "more room or a lower --speed, or --quality 0.01 to have it all the same",
    )  # fmt: skip


def short_of(job: Job, planning: Planning) -> str:
    """That a plan is predicted to miss the quality asked for, and which budgets would do; empty where it is
    not. It may still turn out to keep it: predictions are not that certain."""
    goal, kept = job.goal, judge.share_of(planning.harm, job.goal.measure)
    if goal.quality is None or job.harm is None or kept >= goal.quality:
        return ""
    enough = enough_for(job, planning, job.harm / planning.factor)
    return (
        f"the plan is predicted to keep {kept:.4f} of the {goal.measure}, --quality asks for {goal.quality:g}"
        + (f"; {enough} is predicted to do" if enough else "")
    )


def enough_for(job: Job, planning: Planning, harm: float) -> str:
    """The budgets of bytes, as flags, that a harm of the options is predicted to take; empty where there
    were none, or where no format is so good."""
    options, needs = list(planning.places.values()), dict[str, float]()
    try:
        for name in ("size", "memory"):
            if getattr(job.goal, name):
                plan = planner.smallest(options, harm, name)
                needs[name] = getattr(plan, name) + getattr(job.fixed, name)
    except Infeasible:
        return ""
    short = {n: need for n, need in needs.items() if need > getattr(job.goal, n)} or needs
    return " and ".join(f"--{name} {roomy(need)}" for name, need in short.items())


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
        format = parse_format(table)
        assert isinstance(format, Integers)
        passes.append(Tables(format.bits, format.group))
    if minutes:
        length = min(256, job.ids.shape[1])
        passes.append(Distil(training=Training(minutes=minutes, batch=4, length=length, rate=3e-4)))
    return Recipe("fit", tuple(passes), "planned for budgets")


def renumbered(where: str, gone: Sequence[int]) -> str:
    """A site, by the number of its block among those that stay."""
    _, index, name = where.split(".", 2)
    return f"blocks.{int(index) - sum(g < int(index) for g in gone)}.{name}"


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
    offered = min(MOST, POSITIONS // job.costs.context)
    low, high = goal.batch, offered + 1  # the one fits, the other does not or is not offered
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rest + needed(middle) <= most else (low, middle)
    return low


def remembered(job: Job, planning: Planning) -> Planning:
    """The picks of the first plan, kept for a second run."""
    plan = planning.plan
    data = {"picks": plan.picks, "harm": plan.harm, "looked": planning.looked,
            "options": _named(planning)}  # fmt: skip
    write_text(job.work / "plan.json", json.dumps(data))
    return planning


def recalled(job: Job, planning: Planning) -> Planning | None:
    """The first plan of an interrupted run; None where there was none, or where there are other options now,
    as of tables that have no room in memory any more."""
    data, old = judge.noted(job.work / "plan.json"), planning.plan
    options = list(planning.places.values())
    if not isinstance(data, dict) or data.get("options") != _named(planning):
        return None
    plan = summed(options, data["picks"], planning.groups)
    plan = replace(plan, harm=data["harm"], gap=old.gap, price=old.price, priced=old.priced)
    return replace(planning, plan=plan, looked=tuple(data["looked"]) if data["looked"] else None)


def _named(planning: Planning) -> list[list[str]]:
    """The formats that every place could have."""
    return [[option.format for option in options] for options in planning.places.values()]
