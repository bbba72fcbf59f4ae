"""What a model costs: parts add up, bytes are those of the engine, times follow what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard import cost
from onecard.checkpoint.source import Source
from onecard.core.device import Device
from onecard.core.format import Format, Integers, parse_format
from onecard.core.report import Report, Row
from onecard.core.spec import linear_shapes
from onecard.kernels import cpu, layout, rates
from onecard.kernels.rates import Attending, Form, Heads, Rate
from onecard.runtime.footprint import footprint
from onecard.runtime.weights import matrices
from onecard.verbs import look

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")
FORMATS = ("int4-g64", "int2-g32-zp", "bf16", "codebook3", "codebook4-row", "sparse0.5(int8-g64)",
           "lowrank8(int8-g32)+int2-g32", "nf4-g64")  # fmt: skip


def mixed(source: Source) -> dict[str, Format]:
    """Every format somewhere."""
    paths = [f"blocks.{i}.{path}" for i, layer in enumerate(source.spec.layers)
             for path in linear_shapes(source.spec, layer)]  # fmt: skip
    return {path: parse_format(FORMATS[i % len(FORMATS)]) for i, path in enumerate(paths)}


def test_parts_add_up(tiny: Path, told: list[str]) -> None:
    source = Source(tiny)
    formats = mixed(source)
    whole = cost.cost(source, formats, 96, 2)
    costs = cost.Costs(source, 96, 2)
    total = costs.rest()
    for path, format in formats.items():
        shape = linear_shapes(source.spec, source.spec.layers[0])[path.split(".", 2)[2]]
        total += costs.of_matrix(shape, format)
    assert total.decode == pytest.approx(whole.decode) and total.prompt == pytest.approx(
        whole.prompt
    )
    held = footprint(source, 96, 2, formats=formats, program=10_000_000)
    assert whole.memory == held.total
    work = held.work_bytes - costs.footprint.work_bytes  # products of two need more of it
    assert whole.memory - total.memory == work


def test_what_follows_from_what(tiny: Path, told: list[str]) -> None:
    source = Source(tiny)
    few, many = (cost.cost(source, Integers(bits), 64) for bits in (2, 8))
    assert few.decode < many.decode and few.prompt < many.prompt and few.memory < many.memory
    near, far = (cost.cost(source, None, context) for context in (32, 256))
    assert near.decode < far.decode and near.prompt < far.prompt and near.memory < far.memory
    assert cost.cost(source, None, 64, 4).decode > cost.cost(source, None, 64).decode
    costs = cost.Costs(source)
    plain, expert = (costs.of_matrix((64, 64), Integers(4), share) for share in (1.0, 0.25))
    assert expert.decode == pytest.approx(plain.decode / 4) and expert.memory == plain.memory


def test_a_form_is_measured_once(tiny: Path, told: list[str]) -> None:
    costs = cost.Costs(Source(tiny))
    costs.prepare([((64, 64), parse_format(name)) for name in FORMATS])
    assert told == ["onecard.cost", "onecard.kernels.rates"]
    for name in FORMATS:
        made = sum(layout.size(m) for m in matrices(parse_format(name), (64, 64)).values())
        assert costs.of_matrix((64, 64), parse_format(name)).memory == made
    cost.Costs(Source(tiny)).of_matrix((64, 128), Integers(4, 64))
    assert len(told) == 2


@pytest.mark.parametrize("value", [
    None, [], "x", [[1.0], 2.0], [[[1.0] * 4] * 3, -1.0], [[[1.0] * 4] * 2 + [[0.0] * 4], 1.0],
    [[[1.0] * 4] * 2, 1.0], [[[1.0] * 4] * 2 + [[float("inf")] * 4], 1.0],
])  # fmt: skip
def test_a_damaged_file_is_measured_again(
    told: list[str], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form(0, 4, 64, 2)
    good = rates.rates([form], 2)[form]
    monkeypatch.setattr(rates.cpu, "remembered", lambda name: {key: {"form 0 4 64 2 0 0": value}
                                                               for key in keys})  # fmt: skip
    keys = json.loads((Path(cpu._cache_file(rates.FILE))).read_text())
    assert rates.rates([form], 2)[form] == good and len(told) == 2


def test_between_what_was_measured() -> None:
    line = (1e-9, 2e-9, 4e-9, 5e-8)
    rate = Rate(((2e-9, 4e-9, 8e-9, 1e-7), line, line), 3e-9)
    matrix = Form(0, 8, 32, 2).matrix(32, rates.COLUMNS[1])
    weights = 32 * rates.COLUMNS[1]
    assert rate.seconds(matrix, 1, 1.0) == pytest.approx(1e-9 * weights)
    assert rate.seconds(matrix, 1, 0.0) == pytest.approx(3e-9 * weights)
    assert rate.seconds(matrix, 18, 1.0) == pytest.approx(3e-9 * weights)
    assert rate.seconds(matrix, 1024, 0.5) == pytest.approx(1e-7 * weights)
    short = Form(0, 8, 32, 2).matrix(17, rates.COLUMNS[0])  # two tiles, one of them nearly empty
    assert rate.seconds(short, 1, 1.0) == pytest.approx(2e-9 * 32 * rates.COLUMNS[0])
    between = Form(0, 8, 32, 2).matrix(16, 2 * rates.COLUMNS[0])
    assert 1e-9 < rate.seconds(between, 1, 1.0) / (16 * between.columns) < 2e-9
    attending = Attending(2.0, 1.0, 3.0, 0.5)
    assert attending.decode(10) == 20 and attending.decode(10, 1.0) == 10
    assert attending.prompt(4, 2) == 4 * 3 + 0.5 * (8 + 10)


def test_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other process does, on matrices that are small enough for a test."""
    monkeypatch.setattr(rates, "WARM", 16)
    monkeypatch.setattr(rates, "LEAST", 1 << 18)
    monkeypatch.setattr(rates, "MOST", 1 << 18)
    monkeypatch.setattr(rates, "FAR", 64)
    monkeypatch.setattr(rates, "TURNS", 1)
    monkeypatch.setattr(rates, "ROUNDS", 2)
    forms = [
        Form.of(m) for name in FORMATS for m in matrices(parse_format(name), (64, 128)).values()
    ]
    asked = [["form", *vars(form).values()] for form in forms]
    asked += [
        ["heads", *vars(Heads(4, 2, 16, cache)).values()] for cache in ("fp16", "int8", "int4")
    ]
    for words, made in zip(asked, rates.measure(asked, 2), strict=True):
        assert rates._sound(words, made)


def test_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost.cached(0, 2.0) == 1.0 and cost.cached(1 << 50, 2.0) < 1e-6
    shares = [cost.cached(size << 20, 2.0) for size in range(1, 4096, 16)]
    assert shares == sorted(shares, reverse=True)
    monkeypatch.setattr(cost, "cpu_facts", lambda: Device("x", caches=(("L2", 100), ("L3", 1000))))
    assert cost.cached(1000, 2.0) == 1.0 and cost.cached(2000, 2.0) == 0.25
    monkeypatch.setattr(cost, "cpu_facts", lambda: Device("x"))
    assert cost.cached(1000, 2.0) == 0.0


@pytest.mark.parametrize(
    ("twice", "expected"), [(40.0, 4.32193), (30.0, 1.0), (10.0, 0.074), (25.0, 0.41504)]
)
def test_what_a_cache_keeps(monkeypatch: pytest.MonkeyPatch, twice: float, expected: float) -> None:
    """Read in 20 from the cache and in 40 from memory, of twice its size what `twice` says."""
    device = Device("x", caches=(("L3", 1 << 20),), memory_available=1 << 30)
    monkeypatch.setattr(rates, "cpu_facts", lambda: device)
    seen = {1 << 19: 20.0, 2 << 20: twice, rates.CACHES << 20: 40.0}
    monkeypatch.setattr(rates, "_read", lambda form, size, threads: seen[size])
    assert rates.keeps(2) == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr(rates, "_read", lambda form, size, threads: 20.0)
    assert rates.keeps(2) == rates.KEEPS  # nothing to be told apart


def test_what_is_fitted(told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the other process does, on models that are smaller still."""
    solid = cost.Small(128, 192, 2, 256)
    monkeypatch.setattr(cost, "SOLID", solid)
    monkeypatch.setattr(cost, "SMALL", tuple(cost.Small(64, 64, n, 256) for n in (1, 3, 1)))
    monkeypatch.setattr(cost, "TURNS", 1)
    found = cost.measure()
    assert min(found.layer, found.step, found.choice) >= 0 and found.program > 1 << 20
    assert 1 <= found.decode <= cost.MOST and 1 <= found.prompt <= cost.MOST
    held = Source(cost.write(tmp_path / "held", solid, cost.HELD))
    assert held.format_names() == ["int8-g64"] and held.spec.num_layers == 2


def test_overheads_of_a_damaged_file(told: list[str]) -> None:
    good = cost.measured()
    path = cpu._cache_file(cost.FILE)
    for broken in ({}, {"layer": "x"}, None, {**vars(good), "decode": -1.0}):
        keys = json.loads(path.read_text())
        path.write_text(json.dumps(dict.fromkeys(keys, broken)))
        cost.measured.cache_clear()
        assert cost.measured() == good
    assert told == ["onecard.cost"] * 5


def test_where_nothing_can_be_written_a_process_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cpu.remember("some.json", "a", 1) and not cpu.remember("some.json", "b", 2)
    assert cpu.remembered("some.json") == {"a": 1, "b": 2}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cpu.remembered("some.json") == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cpu.forget("some.json")
    assert cpu.remembered("some.json") == {}


def test_measuring_again_forgets_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (rates.FILE, cost.FILE):
        assert cpu.remember(name, "a machine", 1)
    monkeypatch.setattr("onecard.kernels.tune.apply", lambda refresh: None)
    monkeypatch.setattr(cpu, "info", lambda refresh: Report((Row("cpu", "cores", 2),)))
    look.info(json=True)
    assert cpu.remembered(rates.FILE) and cpu.remembered(cost.FILE)
    look.info(refresh=True, json=True)
    assert not cpu.remembered(rates.FILE) and not cpu.remembered(cost.FILE)
