"""Report -> people: tables for a terminal, one page for a browser.

A report is cleaned once, at the door, and becomes plain strings and positions; the terminal and the
template (templates/report.html) only draw them. Two shapes of report occur:

    one model      rows of the model and its phases with before and after; layers in a summary
    comparison     two or more places that share a size or a quality: a line each, a column per name

Names of models and texts they wrote are hostile until shown otherwise. Control characters become
visible pictures, so that no escape sequence reaches a terminal; overrides of the writing direction
become U+FFFD; the template escapes every value, no string is marked as safe, and the page forbids
itself scripts and the network.

Notes are told apart by their titles: `answer` (replaces the sentence made here), `sample: NAME`,
`reference: NAME`, `convention: NAME`, `run`; all others are shown as they are. A terminal gets no
samples and no references.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from onecard.core.report import Report, Row, Value
from onecard.render.plots import bars_of, heat_of, scatter_of
from onecard.render.tables import (
    FEW,
    MOST,
    VARIANT,
    Cell,
    Table,
    before_after,
    comparison,
    every_layer,
    is_listing,
    layer_tables,
)  # fmt: skip
from onecard.render.values import (
    LAYER,
    STAGE,
    before_of,
    by_place,
    capital,
    change_of,
    label_of,
    original_of,
    shown,
    sure,
)  # fmt: skip

ANSWER = ("file_bytes", "perplexity", "top1_agreement", "accuracy", "decode_tokens_per_second")
PREFIXES, TITLES = ("sample", "reference", "convention"), ("answer", "run")
HEAT = ("relative_output_error", "relative_weight_error", "sparsity")
NEAR = 0.01
"""A variant keeps the quality when its perplexity rises by no more than this share."""

UNBROKEN = re.compile(r"(?<=[0-9]) (?=%|[KMGT]?i?B\b|tok/s|points)")


@dataclass(frozen=True)
class Page:
    """What terminal and browser share."""

    title: str
    answer: str
    tables: list[Table]
    layers: list[Table]
    every_layer: Table | None
    notes: dict[str, list[tuple[str, str]]]


def to_html(report: Report) -> str:
    """One self-contained page."""
    report = cleaned(report)
    page, (whole, layers) = _page(report), _parted(report)
    scatters = scatter_of(whole)
    bars = ("decode_tokens_per_second",) if scatters else ("file_bytes", "decode_tokens_per_second")
    return (
        templates()
        .get_template("report.html")
        .render(
            page=replace(page, answer=UNBROKEN.sub("\u00a0", page.answer)),
            scatters=scatters,
            bars=[picture for what in bars for picture in bars_of(whole, what)],
            heats=[picture for what in HEAT for picture in heat_of(layers, what)],
            environment=[
                (label_of(k), shown(Row("", k, v))) for k, v in report.environment.items()
            ],
            left_out=max(0, len({row.where for row in layers}) - MOST),
        )
    )


def templates() -> Environment:
    """Every value is escaped, and a name that is not there is an error."""
    return Environment(
        loader=PackageLoader("onecard"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def to_terminal(report: Report) -> str:
    """What `terminal` prints, without colour, 100 columns wide."""
    out = io.StringIO()
    terminal(report, Console(file=out, width=100, color_system=None))
    return out.getvalue()


def terminal(report: Report, console: Console) -> None:
    """The answer, the tables, a summary of the layers, conventions and notes."""
    page = _page(cleaned(report))
    console.print(Text(page.title, "bold"))
    if page.answer:
        console.print(Text(page.answer))
    few = page.every_layer is not None and len(page.every_layer.groups[0][1]) <= FEW
    for table in (*page.tables, *([page.every_layer] if few else page.layers)):
        if table:
            console.print()
            console.print(_rich(table, console.width))
    for title, text in (note for kind in ("convention", "", "run") for note in page.notes[kind]):
        console.print()
        console.print(Text.assemble((f"{title}: ", "bold"), text))


def _rich(table: Table, room: int) -> RichTable:
    """A table as rich draws it; where that makes it fit into `room`, only words are folded."""
    title = Text(table.title, "bold")
    drawn = RichTable(title=title, title_justify="left", box=None, pad_edge=False)
    rows: list[tuple[str, list[list[Text]]]] = []
    for name, lines in table.groups:
        widths = [max(len(cell.small) for cell in column) for column in zip(*lines, strict=True)]
        rows.append((name, [list(map(_rich_cell, line, widths)) for line in lines]))
    columns = list(zip(*(line for _, lines in rows for line in lines), strict=True))
    heads = [max(map(len, label.split()), default=0) for label in table.head]
    full = [max(map(len, column)) for column in columns] if columns else heads
    words = [max(len(word) for cell in column for word in (*cell.plain.split(), ""))
             for column in columns] if columns else heads  # fmt: skip
    least = [max(head, wide if number else word) for head, wide, word, number
             in zip(heads, full, words, table.numeric, strict=True)]  # fmt: skip
    tight = _fits(least, room) and not _fits(map(max, map(len, table.head), full), room)
    for label, number, head, wide in zip(table.head, table.numeric, heads, full, strict=True):
        drawn.add_column(
            Text(label, "dim"),
            justify="right" if number else "left",
            overflow="fold",
            min_width=head,
            width=max(head, wide) if tight and number else None,
        )
    for name, cells in rows:
        if name:
            drawn.add_row(Text(name, "dim italic"))
        for line in cells:
            drawn.add_row(*line)
    return drawn


def _fits(widths: Iterable[int], room: int) -> bool:
    return sum(width + 2 for width in widths) - 2 <= room


def _rich_cell(cell: Cell, width: int) -> Text:
    """The text and, behind it, the small one; in a column of numbers both stay aligned."""
    small = cell.small.rjust(width) if cell.number else cell.small
    return Text.assemble(cell.text, (f"  {small}" if small else "", "dim"))


# A report as a page.


def _page(report: Report) -> Page:
    whole, layers = _parted(report)
    variants = _variants(whole)
    compared = [row for row in whole if row.where in variants]
    others = [row for row in whole if row.where not in variants]
    notes = _notes(report)
    return Page(
        title=report.title or "Report",
        answer=notes["answer"][0][1] if notes["answer"] else _answer(whole, variants),
        tables=[*comparison(compared, variants), *before_after(others)],
        layers=layer_tables(layers),
        every_layer=every_layer(layers),
        notes=notes,
    )


def _parted(report: Report) -> tuple[list[Row], list[Row]]:
    """The rows of the whole (models, variants, phases), and those of layers."""
    layers = [row for row in report.rows if LAYER.fullmatch(row.where)]
    return [row for row in report.rows if not LAYER.fullmatch(row.where)], layers


def _variants(rows: list[Row]) -> list[str]:
    """The places that are compared: those that share a size or a quality with another place."""
    places: dict[str, set[str]] = {}
    for row in rows:
        if row.what in VARIANT:
            places.setdefault(row.what, set()).add(row.where)
    shared = {where for found in places.values() if len(found) > 1 for where in found}
    return list(dict.fromkeys(row.where for row in rows if row.where in shared))


def _notes(report: Report) -> dict[str, list[tuple[str, str]]]:
    """The notes by kind, under their names; "" holds those of no kind."""
    kinds: dict[str, list[tuple[str, str]]] = {kind: [] for kind in (*PREFIXES, *TITLES, "")}
    for title, text in report.notes:
        kind, _, name = title.partition(": ")
        if title in TITLES:
            kinds[title].append((title, text))
        elif kind in PREFIXES and name:
            kinds[kind].append((label_of(name) if kind == "convention" else name, text))
        else:
            kinds[""].append((title, text))
    return kinds


def _answer(rows: list[Row], variants: list[str]) -> str:
    if variants:
        return _comparison_answer(rows, variants)
    parts = []
    final = [row for row in rows if not STAGE.fullmatch(row.where)]
    for row in (row for what in ANSWER for row in final if row.what == what):
        change = f" ({change_of(row)})" if change_of(row) else ""
        before = "" if row.before is None else f"from {before_of(row)} to "
        text = " on the calibration text" if row.where == "calibration" else ""
        parts.append(f"{label_of(row.what)}{text} {before}{shown(row)}{change}")
    if rows and is_listing(rows):
        return "Each name, and what it is good for."
    if not parts:
        return "" if rows else "Nothing was measured."
    return f"{capital('; '.join(parts))}."


def _comparison_answer(rows: list[Row], variants: list[str]) -> str:
    """The smallest variant that stays near the original, or the one that comes closest."""
    original = original_of(variants)
    size, quality = by_place(rows, "file_bytes"), by_place(rows, "perplexity")
    rivals = [name for name in variants if name != original and name in size and name in quality]
    if not rivals or original not in size or original not in quality:
        return f"{len(variants)} variants are compared with {original}."
    level = sure(quality[original])
    near = [name for name in rivals if sure(quality[name]) <= (1 + NEAR) * level]
    within = f"{100 * NEAR:g} % of {original}"
    if near:
        best = min(near, key=lambda name: (sure(size[name]), sure(quality[name])))
        start = f"{best} is the smallest that keeps perplexity within {within}"
    else:
        best = min(rivals, key=lambda name: sure(quality[name]))
        start = f"None keeps perplexity within {within}; {best} is closest"
    change = change_of(replace(size[best], before=size[original].value))
    return (f"{start}: {shown(size[best])} ({change}), perplexity {shown(quality[best])} "
            f"against {shown(quality[original])}.")  # fmt: skip


# At the door.


def cleaned(report: Report) -> Report:
    """The same report with every string fit to be shown."""

    def line(text: object) -> str:
        return str(text).translate(_LINE)

    def value(given: Value) -> Value:
        return given if given is None or isinstance(given, (bool, int, float)) else line(given)

    rows = (Row(line(r.where), line(r.what), value(r.value), line(r.unit), value(r.before))
            for r in report.rows)  # fmt: skip
    notes = ((line(title), str(text).replace("\r\n", "\n").translate(_TEXT))
             for title, text in report.notes)  # fmt: skip
    facts = {line(key): value(item) for key, item in report.environment.items()}
    return Report(tuple(rows), facts, line(report.title), tuple(notes))


_PICTURES = {code: 0x2400 + code for code in range(32)}
_PICTURES |= {0x7F: 0x2421, 0x2028: 0x240A, 0x2029: 0x240A}
_REPLACED = ((0x80, 0xA0), (0x202A, 0x202F), (0x2066, 0x206A), (0xD800, 0xE000))
"""C1 controls, embeddings and overrides, isolates, halves of surrogate pairs."""
_LINE = _PICTURES | {code: 0xFFFD for start, end in _REPLACED for code in range(start, end)}
_TEXT = {code: sign for code, sign in _LINE.items() if code not in (9, 10)}
