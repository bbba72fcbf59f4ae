"""A second look at a plan: harms measured around it, where everything else is compressed too.

Harms of places that are disturbed alone do not quite add up: behind a block in two bits another one in two
bits does less, or more. So for a model that fits into memory the plan is put together, and each place is
moved, one at a time, to its neighbours among the options that nothing beats; what that does to the KL of the
whole,

    delta(s, c) = KL(original || plan with s at c) - KL(original || plan)

takes the place of the harms, the knapsack is solved again over these neighbours alone, and what it gives is
put together and measured. It is kept only where it is better; where it is not, moves are made dearer by a
toll until few enough remain that they do what they promise.

Blocks that are left out do not add up at all: behind one that is gone another is needed more. So which ones
go is decided by measuring (`lighter`): of the blocks that the planner would leave out each is put back in
turn, others are left out besides, the rest is planned anew, and the best of these steps is taken while the KL
falls.

A `Bank` makes the matrices: the statistics of every site are collected once, on the original, and a site's
candidate is solved for when it is first asked for. Memory: the model in float32 twice, a Hessian per site,
the candidates that were asked for, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from onecard.calibrate.stats import HESSIAN, Statistics
from onecard.calibrate.walk import Progress, Reached, batches, walk, weight_count
from onecard.checkpoint.load import load_model
from onecard.checkpoint.source import Source
from onecard.core.format import parse_format
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes, sites
from onecard.fit import removal
from onecard.fit.planner import (
    GONE,
    Group,
    Infeasible,
    Limits,
    Option,
    Plan,
    solve,
    summed,
    undominated,
)
from onecard.kernels.reference import from_dense
from onecard.nn.layers import Linear
from onecard.nn.transformer import Block, positions_of
from onecard.passes.judge import Judge
from onecard.passes.planned import carry_out

REACH = 2
"""Neighbours that are tried, each way."""
MEASURED, OTHERS = 24, 3
"""Plans with blocks left out that are measured at most; blocks that each step leaves out besides."""
TOLLS = (0.0, 0.05, 0.2, 0.8)
"""What a move has to be worth, in shares of the mean gain of all moves that promise any."""


def bank_bytes(spec: Spec) -> int:
    """What a Bank holds, the candidates of a search among them."""
    weights = sum(weight_count(spec, layer) for layer in spec.layers)
    squares = 0
    for layer in spec.layers:
        shapes = linear_shapes(spec, layer)
        squares += sum(shapes[site.linears[0]][1] ** 2 for site in sites(layer))
    return 8 * weights + 4 * squares + 2 * weights * (2 * REACH + 2)


class Bank:
    """A model in memory, each of its sites in whatever format is asked for."""

    def __init__(self, source: Source, ids: Tensor, tried: Tensor) -> None:
        self.model = load_model(source.folder, "fp32", tokenizer=False)
        self.spec, self.stored, self.tried = source.spec, source.dtype, tried
        self.blocks = list(self.model.blocks())
        self.there = list(range(len(self.blocks)))
        self.stats: dict[str, Statistics] = {}
        self.made: dict[tuple[str, str], dict[str, Tensor]] = {}
        self.original = {path: linear.matrix() for path, linear in self.model.linears()}
        with torch.no_grad():
            stem = self.model.network.stem
            hidden = [stem(b, positions_of(b, None, 0)) for b in batches(ids)]
        walk(_Blocks(self), (_Collect(self),), hidden)
        self.answers = Judge(self.model, tried).answers

    def linears(self, where: str) -> dict[str, Linear]:
        """path in the block -> linear of a site `blocks.3.attention.in`."""
        index, name = _parts(where)
        block = self.blocks[index]
        site = next(s for s in sites(block.layer) if s.name == name)
        return {path: block.linear(path) for path in site.linears}

    def matrices(self, where: str, format: str) -> dict[str, Tensor]:
        """path -> what a site's matrices become in a format, each site solved for by itself."""
        if (where, format) not in self.made:
            linears, block = self.linears(where), where.split(".")[1]
            held = {path: linear.held() for path, linear in linears.items()}
            for path, linear in linears.items():
                linear.replace(from_dense(self.original[f"blocks.{block}.{path}"]))
            site = Reached(
                f"blocks.{block}", _parts(where)[1], linears, self.stats[where], self.stored
            )
            for _ in carry_out(site, parse_format(format)):
                pass
            self.made[where, format] = {
                path: m.matrix(torch.bfloat16) for path, m in linears.items()
            }
            for path, linear in linears.items():
                linear.replace(held[path])
        return self.made[where, format]

    def put(self, where: str, format: str) -> None:
        """Bring a site into a format."""
        if parse_format(format).dense:
            found = {
                p: self.original[f"blocks.{where.split('.')[1]}.{p}"] for p in self.linears(where)
            }
        else:
            found = self.matrices(where, format)
        for path, linear in self.linears(where).items():
            linear.replace(from_dense(found[path].float()))

    def leave_out(self, gone: Collection[str]) -> None:
        """The model has all blocks but these, `blocks.3`, from now on."""
        self.there = [i for i in range(len(self.blocks)) if f"blocks.{i}" not in gone]
        self.model.network.blocks = nn.ModuleList(self.blocks[i] for i in self.there)

    def judge(self) -> Judge:
        """Of the model as it is now, against the original's answers."""
        return Judge(self.model, self.tried, self.answers)

    @torch.no_grad()
    def kl(self, ids: Tensor | None = None, answers: Tensor | None = None) -> float:
        """KL(answers || what the model says now) per token; of the tried text where none is given."""
        if ids is None or answers is None:
            ids, answers = self.tried, self.answers
        total = 0.0
        for row, said in zip(ids.split(1), answers.split(1), strict=True):
            now = torch.log_softmax(self.model.network(row).float(), -1)
            total += float((said.exp() * (said - now)).sum(-1).mean()) / len(ids)
        return total


class _Blocks:
    """The walk's source: the blocks of a bank, which keep what they are."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.spec, self.stored = bank, bank.spec, bank.stored

    def load(self, index: int) -> Block:
        return self.bank.blocks[index]

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        return None


@dataclass(frozen=True, eq=False)
class _Collect:
    """Keeps the statistics of every site."""

    bank: Bank
    needs: frozenset[str] = frozenset({HESSIAN})

    def site(self, site: Reached) -> Iterator[Row]:
        self.bank.stats[f"{site.block}.{site.name}"] = site.stats
        yield from ()

    def finish(self, whole: Any) -> Iterator[Row]:
        return iter(())


def _parts(where: str) -> tuple[int, str]:
    _, index, name = where.split(".", 2)
    return int(index), name


@dataclass(frozen=True)
class Found:
    """A plan, its KL on the text it was measured on (nats per token), and that of the plan begun with."""

    plan: Plan
    kl: float
    before: float
    rounds: int


def search(
    bank: Bank, places: Mapping[str, Sequence[Option]], limits: Limits, plan: Plan, rounds: int,
    progress: Progress = lambda done, total, what: None,
) -> Found:  # fmt: skip
    """The plan after at most `rounds` looks around; only sites move, tables and cache stay."""
    names = list(places)
    at = {
        where: option.format
        for where, option in zip(places, plan.options(list(places.values())), strict=True)
    }
    settle(bank, at)
    before = kl = bank.kl()
    done = 0
    for number in range(rounds):
        deltas = looked(bank, places, at, kl, progress)
        better = moved(bank, places, at, deltas, limits, kl)
        if better is None:
            break
        at, kl = better
        done = number + 1
    picks = [[o.format for o in places[where]].index(at[where]) for where in names]
    found = summed([places[where] for where in names], picks)
    found = replace(found, gap=plan.gap, price=plan.price, priced=plan.priced)
    return Found(found, kl, before, done)


def settle(bank: Bank, at: Mapping[str, str]) -> None:
    """Bring every site into its format; blocks whose sites are gone are left out."""
    sites = {where: format for where, format in at.items() if where.startswith("blocks.")}
    bank.leave_out({f"blocks.{_parts(where)[0]}" for where, f in sites.items() if f == GONE})
    for where, format in sites.items():
        if format != GONE:
            bank.put(where, format)


def lighter(
    bank: Bank, places: Mapping[str, Sequence[Option]], groups: Sequence[Group], limits: Limits,
    plan: Plan, rounds: int, progress: Progress = lambda done, total, what: None,
) -> Found:  # fmt: skip
    """The plan with blocks left out, begun with those that `plan` leaves out; its KL is measured.

    At every step each block that is gone is put back, and each of the OTHERS least harmful ones that are
    not is left out, the rest planned anew within the limits; the step of least KL is taken while it falls, at
    most MEASURED plans in all. Then its sites are looked around, `rounds` times.
    """
    options = list(places.values())
    by_harm = sorted(groups, key=lambda group: group.harm)
    seen: set[frozenset[str]] = set()

    def measured(found: Plan) -> tuple[float, Plan]:
        seen.add(frozenset(found.gone))
        progress(len(seen), MEASURED, "measuring with blocks left out")
        formats = [option.format for option in found.options(options)]
        settle(bank, dict(zip(places, formats, strict=True)))
        return bank.kl(), found

    def tried(gone: frozenset[str]) -> tuple[float, Plan] | None:
        if gone in seen or len(seen) >= MEASURED or not 0 < len(gone) < len(groups):
            return None
        try:
            return measured(removal.with_out(options, limits, groups, gone))
        except Infeasible:
            return None

    best = measured(plan)
    before = best[0]
    while True:
        gone = frozenset(best[1].gone)
        others = [group.name for group in by_harm if group.name not in gone][:OTHERS]
        steps = [tried(gone ^ {name}) for name in (*sorted(gone), *others)]
        better = min((s for s in steps if s is not None), key=lambda s: s[0], default=None)
        if better is None or better[0] >= best[0]:
            break
        best = better
    left = dict(zip(places, removal.without(options, groups, best[1].gone), strict=True))
    inside = replace(best[1], picks=tuple(pick or 0 for pick in best[1].picks))
    found = search(bank, left, limits, inside, rounds, progress)
    whole = removal.from_without(options, groups, best[1].gone, found.plan)
    return Found(whole, found.kl, before, found.rounds)


def looked(
    bank: Bank,
    places: Mapping[str, Sequence[Option]],
    at: Mapping[str, str],
    kl: float,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """place -> neighbour -> what moving there does to the KL; the model is left as it was."""
    judge, deltas = bank.judge(), {}
    for number, (where, options) in enumerate(places.items()):
        progress(number, len(places), "looking around the plan")
        deltas[where] = {at[where]: 0.0}
        if not where.startswith("blocks.") or at[where] == GONE:
            continue
        index = bank.there.index(_parts(where)[0])
        for format in neighbours(options, at[where]):
            bank.put(where, format)
            deltas[where][format] = judge.moved(index) - kl
        bank.put(where, at[where])
    return deltas


def moved(
    bank: Bank, places: Mapping[str, Sequence[Option]], at: dict[str, str],
    deltas: Mapping[str, Mapping[str, float]], limits: Limits, kl: float,
) -> tuple[dict[str, str], float] | None:  # fmt: skip
    """The plan that the deltas make best, and its KL; None where none that was tried is better."""
    gains = [-d for found in deltas.values() for d in found.values() if d < 0]
    mean = sum(gains) / len(gains) if gains else kl / max(1, len(deltas))
    for toll in TOLLS:
        options = [
            [
                replace(o, harm=1.0 + deltas[where][o.format] + toll * mean * (o.format != at[where]))
                for o in place if o.format in deltas[where]
            ]
            for where, place in places.items()
        ]  # fmt: skip
        plan = solve(options, replace(limits, harm=None))
        new = {
            w: option.format for w, option in zip(places, plan.options(options), strict=True)
        }  # fmt: skip
        changed = [where for where in places if new[where] != at[where]]
        if not changed:
            return None
        for where in changed:
            bank.put(where, new[where])
        found = bank.kl()
        if found < kl:
            return new, found
        for where in changed:
            bank.put(where, at[where])
    return None


def neighbours(options: Sequence[Option], format: str) -> list[str]:
    """Up to REACH options each way among those that nothing beats in harm and bytes."""
    here = next(o for o in options if o.format == format)
    kept = [options[i] for i in undominated(options)]
    down = [o for o in kept if o.size < here.size and o.format != format][-REACH:]
    up = [o for o in kept if o.size >= here.size and o.format != format][:REACH]
    return [o.format for o in (*down, *up)]
