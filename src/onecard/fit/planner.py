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

A group g of places, a block, may be left out as a whole (removal.py): it costs nothing then, and harms by
h_g. In D its share is the lesser of h_g and of the sum of its places' minima. In the table its places are
entered in a row, on top of the least they cost, and what comes out is set beside the table from before plus
h_g: as exact as without groups where costs have a common divisor. One group at least stays.

Pure arithmetic: no torch, no files. Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest

STEPS, ROUNDS, REPRICED, POINTS = 1 << 16, 200, 40, 48
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
class Group:
    """Places that can be left out together, by their numbers: nothing is paid for them then, and the harm is
    this. `saves`: what goes with them besides, for each option of the last place. All disjoint."""

    name: str
    members: tuple[int, ...]
    harm: float
    saves: tuple[Option, ...] = ()


GONE = "gone"
NOTHING = Option(GONE, 0.0)
"""What a place has that is left out with its group, whose harm counts once."""


@dataclass(frozen=True)
class Plan:
    """An option for each place, their sums, and what is known of it. A pick of None: left out."""

    picks: tuple[int | None, ...]
    harm: float
    size: int
    memory: int
    seconds: float
    gap: float = 0.0
    price: float = 0.0  # nats that one more unit of the first budget would take away
    priced: str = "size"
    gone: tuple[str, ...] = ()  # groups that are left out

    def options(self, places: Sequence[Sequence[Option]]) -> list[Option]:
        return [
            NOTHING if pick is None else options[pick]
            for options, pick in zip(places, self.picks, strict=True)
        ]


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
        least = least_cost(places, name)
        if least > limit:
            raise Infeasible(name, limit, least)
    first, *others = sorted(costs, key=lambda name: _tightness(places, name, costs[name]))
    bound, prices = dual(places, costs)
    if not others:
        table = Table(places, first, costs[first], {})
        picks, price = table.trace(table.room), table.price(table.room)
        return _with(summed(places, picks), None if table.exact else bound, price, first)
    for _ in range(REPRICED):
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


def smallest(places: Sequence[Sequence[Option]], harm: float, name: str = "size") -> Plan:
    """The plan of least size, or of another cost, whose harms come to at most `harm`."""
    least = sum(min(o.harm for o in options) for options in places)
    if least > harm:
        raise Infeasible("harm", harm, least)
    most = sum(max(o.cost(name) for o in options) for options in places)
    table = Table(places, name, most, {})
    room = table.first(harm)
    return _with(summed(places, table.trace(room)), None, table.price(room), name)


def front(places: Sequence[Sequence[Option]], name: str = "size") -> list[Plan]:
    """Plans that nothing beats in both harm and a cost, dearest last; at most POINTS."""
    most = sum(max(o.cost(name) for o in options) for options in places)
    table = Table(places, name, most, {})
    return [summed(places, table.trace(room)) for room in table.drops()]


def summed(
    places: Sequence[Sequence[Option]], picks: Sequence[int | None], groups: Sequence[Group] = ()
) -> Plan:
    """The plan of these picks; what is left out takes with it what it `saves`."""
    gone = [group for group in groups if picks[group.members[0]] is None]
    chosen = [
        options[pick] for options, pick in zip(places, picks, strict=True) if pick is not None
    ]
    last = picks[-1]
    less = [group.saves[last] for group in gone if group.saves and last is not None]
    return Plan(
        tuple(picks), sum(o.harm for o in chosen) + sum(group.harm for group in gone),
        sum(o.size for o in chosen) - sum(o.size for o in less),
        sum(o.memory for o in chosen) - sum(o.memory for o in less),
        sum(o.seconds for o in chosen) - sum(o.seconds for o in less),
        gone=tuple(group.name for group in gone),
    )  # fmt: skip


def least_cost(places: Sequence[Sequence[Option]], name: str) -> float:
    """The least that any plan costs."""
    return sum(min(o.cost(name) for o in options) for options in places)


# One budget, exactly ------------------------------------------------------------------------------


class Table:
    """best[r]: the least harm of all places with r steps of room above the cheapest options; with groups,
    above none of these and the cheapest options of the others."""

    def __init__(
        self, places: Sequence[Sequence[Option]], name: str, limit: float, prices: dict[str, float],
        groups: Sequence[Group] = (),
    ) -> None:  # fmt: skip
        self.places, self.prices, self.groups = places, prices, groups
        lows = [min(o.cost(name) for o in options) for options in places]
        extra = [
            [o.cost(name) - low for o in options]
            for options, low in zip(places, lows, strict=True)
        ]  # fmt: skip
        kept = [max(0.0, sum(lows[m] for m in group.members)) for group in groups]
        inside = {m for group in groups for m in group.members}
        self.free = [i for i in range(len(places)) if i not in inside]
        room = limit - sum(lows[i] for i in self.free)
        wanted = [*(cost for row in extra for cost in row), *kept]
        self.unit, self.exact = _unit(wanted, room, STEPS // 4 if groups else STEPS)
        self.steps = [[math.ceil(cost / self.unit - 1e-9) for cost in row] for row in extra]
        self.kept = [math.ceil(cost / self.unit - 1e-9) for cost in kept]
        self.room = min(int(room / self.unit + 1e-9), sum(map(max, self.steps)) + sum(self.kept))
        self.taken: dict[int, NDArray[np.uint8]] = {}
        self.out: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]] = []
        best: Floats = np.zeros(self.room + 1)
        if groups:
            best = self._grouped()
        for place in self.free:
            best = self._entered(best, place)
        self.best = best

    def _grouped(self) -> Floats:
        """The groups, one behind the other; `bare`: the harm where all so far are left out."""
        best: Floats = np.full(self.room + 1, np.inf)
        bare = 0.0
        for group, cost in zip(self.groups, self.kept, strict=True):
            alone = bare <= best
            stays = np.full(self.room + 1, np.inf)
            if cost <= self.room:
                stays[cost:] = np.minimum(best, bare)[: self.room + 1 - cost]
            for member in group.members:
                stays = self._entered(stays, member)
            best = best + group.harm
            gone = best < stays
            self.out.append((gone, alone))
            best = np.where(gone, best, stays)
            bare += group.harm
        return best

    def _entered(self, best: Floats, place: int) -> Floats:
        """The table with one more place."""
        options, steps = self.places[place], self.steps[place]
        now = np.full(self.room + 1, np.inf)
        pick = np.zeros(self.room + 1, np.uint8)
        for i in _undominated(options, steps, self.prices):
            cost = steps[i]
            if cost > self.room:
                continue
            with_it = best[: self.room + 1 - cost] + priced(options[i], self.prices)
            better = with_it < now[cost:]
            np.copyto(now[cost:], with_it, where=better)
            np.copyto(pick[cost:], i, where=better)
        self.taken[place] = pick
        return now

    def trace(self, room: int) -> list[int | None]:
        """The picks of the best plan in so much room."""
        picks: list[int | None] = [None] * len(self.places)

        def take(place: int) -> int:
            pick = int(self.taken[place][room])
            picks[place] = pick
            return self.steps[place][pick]

        for place in reversed(self.free):
            room -= take(place)
        for number in reversed(range(len(self.groups))):
            gone, alone = self.out[number]
            if gone[room]:
                continue
            for member in reversed(self.groups[number].members):
                room -= take(member)
            room -= self.kept[number]
            if alone[room]:
                break
        return picks

    def first(self, harm: float) -> int:
        """The least room in which a harm is not exceeded; all of it where there is none."""
        fitting = np.flatnonzero(self.best <= harm + 1e-15)
        return int(fitting[0]) if len(fitting) else self.room

    def drops(self) -> list[int]:
        """Rooms at which the harm falls; at most POINTS."""
        before = np.concatenate(([np.inf], self.best[:-1]))
        drops = np.flatnonzero(self.best < before)
        if len(drops) > POINTS:
            wanted = np.linspace(drops[0], self.room, POINTS)
            drops = np.unique(drops[np.searchsorted(drops, wanted, side="right").clip(1) - 1])
        return [int(room) for room in drops]

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
) -> tuple[list[int | None], float]:
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


def _unit(costs: Sequence[float], room: float, steps: int) -> tuple[float, bool]:
    """The step of a table and whether it is exact: where whole costs have a large divisor that is it, else
    it is one of `steps` in the room."""
    if room <= 0:
        return 1.0, True
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs)) or 1
        if room / divisor <= 4 * steps:
            return float(divisor), True
    return max(room, 1e-12) / steps, False


# Several budgets ----------------------------------------------------------------------------------


def dual(
    places: Sequence[Sequence[Option]], costs: dict[str, float], groups: Sequence[Group] = ()
) -> tuple[float, dict[str, float]]:
    """The best lower bound on the harm that ROUNDS subgradient steps find, and its prices."""
    names = list(costs)
    scale = {name: max(abs(limit), 1e-30) for name, limit in costs.items()}
    limits = np.array([costs[name] / scale[name] for name in names])
    width = max(map(len, places))
    harm = np.full((len(places), width), np.inf)
    cost = np.zeros((len(names), len(places), width))
    for s, options in enumerate(places):
        for c, option in enumerate(options):
            harm[s, c] = option.harm
            cost[:, s, c] = [option.cost(name) / scale[name] for name in names]
    prices, rows = np.zeros(len(names)), np.arange(len(places))
    inside = np.zeros((len(groups), len(places)))
    for g, group in enumerate(groups):
        inside[g, list(group.members)] = 1.0
    out = np.array([group.harm for group in groups])
    spread = float(np.where(np.isfinite(harm), harm, 0.0).max(1).sum())
    best, kept = 0.0, prices.copy()
    step = max(spread, 1e-12)
    for number in range(ROUNDS):
        with_prices = harm + np.tensordot(prices, cost, 1)
        pick = with_prices.argmin(1)
        least = with_prices[rows, pick]
        gone = inside @ least > out
        stays = 1.0 - gone @ inside
        value = float(least @ stays + out[gone].sum() - prices @ limits)
        if value > best:
            best, kept = value, prices.copy()
        over = cost[:, rows, pick] @ stays - limits
        norm = float(np.square(over).sum())
        if norm == 0 or (np.all(over <= 0) and not prices.any()):
            break
        prices = np.maximum(0.0, prices + step / math.sqrt(norm) / (1 + number) * over)
    return best, {n: float(p / scale[n]) for n, p in zip(names, kept, strict=True)}


def _with(plan: Plan, bound: float | None, price: float, name: str) -> Plan:
    gap = 0.0 if bound is None else max(0.0, plan.harm - bound)
    return replace(plan, gap=gap, price=price, priced=name)


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
