"""Which format each place gets: the least harm within the budgets.

A place s (a site, the tables, the cache) takes one option c; options have a harm h and costs: bytes of the
file, bytes in memory, seconds of a step. Harms of places are taken to add up:

    minimize  sum_s h(s, c_s)   subject to   sum_s cost_k(s, c_s) <= budget_k    for every budget k

a multiple-choice knapsack. With one budget it is solved exactly by dynamic programming over the room above
the cheapest options, in steps of the greatest common divisor of all costs (or of room / STEPS where that is
finer, costs rounded up so that the budget holds). Further budgets are priced: with multipliers p_k >= 0

    D(p) = min_c sum_s [h(s, c_s) + sum_k p_k cost_k(s, c_s)] - sum_k p_k budget_k  <=  optimum

subgradient steps raise D; then the priced problem is solved exactly in the first budget, the others'
prices raised until all hold. `gap` is the harm found less the best D seen: how far from the optimum it can
be at most. The tables of the program give the Pareto front with no more work.

Pure arithmetic: no torch, no files. Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest

STEPS, ROUNDS, POINTS = 1 << 16, 200, 48
COSTS = ("size", "memory", "seconds")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """One candidate of a place: nats per token, bytes of the file, bytes in memory, seconds of a step."""

    format: str
    harm: float
    size: int = 0
    memory: int = 0
    seconds: float = 0.0

    def cost(self, name: str) -> float:
        return float(getattr(self, name))


@dataclass(frozen=True)
class Limits:
    """What the sums of all options may come to; None: no limit."""

    size: float | None = None
    memory: float | None = None
    seconds: float | None = None
    harm: float | None = None

    def costs(self) -> dict[str, float]:
        """name -> limit of the costs that are limited."""
        found = {name: getattr(self, name) for name in COSTS}
        return {name: float(limit) for name, limit in found.items() if limit is not None}


@dataclass(frozen=True)
class Plan:
    """An option for each place, their sums, and what is known of it."""

    picks: tuple[int, ...]
    harm: float
    size: int
    memory: int
    seconds: float
    gap: float = 0.0
    price: float = 0.0  # nats that one more unit of the first budget would take away
    priced: str = "size"

    def options(self, places: Sequence[Sequence[Option]]) -> list[Option]:
        return [options[pick] for options, pick in zip(places, self.picks, strict=True)]


class Infeasible(BadRequest):
    """No plan keeps the budgets; `name` is the one to relax, `least` what it would have to be."""

    def __init__(self, name: str, limit: float, least: float) -> None:
        self.name, self.limit, self.least = name, limit, least
        super().__init__(
            f"no plan keeps {name} within {limit:g}", f"the least possible is {least:g}"
        )


def solve(places: Sequence[Sequence[Option]], limits: Limits) -> Plan:
    """The plan of least harm; without a limit on costs, the smallest file that keeps the limit on harm.

    Raises Infeasible where the cheapest options are too dear.
    """
    costs = limits.costs()
    if not costs:
        if limits.harm is None:
            return summed(places, [_least(options, "harm") for options in places])
        return smallest(places, limits.harm)
    for name, limit in costs.items():
        least = sum(min(o.cost(name) for o in options) for options in places)
        if least > limit:
            raise Infeasible(name, limit, least)
    first, *others = sorted(costs, key=lambda name: _tightness(places, name, costs[name]))
    bound, prices = dual(places, costs)
    if not others:
        table = Table(places, first, costs[first], {})
        picks, price = table.trace(table.room), table.price(table.room)
        return _with(summed(places, picks), None if table.exact else bound, price, first)
    for _ in range(40):
        picks, price = knapsack(places, first, costs[first], prices)
        found = summed(places, picks)
        over = {n: getattr(found, n) / costs[n] for n in others if getattr(found, n) > costs[n]}
        if not over:
            return _with(found, bound, price, first)
        for name in over:
            scale = max(found.harm, 1e-9) / costs[name]
            prices[name] = max(prices.get(name, 0.0) * 1.5, 0.02 * scale)
    worst = max(others, key=lambda name: getattr(found, name) / costs[name])
    raise Infeasible(worst, costs[worst], getattr(found, worst))


def smallest(places: Sequence[Sequence[Option]], harm: float) -> Plan:
    """The plan of least size whose harms come to at most `harm`."""
    least = sum(min(o.harm for o in options) for options in places)
    if least > harm:
        raise Infeasible("harm", harm, least)
    most = sum(max(o.size for o in options) for options in places)
    table = Table(places, "size", float(most), {})
    fitting = np.flatnonzero(table.best <= harm + 1e-15)
    room = int(fitting[0]) if len(fitting) else table.room
    return _with(summed(places, table.trace(room)), None, table.price(room), "size")


def front(places: Sequence[Sequence[Option]], name: str = "size") -> list[Plan]:
    """Plans that nothing beats in both harm and a cost, dearest last; at most POINTS."""
    most = sum(max(o.cost(name) for o in options) for options in places)
    table = Table(places, name, most, {})
    drops = np.flatnonzero(np.diff(table.best, prepend=np.inf) < 0)
    if len(drops) > POINTS:
        wanted = np.linspace(0, table.room, POINTS)
        drops = np.unique(drops[np.searchsorted(drops, wanted, side="right").clip(1) - 1])
    return [summed(places, table.trace(int(room))) for room in drops]


def summed(places: Sequence[Sequence[Option]], picks: Sequence[int]) -> Plan:
    """The plan of these picks."""
    chosen = [options[pick] for options, pick in zip(places, picks, strict=True)]
    return Plan(
        tuple(picks), sum(o.harm for o in chosen), sum(o.size for o in chosen),
        sum(o.memory for o in chosen), sum(o.seconds for o in chosen),
    )  # fmt: skip


# One budget, exactly ------------------------------------------------------------------------------


class Table:
    """best[r]: the least harm of all places with r steps of room above the cheapest options."""

    def __init__(
        self, places: Sequence[Sequence[Option]], name: str, limit: float, prices: dict[str, float]
    ) -> None:
        self.lows = [min(o.cost(name) for o in options) for options in places]
        extra = [
            [o.cost(name) - low for o in options]
            for options, low in zip(places, self.lows, strict=True)
        ]
        room = limit - sum(self.lows)
        self.unit, self.exact = _unit([cost for row in extra for cost in row], room)
        self.room = min(int(room / self.unit + 1e-9),
                        sum(math.ceil(max(row) / self.unit - 1e-9) for row in extra))  # fmt: skip
        self.steps = [[math.ceil(cost / self.unit - 1e-9) for cost in row] for row in extra]
        best: Floats = np.zeros(self.room + 1)
        self.taken: list[NDArray[np.uint8]] = []
        for options, steps in zip(places, self.steps, strict=True):
            now = np.full(self.room + 1, np.inf)
            pick = np.zeros(self.room + 1, np.uint8)
            for i in _undominated(options, steps, prices):
                cost = steps[i]
                if cost > self.room:
                    continue
                harm = priced(options[i], prices)
                with_it = best[: self.room + 1 - cost] + harm
                better = with_it < now[cost:]
                np.copyto(now[cost:], with_it, where=better)
                np.copyto(pick[cost:], i, where=better)
            best = now
            self.taken.append(pick)
        self.best = best

    def trace(self, room: int) -> list[int]:
        """The picks of the best plan in so much room."""
        picks = []
        for pick, steps in zip(reversed(self.taken), reversed(self.steps), strict=True):
            picks.append(int(pick[room]))
            room -= steps[picks[-1]]
        return picks[::-1]

    def price(self, room: int) -> float:
        """What a unit of cost is worth around here, in nats."""
        reach = max(1, self.room // 50)
        low, high = max(0, room - reach), min(self.room, room + reach)
        fall = self.best[low] - self.best[high]
        return (
            float(fall / ((high - low) * self.unit)) if high > low and math.isfinite(fall) else 0.0
        )


def knapsack(
    places: Sequence[Sequence[Option]], name: str, limit: float, prices: dict[str, float]
) -> tuple[list[int], float]:
    """The picks of least priced harm within one limit, and what a unit of it is worth."""
    table = Table(places, name, limit, {k: p for k, p in prices.items() if k != name})
    return table.trace(table.room), table.price(table.room)


def priced(option: Option, prices: dict[str, float]) -> float:
    return option.harm + sum(price * option.cost(name) for name, price in prices.items())


def undominated(options: Sequence[Option], name: str = "size") -> list[int]:
    """Options, cheapest first, that cost more only where they harm less."""
    return _undominated(options, [o.cost(name) for o in options], {})


def _undominated(
    options: Sequence[Option], steps: Sequence[float], prices: dict[str, float]
) -> list[int]:
    order = sorted(range(len(options)), key=lambda i: (steps[i], priced(options[i], prices), i))
    kept, least = [], math.inf
    for i in order:
        if priced(options[i], prices) < least:
            kept.append(i)
            least = priced(options[i], prices)
    return kept


def _unit(costs: Sequence[float], room: float) -> tuple[float, bool]:
    """The step of a table and whether it is exact: where whole costs have a large divisor that is it, else
    it is a STEPS-th of the room."""
    if room <= 0:
        return 1.0, True
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs)) or 1
        if room / divisor <= 4 * STEPS:
            return float(divisor), True
    return max(room, 1e-12) / STEPS, False


# Several budgets ----------------------------------------------------------------------------------


def dual(
    places: Sequence[Sequence[Option]], costs: dict[str, float]
) -> tuple[float, dict[str, float]]:
    """The best lower bound on the harm that ROUNDS subgradient steps find, and its prices."""
    names = list(costs)
    width = max(map(len, places))
    harm = np.full((len(places), width), np.inf)
    cost = np.zeros((len(names), len(places), width))
    for s, options in enumerate(places):
        for c, option in enumerate(options):
            harm[s, c] = option.harm
            cost[:, s, c] = [option.cost(name) / max(costs[name], 1e-30) for name in names]
    prices, rows = np.zeros(len(names)), np.arange(len(places))
    spread = float(np.where(np.isfinite(harm), harm, 0.0).max(1).sum())
    best, kept = 0.0, prices.copy()
    step = max(spread, 1e-12)
    for number in range(ROUNDS):
        with_prices = harm + np.tensordot(prices, cost, 1)
        pick = with_prices.argmin(1)
        value = float(with_prices[rows, pick].sum() - prices.sum())
        if value > best:
            best, kept = value, prices.copy()
        over = cost[:, rows, pick].sum(1) - 1.0
        norm = float(np.square(over).sum())
        if norm == 0 or (np.all(over <= 0) and not prices.any()):
            break
        prices = np.maximum(0.0, prices + step / math.sqrt(norm) / (1 + number) * over)
    return best, {n: float(p / max(costs[n], 1e-30)) for n, p in zip(names, kept, strict=True)}


def _with(plan: Plan, bound: float | None, price: float, name: str) -> Plan:
    gap = 0.0 if bound is None else max(0.0, plan.harm - bound)
    return Plan(plan.picks, plan.harm, plan.size, plan.memory, plan.seconds, gap, price, name)


def _tightness(places: Sequence[Sequence[Option]], name: str, limit: float) -> float:
    """How little room a limit leaves, as a share of what the dearest options would take."""
    low, high = (sum(f(o.cost(name) for o in options) for options in places) for f in (min, max))
    return (limit - low) / (high - low) if high > low else math.inf


def _least(options: Sequence[Option], name: str) -> int:
    key: Callable[[int], tuple[float, float]] = lambda i: (options[i].harm, options[i].size)  # noqa: E731
    return min(range(len(options)), key=key)


# Why ----------------------------------------------------------------------------------------------


def reason(options: Sequence[Option], pick: int, price: float, name: str = "size") -> str:
    """Why a place got what it got: the step down, the step up, and what a byte is worth elsewhere."""
    chosen = options[pick]
    kept = [options[i] for i in undominated(options, name)]
    down = [o for o in kept if o.cost(name) < chosen.cost(name)]
    up = [o for o in kept if o.cost(name) > chosen.cost(name)]
    said = [f"{chosen.format} harms {chosen.harm:.2g} nat"]
    if down:
        less = down[-1]
        said.append(f"{less.format} would save {_cost(chosen, less, name)} for "
                    f"{less.harm - chosen.harm:.2g} nat more")  # fmt: skip
    if up:
        more = up[0]
        said.append(f"{more.format} would take off {chosen.harm - more.harm:.2g} nat for "
                    f"{_cost(more, chosen, name)}")  # fmt: skip
    if price and name != "seconds":
        said.append(f"elsewhere a KiB buys {price * 1024:.2g} nat")
    return "; ".join(said)


def _cost(dear: Option, cheap: Option, name: str) -> str:
    difference = dear.cost(name) - cheap.cost(name)
    return f"{difference * 1e6:.3g} us" if name == "seconds" else f"{difference / 1024:.4g} KiB"
