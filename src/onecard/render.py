"""Report -> people: tables for a terminal, one page for a browser.

A report is cleaned once, at the door, and becomes plain strings and positions; the terminal and the
template (templates/report.html) only draw them. Two shapes of report occur:

    one model      rows of the model and its phases with before and after; layers in a summary
    comparison     two or more places that share a size or a quality: a line each, a column per name

Names of models and texts they wrote are hostile until shown otherwise. Control characters become
visible pictures, so that no escape sequence reaches a terminal; overrides of the writing direction
become U+FFFD; the template escapes every value, no string is marked as safe, and the page forbids
itself scripts and the network. Pictures are SVG whose positions across are per cent, so that their
text keeps its size on a phone.

Notes are told apart by their titles: `answer` (replaces the sentence made here), `sample: NAME`,
`reference: NAME`, `convention: NAME`, `run`; all others are shown as they are. A terminal gets no
samples and no references.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from onecard.core.report import Report, Row, Value
from onecard.core.settings import format_size

GROUPS = {
    "Size": ("format", "file_bytes", "part_bytes", "disk_bytes", "output_bytes", "bits_per_weight",
             "parameters", "sparsity"),
    "Quality": ("perplexity", "nats_per_token", "bits_per_byte", "kl", "top1_agreement",
                "accuracy", "accuracy_by_length", "predicted_tokens", "questions"),
    "Speed": ("decode_tokens_per_second", "prompt_tokens_per_second", "time_to_first_token",
              "bandwidth_share", "operations_share", "energy_joules"),
}  # fmt: skip
REST = "Memory and work"
HEADLINE = ("format", "file_bytes", "bits_per_weight", "perplexity", "kl", "top1_agreement",
            "accuracy", "decode_tokens_per_second")  # fmt: skip
ANSWER = ("file_bytes", "perplexity", "top1_agreement", "accuracy", "decode_tokens_per_second")
LABELS = {
    "file_bytes": "file size", "disk_bytes": "working space on disk",
    "output_bytes": "output size", "part_bytes": "size",
    "kl": "KL", "top1_agreement": "top-1 agreement", "energy_joules": "energy",
    "decode_tokens_per_second": "decode", "prompt_tokens_per_second": "prompt reading",
    "bandwidth_share": "share of bandwidth", "operations_share": "share of operations",
    "peak_memory_bytes": "peak memory", "planned_peak_bytes": "planned peak memory",
    "seconds": "time",
}  # fmt: skip
SHARES = {"top1_agreement", "accuracy", "accuracy_by_length", "bandwidth_share",
          "operations_share", "sparsity", "relative_output_error", "relative_weight_error"}  # fmt: skip
MORE_IS_BETTER = {*GROUPS["Speed"], "top1_agreement", "accuracy", "accuracy_by_length",
                  "calibration_tokens"} - {"time_to_first_token", "energy_joules"}  # fmt: skip
PREFIXES, TITLES = ("sample", "reference", "convention"), ("answer", "run")
DECIMALS = {"perplexity": 3, "bits_per_weight": 2, "nats_per_token": 4, "bits_per_byte": 4, "kl": 4}
WORDS = {"B": ("larger", "smaller"), "1/s": ("faster", "slower"), "s": ("longer", "shorter"),
         "B/s": ("faster", "slower")}  # fmt: skip
HEAT = ("relative_output_error", "relative_weight_error", "sparsity")
VARIANT = {"file_bytes", "bits_per_weight", "decode_tokens_per_second", *GROUPS["Quality"]} - {
    "predicted_tokens", "questions"}  # fmt: skip
ORIGINALS = ("dense", "original", "baseline")
NEAR = 0.01
"""A variant keeps the quality when its perplexity rises by no more than this share."""

FEW, WORST, MOST = 12, 5, 2000
"""Layers shown one by one in a terminal; the worst that are named; the most a page lists."""

LAYER = re.compile(r"blocks\.([0-9]{1,6})(?:\.(.+))?")
UNBROKEN = re.compile(r"(?<=[0-9]) (?=%|[KMGT]?i?B\b|tok/s|points)")
MISSING = "n/a"


@dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""
    number: bool = False


@dataclass(frozen=True)
class Table:
    """Lines in titled groups; the first cell of a line is its header."""

    title: str
    head: tuple[str, ...]
    groups: list[tuple[str, list[list[Cell]]]]

    @property
    def numeric(self) -> list[bool]:
        lines = [line for _, lines in self.groups for line in lines]
        return [any(line[i].number for line in lines) for i in range(len(self.head))]


@dataclass(frozen=True)
class Picture:
    """What every picture says in words."""

    title: str
    description: str


@dataclass(frozen=True)
class Scatter(Picture):
    """Points (name, words, x, y, y of its label); ticks (place, text). x is per cent, y pixels."""

    height: int
    points: list[tuple[str, str, float, float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Bars(Picture):
    """(name, share of the longest in per cent, value)."""

    bars: list[tuple[str, float, str]]


@dataclass(frozen=True)
class Heat(Picture):
    """Lines of (name, cells); a cell is (shade 0 to 1, words), None where there is no linear."""

    layers: list[int]
    lines: list[tuple[str, list[tuple[float, str] | None]]]


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
    report = _cleaned(report)
    page, (whole, layers) = _page(report), _parted(report)
    scatters = _scatter(whole)
    bars = ("decode_tokens_per_second",) if scatters else ("file_bytes", "decode_tokens_per_second")
    templates = Environment(
        loader=PackageLoader("onecard"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template("report.html").render(
        page=replace(page, answer=UNBROKEN.sub("\u00a0", page.answer)),
        scatters=scatters,
        bars=[picture for what in bars for picture in _bars(whole, what)],
        heats=[picture for what in HEAT for picture in _heat(layers, what)],
        environment=[(_label(k), _shown(Row("", k, v))) for k, v in report.environment.items()],
        left_out=max(0, len({row.where for row in layers}) - MOST),
    )


def to_terminal(report: Report) -> str:
    """What `terminal` prints, without colour, 100 columns wide."""
    out = io.StringIO()
    terminal(report, Console(file=out, width=100, color_system=None))
    return out.getvalue()


def terminal(report: Report, console: Console) -> None:
    """The answer, the tables, a summary of the layers, conventions and notes."""
    page = _page(_cleaned(report))
    console.print(Text(page.title, "bold"))
    console.print(Text(page.answer))
    few = page.every_layer is not None and len(page.every_layer.groups[0][1]) <= FEW
    for table in (*page.tables, *([page.every_layer] if few else page.layers)):
        if table:
            console.print()
            console.print(_rich(table))
    for title, text in (note for kind in ("convention", "", "run") for note in page.notes[kind]):
        console.print()
        console.print(Text.assemble((f"{title}: ", "bold"), text))


def _rich(table: Table) -> RichTable:
    title = Text(table.title, "bold")
    drawn = RichTable(title=title, title_justify="left", box=None, pad_edge=False)
    for label, number in zip(table.head, table.numeric, strict=True):
        widest = max(map(len, label.split()), default=0)
        drawn.add_column(
            Text(label, "dim"),
            justify="right" if number else "left",
            overflow="fold",
            min_width=widest,
        )
    for name, lines in table.groups:
        if name:
            drawn.add_row(Text(name, "dim italic"))
        widths = [max(len(cell.small) for cell in column) for column in zip(*lines, strict=True)]
        for line in lines:
            drawn.add_row(*map(_rich_cell, line, widths))
    return drawn


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
        tables=[*_comparison(compared, variants), *_before_after(others)],
        layers=_layer_tables(layers),
        every_layer=_every_layer(layers),
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
            kinds[kind].append((_label(name) if kind == "convention" else name, text))
        else:
            kinds[""].append((title, text))
    return kinds


def _answer(rows: list[Row], variants: list[str]) -> str:
    if variants:
        return _comparison_answer(rows, variants)
    parts = []
    for row in (row for what in ANSWER for row in rows if row.what == what):
        change = f" ({_change(row)})" if _change(row) else ""
        before = "" if row.before is None else f"from {_before(row)} to "
        parts.append(f"{_label(row.what)} {before}{_shown(row)}{change}")
    if rows and _listing(rows):
        return "Each name, and what it is good for."
    if not parts:
        return f"{len(rows)} values were recorded." if rows else "Nothing was measured."
    return f"{_capital('; '.join(parts))}."


def _comparison_answer(rows: list[Row], variants: list[str]) -> str:
    """The smallest variant that stays near the original, or the one that comes closest."""
    original = next((name for name in variants if name.lower() in ORIGINALS), variants[0])
    size, quality = _found(rows, "file_bytes"), _found(rows, "perplexity")
    rivals = [name for name in variants if name != original and name in size and name in quality]
    if not rivals or original not in size or original not in quality:
        return f"{len(variants)} variants are compared with {original}."
    level = _sure(quality[original])
    near = [name for name in rivals if _sure(quality[name]) <= (1 + NEAR) * level]
    within = f"{100 * NEAR:g} % of {original}"
    if near:
        best = min(near, key=lambda name: (_sure(size[name]), _sure(quality[name])))
        start = f"{best} is the smallest that keeps perplexity within {within}"
    else:
        best = min(rivals, key=lambda name: _sure(quality[name]))
        start = f"None keeps perplexity within {within}; {best} is closest"
    change = _change(replace(size[best], before=size[original].value))
    return (f"{start}: {_shown(size[best])} ({change}), perplexity {_shown(quality[best])} "
            f"against {_shown(quality[original])}.")  # fmt: skip


# Tables.


def _listing(rows: list[Row]) -> bool:
    """Whether nothing was measured: the rows only say what recipes are good for."""
    return all(row.what == "good_for" for row in rows)


def _before_after(rows: list[Row]) -> list[Table]:
    if not rows:
        return []
    if _listing(rows):
        lines = [[Cell(row.where), Cell(_shown(row))] for row in rows]
        return [Table("Good for", ("name", "good for"), [("", lines)])]
    changed = any(row.before is not None for row in rows)
    usual = "model" if any(row.where == "model" for row in rows) else rows[0].where
    groups = []
    for group, whats in _grouped(row.what for row in rows):
        lines = []
        for row in (row for what in whats for row in rows if row.what == what):
            texts = [_before(row), _shown(row), _change(row)] if changed else [_shown(row)]
            name = Cell(_label(row.what), "" if row.where == usual else row.where)
            number = not isinstance(row.value, str)
            lines.append([name, *(Cell(text, number=number) for text in texts)])
        groups.append((group, lines))
    head = ("", "before", "after", "change") if changed else ("", "value")
    if len(groups) == 1:
        groups = [("", groups[0][1])]
    title = "Before and after" if changed else "Measured"
    return [Table(title if usual == "model" else f"{title}: {usual}", head, groups)]


def _comparison(rows: list[Row], variants: list[str]) -> list[Table]:
    """The headline; quality with its change; whatever of the rest the headline left out."""
    if not rows:
        return []
    whats = {row.what for row in rows}
    tables = [_matrix("Comparison", rows, variants, [what for what in HEADLINE if what in whats])]
    for group, names in _grouped(row.what for row in rows):
        if group == "Quality" or not set(names) <= set(HEADLINE):
            tables.append(_matrix(group, _against_original(rows, variants), variants, names))
    return tables


def _against_original(rows: list[Row], variants: list[str]) -> list[Row]:
    """Rows without a `before` of their own take the original's value as theirs."""
    original = next((name for name in variants if name.lower() in ORIGINALS), variants[0])
    level = {row.what: row.value for row in rows if row.where == original}
    return [
        row if row.where == original or row.before is not None
        else replace(row, before=level.get(row.what))
        for row in rows
    ]  # fmt: skip


def _grouped(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The names that occur, by group and in the order of GROUPS; the rest as they come."""
    left = dict.fromkeys(names)
    known = {name for whats in GROUPS.values() for name in whats}
    groups = [(group, [name for name in whats if name in left]) for group, whats in GROUPS.items()]
    groups.append((REST, [name for name in left if name not in known]))
    return [(group, whats) for group, whats in groups if whats]


def _matrix(title: str, rows: list[Row], places: list[str], whats: list[str]) -> Table:
    """A line per place, a column per name, the change (where there is one) in small."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.where, row.what), []).append(row)

    def cell(place: str, what: str) -> Cell:
        here = found.get((place, what), [])
        number = any(not isinstance(row.value, str) for row in here)
        changes = ", ".join(change for row in here if (change := _change(row)))
        return Cell(", ".join(map(_shown, here)) or MISSING, changes, number)

    lines = [[Cell(place), *(cell(place, what) for what in whats)] for place in places]
    return Table(title, ("", *map(_label, whats)), [("", lines)])


def _every_layer(rows: list[Row]) -> Table | None:
    places = list(dict.fromkeys(row.where for row in rows))[:MOST]
    whats = list(dict.fromkeys(row.what for row in rows))
    return _matrix("Every layer", rows, places, whats) if places else None


def _layer_tables(rows: list[Row]) -> list[Table]:
    """Smallest, median and largest of every number, how often every text occurs, the worst few."""
    summary: list[list[Cell]] = []
    tables = []
    for what in dict.fromkeys(row.what for row in rows):
        own = [row for row in rows if row.what == what]
        known = sorted((row for row in own if _number(row.value) is not None), key=_sure)
        if not known:
            counts = Counter(map(_shown, own)).most_common()
            tables.append(_list(f"Layers by {_label(what)}", "count", counts))
            continue
        middle = replace(known[0], value=statistics.median(map(_sure, known)))
        texts = (*map(_shown, (known[0], middle, known[-1])), f"{len(known)}")
        summary.append([Cell(_label(what)), *(Cell(text, number=True) for text in texts)])
        if len(known) > WORST and _sure(known[0]) < _sure(known[-1]):
            low = what in MORE_IS_BETTER
            worst = known[:WORST] if low else known[: -WORST - 1 : -1]
            title = f"{'Lowest' if low else 'Highest'} {_label(what)}"
            tables.append(_list(title, _label(what), [(row.where, _shown(row)) for row in worst]))
    head = ("", "smallest", "median", "largest", "count")
    return [Table("Layers", head, [("", summary)]), *tables] if summary else tables


def _list(title: str, label: str, pairs: Iterable[tuple[str, object]]) -> Table:
    lines = [[Cell(name), Cell(str(value), number=True)] for name, value in pairs]
    return Table(title, ("", label), [("", lines)])


# Pictures.


def _scatter(rows: list[Row]) -> list[Scatter]:
    """Size across from zero, perplexity upwards; logarithmic when it spans more than a decade."""
    size, cost = _found(rows, "file_bytes"), _found(rows, "perplexity")
    names = sorted(set(size) & set(cost), key=lambda name: (_sure(cost[name]), name))
    values = [_sure(found[name]) for found in (size, cost) for name in names]
    if len(names) < 2 or min(values) <= 0:
        return []
    widest, costs = max(values[: len(names)]), values[len(names) :]
    logarithmic = costs[-1] / costs[0] > 10
    bend: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = bend(costs[0]), bend(costs[-1])
    pad = 0.08 * (high - low or abs(high) or 1.0)
    low, high = low - pad, high + pad
    height = max(300, 20 * len(names) + 100)

    def across(value: float) -> float:
        return 8 + 86 * value / widest

    def down(bent: float) -> float:
        return height - 40 - (height - 80) * (bent - low) / (high - low)

    points: list[tuple[str, str, float, float, float]] = []
    for name in names:
        words = f"{name}: {_shown(size[name])}, perplexity {_shown(cost[name])}"
        x, y = across(_sure(size[name])), down(bend(_sure(cost[name])))
        points.append((_short(name), words, x, y, _free(x, y, points)))
    unit = 1024.0 ** int(math.log(max(widest, 1.0), 1024))
    whole = [float(k) for k in range(math.ceil(low), math.floor(high) + 1)]
    y_ticks = whole if logarithmic else _ticks(low, high, 5)
    digits = 0 if logarithmic else max(len(f"{y:g}".partition(".")[2]) for y in y_ticks)
    x_ticks = [value * unit for value in _ticks(0, widest / unit, 3)]
    return [Scatter(
        "File size and perplexity" + (" (logarithmic)" if logarithmic else ""),
        "; ".join(point[1] for point in points), height, points,
        [(across(x), format_size(x).replace(".00 ", " ")) for x in x_ticks],
        [(down(y), f"{10**y if logarithmic else y:,.{digits}f}") for y in y_ticks],
    )]  # fmt: skip


def _free(x: float, y: float, placed: list[tuple[str, str, float, float, float]]) -> float:
    """The place at or above y where a label meets no earlier one."""
    for _, _, other_x, _, label in sorted(placed, key=lambda point: -point[4]):
        if abs(other_x - x) < 34 and abs(label - y) < 18:
            y = label - 18
    return y


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.999 * raw)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]


def _bars(rows: list[Row], what: str) -> list[Bars]:
    own = [row for row in _found(rows, what).values() if _sure(row) > 0]
    if len(own) < 2:
        return []
    longest = max(map(_sure, own))
    bars = [(_short(row.where, 36), 100 * _sure(row) / longest, _shown(row)) for row in own]
    return [Bars(_capital(_label(what)), "; ".join(f"{r.where}: {_shown(r)}" for r in own), bars)]


def _heat(rows: list[Row], what: str) -> list[Heat]:
    """Linears down, layers across; experts share a line, which shows the worst of them."""
    worst: dict[tuple[str, int], Row] = {}
    for where, row in _found(rows, what).items():
        if match := LAYER.fullmatch(where):
            key = (re.sub(r"\bexpert[0-9]+\b", "experts", match[2] or "block"), int(match[1]))
            if key not in worst or _sure(row) > _sure(worst[key]):
                worst[key] = row
    layers = sorted({layer for _, layer in worst})
    if len(layers) < 2:
        return []
    rising = sorted(worst.values(), key=_sure)
    low, span = _sure(rising[0]), _sure(rising[-1]) - _sure(rising[0]) or 1.0

    def cell(row: Row | None) -> tuple[float, str] | None:
        return ((_sure(row) - low) / span, f"{row.where}: {_shown(row)}") if row else None

    lines = [(_short(name, 32), [cell(worst.get((name, layer))) for layer in layers])
             for name in dict.fromkeys(name for name, _ in worst)]  # fmt: skip
    ends = [f"{_shown(row)} ({row.where})" for row in (rising[0], rising[-1])]
    title = f"{_capital(_label(what))} by layer"
    return [Heat(title, f"From {ends[0]} to {ends[1]}.", layers, lines)]


# Numbers and names for eyes.


def _number(value: Value) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _sure(row: Row) -> float:
    """The value of a row that is known to hold a number."""
    number = _number(row.value)
    assert number is not None
    return number


def _found(rows: list[Row], what: str) -> dict[str, Row]:
    """The rows of one name that hold a number, by place."""
    return {row.where: row for row in rows if row.what == what and _number(row.value) is not None}


def _unit(row: Row) -> str:
    endings = {"bytes": "B", "per_second": "1/s", "seconds": "s"}
    return row.unit or next((unit for end, unit in endings.items() if row.what.endswith(end)), "")


def _shown(row: Row) -> str:
    """The value with its unit."""
    number, unit, what = _number(row.value), _unit(row), row.what
    if number is None:
        return _plain(row.value)
    if unit == "B":
        return format_size(number)
    if unit == "s":
        return _duration(number)
    if unit == "B/s":
        return f"{_figures(number / 1e9)} GB/s"
    if unit == "1/s" and what.startswith("peak_"):
        tera = abs(number) >= 1e12
        return f"{_figures(number / (1e12 if tera else 1e9))} {'TOP/s' if tera else 'GOP/s'}"
    if unit == "1/s":
        digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
        return f"{number:,.{digits}f} {'tok/s' if 'token' in what else unit}"
    if what in SHARES:
        return f"{100 * number:.3g} %" if what.endswith("error") else f"{100 * number:.2f} %"
    if what == "parameters" and number >= 1e6:
        return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
    known = what in DECIMALS and abs(number) < 1e5
    text = f"{number:,.{DECIMALS[what]}f}" if known else _figures(number)
    return f"{text} {unit}".rstrip()


def _before(row: Row) -> str:
    return "" if row.before is None else _shown(replace(row, value=row.before))


def _figures(number: float) -> str:
    """Whole numbers in full, four figures of others."""
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    if not 1e-3 <= abs(number) < 1e9:
        return f"{number:.4g}"
    return f"{number:,.{max(0, 3 - math.floor(math.log10(abs(number))))}f}"


def _duration(seconds: float) -> str:
    if 0 < abs(seconds) < 1:
        return f"{seconds * 1e3:.4g} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.4g} µs"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _plain(value: Value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _change(row: Row) -> str:
    """Against `before`: a factor with a word from 1.5 on, per cent below, points of a share."""
    after, before = _number(row.value), _number(row.before)
    if after is None or before is None:
        return ""
    if row.what in SHARES:
        return f"{100 * (after - before):+.2f} points"
    if before <= 0 or after <= 0:
        return ""
    ratio = after / before
    if 2 / 3 < ratio < 1.5:
        return "same" if ratio == 1 else f"{100 * (ratio - 1):+.2f} %"
    size = row.what in ("bits_per_weight", "parameters")
    more, less = ("larger", "smaller") if size else WORDS.get(_unit(row), ("higher", "lower"))
    factor = max(ratio, before / after)
    return f"{factor:,.{2 if factor < 100 else 0}f}× {more if ratio > 1 else less}"


def _label(what: str) -> str:
    return LABELS.get(what, what.replace("_", " "))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."


# At the door.


def _cleaned(report: Report) -> Report:
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
