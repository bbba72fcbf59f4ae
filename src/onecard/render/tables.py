"""Reports as tables: one model before and after, variants side by side, a summary of layers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from onecard.core.report import Row
from onecard.render.values import (
    MISSING,
    STAGE,
    before_of,
    change_of,
    label_of,
    number_of,
    original_of,
    shown,
    sure,
)  # fmt: skip

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
            "accuracy", "needed_bytes", "fits", "longest_context", "largest_batch",
            "decode_tokens_per_second")  # fmt: skip
MORE_IS_BETTER = {*GROUPS["Speed"], "top1_agreement", "accuracy", "accuracy_by_length",
                  "calibration_tokens"} - {"time_to_first_token", "energy_joules"}  # fmt: skip
VARIANT = {"file_bytes", "bits_per_weight", "needed_bytes", *GROUPS["Quality"]} - {
    "predicted_tokens", "questions"}  # fmt: skip

FEW, WORST, MOST = 12, 5, 2000
"""Layers shown one by one in a terminal; the worst that are named; the most a page lists."""


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


def is_listing(rows: list[Row]) -> bool:
    """Whether nothing was measured: the rows only say what recipes are good for."""
    return all(row.what == "good_for" for row in rows)


def before_after(rows: list[Row]) -> list[Table]:
    if not rows:
        return []
    if is_listing(rows):
        lines = [[Cell(row.where), Cell(shown(row))] for row in rows]
        return [Table("Good for", ("name", "good for"), [("", lines)])]
    changed = any(row.before is not None for row in rows)
    usual = "model" if any(row.where == "model" for row in rows) else rows[0].where
    groups = []
    for group, whats in _grouped(row.what for row in rows):
        lines = []
        for row in (row for what in whats for row in rows if row.what == what):
            texts = [before_of(row), shown(row), change_of(row)] if changed else [shown(row)]
            name = Cell(label_of(row.what), "" if row.where == usual else row.where)
            number = not isinstance(row.value, str)
            lines.append([name, *(Cell(text, number=number) for text in texts)])
        groups.append((group, lines))
    head = ("", "before", "after", "change") if changed else ("", "value")
    if len(groups) == 1:
        groups = [("", groups[0][1])]
    if all(row.where == "plan" for row in rows):
        return [Table("Planned", head, groups)]
    title = "Before and after" if changed else "Measured"
    return [Table(title if usual == "model" else f"{title}: {usual}", head, groups)]


def comparison(rows: list[Row], variants: list[str]) -> list[Table]:
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
    original = original_of(variants)
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
        changes = ", ".join(change for row in here if (change := change_of(row)))
        return Cell(", ".join(map(shown, here)) or MISSING, changes, number)

    lines = [[Cell(place), *(cell(place, what) for what in whats)] for place in places]
    return Table(title, ("", *map(label_of, whats)), [("", lines)])


def every_layer(rows: list[Row]) -> Table | None:
    places = list(dict.fromkeys(row.where for row in rows))[:MOST]
    whats = list(dict.fromkeys(row.what for row in rows))
    return _matrix("Every layer", rows, places, whats) if places else None


def layer_tables(rows: list[Row]) -> list[Table]:
    """Smallest, median and largest of every number, how often every text occurs, the worst few.

    Stages change one model one after the other, so what they say of layers is told apart.
    """
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stage = STAGE.fullmatch(row.where)
        own = replace(row, where=stage[2]) if stage else row
        stages.setdefault(f", {stage[1]}" if stage else "", []).append(own)
    found = [(stage, table) for stage, own in stages.items() for table in _layer_tables(own)]
    return [replace(table, title=table.title + stage * (len(stages) > 1)) for stage, table in found]


def _layer_tables(rows: list[Row]) -> list[Table]:
    summary: list[list[Cell]] = []
    tables = []
    for what in dict.fromkeys(row.what for row in rows):
        own = [row for row in rows if row.what == what]
        known = sorted((row for row in own if number_of(row.value) is not None), key=sure)
        if not known:
            counts = Counter(map(shown, own)).most_common()
            tables.append(_list(f"Layers by {label_of(what)}", "count", counts))
            continue
        middle = replace(known[0], value=statistics.median(map(sure, known)))
        texts = (*map(shown, (known[0], middle, known[-1])), f"{len(known)}")
        summary.append([Cell(label_of(what)), *(Cell(text, number=True) for text in texts)])
        if len(known) > WORST and sure(known[0]) < sure(known[-1]):
            low = what in MORE_IS_BETTER
            worst = known[:WORST] if low else known[: -WORST - 1 : -1]
            title = f"{'Lowest' if low else 'Highest'} {label_of(what)}"
            tables.append(_list(title, label_of(what), [(row.where, shown(row)) for row in worst]))
    head = ("", "smallest", "median", "largest", "count")
    return [Table("Layers", head, [("", summary)]), *tables] if summary else tables


def _list(title: str, label: str, pairs: Iterable[tuple[str, object]]) -> Table:
    lines = [[Cell(name), Cell(str(value), number=True)] for name, value in pairs]
    return Table(title, ("", label), [("", lines)])
