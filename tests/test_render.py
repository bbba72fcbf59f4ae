"""Reports as people see them: what is there, what must not be, and numbers for eyes.

The page is read with html.parser; where Chromium is installed it is also laid out for a phone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onecard.core.errors import BadRequest
from onecard.core.report import Report, Row, Value
from onecard.render import to_html, to_terminal

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
EVIL += "\x1b[31m\x00\u202eevil\u200f\ud800"
HARMFUL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINEARS = ("attention.q", "attention.o", "feed_forward.down")


class Page(HTMLParser):
    """Tags in balance, attributes, and the text without style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def one_model(layers: int = 8) -> Report:
    rows = [
        Row.of("model", "file_bytes", 3 * 2**30, 12 * 2**30),
        Row.of("model", "perplexity", 5.7321, 5.678),
        Row.of("model", "top1_agreement", 0.9561),
        Row.of("model", "decode_tokens_per_second", 29.81, 8.12),
        Row("walk", "seconds", 4212.0, "s"),
    ]
    for i in range(layers):
        for k, name in enumerate(LINEARS):
            where = f"blocks.{i}.{name}"
            rows.append(Row(where, "format", "int4-g128"))
            rows.append(Row(where, "relative_output_error", 0.001 * (1 + i + 10 * k)))
    notes = (
        ("sample: dense", "Once\n  upon a time"), ("convention: perplexity", "windows of 2048"),
        ("reference: GPTQ", "arXiv 2210.17323"), ("run", "onecard run OUT"), ("Remark", "a remark"),
    )  # fmt: skip
    return Report(tuple(rows), {"cores": 2}, "gptq-int4", notes)


def comparison() -> Report:
    names = {"dense": (8.0, 5.678), "int8": (4.0, 5.681), "int4 GPTQ": (2.1, 5.712),
             "int2 rounding": (1.2, 23841.0)}  # fmt: skip
    rows = []
    for name, (size, perplexity) in names.items():
        rows.append(Row(name, "format", f"format of {name}"))
        rows.append(Row.of(name, "file_bytes", int(size * 2**30)))
        rows.append(Row.of(name, "perplexity", perplexity))
        rows.append(Row.of(name, "decode_tokens_per_second", 16 / size))
    rows.append(Row.of("int8", "kl", float("nan")))
    return Report((*rows, Row("walk", "seconds", 3.0, "s")), title="four formats")


def hostile() -> Report:
    rows = (Row.of(EVIL, "file_bytes", 1), Row.of("b" + EVIL, "file_bytes", 2),
            Row.of(EVIL, "perplexity", 1.0), Row.of("b" + EVIL, "perplexity", 2.0),
            Row("x", EVIL, EVIL, EVIL, EVIL), Row("blocks.0." + EVIL, "sparsity", 0.1),
            Row("blocks.1." + EVIL, "sparsity", 0.2))  # fmt: skip
    kinds = ("", "sample: ", "reference: ", "convention: ")
    return Report(rows, {EVIL: EVIL}, EVIL, tuple((kind + EVIL, EVIL) for kind in kinds))


REPORTS = {
    "model": one_model(), "comparison": comparison(), "hostile": hostile(), "empty": Report(()),
}  # fmt: skip


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]


def test_the_page_is_whole_and_asks_nobody(report: Report) -> None:
    html = to_html(report)
    page = Page(html)
    names = {name for name, _ in page.tags}
    attributes = {(key, value) for _, attrs in page.tags for key, value in attrs.items()}
    assert not names & {"script", "img", "link", "iframe", "a", "object", "base"}
    assert not [key for key, _ in attributes if key in ("src", "href") or key.startswith("on")]
    assert "@import" not in html and "url(" not in html and "http:" not in html
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in attributes
    html.encode()


def test_pictures_and_tables_are_named(report: Report) -> None:
    page = Page(to_html(report))
    identities = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identities) == len(set(identities))
    for name, attrs in page.tags:
        if name == "th":
            assert attrs["scope"] in ("row", "col", "rowgroup")
        if name == "svg":
            assert set(str(attrs["aria-labelledby"]).split()) <= set(identities)


def test_hostile_text_stays_text() -> None:
    html, text = to_html(hostile()), to_terminal(hostile())
    for shown in (html, text):
        assert not HARMFUL.search(shown)
        assert "␛[31m␀" in shown
    assert "<script" not in html and "<img" not in html
    assert "<script>alert(1)</script>" in Page(html).text


def test_markup_is_not_read_in_a_terminal() -> None:
    assert "[red]x[/red]" in to_terminal(Report((), title="[red]x[/red]"))


def test_one_model_shows_every_row() -> None:
    report = one_model()
    page = Page(to_html(report))
    for row in report.rows:
        assert row.where in page.text or row.where == "model"
    expected = ("3.00 GiB", "12.00 GiB", "4.00× smaller", "5.732", "5.678", "+0.95 %", "95.61 %",
                "29.8 tok/s", "3.67× faster", "1 h 10 min")  # fmt: skip
    for shown in expected:
        assert shown in page.text and shown in to_terminal(report)
    for _, text in report.notes:
        assert text in page.text
    assert page.count("svg") == 1 and page.count("rect") == 8 * len(LINEARS)


def test_a_terminal_sums_up_many_layers_and_lists_few() -> None:
    many, few = to_terminal(one_model(8)), to_terminal(one_model(2))
    assert "median" in many and "blocks.7.feed_forward.down" in many
    assert "blocks.0.attention.q" not in many
    assert "median" not in few and "blocks.0.attention.q" in few


def test_stages_of_a_chain_are_told_apart() -> None:
    places = [f"blocks.{i}.{name}" for i in range(8) for name in LINEARS]
    shown = to_terminal(Report((
        Row.of("model", "file_bytes", 2**30, 2**31),
        Row("stage 1: calibration", "perplexity", 7.25, before=6.5),
        *(Row(f"stage 1: blocks.{i}", "influence", 0.1 * i) for i in range(8)),
        *(Row(f"stage 2: {place}", "format", "int4-g64") for place in places),
        *(Row(f"stage 2: {place}", "relative_output_error", 0.01 * i) for i, place in enumerate(places)),
    )))  # fmt: skip
    answer, tables = " ".join(shown.split()).split("Before and after", 1)
    assert "perplexity" not in answer and "stage 1: calibration" in tables
    assert "Layers, stage 1" in tables and "Layers by format, stage 2" in tables
    assert shown.count("int4-g64") == 1 and "stage 2: blocks" not in shown
    page = Page(to_html(Report((Row("calibration", "perplexity", 7.25, before=6.5),))))
    assert "Perplexity on the calibration text from 6.500 to 7.250" in page.text


def test_experts_share_a_line() -> None:
    rows = tuple(Row(f"blocks.{i}.feed_forward.expert{e}.up", "sparsity", 0.1 * e)
                 for i in range(3) for e in range(4))  # fmt: skip
    page = Page(to_html(Report(rows)))
    assert page.count("rect") == 3
    assert "feed_forward.experts.up" in page.text
    assert "blocks.2.feed_forward.expert3.up: 30.00 %" in page.text


def test_a_comparison_is_one_table() -> None:
    report = comparison()
    text, page = to_terminal(report), Page(to_html(report))
    assert "int4 GPTQ is the smallest that keeps perplexity within 1 % of dense" in text
    headline = text.split("Comparison")[1].split("Quality")[0]
    for name in ("dense", "int8", "int4 GPTQ", "int2 rounding"):
        line = next(line for line in headline.splitlines() if line.startswith(name))
        assert f"format of {name}" in line and "GiB" in line and "tok/s" in line and "n/a" in line
    for row in report.rows:
        assert row.where in page.text
    assert page.count("circle") == 4 and "(logarithmic)" in page.text
    assert "+0.60 %" in page.text and "4,199× higher" in page.text


def test_nothing_near_the_original() -> None:
    rows = (Row.of("dense", "file_bytes", 100), Row.of("dense", "perplexity", 5.0),
            Row.of("int2", "file_bytes", 10), Row.of("int2", "perplexity", 9.0))  # fmt: skip
    shown = to_terminal(Report(rows))
    assert "None keeps perplexity within 1 % of dense; int2 is closest" in shown


def test_an_answer_may_be_given() -> None:
    assert "It fits." in to_terminal(Report((), notes=(("answer", "It fits."),)))
    assert "Nothing was measured." in Page(to_html(Report(()))).text


@pytest.mark.parametrize(
    ("what", "value", "shown"),
    [
        ("file_bytes", 1536, "1.50 KiB"), ("disk_bytes", 10**400, str(10**400)),
        ("perplexity", None, "n/a"), ("perplexity", float("inf"), "n/a"),
        ("perplexity", 5, "5.000"),
        ("kl", 0.02134, "0.0213 nat"), ("bits_per_weight", 4.25, "4.25"),
        ("relative_output_error", 0.0001234, "0.0123 %"), ("sparsity", 0.5, "50.00 %"),
        ("prompt_tokens_per_second", 1234.5, "1,234 tok/s"), ("seconds", 0.0021, "2.1 ms"),
        ("seconds", 99.97, "100.0 s"), ("seconds", 7261, "2 h 1 min"),
        ("parameters", 7.24e9, "7.24 billion"), ("unheard_of", -1e-9, "-1e-09"),
        ("calibration_tokens", 262144, "262,144"), ("format", "int4-g128", "int4-g128"),
        ("read_bandwidth", 23.456e9, "23.46 GB/s"), ("peak_fp32", 98.7654e9, "98.77 GOP/s"),
        ("peak_int8", 1.5e12, "1.500 TOP/s"), ("peak_memory_bytes", 1024, "1.00 KiB"),
        ("accuracy_by_length", 0.25, "25.00 %"), ("streamed", True, "yes"),
        ("unheard_of", 0.00123456, "0.001235"),
    ],
)  # fmt: skip
def test_numbers_for_eyes(what: str, value: Value, shown: str) -> None:
    units = {"kl": "nat", "bits_per_weight": "bit", "read_bandwidth": "B/s", "peak_fp32": "1/s",
             "peak_int8": "1/s"}  # fmt: skip
    report = Report((Row("model", what, value, units.get(what, "")),))
    assert shown in Page(to_html(report)).text.splitlines()


def test_recipes_are_a_plain_list() -> None:
    rows = tuple(Row(name, "good_for", f"what {name} is for") for name in ("int8", "gptq-int4"))
    for shown in (to_terminal(Report(rows, title="Recipes")), Page(to_html(Report(rows))).text):
        assert "recorded" not in shown and "Measured" not in shown
        assert shown.count("gptq-int4") == 2 and shown.count("int8") == 2


def test_a_plan_is_not_called_measured() -> None:
    for shown in (to_terminal(Report((Row("plan", "disk_bytes", 1),), title="Plan")),
                  Page(to_html(Report((Row("plan", "seconds", 1.0),)))).text):  # fmt: skip
        assert "Planned" in shown and "Measured" not in shown and "recorded" not in shown


def test_rows_are_in_sensible_groups() -> None:
    rows = (Row("model", "questions", 3), Row("model", "accuracy", 0.5), Row("model", "part_bytes", 9),
            Row("plan", "disk_bytes", 1), Row("plan", "output_bytes", 1))  # fmt: skip
    shown = to_terminal(Report(rows))
    assert "Memory and work" not in shown
    assert "working space on disk" in shown and "output size" in shown
    assert shown.index("Size") < shown.index("output size") < shown.index("Quality")
    assert shown.index("Quality") < shown.index("questions")


ROW = '{"rows": [{"where": "a", "what": "b", "value": 1}]'


@pytest.mark.parametrize("junk", [
    "", "[" * 100_000, '{"rows":' * 100_000, "[]", "1", "null", "{}", '{"rows": 1}',
    '{"rows": [1]}', '{"rows": [{}]}', '{"rows": [{"where": 1, "what": "b", "value": 1}]}',
    '{"rows": [{"where": "a", "what": "b", "value": []}]}', ROW + ', "title": 1}',
    ROW + ', "notes": 1}', ROW + ', "notes": [[1, 2]]}', ROW + ', "notes": [["a"]]}',
    ROW + ', "environment": []}', ROW + ', "environment": {"a": []}}',
    '{"rows": [' + "9" * 5000 + "]}",
])  # fmt: skip
def test_junk_is_no_report(junk: str) -> None:
    assert Report.from_json(ROW + "}").value("b") == 1
    with pytest.raises(BadRequest, match="not a report"):
        Report.from_json(junk)


def width_on_a_phone(html: str, folder: Path) -> int:
    """Pixels across of a page in a frame of 390, in a real browser; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    html = re.sub("<meta http-equiv[^>]*>", "", html)
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    (folder / "page.html").write_text(html.replace("</body>", tell), encoding="utf-8")
    (folder / "phone.html").write_text(
        "<script>onmessage = event => document.title = 'width ' + event.data</script>"
        "<iframe src='page.html' style='width: 390px; height: 800px'></iframe>"
    )
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu",
               "--virtual-time-budget=3000", f"--user-data-dir={folder / 'profile'}",
               "--dump-dom", (folder / "phone.html").as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search("<title>width ([0-9]+)</title>", shown)
    assert found
    return int(found[1])


@pytest.mark.parametrize("name", REPORTS)
def test_a_phone_scrolls_tables_not_the_page(name: str, tmp_path: Path) -> None:
    assert width_on_a_phone(to_html(REPORTS[name]), tmp_path) <= 390
