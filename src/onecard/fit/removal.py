"""Plans that may leave whole blocks out: the planner's problem with groups of places (planner.py).

What the last place costs, the cache, falls with every group that goes, by how much depends on its option.
Where that matters the problem is solved for every option of it, least bound first, as long as one can be
better than what was found; else what groups save is one more place of theirs.

Where costs have a common divisor, one budget is solved exactly. Else tables with groups are coarse, as
their room is the whole and not what is above the cheapest options: what they leave out is taken as given and
planned again without groups. `gap` stays the harm found less the best bound.

Harms of single groups are added up like others. Of several they are only a first guess: whoever takes such a
plan has to measure it (around.py, sensitivity.left_out).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onecard.fit import planner
from onecard.fit.planner import (
    NOTHING,
    REPRICED,
    Group,
    Infeasible,
    Limits,
    Option,
    Plan,
    Table,
    dual,
    summed,
)


def solve(
    places: Sequence[Sequence[Option]], limits: Limits, groups: Sequence[Group] = ()
) -> Plan:  # fmt: skip
    """The plan of least harm; without a limit on costs, the smallest file that keeps the limit on harm.

    Raises Infeasible where the cheapest options are too dear, whatever is left out.
    """
    costs = limits.costs()
    if groups and costs:
        return _solve_groups(places, costs, groups)
    if groups and limits.harm is not None:
        return smallest(places, limits.harm, groups)
    return planner.solve(places, limits)


def smallest(
    places: Sequence[Sequence[Option]], harm: float, groups: Sequence[Group] = ()
) -> Plan:  # fmt: skip
    """The plan of least size whose harms come to at most `harm`."""
    if not groups:
        return planner.smallest(places, harm)
    least = sum(min(o.harm for o in options) for options in places)
    if least > harm:
        raise Infeasible("harm", harm, least)
    most = sum(max(o.size for o in options) for options in places)
    found = []
    for case in _cases(places, groups, ["size"]):
        table = Table(case.places, "size", float(most), {}, case.groups)
        room = table.first(harm)
        plan = summed(places, case.picks(table.trace(room)), groups)
        found.append(replace(plan, price=table.price(room), priced="size"))
    return min(found, key=lambda plan: (plan.harm > harm + 1e-15, plan.size, plan.harm))


def front(
    places: Sequence[Sequence[Option]], name: str = "size", groups: Sequence[Group] = ()
) -> list[Plan]:
    """Plans that nothing beats in both harm and a cost, dearest last."""
    if not groups:
        return planner.front(places, name)
    most = sum(max(o.cost(name) for o in options) for options in places)
    found: list[Plan] = []
    for case in _cases(places, groups, [name]):
        table = Table(case.places, name, float(most), {}, case.groups)
        found += [
            summed(places, case.picks(table.trace(room)), groups) for room in table.drops()
        ]  # fmt: skip
    found.sort(key=lambda plan: (getattr(plan, name), plan.harm))
    harms = np.minimum.accumulate([plan.harm for plan in found])
    return [p for i, p in enumerate(found) if not i or p.harm < harms[i - 1]]


def least_cost(
    places: Sequence[Sequence[Option]], name: str, groups: Sequence[Group] = ()
) -> float:  # fmt: skip
    """The least that any plan costs: of the groups only the cheapest is left."""
    if not groups:
        return planner.least_cost(places, name)
    return min(_least_of(case, name) for case in _cases(places, groups, [name]))


@dataclass(frozen=True)
class Case:
    """A problem in which what groups save is a place of their own; `last`: the option the last place has."""

    places: list[Sequence[Option]]
    groups: list[Group]
    count: int
    last: int | None = None

    def picks(self, found: Sequence[int | None]) -> list[int | None]:
        """Picks of the places that the case was made from."""
        mine = list(found[: self.count])
        return mine if self.last is None else [*mine[:-1], self.last]


def _cases(
    places: Sequence[Sequence[Option]], groups: Sequence[Group], names: Sequence[str]
) -> Iterator[Case]:
    """One case; or one per option of the last place, where the costs that count differ in what is saved."""
    if not any(group.saves for group in groups):
        yield Case(list(places), list(groups), len(places))
        return
    differ = any(len({o.cost(n) for o in group.saves}) > 1 for group in groups for n in names)
    for last in range(len(places[-1])) if differ else (None,):
        at = range(len(places[-1])) if last is None else (last,)
        rest = [
            replace(o, size=o.size - sum(g.saves[i].size for g in groups if g.saves),
                    memory=o.memory - sum(g.saves[i].memory for g in groups if g.saves),
                    seconds=o.seconds - sum(g.saves[i].seconds for g in groups if g.saves))
            for i, o in ((i, places[-1][i]) for i in at)
        ]  # fmt: skip
        more: list[Sequence[Option]] = []
        own: list[Group] = []
        for group in groups:
            members = group.members
            if group.saves:
                members = (*members, len(places) + len(more))
                more.append([replace(group.saves[last or 0], harm=0.0)])
            own.append(Group(group.name, members, group.harm))
        yield Case([*places[:-1], rest, *more], own, len(places), last)


def _solve_groups(
    places: Sequence[Sequence[Option]], costs: dict[str, float], groups: Sequence[Group]
) -> Plan:
    """`solve` with groups: the cases by their bounds, as long as one can be better than what was found."""
    for name, limit in costs.items():
        least = least_cost(places, name, groups)
        if least > limit:
            raise Infeasible(name, limit, least)
    cases = list(_cases(places, groups, list(costs)))
    bounds = [dual(case.places, costs, case.groups) for case in cases]
    best, exact, error = None, len(costs) == 1, None
    for (bound, prices), case in sorted(zip(bounds, cases, strict=True), key=lambda c: c[0][0]):
        if best is not None and best.harm <= bound:
            break
        try:
            found, truly = _solve_case(places, groups, case, costs, prices)
        except Infeasible as now:
            error = error or now
            continue
        exact = exact and truly
        if best is None or found.harm < best.harm:
            best = found
    if best is None:
        assert error is not None
        raise error
    try:
        kept = planner.solve(places, Limits(**costs))
        best = kept if kept.harm <= best.harm else best
    except Infeasible:
        pass
    low = best.harm if exact else min(bound for bound, _ in bounds)
    return replace(best, gap=max(0.0, best.harm - low))


def _solve_case(
    places: Sequence[Sequence[Option]], groups: Sequence[Group], case: Case,
    costs: dict[str, float], prices: dict[str, float],
) -> tuple[Plan, bool]:  # fmt: skip
    """The best plan found of a case, and whether it is the best there is.

    Tables with groups are coarse where costs have no common divisor, as their room is the whole and not what
    is above the cheapest: what they leave out is taken as given, and planned again without groups.
    """
    first, *others = sorted(
        costs, key=lambda name: (costs[name] - _least_of(case, name)) / max(costs[name], 1e-30)
    )
    prices, exact, found = dict(prices), False, None
    for _ in range(REPRICED if others else 1):
        own = {k: p for k, p in prices.items() if k in others}
        table = Table(case.places, first, costs[first], own, case.groups)
        if not math.isfinite(table.best[table.room]):
            break
        found = summed(places, case.picks(table.trace(table.room)), groups)
        price, exact = table.price(table.room), table.exact and not others
        over = {n: getattr(found, n) / costs[n] for n in others if getattr(found, n) > costs[n]}
        if not over:
            break
        for name in over:
            scale = max(found.harm, 1e-9) / costs[name]
            prices[name] = max(prices.get(name, 0.0) * 1.5, 0.02 * scale)
        found = None
    if found is None:
        found, price = summed(places, case.picks(_barest(case, costs)), groups), 0.0
        worst = max(costs, key=lambda name: getattr(found, name) / costs[name])
        if getattr(found, worst) > costs[worst]:
            raise Infeasible(worst, costs[worst], getattr(found, worst))
    found = replace(found, price=price, priced=first)
    if not exact and found.gone:
        try:
            again = with_out(places, Limits(**costs), groups, found.gone)
            found = again if again.harm < found.harm else found
        except Infeasible:
            pass
    return found, exact


def with_out(
    places: Sequence[Sequence[Option]], limits: Limits, groups: Sequence[Group],
    gone: Collection[str],
) -> Plan:  # fmt: skip
    """The plan that leaves out just these groups. Raises Infeasible."""
    left = without(places, groups, gone)
    plan = planner.solve(left, limits)
    return from_without(places, groups, gone, plan)


def without(
    places: Sequence[Sequence[Option]], groups: Sequence[Group], gone: Collection[str]
) -> list[Sequence[Option]]:
    """The places, where those of the groups that are gone have one option of no cost; the harm is with the
    first of them, and what is saved besides is taken off the last place."""
    left = list(places)
    for group in groups:
        if group.name not in gone:
            continue
        for number, member in enumerate(group.members):
            left[member] = [replace(NOTHING, harm=0.0 if number else group.harm)]
        if group.saves:
            left[-1] = [
                replace(o, size=o.size - less.size, memory=o.memory - less.memory,
                        seconds=o.seconds - less.seconds)
                for o, less in zip(left[-1], group.saves, strict=True)
            ]  # fmt: skip
    return left


def from_without(
    places: Sequence[Sequence[Option]], groups: Sequence[Group], gone: Collection[str], plan: Plan
) -> Plan:
    """A plan of the places that `without` gave, as one of all places."""
    out = {member for group in groups if group.name in gone for member in group.members}
    picks = [None if i in out else pick for i, pick in enumerate(plan.picks)]
    found = summed(places, picks, groups)
    return replace(found, gap=plan.gap, price=plan.price, priced=plan.priced)


def _kept(case: Case, name: str) -> tuple[float, list[float]]:
    """The least that the places outside the groups cost, and that each group costs when it is kept."""
    lows = [min(o.cost(name) for o in options) for options in case.places]
    kept = [max(0.0, sum(lows[m] for m in group.members)) for group in case.groups]
    inside = {m for group in case.groups for m in group.members}
    return sum(low for i, low in enumerate(lows) if i not in inside), kept


def _least_of(case: Case, name: str) -> float:
    free, kept = _kept(case, name)
    return free + min(kept)


def _barest(case: Case, costs: dict[str, float]) -> list[int | None]:
    """The picks that cost least, all costs as shares of their limits: of the groups only the cheapest."""
    share = [[sum(o.cost(n) / max(limit, 1e-30) for n, limit in costs.items()) for o in options]
             for options in case.places]  # fmt: skip
    picks: list[int | None] = [min(range(len(row)), key=row.__getitem__) for row in share]
    stays = min(case.groups, key=lambda group: sum(min(share[m]) for m in group.members))
    for group in case.groups:
        if group is not stays:
            for member in group.members:
                picks[member] = None
    return picks
