"""Fitting a model to budgets: plans are optimal, harms are measured, budgets hold, kills change nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import call, make_llama
from test_render import Page
from test_walk import SETTINGS, ids_of, same

import onecard
from onecard.calibrate.data import Calibration, calibration_ids
from onecard.checkpoint.journal import Journal
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.shards import Checkpoint
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import parse_format
from onecard.core.report import Report, Row
from onecard.core.spec import sites
from onecard.fit import (
    candidates,
    choose,
    gates,
    mend,
    planner,
    removal,
    sensitivity,
    story,
    timing,
)
from onecard.fit import fit as fits
from onecard.fit import job as jobs
from onecard.fit.around import Bank, lighter, neighbours, search
from onecard.fit.candidates import TRIALS, Trial, possible, size_of
from onecard.fit.costs import Costs, program_bytes
from onecard.fit.goal import Goal, goal_of
from onecard.fit.planner import Group, Infeasible, Limits, Option, front, solve, summed
from onecard.fit.result import FitResult, Gate, Promise, read_fit
from onecard.fit.sensitivity import between, left_out, look, shapes_of
from onecard.kernels import cpu
from onecard.kernels.reference import from_dense
from onecard.passes.base import Recipe
from onecard.passes.job import compress, file_bytes, prepare
from onecard.passes.judge import Judge
from onecard.passes.layers import DropLayers
from onecard.passes.plan import Settings
from onecard.passes.planned import Chosen, Planned, carry_out
from onecard.passes.walked import apply
from onecard.render import fit_report, fit_to_html
from onecard.runtime.cpu import CpuSettings, usual_cache
from onecard.runtime.engine import complete
from onecard.runtime.footprint import footprint
from onecard.runtime.sample import Sampling

FORMATS = ("int2-g32-zp", "int3-g32", "int4-g64", "int6-g128", "codebook2")
SMALL = Trial(1024, 64, 128, (2.2, 4.3), 0, "gptq", FORMATS, 1, 1.5)


def drawn(seed: int, count: int = 6, width: int = 4) -> list[list[Option]]:
    """Places with random options, dearer ones less harmful."""
    draw = random.Random(seed)
    return [
        [
            Option(str(i), draw.random() / (i + 1), 8 * draw.randint(1, 20) * (i + 1),
                   draw.randint(1, 30) * (i + 1), draw.random() * (i + 1))
            for i in range(width)
        ]
        for _ in range(count)
    ]  # fmt: skip


def least(places: list[list[Option]], **limits: float) -> float | None:
    """The least harm of all combinations within limits; None where there is none."""
    plans = (summed(places, picks) for picks in itertools.product(*(range(len(p)) for p in places)))
    return min(
        (p.harm for p in plans if all(getattr(p, n) <= v for n, v in limits.items())), default=None
    )


def between_ends(places: list[list[Option]], name: str, share: float) -> float:
    low, high = (sum(f(o.cost(name) for o in p) for p in places) for f in (min, max))
    return low + share * (high - low)


# The planner --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_one_budget_is_solved_exactly(seed: int) -> None:
    places = drawn(seed)
    for share in (0.0, 0.13, 0.5, 1.0):
        room = between_ends(places, "size", share)
        plan = solve(places, Limits(size=room))
        assert plan.size <= room and plan.gap == 0
        assert plan.harm == pytest.approx(least(places, size=room))


@pytest.mark.parametrize("seed", range(6))
def test_several_budgets_hold_and_the_gap_is_true(seed: int) -> None:
    places = drawn(seed, 5)
    limits = {
        n: between_ends(places, n, 0.4 + 0.1 * i)
        for i, n in enumerate(("size", "memory", "seconds"))
    }
    best = least(places, **limits)
    try:
        plan = solve(places, Limits(**limits))
    except Infeasible:
        assert best is None
        return
    assert all(getattr(plan, name) <= limit for name, limit in limits.items())
    assert best is not None and plan.harm - plan.gap <= best + 1e-9 <= plan.harm + 2e-9


def test_the_smallest_plan_of_a_quality() -> None:
    places = drawn(3)
    harm = sum(min(o.harm for o in p) for p in places) * 1.5
    plan = solve(places, Limits(harm=harm))
    picks = itertools.product(range(4), repeat=len(places))
    assert plan.harm <= harm
    assert plan.size == min(p.size for p in (summed(places, c) for c in picks) if p.harm <= harm)


def test_the_front_falls_and_holds_the_plans() -> None:
    places = drawn(4)
    plans = front(places)
    assert all(a.size < b.size and a.harm > b.harm for a, b in itertools.pairwise(plans))
    for plan in plans:
        assert plan.harm == pytest.approx(least(places, size=plan.size))


def test_what_cannot_be_says_what_could() -> None:
    places = drawn(5)
    low = sum(min(o.memory for o in p) for p in places)
    with pytest.raises(Infeasible) as error:
        solve(places, Limits(size=1e9, memory=low - 1))
    assert error.value.name == "memory" and error.value.least == low


def test_reasons_name_the_steps_beside() -> None:
    options = [Option("int2", 0.4, 1024), Option("int4", 0.1, 2048), Option("int8", 0.0, 4096)]
    said = planner.reason(options, 1, 1e-6)
    assert "int2 would save 1 KiB for 0.3 nat more" in said
    assert "int8 would take off 0.1 nat for 2 KiB" in said


# Blocks that are left out -------------------------------------------------------------------------


def drawn_groups(seed: int, saves: bool = True) -> tuple[list[list[Option]], list[Group]]:
    """Three blocks of two sites, tables, and a cache of which a block takes its share."""
    draw, places = random.Random(seed), drawn(seed, 7, 3)
    cache = [Option("fp16", 0.0, 0, 192, 0.3), Option("int4", 0.3 * draw.random(), 0, 48, 0.15)]
    saved = tuple(Option("gone", 0.0, 8, o.memory // 3 + 4, o.seconds / 3) for o in cache)
    groups = [
        Group(f"blocks.{i}", (2 * i, 2 * i + 1), 2 * draw.random(), saved if saves else ())
        for i in range(3)
    ]
    return [*places, cache], groups


def every_plan(places: list[list[Option]], groups: list[Group]) -> list[planner.Plan]:
    """All plans, with all sets of blocks but the whole."""
    found = []
    for gone in itertools.product((False, True), repeat=len(groups)):
        out = {
            m for group, is_gone in zip(groups, gone, strict=True) if is_gone for m in group.members
        }
        if not all(gone):
            choices = [[None] if i in out else range(len(p)) for i, p in enumerate(places)]
            found += [summed(places, picks, groups) for picks in itertools.product(*choices)]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [("size",), ("memory",), ("size", "memory", "seconds")])
def test_leaving_blocks_out_against_all_plans(seed: int, names: tuple[str, ...]) -> None:
    places, groups = drawn_groups(seed, saves=seed != 3)
    plans = every_plan(places, groups)
    for share in (0.0, 0.1, 0.3, 0.7):
        limits = {}
        for i, name in enumerate(names):
            low = removal.least_cost(places, name, groups)
            assert low == pytest.approx(min(getattr(p, name) for p in plans))
            high = sum(max(o.cost(name) for o in p) for p in places)
            limits[name] = low + (share + 0.1 * i) * (high - low)
        best = min((p.harm for p in plans if all(getattr(p, n) <= v for n, v in limits.items())),
                   default=None)  # fmt: skip
        try:
            plan = removal.solve(places, Limits(**limits), groups)
        except Infeasible:
            assert best is None
            continue
        assert best is not None
        assert all(getattr(plan, name) <= limit + 1e-9 for name, limit in limits.items())
        assert plan.harm - plan.gap <= best + 1e-9 <= plan.harm + 2e-9
        assert len(names) > 1 or plan.gap == 0
        again = summed(places, plan.picks, groups)
        assert (again.harm, again.gone) == (pytest.approx(plan.harm), plan.gone)
        with contextlib.suppress(Infeasible):
            assert plan.harm <= solve(places, Limits(**limits)).harm + 1e-12
    low = removal.least_cost(places, "memory", groups)
    with pytest.raises(Infeasible) as error:
        removal.solve(places, Limits(size=1e9, memory=low - 1), groups)
    assert (error.value.name, error.value.least) == ("memory", pytest.approx(low))


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_and_the_front_leave_blocks_out(seed: int) -> None:
    places, groups = drawn_groups(seed)
    plans = every_plan(places, groups)
    least = sum(min(o.harm for o in p) for p in places)
    for more in (0.05, 0.5, 2.0):
        plan = removal.smallest(places, least + more, groups)
        assert plan.harm <= least + more
        assert plan.size == min(p.size for p in plans if p.harm <= least + more)
    found = removal.front(places, "size", groups)
    assert found[0].gone and all(
        a.size < b.size and a.harm > b.harm for a, b in itertools.pairwise(found)
    )
    for plan in found:
        assert plan.harm == pytest.approx(min(p.harm for p in plans if p.size <= plan.size))


def test_costs_without_a_common_divisor_keep_the_bound() -> None:
    """The coarse table, and what it leaves out planned again."""
    draw = random.Random(1)
    places, groups = drawn_groups(1)
    odd = [[replace(o, size=o.size * 99991 + draw.randint(0, 9999)) for o in p] for p in places]
    plans = every_plan(odd, groups)
    for share in (0.1, 0.3, 0.6):
        low, high = (f(p.size for p in plans) for f in (min, max))
        room = low + share * (high - low)
        plan = removal.solve(odd, Limits(size=room), groups)
        best = min(p.harm for p in plans if p.size <= room)
        assert plan.size <= room and plan.harm - plan.gap <= best + 1e-9 <= plan.harm + 2e-9


# Goals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, size", [("6GB", 6 * 10**9), ("6GiB", 6 << 30), ("6g", 6 << 30)])
def test_units(words: str, size: int) -> None:
    assert goal_of(words).memory == size


@pytest.mark.parametrize("bad, said", [
    ({}, "nothing is asked"), ({"size": "2GiB", "memory": "1GiB"}, "more than --memory"),
    ({"memory": "-3GiB"}, "--memory"), ({"memory": "6 pounds"}, "--memory"), ({"quality": 99.0}, "0.99"),
    ({"quality": 0.0}, "--quality"), ({"quality": 1.0}, "0.9999"),
    ({"quality": float("nan")}, "--quality"), ({"speed": -1.0}, "--speed"),
    ({"size": "1GB", "context": 0}, "--context"), ({"size": "1GB", "batch": -2}, "--batch"),
    ({"size": "1GB", "recover": -1.0}, "--recover"), ({"size": "1GB", "effort": "norml"}, "normal"),
    ({"size": "1GB", "measure": "likelyhood"}, "likelihood"),
])  # fmt: skip
def test_bad_goals(bad: dict, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        goal_of(**bad)


# Planned formats ----------------------------------------------------------------------------------

MIXED = (
    "int3-g32",
    "codebook2",
    "sparse0.5(int4-g64)",
    "lowrank8(int8-row)+int3-g64",
    "bf16",
    "nf4-g64",
)


def mixed(tiny: Path) -> Planned:
    names = itertools.cycle(MIXED)
    spec = Source(tiny).spec
    return Planned(tuple(
        Chosen(f"blocks.{i}.{site.name}", next(names))
        for i, layer in enumerate(spec.layers) for site in sites(layer)
    ))  # fmt: skip


def test_a_plan_streamed_is_that_in_memory(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    plan = mixed(tiny)
    recipe = Recipe("plan", (plan,))
    compress(prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    found = dict(load_model(tmp_path / "streamed").linears())
    spec = Source(tiny).spec
    for chosen in plan.choices:
        _, index, name = chosen.site.split(".", 2)
        site = next(s for s in sites(spec.layers[int(index)]) if s.name == name)
        for path in site.linears:
            linear, wanted = found[f"blocks.{index}.{path}"], parse_format(chosen.format)
            assert type(linear.format) is type(wanted)
            assert linear.format.scaled("bf16").bytes(linear.shape) <= wanted.scaled("bf16").bytes(
                linear.shape
            )


@pytest.mark.parametrize("change, said", [
    (lambda c: c[1:], "says nothing of"),
    (lambda c: (*c, Chosen("blocks.9.attention.in", "bf16")), "has not"),
    (lambda c: (Chosen(c[0].site, "lowrank999(int8-row)+int3-g64"), *c[1:]), "rank"),
])  # fmt: skip
def test_plans_that_do_not_suit(tiny: Path, change, said: str) -> None:
    plan = mixed(tiny)
    with pytest.raises(BadRequest, match=said):
        Recipe("plan", (replace(plan, choices=change(plan.choices)),)).check(Source(tiny).spec)


# Sensitivities ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(tiny: Path, text_file: Path) -> torch.Tensor:
    source = Source(tiny)
    return calibration_ids(
        source.tokenizer(), text_file, Calibration(16, 64), source.spec.vocab_size
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivity")


def test_streams_measure_what_the_judge_measures(tiny: Path, ids: torch.Tensor, home: Path) -> None:
    """The streamed walk against the whole model in memory, one site changed by hand."""
    found = look(Source(tiny), ids, SMALL, home)
    bank = Bank(Source(tiny), ids, ids[:2])
    for where in ("blocks.0.attention.in", "blocks.1.feed_forward.out", "blocks.2.attention.out"):
        for format in found.measured[where]:
            judge = Judge(bank.model, ids[:2])
            block = where.split(".")[1]
            linears = bank.linears(where)
            held = {path: linear.held() for path, linear in linears.items()}
            from onecard.calibrate.walk import Reached

            name = where.split(".", 2)[2]
            site = Reached(f"blocks.{block}", name, linears, bank.stats[where], "bf16")
            list(carry_out(site, parse_format(format)))
            for linear in linears.values():
                linear.replace(from_dense(linear.matrix()))
            assert found.harms[where][format] == pytest.approx(
                judge.moved(int(block)), rel=1e-3, abs=1e-8
            )
            for path, linear in linears.items():
                linear.replace(held[path])


def test_harms_cover_everything_and_fall_with_bits(
    tiny: Path, ids: torch.Tensor, home: Path
) -> None:
    found = look(Source(tiny), ids, SMALL, home)
    for i, layer in enumerate(Source(tiny).spec.layers):
        for site in sites(layer):
            harms = found.harms[f"blocks.{i}.{site.name}"]
            assert (
                harms["int2-g32-zp"] > harms["int4-g64"] > harms["int6-g128"] > harms["bf16"] == 0
            )
        assert found.harms[f"blocks.{i}"]["gone"] > 0
    assert (
        found.harms["cache"]["int4"]
        > found.harms["cache"]["int8"]
        > found.harms["cache"]["fp16"]
        == 0
    )
    assert found.harms["tables"]["int4-g32"] > found.harms["tables"]["int8-g128"] > 0


def test_a_killed_look_goes_on(tiny: Path, ids: torch.Tensor, home: Path, tmp_path: Path) -> None:
    whole = look(Source(tiny), ids, SMALL, home)

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(Source(tiny), ids, SMALL, tmp_path, stop)
    began: list[int] = []
    again = look(Source(tiny), ids, SMALL, tmp_path, lambda done, total, what: began.append(done))
    assert again == whole and min(began) == 2
    once: list[int] = []
    assert (
        look(Source(tiny), ids, SMALL, tmp_path, lambda done, total, what: once.append(done))
        == whole
    )
    assert not once


def test_quick_deals_out_what_blocks_do(tiny: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    trial = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    found = look(Source(tiny), ids, trial, tmp_path)
    for i, layer in enumerate(Source(tiny).spec.layers):
        for site in sites(layer):
            harms = found.harms[f"blocks.{i}.{site.name}"]
            assert harms["int2-g64-zp"] > harms["int4-g64"] > harms["bf16"] == 0


def test_a_stream_of_two_blocks_deals_out_its_harm(
    tiny: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To both blocks, and about as much as two streams find; a kill between the two changes nothing."""
    one = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    two = replace(one, together=2)
    apart, found = (look(Source(tiny), ids, t, tmp_path / "x").harms for t in (one, two))
    sums = [
        sum(h["int3-g128"] for w, h in harms.items() if w.count(".") > 1)
        for harms in (apart, found)
    ]
    assert sums[1] == pytest.approx(sums[0], rel=0.5)
    for where, harms in found.items():
        if where.count(".") > 1:
            assert harms["int3-g128"] > 0
    done = Journal.add

    def dying(journal: Journal, part: str, *more: object) -> None:
        done(journal, part, *more)  # type: ignore[arg-type]
        if part == "block-00000":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        look(Source(tiny), ids, two, tmp_path / "y")
    monkeypatch.setattr(Journal, "add", done)
    assert look(Source(tiny), ids, two, tmp_path / "y").harms == found


def test_what_is_remembered_and_damaged_is_measured_again(
    tiny: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    trial = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    found = look(Source(tiny), ids, trial, tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert sensitivity.known(Source(tiny), ids, trial, tmp_path)
    data = json.loads(path.read_text())
    wrong = [{"harms": {}}, {**data, "more": 1}, [1, 2]]
    for where, harms in (("blocks.1.attention.in", {"int2": 0.1}), ("cache", {"fp16": float("nan")}),
                         ("cache", {"fp16": "none"}), ("blocks.2", [0.1]), ("blocks.0", {})):  # fmt: skip
        wrong.append({**data, "harms": {**data["harms"], where: harms}})
    for text in ("", "{", *map(json.dumps, wrong)):
        path.write_text(text)
        assert not sensitivity.known(Source(tiny), ids, trial, tmp_path), text
    assert look(Source(tiny), ids, trial, tmp_path) == found
    assert sensitivity.known(Source(tiny), ids, trial, tmp_path)


def test_a_damaged_state_begins_the_walk_anew(
    tiny: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    found, add = look(Source(tiny), ids, trial, tmp_path / "whole"), Journal.add

    def dying(self: Journal, part: str, *rest: object) -> None:
        add(self, part, *rest)  # type: ignore[arg-type]
        if part == "block-00001":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        look(Source(tiny), ids, trial, tmp_path / "killed")
    monkeypatch.setattr(Journal, "add", add)
    (state,) = (tmp_path / "killed").glob(".*.partial/state-*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    assert look(Source(tiny), ids, trial, tmp_path / "killed") == found


def test_two_that_look_at_the_same_model_do_not_do_it_twice(
    tiny: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    found = look(Source(tiny), ids, trial, tmp_path)
    (path,) = tmp_path.glob("*.json")
    text, waited = path.read_text(), list[float]()
    path.unlink()
    other = Journal(path.with_suffix(""), {"another": "process"})

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        path.write_text(text)  # the other one is done

    monkeypatch.setattr(sensitivity.time, "sleep", sleep)
    monkeypatch.setattr(sensitivity, "walk", None)
    with other:
        assert look(Source(tiny), ids, trial, tmp_path) == found
    assert len(waited) == 1


def test_answers_that_are_no_numbers() -> None:
    logp = torch.log_softmax(torch.randn(1, 3, 5), -1)
    nothing = torch.full_like(logp, float("nan"))
    assert sensitivity.apart(logp.exp(), logp, logp) == 0
    assert sensitivity.apart(logp.exp(), logp, nothing) == sensitivity.WORST
    with pytest.raises(FailedWork, match="not numbers"):
        sensitivity.apart(nothing, nothing, logp)


def test_some_rows_tell_what_rounding_all_of_them_does(
    tiny: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = replace(TRIALS["quick"], tokens=512, length=64, tried=128)
    every = look(Source(tiny), ids, trial, tmp_path / "every").errors
    monkeypatch.setattr(sensitivity, "ROWS", 16)
    some = look(Source(tiny), ids, trial, tmp_path / "some").errors
    monkeypatch.setattr(sensitivity, "rounding_error", lambda *_: None)
    made = look(Source(tiny), ids, trial, tmp_path / "made").errors
    for where, found in made.items():
        for name, error in found.items():
            assert every[where][name] == pytest.approx(error, rel=1e-4)
            assert some[where][name] == pytest.approx(error, rel=0.25)


def test_between_the_points() -> None:
    harms = between({"a": 0.1, "b": 0.01, "c": 0.001, "d": 1.0, "e": 1e-4}, {"a": 0.5, "c": 0.005})
    assert harms["b"] == pytest.approx(0.05)  # log harm over log error is a line here
    assert harms["d"] == pytest.approx(5.0) and harms["e"] == pytest.approx(0.0005)


def test_a_search_is_never_worse(tiny: Path, ids: torch.Tensor, home: Path) -> None:
    source = Source(tiny)
    found = look(source, ids, SMALL, home)
    places = {}
    for i, layer in enumerate(source.spec.layers):
        for name, shapes in shapes_of(source.spec, layer).items():
            where = f"blocks.{i}.{name}"
            places[where] = [
                Option(n, found.harms[where][n], size_of(f, shapes, "bf16"))
                for n, f in possible(FORMATS, shapes, "bf16").items()
            ]
    limits = Limits(size=3.1 / 16 * sum(p[-1].size for p in places.values()))
    plan = solve(list(places.values()), limits)
    bank = Bank(source, ids, ids[:2])
    better = search(bank, places, limits, plan, 2)
    assert better.kl <= better.before and better.plan.size <= limits.size  # type: ignore[operator]
    for where, option in zip(places, better.plan.options(list(places.values())), strict=True):
        bank.put(where, option.format)
    assert bank.kl() == pytest.approx(better.kl, rel=1e-4)
    first = next(iter(places.values()))
    assert all(n in {o.format for o in first} for n in neighbours(first, "int4-g64"))


def test_streams_and_the_bank_leave_out_the_same(tiny: Path, ids: torch.Tensor, home: Path) -> None:
    source = Source(tiny)
    found, bank = look(source, ids, SMALL, home), Bank(source, ids, ids[:2])
    for gone in (["blocks.1"], ["blocks.0", "blocks.2"]):
        bank.leave_out(gone)
        streamed = left_out(source, ids, 128, gone)
        assert streamed == pytest.approx(bank.kl(), rel=1e-4) and streamed > 0
        if len(gone) == 1:
            assert streamed == pytest.approx(found.harms[gone[0]]["gone"], rel=1e-4)
    bank.leave_out([])
    assert bank.kl() < 1e-9


def of_sites(
    tiny: Path, ids: torch.Tensor, home: Path
) -> tuple[dict[str, list[Option]], list[Group]]:
    """Places and blocks of the tiny model, by their sizes alone."""
    source = Source(tiny)
    found, places, groups = look(source, ids, SMALL, home), {}, []
    for i, layer in enumerate(source.spec.layers):
        first = len(places)
        for name, shapes in shapes_of(source.spec, layer).items():
            where = f"blocks.{i}.{name}"
            places[where] = [
                Option(n, found.harms[where][n], size_of(f, shapes, "bf16"))
                for n, f in possible(FORMATS, shapes, "bf16").items()
            ]
        members = tuple(range(first, len(places)))
        groups.append(Group(f"blocks.{i}", members, found.harms[f"blocks.{i}"]["gone"]))
    return places, groups


def test_blocks_come_back_where_that_is_better(tiny: Path, ids: torch.Tensor, home: Path) -> None:
    """Begun with all blocks but one left out in room for two of them: what is kept is measured."""
    places, groups = of_sites(tiny, ids, home)
    options = list(places.values())
    dense = sum(p[-1].size for p in options)
    bank = Bank(Source(tiny), ids, ids[:2])
    limits = Limits(size=2 * dense / len(groups))
    first = removal.with_out(options, limits, groups, [g.name for g in groups[1:]])
    found = lighter(bank, places, groups, limits, first, 1)
    assert 0 < len(found.plan.gone) < len(first.gone) and found.kl < found.before
    assert found.plan.size <= limits.size  # type: ignore[operator]
    bank.leave_out(found.plan.gone)
    for where, option in zip(places, found.plan.options(options), strict=True):
        if option.format != "gone":
            bank.put(where, option.format)
    assert bank.kl() == pytest.approx(found.kl, rel=1e-4)
    again = summed(options, found.plan.picks, groups)
    assert (again.size, again.gone) == (found.plan.size, found.plan.gone)


# The whole ----------------------------------------------------------------------------------------


def request(tiny: Path, text_file: Path, out: Path, home: Path, **goal) -> jobs.Request:
    wanted = goal_of(**{"context": 128, "effort": "quick", **goal})
    return jobs.Request(str(tiny), out, wanted, text_file, text_file, home=home)


def half(tiny: Path) -> int:
    return file_bytes(Checkpoint(tiny)) // 2


def test_a_fit_keeps_its_budget_and_a_kill_changes_nothing(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    asked = request(tiny, text_file, tmp_path / "one", home, size=half(tiny), quality=0.2)
    result = fits.fit(jobs.prepare(asked), measure=False)
    assert result.kept and file_bytes(Checkpoint(tmp_path / "one")) <= half(tiny)
    assert read_fit(tmp_path / "one") == FitResult.from_json(result.to_json())
    made = Report.from_json((tmp_path / "one" / "report.json").read_text())
    again = fit_report(result)
    for what in ("file_bytes", "bits_per_weight"):  # the same number wherever it is told
        assert made.value(what) == again.value(what)
    promise = next(p for p in result.promises if p.what == "size")
    assert promise.predicted is not None and promise.measured is not None
    assert promise.measured <= promise.predicted <= half(tiny)
    assert load_model(tmp_path / "one").spec == Source(tiny).spec
    assert jobs.is_finished(asked)

    killed = replace(asked, out=tmp_path / "two")
    real = gates.judged

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gates, "judged", stop)
    with pytest.raises(KeyboardInterrupt):
        fits.fit(jobs.prepare(killed), measure=False)
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(gates, "judged", real)
    fits.fit(jobs.prepare(killed), measure=False)
    assert same(tmp_path / "one", tmp_path / "two")
    assert not list(tmp_path.glob(".*.fit"))


def test_a_missed_gate_raises_what_hurts(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Without a budget on bytes the smallest model of a quality; the promise is made too light on purpose."""
    asked = request(tiny, text_file, tmp_path / "out", tmp_path / "home", quality=0.97)
    job = jobs.prepare(asked)
    found = look(job.source, job.ids, job.trial, asked.home)
    light = choose.plan_for(job, found, harm=0.5)
    texts = gates.texts_of(job.source, text_file, 1024, tmp_path / "texts.json")
    first = fits.one_try(job, light, texts, "attempt-1", "too light", jobs.Quiet)
    assert first.passed is False
    again = mend.raised(job, found, [first])
    assert again is not None and again.plan.size > light.plan.size
    result = fits.fit(jobs.prepare(asked), measure=False)
    assert result.kept and min(gates.kept(g, "likelihood") for g in result.gates) >= 0.97


def test_inputs_are_not_rounded_only_where_that_is_fast_enough(
    tiny: Path, text_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tiny, text_file, tmp_path / "out", home, quality=0.99, speed=100.0)
    job = jobs.prepare(asked)
    light = choose.plan_for(job, look(job.source, job.ids, job.trial, home))
    texts = gates.texts_of(job.source, text_file, 1024, tmp_path / "texts.json")

    def judged(*given: object) -> tuple[Gate, ...]:
        runs = next(each for each in given if isinstance(each, CpuSettings))
        return (Gate("held-out", 0.005 if runs.exact else 0.0101, 1.0, 2.0, 2.0, 100),)

    timed = {"decode_tokens_per_second": 0.0}
    monkeypatch.setattr(gates, "judged", judged)
    monkeypatch.setattr(timing, "benched", lambda *_: timed)
    for speed, exact in ((20.0, ()), (100.0, ("all",))):
        timed["decode_tokens_per_second"] = speed
        tried = fits.one_try(job, light, texts, "attempt-1", "as planned", jobs.Quiet)
        assert tried.runs.exact == exact and tried.passed is bool(exact)


def test_what_misses_its_gate_ends_with_one(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["fit", tiny, tmp_path / "out", "--size", half(tiny) // 2, "--effort", "quick", "--context", 128,
             "--calibration", text_file, "--held-out", text_file]  # fmt: skip
    assert call(*words, "--quality", "0.9999", "--dry-run", "--json") == 0
    assert not (tmp_path / "out").exists()
    json.loads(capsys.readouterr().out)
    assert call(*words, "--quality", "0.9999", "--dry-run", "--json", "--explain") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert any(row["what"] == "why" and "would save" in row["value"] for row in rows)
    assert call(*words, "--quality", "0.9999", "--explain") == 1
    said = capsys.readouterr()
    assert "does not keep what was asked" in said.err and "would save" in said.out
    assert not read_fit(tmp_path / "out").kept


def test_what_a_plan_is_predicted_to_miss_is_said_before(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    tight = request(
        tiny, text_file, tmp_path / "out", tmp_path, size=half(tiny) // 2, quality=0.9999
    )
    job, told = jobs.prepare(tight), list[str]()
    planning, _ = fits.plan_only(job)
    said = dict(story.dry(job, planning).notes)["warning"]
    found = re.search(r"--quality asks for 0.9999; --size ([0-9]+)KiB is predicted to do", said)
    assert found
    fits.fit(job, measure=False, warn=told.append)
    assert told == [said]
    enough = replace(tight, goal=replace(tight.goal, size=int(found[1]) << 10))
    job = jobs.prepare(replace(enough, force=True))
    assert choose.short_of(job, fits.plan_only(job)[0]) == ""


def test_another_process_has_the_output(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    asked = request(tiny, text_file, tmp_path / "out", tmp_path, size=half(tiny))
    job = jobs.prepare(asked)
    with fits.working(job), pytest.raises(BadRequest, match="another process"):
        fits.fit(jobs.prepare(replace(asked, goal=replace(asked.goal, size=half(tiny) + 1))))
    assert json.loads((job.work / "goal.json").read_text())["goal"]["size"] == half(tiny)
    shutil.rmtree(job.work)
    job.work.write_text("mine")
    with pytest.raises(BadRequest, match="is a file"):
        fits.fit(job)


@pytest.mark.parametrize("name, damage", [
    ("goal.json", "{"), ("plan.json", '{"picks": [0]}'), ("texts.json", '{"held": 1, "own": []}'),
    ("attempt-1.gates.json", '[{"kl": "x"}]'),
])  # fmt: skip
def test_damaged_notes_are_made_again(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path,
    name: str, damage: str,
) -> None:  # fmt: skip
    asked = request(tiny, text_file, tmp_path / "one", home, size=half(tiny))
    whole = fits.fit(jobs.prepare(asked), measure=False)
    job = jobs.prepare(replace(asked, out=tmp_path / "two"))
    real = story.told

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "told", stop)
    with pytest.raises(KeyboardInterrupt):
        fits.fit(job, measure=False)
    monkeypatch.setattr(story, "told", real)
    (job.work / name).write_text(damage)
    assert fits.fit(job, measure=False).promises == whole.promises
    assert same(tmp_path / "one", tmp_path / "two") and not job.work.exists()


def test_a_plan_of_other_options_is_not_gone_on_with(
    tiny: Path, text_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are a choice only where they fit into memory, and that may have changed meanwhile."""
    job = jobs.prepare(request(tiny, text_file, tmp_path / "out", home, size=half(tiny)))
    planning, found = fits.plan_only(job)
    job.work.mkdir()
    choose.remembered(job, planning)
    again = choose.recalled(job, planning)
    assert (
        again is not None and again.plan.picks == planning.plan.picks and "tables" in again.places
    )
    monkeypatch.setattr(type(job), "tables", ())
    job = jobs.prepare(job.request)
    assert choose.recalled(job, choose.plan_for(job, found)) is None


def test_what_is_finished_is_so_by_its_texts_too(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "measured", lambda *_: timing.Seen())
    text, task, out = tmp_path / "text.txt", tmp_path / "task.jsonl", tmp_path / "out"
    text.write_text(text_file.read_text())
    task.write_text('{"question": "Is it text?", "choices": ["yes", "no"], "gold": 0}')
    words = ["fit", tiny, out, "--size", half(tiny), "--effort", "quick", "--context", 64, "--held-out", text,
             "--calibration", text, "--task", task, "--resume"]  # fmt: skip
    assert call(*words) == 0
    capsys.readouterr()
    assert call(*words) == 0 and "is finished" in capsys.readouterr().err
    for file in (text, task):
        before = file.read_text()
        file.write_text(before.replace("text", "prose"))
        assert call(*words) == 2
        said = capsys.readouterr().err
        assert "another fit" in said and ("text" if file == text else "questions") in said
        file.write_text(before)
    assert call(*words[:-1], "--quality", "0.01", "--resume") == 2
    assert "differs in: --quality\n" in capsys.readouterr().err
    assert call(*words) == 0
    (out / "fit.json").rename(tmp_path / "fit.json")
    (out / "fit.json").write_text("{")
    assert call(*words) == 2 and "fit.json: this is no result" in capsys.readouterr().err
    (tmp_path / "fit.json").replace(out / "fit.json")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert call(*words) == 2 and "model.safetensors" in capsys.readouterr().err


def test_texts_that_say_nothing(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    short, ids = tmp_path / "short.txt", tmp_path / "ids.json"
    short.write_text("Nothing here is remarkable.")
    asked = request(tiny, text_file, tmp_path / "out", tmp_path / "home", size="1GB")
    with pytest.raises(BadRequest, match="at least 64 are needed"):
        jobs.prepare(replace(asked, held_out=short))
    for rows, said in (([[5] * 257], "context is 256"), ([[5]] * 40, "2 tokens or more")):
        ids.write_text(json.dumps(rows))
        with pytest.raises(BadRequest, match=said):
            jobs.prepare(replace(asked, data=ids))


def test_room_for_the_work_is_asked_for_first(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tiny, text_file, tmp_path / "out", tmp_path / "home", size="1GB")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="XDG_CACHE_HOME"):
        jobs.prepare(replace(asked, home=tmp_path / "file" / "home"))
    with pytest.raises(BadRequest, match="raise --cap"):
        jobs.prepare(replace(asked, cap=1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BadRequest, match="1000 B are free"):
        jobs.prepare(asked)
    assert not (tmp_path / "home").exists()


def test_the_engine_is_measured_with_its_context_full(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for context, batch in ((1, 1), (2, 3), (300, 1), (2048, 4), (8192, 1), (1 << 20, 64)):
        load = timing.Load.of(context, batch)
        filled = load.behind + load.decode
        assert filled * batch + load.unwritten == max(context, 2) * batch
        assert filled <= max(2, context) and load.unwritten <= max(
            0, batch * context - timing.FILLED // 2
        )
    asked = request(tiny, text_file, tmp_path / "out", tmp_path, memory="1GiB", batch=4)
    job, cases = jobs.prepare(asked), list[list[str]]()
    figures = {
        "foreign_share": 0.4,
        "peak_memory_bytes": 1e6,
        "prompt_tokens_per_second": 80.0,
        "decode_tokens_per_second": 40.0,
    }

    def run(words: list[str], **_: object) -> SimpleNamespace:
        cases.append(words)
        rows = tuple(Row("model", what, value) for what, value in figures.items())
        return SimpleNamespace(returncode=0, stdout=Report(rows).to_json(), stderr="")

    monkeypatch.setattr(timing, "samples_of", lambda *_: ())
    monkeypatch.setattr(timing.subprocess, "run", run)
    seen = timing.measured(job, tiny, CpuSettings(cache="int8"))
    assert (seen.memory, seen.prompt, seen.foreign) == (1e6, 80.0, 0.4)
    assert seen.decode == 10.0  # a speed is of one sequence
    assert cases[0][cases[0].index("--behind") + 1] == "64"
    assert "int8" in cases[0] and "int8" not in cases[1]
    monkeypatch.setattr(timing, "FILLED", 400)  # 100 of the 128 positions of each sequence
    seen = timing.measured(job, tiny, CpuSettings(cache="int8"))
    assert seen.memory == 1e6 + job.costs.kept("int8") * 28 // 128


def test_a_speed_says_where_it_comes_from(
    tiny: Path, text_file: Path, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no kernel of this machine was measured, reading memory gives a bound and no prediction."""
    monkeypatch.setattr(Costs, "per_byte", 1e-9)

    def said(**goal) -> tuple[str, Promise]:
        asked = request(tiny, text_file, tmp_path / "out", tmp_path, **goal)
        job = jobs.prepare(replace(asked, force=True))
        planning, _ = fits.plan_only(job)
        result = fits.fit(job, measure=False)
        dry = dict(story.dry(job, planning).notes)["speed"]
        return dry, next(p for p in result.promises if p.what == "decode")

    dry, promise = said(size="1GB", device="RTX 4090")
    assert promise.how.endswith("not measured, it is meant for RTX 4090")
    assert "maker" in dry and promise.uncertainty == timing.SPEED_UNCERTAIN * (
        promise.predicted or 0
    )
    dry, promise = said(size="1GB")
    assert "at most" in dry and promise.how.startswith("at most") and promise.uncertainty is None
    dry, promise = said(size="1GB", speed=1.0)
    assert "give or take 15%" in dry and promise.uncertainty and promise.kept


def test_what_could_not_be_measured_is_not_kept(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(tiny, text_file, tmp_path / "out", tmp_path, memory="1GiB")
    run = timing.subprocess.run

    def failing(words: list[str], **more) -> object:
        bench = "bench" in words
        return run([sys.executable, "-c", "import os; os.abort()"] if bench else words, **more)

    monkeypatch.setattr(timing.subprocess, "run", failing)
    result = fits.fit(jobs.prepare(asked))
    memory = next(p for p in result.promises if p.what == "memory")
    assert (
        not result.kept and memory.kept is False and "could not be run: exit code -6" in memory.how
    )


def test_from_python(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder as from the command line, page and all; texts and sizes as people have them at hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "measured", lambda *_: timing.Seen())
    result = onecard.fit_model(
        tiny, str(tmp_path / "out"), size=float(half(tiny)), calibration=str(text_file),
        held_out=str(text_file), effort="quick", context=64, quality=0.01,
    )  # fmt: skip
    assert (
        result.kept and result.answer in Page((tmp_path / "out" / "report.html").read_text()).text
    )
    assert read_fit(tmp_path / "out") == FitResult.from_json(result.to_json())


def test_rows_that_no_group_divides(text_file: Path, tmp_path: Path) -> None:
    """Tables and linears are rounded row by row then."""
    odd = make_llama(tmp_path / "odd", hidden_size=48, intermediate_size=72)
    asked = request(
        odd, text_file, tmp_path / "out", tmp_path / "home", size=half(odd), quality=0.01
    )
    result = fits.fit(jobs.prepare(asked), measure=False)
    formats = {place.part: place.format for place in result.places}
    assert result.kept and formats["tables"].endswith("-row")
    assert load_model(tmp_path / "out").spec == Source(odd).spec


def test_what_cannot_fit_is_said_at_once(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    for goal, said in (({"size": "20kB"}, "least possible"), ({"memory": "1MiB"}, "--memory"),
                       ({"size": "1GB", "context": 10_000}, "made for 256"),
                       ({"size": "1GB", "device": "RTX 409"}, "RTX 4090")):  # fmt: skip
        with pytest.raises(BadRequest, match=said):
            jobs.prepare(request(tiny, text_file, tmp_path / "out", tmp_path, **goal))
    assert not any(tmp_path.iterdir())


def test_what_is_compressed_already(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    compress(
        prepare(
            tiny, tmp_path / "small", Recipe("plan", (mixed(tiny),)), Settings(SETTINGS, text_file)
        )
    )
    with pytest.raises(BadRequest, match="compressed already"):
        jobs.prepare(request(tmp_path / "small", text_file, tmp_path / "out", tmp_path, size="1GB"))


def least_of(tiny: Path, text_file: Path, tmp_path: Path, **goal) -> float:
    """Bytes of the files in the smallest formats, all blocks kept."""
    job = jobs.prepare(request(tiny, text_file, tmp_path / "out", tmp_path, size="1GB", **goal))
    return planner.least_cost(list(job.places().values()), "size") + job.fixed.size


def test_blocks_go_where_the_smallest_formats_are_too_large(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(least_of(tiny, text_file, tmp_path)) - 4096
    asked = request(tiny, text_file, tmp_path / "one", tmp_path / "home", size=size)
    job = jobs.prepare(asked)
    assert job.cramped
    result = fits.fit(job, measure=False)
    made, before = Source(tmp_path / "one"), Source(tiny)
    assert result.kept and result.left_out
    assert made.spec.num_layers == before.spec.num_layers - len(result.left_out)
    assert file_bytes(made.checkpoint) <= size and "blocks left out" in result.answer
    promise = {p.what: p for p in result.promises}
    assert promise["size"].measured <= promise["size"].predicted <= size  # type: ignore[operator]
    for place in result.places:
        gone = place.layer in result.left_out
        assert (place.format == "gone") == gone and (not gone or place.size == 0)
    assert read_fit(tmp_path / "one") == FitResult.from_json(result.to_json())
    runner = gates.runner_of(made, 64)
    assert complete(runner, made.tokenizer(), [1, 2, 3], Sampling(4, ignore_eos=True)).ids

    real = gates.judged

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    killed = replace(asked, out=tmp_path / "two")
    monkeypatch.setattr(gates, "judged", stop)
    with pytest.raises(KeyboardInterrupt):
        fits.fit(jobs.prepare(killed), measure=False)
    monkeypatch.setattr(gates, "judged", real)
    again = fits.fit(jobs.prepare(killed), measure=False)
    assert same(tmp_path / "one", tmp_path / "two") and again.promises[0] == result.promises[0]


def test_quick_effort_tries_removal_of_a_large_model_where_it_is_needed(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(least_of(tiny, text_file, tmp_path)) - 4096
    monkeypatch.setattr(candidates, "LARGE", 1000)
    roomy = jobs.prepare(request(tiny, text_file, tmp_path / "out", tmp_path, size=half(tiny)))
    found = look(roomy.source, roomy.ids, roomy.trial, tmp_path)
    assert not roomy.trial.left_out and not choose.plan_for(roomy, found).groups
    tight = jobs.prepare(request(tiny, text_file, tmp_path / "out", tmp_path, size=size))
    assert tight.trial.left_out and not tight.effort.left_out
    planning, found = fits.plan_only(tight)
    assert planning.plan.gone and all(f"blocks.{i}" in found.harms for i in range(3))
    together = left_out(tight.source, tight.ids, tight.trial.tried, planning.plan.gone)
    assert planning.harm > jobs.SUMS_UP * together > 0


def test_what_goes_is_measured_around(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At normal effort: a removal that the sums like and the model does not is not made."""
    room = half(tiny)
    job = jobs.prepare(
        request(tiny, text_file, tmp_path / "out", tmp_path, size=room, effort="normal")
    )
    monkeypatch.setattr(type(job), "effort", replace(SMALL, rounds=1))
    found = look(job.source, job.ids, job.trial, tmp_path)
    planning = choose.plan_for(job, found)
    assert not job.cramped and not planning.plan.gone
    liked = [replace(group, harm=1e-9) for group in planning.groups]
    assert removal.solve(list(planning.places.values()), job.limits(None), liked).gone
    seen: list[str] = []
    kept = choose.looked_around(
        job, replace(planning, groups=liked), lambda done, total, what: seen.append(what)
    )
    assert "measuring with blocks left out" in seen and not kept.plan.gone and kept.looked

    small = request(tiny, text_file, tmp_path / "out", tmp_path, effort="normal",
                    size=int(least_of(tiny, text_file, tmp_path)) - 4096)  # fmt: skip
    job = jobs.prepare(small)
    planning = choose.looked_around(job, choose.plan_for(job, found))
    assert planning.plan.gone and planning.looked
    assert planning.harm == planning.plan.harm == planning.looked[1]


def test_costs_with_a_block_left_out_are_those_of_the_smaller_model(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    model = load_model(tiny)
    apply(model, Recipe("less", (DropLayers(layers=(1,), most=None),)), ids_of(tiny, text_file))
    save_model(model, tmp_path / "less")
    for device in ("auto", "RTX 4090"):
        sums = []
        for folder in (tiny, tmp_path / "less"):
            costs = Costs(Source(folder), Goal(memory=1 << 40, context=128, batch=3, device=device))
            places = costs.options(("int4-g64",))
            names = {name for own in places.values() for name in (own[0].format,)}
            assert names == {"int4-g64", "fp16"}
            groups, fixed = costs.groups(places, None), costs.fixed(False)
            gone = [groups[1].name] if folder == tiny else []
            plan = planner.summed(
                list(places.values()),
                [None if w.split(".", 2)[:2] == ["blocks", "1"] and gone else 0 for w in places], groups
            )  # fmt: skip
            assert plan.gone == tuple(gone)
            sums.append((plan.size + fixed.size, plan.memory + fixed.memory))
        assert sums[0][1] == pytest.approx(sums[1][1], abs=256)
        assert 0 <= sums[0][0] - sums[1][0] < 8192  # lines of headers


def test_the_largest_batch_is_counted_by_the_code_that_allocates(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = program_bytes() + (16 << 20)
    asked = request(tiny, text_file, tmp_path / "out", tmp_path, memory=memory, batch=2)
    result = fits.fit(jobs.prepare(asked), measure=False)
    batch = result.largest_batch
    assert batch is not None and batch > 2
    cache = next(p.format for p in result.places if p.part == "cache")
    settings = CpuSettings(cache=usual_cache() if cache == "fp16" else cache)

    def held(batch: int) -> int:
        return footprint(
            Source(tmp_path / "out"), 128, batch, settings, program=program_bytes()
        ).total

    assert held(batch) <= memory < held(batch + 2)  # work space is that of any format
    rows = {row.what: row.value for row in fit_report(result).rows}
    assert rows["largest_batch"] == batch
    text = Page(fit_to_html(result)).text
    assert f"{batch:,} sequences at once fit into --memory" in text
    job = jobs.prepare(replace(asked, force=True))
    dry = story.dry(job, fits.plan_only(job)[0])
    assert next(row.value for row in dry.rows if row.what == "largest_batch") == batch
    monkeypatch.setattr(choose, "POSITIONS", 3 * 128 + 1)  # more are not to be had of the engine
    assert choose.largest_batch(job, fits.plan_only(job)[0]) == 3
    without = jobs.prepare(request(tiny, text_file, tmp_path / "no", tmp_path, size="1GB"))
    assert choose.largest_batch(without, fits.plan_only(without)[0]) is None


def test_figures_of_a_busy_machine_are_forgotten(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs far faster than its kernels promised shows that these were timed beside something else."""
    forgotten: list[str] = []
    monkeypatch.setattr(cpu, "forget", forgotten.append)
    asked = request(
        tiny, text_file, tmp_path / "out", tmp_path / "home", size=half(tiny), speed=1.0
    )
    job = jobs.prepare(asked)
    planning, _ = fits.plan_only(job)
    promised = 1 / (planning.plan.seconds + job.fixed.seconds)
    for faster, files in ((1.9, 0), (2.1, 2)):
        seen = timing.Seen(decode=faster * promised)
        monkeypatch.setattr(timing, "measured", lambda *_, seen=seen: seen)
        fits.fit(jobs.prepare(replace(asked, force=True)))
        assert len(forgotten) == files


def test_a_wreck_has_to_be_asked_for(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving blocks out keeps any budget; what nothing is left of is refused, unless --quality says so."""
    asked = jobs.Request(str(stories), tmp_path / "out", goal_of(size="90KiB", context=128, effort="quick"),
                         home=tmp_path / "home")  # fmt: skip
    job = jobs.prepare(asked)
    monkeypatch.setattr(choose, "WRECK", 0.0)
    planning, _ = fits.plan_only(job)
    kept = gates.share_of(planning.harm, "likelihood")
    assert planning.plan.gone and 0 < kept < 0.5
    monkeypatch.setattr(choose, "WRECK", kept * 1.01)
    with pytest.raises(BadRequest, match="of 5 blocks left out") as error:
        fits.fit(job)
    assert "--quality" in str(error.value) and not list(tmp_path.glob(".out*"))
    assert not (tmp_path / "out").exists()
    wanted = replace(asked, goal=replace(asked.goal, quality=0.001))
    assert fits.plan_only(jobs.prepare(wanted))[0].plan.gone
    monkeypatch.setattr(choose, "WRECK", kept * 0.99)
    assert fits.plan_only(job)[0].plan.gone == planning.plan.gone


def test_a_missed_gate_names_the_budget_that_would_do(stories: Path, tmp_path: Path) -> None:
    def fit(**goal) -> FitResult:
        wanted = goal_of(**goal, quality=0.95, context=128, effort="quick")
        asked = jobs.Request(str(stories), tmp_path / "out", wanted, force=True, home=tmp_path)
        return fits.fit(jobs.prepare(asked), measure=False)

    missed = fit(size="200KiB")
    said = fits.advice(missed)
    found = re.match("--size ([0-9]+)KiB would do", said)
    assert not missed.kept and found and "--memory" not in said
    assert 200 < int(found[1]) < 300
    again = fit(size=f"{found[1]}KiB")
    assert again.kept and again.nearest == ""


def test_what_is_added_while_it_works_stays(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """The result waits; the same fit puts it there, without making it again, once the file is moved away."""
    out = tmp_path / "out"
    job = jobs.prepare(request(tiny, text_file, out, tmp_path, size="1GB"))
    made: list[int] = []
    rows: list[str] = []

    def add(folder: Path, report: Report, result: FitResult) -> None:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("precious")
        made.append((folder / "model.safetensors").stat().st_mtime_ns)
        rows.extend(row.what for row in report.rows)

    with pytest.raises(FailedWork, match="no longer empty"):
        fits.fit(job, page=add, measure=False)
    assert (out / "notes.txt").read_text() == "precious"
    (out / "notes.txt").unlink()
    fits.fit(job, measure=False)
    assert (out / "model.safetensors").stat().st_mtime_ns == made[0] and not job.work.exists()
    again = Report.from_json((out / "report.json").read_text())
    assert [row.what for row in again.rows] == rows


def test_a_text_that_falls_into_bytes(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("機械学習の模型を小さくする。" * 200, encoding="utf-8")
    assert any("tokens per character" in w for w in jobs.warned(Source(tiny), text))


def test_a_text_of_unknown_words(model: Path, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"unk_token": "?"}')
    text = tmp_path / "other.txt"
    text.write_text("the modelo cabe, " * 50)
    assert any("no token for 75%" in w for w in jobs.warned(Source(model), text))
    text.write_text("the the the the")
    assert not jobs.warned(Source(model), text)


def test_costs_are_those_of_the_code_that_allocates(tiny: Path) -> None:
    """The sum over a plan of one format is the footprint of the model in that format."""
    source = Source(tiny)
    costs = Costs(source, Goal(memory=1 << 40, context=128))
    options, fixed = costs.options(("int4-g64",)), costs.fixed(False)
    total = fixed.memory + sum(
        next(o for o in own if o.format in ("int4-g64", "fp16")).memory for own in options.values()
    )
    held = footprint(source, 128, 1, formats=parse_format("int4-g64"))
    program = dict(held.parts())["program"]
    own = held.total - program
    assert own <= total - program_bytes() <= own + (64 << 10)
