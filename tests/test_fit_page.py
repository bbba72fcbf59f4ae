"""The page of a fit: all that was found out is on it, it asks nobody, and nobody's text becomes its own."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import call
from test_render import EVIL, HARMFUL, Page, comparison, one_model, width_on_a_phone

from onecard.core.errors import BadRequest
from onecard.core.settings import format_size
from onecard.fit.goal import Goal
from onecard.fit.result import (
    FILE,
    Attempt,
    FitResult,
    Gate,
    Held,
    Part,
    Place,
    Point,
    Promise,
    Said,
    Sample,
    Speed,
    Tried,
)  # fmt: skip
from onecard.render import compared, fit_report, fit_to_html, to_html
from onecard.render.fit_plots import bits_of, front_of, harm_of, kind_of, memory_of, speeds_of

FORMATS = {
    "int2-g64": 2.25,
    "int3-g64": 3.25,
    "int4-g64": 4.25,
    "sparse0.5(int8-g64)": 5.25,
    "int8-g64": 8.25,
}
PARTS = ("attention.in", "attention.out", "feed_forward.in", "feed_forward.out")


def place(layer: int, part: str, layers: int) -> Place:
    weights = 4_194_304 * (3 if part.startswith("feed") else 1)
    size = {name: int(weights * bits / 8) for name, bits in FORMATS.items()}
    harm = {
        name: 0.3
        * 2.0 ** (-1.9 * bits)
        * (3 if layer in (0, layers - 1) else 1 + layer / layers)
        * (2.5 if part.endswith("out") else 1)
        for name, bits in FORMATS.items()
    }
    tried = tuple(
        Tried(name, harm[name], size[name], size[name] + 4096, 1e-4 * FORMATS[name])
        for name in FORMATS
    )
    names = list(FORMATS)
    format = names[
        min(len(names) - 1, 1 + (layer * 7 + len(part)) % 3 + (layer in (0, layers - 1)))
    ]
    return Place(
        f"blocks.{layer}.{part}",
        layer,
        part,
        weights,
        format,
        FORMATS[format],
        harm[format],
        size[format],
        size[format] + 4096,
        "int2-g64 here costs more KL than a bit elsewhere",
        tried,
    )


def fitted(layers: int = 22, kept: bool = True, name: str = "llama-1.1b") -> FitResult:
    places = tuple(place(i, part, layers) for i in range(layers) for part in PARTS)
    places += (
        Place(
            "tables",
            None,
            "tables",
            65_536_000,
            "int8-g64",
            8.25,
            0.0004,
            67_584_000,
            90_000_000,
            "small KL",
        ),
        Place("cache", None, "cache", 0, "fp16", 16.0, 0.0, 0, 92_274_688, "nothing to gain"),
    )
    size = sum(p.size for p in places)
    front = tuple(
        Point(
            int(size * (0.6 + 0.05 * i)),
            int(size * (0.8 + 0.05 * i)),
            2.4 + 0.2 * i,
            0.4 * 0.6**i,
            2.718 ** -(0.4 * 0.6**i),
            i == 8,
        )
        for i in range(24)
    )
    promises = (
        Promise(
            "size",
            "B",
            size * 1.02,
            True,
            size,
            4096.0,
            size + 100.0,
            2.2e9,
            True,
            "counted: bytes of the files",
        ),
        Promise(
            "memory",
            "B",
            1.25 * 2**30,
            True,
            1.17e9,
            3e7,
            1.19e9,
            2.6e9,
            True,
            "counted; measured: resident peak",
        ),
        Promise(
            "decode",
            "1/s",
            20.0,
            False,
            31.2,
            3.7,
            29.4,
            7.9,
            True,
            "modelled from measured kernels",
        ),
        Promise(
            "prompt",
            "1/s",
            None,
            False,
            88.0,
            9.0,
            91.5,
            61.0,
            None,
            "modelled from measured kernels",
        ),
        Promise(
            "likelihood",
            "",
            0.99,
            False,
            0.9933,
            0.002,
            0.9921 if kept else 0.9712,
            1.0,
            kept,
            "exp(-KL) per token, the worse of two texts",
        ),
        Promise("kl", "nat", None, True, 0.0067, 0.002, 0.0079, 0.0, None, "mean KL per token"),
        Promise("perplexity", "", None, True, None, None, 7.912, 7.863, None, "on held-out text"),
    )
    contexts = (512, 1024, 2048, 4096)
    memory = tuple(
        Held(
            context,
            (
                Part("attention", 120 << 20),
                Part("feed-forward", 480 << 20),
                Part("embedding", 125 << 20),
                Part("head", 66 << 20),
                Part("kv cache", 22528 * context),
                Part("work space", 40 << 20),
                Part("program", 44 << 20),
                Part("norms", 360 << 10),
            ),
        )
        for context in contexts
    )
    answer = (
        (
            f"{name} fits: 620 MiB, 3.39× smaller, 1.11 GiB in memory with 2048 tokens, 29.4 tokens/s, "
            "99.21% of the original's likelihood kept."
        )
        if kept
        else (f"{name} does not keep what was asked (likelihood 0.9712, asked for 0.99): 620 MiB.")
    )
    return FitResult(
        name,
        "OUT",
        answer,
        kept,
        Goal(memory=int(1.25 * 2**30), speed=20, quality=0.99, context=2048),
        promises,
        front,
        places,
        memory,
        (
            Speed("prompt", 256, 88.0, 91.5, 61.0, 240.0),
            Speed("decode", 2048, 31.2, 29.4, 7.9, 41.0),
        ),
        (
            Gate("held-out", 0.0061, 0.967, 7.912, 7.863, 4096),
            Gate("own words", 0.0079, 0.959, 3.41, 3.38, 2048),
        ),
        (
            Attempt(600_000_000, 0.9902, 0.9868, False, "planned"),
            Attempt(size, 0.9933, 0.9921, True, "harder"),
        ),
        (
            Sample(
                "Once upon a time",
                "there was a girl who lived\nby the sea.",
                "there was a girl who lived\nin a house.",
            ),
            Sample(
                "The machine",
                "was old, and nobody knew how it worked.",
                "was old, and nobody knew what it did.",
            ),
        ),
        (
            Said("speed", "kernels measured on this machine"),
            Said("KL", "over all words of the vocabulary"),
        ),
        (Said("sensitivity", "184 s"), Said("planning", "0.4 s")),
        (Said("cores", "2"), Said("onecard", "0.9")),
        'onecard run OUT "The"',
    )


def everywhere(value: Any, text: str) -> Any:
    """A result with every string replaced."""
    if isinstance(value, str):
        return text
    if isinstance(value, tuple):
        return tuple(everywhere(each, text) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Goal)):
        fields = {
            f.name: everywhere(getattr(value, f.name), text) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    return value


EMPTY = dataclasses.replace(
    fitted(1),
    promises=(),
    front=(),
    places=(),
    memory=(),
    speeds=(),
    gates=(),
    attempts=(),
    samples=(),
    how=(),
    seconds=(),
    environment=(),
)
FITS = {
    "fit": fitted(),
    "missed": fitted(3, False),
    "empty": EMPTY,
    "hostile": everywhere(fitted(2), EVIL),
}


@pytest.mark.parametrize("which", FITS)
def test_the_page_is_whole_and_asks_nobody(which: str) -> None:
    html = fit_to_html(FITS[which])
    page = Page(html)
    names = {name for name, _ in page.tags}
    attributes = {(key, value) for _, attrs in page.tags for key, value in attrs.items()}
    assert not names & {"script", "img", "link", "iframe", "a", "object", "base"}
    assert not [key for key, _ in attributes if key in ("src", "href") or key.startswith("on")]
    assert (
        "@import" not in html
        and "url(" not in html
        and "http:" not in html
        and "https:" not in html
    )
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in attributes
    assert not HARMFUL.search(html) and "nan" not in re.findall(r"\bnan\b", html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    html.encode()


def test_every_number_is_there() -> None:
    fit = FITS["fit"]
    page = Page(fit_to_html(fit))
    text = page.text
    assert fit.answer in text and fit.run in text
    for promise in fit.promises:
        assert promise.how in text
    for shown in (
        "31.2 tok/s",
        "29.4 tok/s",
        "7.90 tok/s",
        "± 3.70 tok/s",
        "99.33 %",
        "99.21 %",
        "7.912",
        "7.863",
        "0.0079",
        "96.70 %",
        "1.25 GiB",
        "72 % of the roof",
    ):
        assert shown in text, shown
    for place_ in fit.places:
        assert place_.where in text and format_size(place_.size) in text
    for held in fit.memory:
        assert format_size(sum(part.bytes for part in held.parts)) in text
        assert all(f"{part.name}: {format_size(part.bytes)}" in text for part in held.parts)
    for point in fit.front:
        assert f"{format_size(point.size)}, KL {point.harm:.3g}" in text
    for tried in fit.places[5].tried:
        assert f"{fit.places[5].where} in {tried.format}: KL {tried.harm:.3g}" in text
    for sample in fit.samples:
        assert sample.prompt in text and sample.original in text and sample.result in text
    for said in (*fit.how, *fit.seconds, *fit.environment):
        assert said.name in text and said.text in text
    for gate in fit.gates:
        assert gate.text in text and f"{gate.tokens:,}" in text


def test_what_was_missed_is_said() -> None:
    page = Page(fit_to_html(FITS["missed"]))
    assert "at least 99.00 %: NOT KEPT" in page.text and ("class", "answer missed") in {
        (key, value) for _, attrs in page.tags for key, value in attrs.items()
    }


@pytest.mark.parametrize("which", FITS)
def test_a_phone_scrolls_tables_not_the_page(which: str, tmp_path: Path) -> None:
    assert width_on_a_phone(fit_to_html(FITS[which]), tmp_path) <= 390


def test_positions() -> None:
    fit = FITS["fit"]
    front = front_of(fit)
    assert front is not None
    assert all(
        0 <= mark.x <= 100 and 0 <= mark.y <= front.height
        for mark in (*front.marks, *front.budgets)
    )
    plans = [mark for mark in front.marks if mark.kind == "plan"]
    assert [mark.x for mark in plans] == sorted(mark.x for mark in plans)
    assert [mark.y for mark in plans] == sorted(
        mark.y for mark in plans
    )  # larger is better, further down
    assert {mark.kind for mark in front.marks} == {"plan", "chosen", "measured"}
    memory = memory_of(fit)
    assert memory is not None and memory.budget is not None
    for bar, held in zip(memory.bars, fit.memory, strict=True):
        ends = [start + length for start, length, _, _ in bar.pieces]
        assert [start for start, *_ in bar.pieces[1:]] == pytest.approx(ends[:-1])
        share = sum(part.bytes for part in held.parts) / max(
            1.25 * 2**30, *(sum(p.bytes for p in h.parts) for h in fit.memory)
        )
        assert ends[-1] == pytest.approx(100 * share)
    speeds = speeds_of(fit)
    assert speeds is not None
    decode = {name: length for name, length, _, _ in speeds.phases[1].bars}
    assert decode == pytest.approx(
        {"original": 790 / 41, "promised": 3120 / 41, "measured": 2940 / 41}
    )
    first, *_, last = harm_of(fit)
    assert first.title == "int2-g64 alone" and last.title == "int8-g64 alone"
    assert all(0 <= cell[0] <= 1 for _, cells in first.lines for cell in cells if cell)
    assert front_of(EMPTY) is None and memory_of(EMPTY) is None and speeds_of(EMPTY) is None


@pytest.mark.parametrize("format, letters", [
    ("int4-g128", "4"), ("int8-row-zp", "8"), ("sparse0.5(int4-g64)", "4s"), ("sparse2:4(bf16)", "16s"),
    ("lowrank64(int8-row)+int2-g64", "r64"), ("codebook3-row", "3c"), ("nf4-g64", "4t"), ("mxfp4", "4t"),
    ("fp8-row", "8t"), ("bf16", "16"), ("ternary-g64", "1.6"), ("hashed8", "has"),
])  # fmt: skip
def test_formats_in_letters(format: str, letters: str) -> None:
    assert kind_of(format) == letters


def test_a_layer_that_was_not_left_out() -> None:
    fit = fitted(3)
    gone = tuple(
        Place(
            f"blocks.{i}", i, "layer", 0, "kept", 0, 0, 0, 0, "no", (Tried("gone", 1.0, 0, 0, 0),)
        )
        for i in range(3)
    )
    more = dataclasses.replace(fit, places=(*fit.places, *gone))
    bits = bits_of(more)
    assert bits is not None and [name for name, _ in bits.lines] == [
        p.replace("_", "-") for p in PARTS
    ]
    assert bits.description.startswith("From 4.25 bits")
    (alone,) = [heat for heat in harm_of(more) if heat.title == "gone alone"]
    assert [name for name, _ in alone.lines] == ["layer"]


def test_a_layer_that_was_left_out() -> None:
    fit = fitted(3)
    gone = {"format": "gone", "bits_per_weight": 0.0, "size": 0, "memory": 0, "harm": 0.0}
    sites = tuple(
        dataclasses.replace(p, **gone, why="gone with its layer") if p.layer == 1 else p
        for p in fit.places
    )
    layer = Place("blocks.1", 1, "layer", 0, "gone", 0, 0.2, 0, 0, "measured to be better")
    front = (dataclasses.replace(fit.front[0], left_out=2), *fit.front[1:])
    less = dataclasses.replace(fit, places=(*sites, layer), front=front, left_out=(1,))
    bits = bits_of(less)
    assert bits is not None and bits.layers == [0, 1, 2]
    for _, cells in bits.lines:
        assert [cell and cell[2] == "-" for cell in cells] == [False, True, False]
    text = Page(fit_to_html(less)).text
    assert "measured to be better" in text and "without 2 blocks" in text
    rows = {row.what: row.value for row in fit_report(less).rows}
    there = {row.what: row.value for row in fit_report(fit).rows}
    assert 0.5 * there["bits_per_weight"] < rows["bits_per_weight"] < 2 * there["bits_per_weight"]


# Several ------------------------------------------------------------------------------------------


def test_several_on_one_page() -> None:
    found = compared([("small", fitted(2)), ("large", fitted(3)), ("int4", one_model())])
    page = Page(to_html(found))
    for name in ("small", "large", "int4"):
        assert name in page.text
    for shown in (
        "29.4 tok/s",
        "29.8 tok/s",
        "3.00 GiB",
        "7.912",
        "5.732",
        "there was a girl who lived\nin a house.",
    ):
        assert shown in page.text, shown
    assert page.count("circle") == 3
    assert "small is the smallest" in page.text and "int4 is of the least perplexity" in page.text
    evil = compared([(EVIL, everywhere(fitted(2), EVIL)), ("b" + EVIL, comparison())])
    assert not HARMFUL.search(to_html(evil)) and "<script" not in to_html(evil)


@pytest.mark.parametrize(
    "where, key", [("promises", "measured"), ("front", "size"), ("places", "harm")]
)
def test_numbers_beyond_any_measure_are_refused(where: str, key: str) -> None:
    data = json.loads(fitted(2).to_json())
    data[where][0][key] = 10**400
    with pytest.raises(BadRequest, match=f"{key} is a number of 401 digits"):
        FitResult.from_json(json.dumps(data))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, fit in (("a", fitted(2)), ("b", fitted(3, False))):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_text(fit.to_json())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report.json").write_text(one_model().to_json())
    assert call("report", tmp_path / "a") == 0
    assert "fits: 620 MiB" in capsys.readouterr().out
    assert (tmp_path / "a" / "report.html").read_text() == fit_to_html(fitted(2))
    out = tmp_path / "all.html"
    assert call("report", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--out", out) == 0
    said = capsys.readouterr()
    assert "3 results: a, b, c" in said.out and str(out) in said.err
    assert Page(out.read_text()).count("circle") == 3
    assert call("report", tmp_path / "a", tmp_path / "b", "--json", "--out", out) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["where"] for row in rows} == {"a", "b"}
    (tmp_path / "b" / "a").mkdir()
    (tmp_path / "b" / "a" / FILE).write_text(fitted(4).to_json())
    both = (
        tmp_path / "a",
        tmp_path / "b" / "a",
        tmp_path / "a",
    )  # of one name, and one of them twice
    assert call("report", *both, "--json", "--out", out) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    first = f"{tmp_path.name}/a"
    assert {row["where"] for row in rows} == {first, "b/a", f"{first} (2)"}
    assert call("report", tmp_path / "a", tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err
    assert call("report") == 2
