"""Reports as pictures: what a scatter, bars and a heat map show, as strings and positions.

templates/report.html draws them as SVG. Positions across are per cent, so that the text of a picture
keeps its size on a phone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from onecard.core.report import Row
from onecard.core.settings import format_size
from onecard.render.values import LAYER, by_place, capital, label_of, short, shown, sure


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


Shaded = tuple[float, str, str]


@dataclass(frozen=True)
class Heat(Picture):
    """Lines of (name, cells); a cell is (shade 0 to 1, words, text in it), None where there is no linear."""

    layers: list[int]
    lines: list[tuple[str, list[Shaded | None]]]


def scatter_of(rows: list[Row]) -> list[Scatter]:
    """Size across from zero, perplexity upwards; logarithmic when it spans more than a decade."""
    size, cost = by_place(rows, "file_bytes"), by_place(rows, "perplexity")
    names = sorted(set(size) & set(cost), key=lambda name: (sure(cost[name]), name))
    values = [sure(found[name]) for found in (size, cost) for name in names]
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
        words = f"{name}: {shown(size[name])}, perplexity {shown(cost[name])}"
        x, y = across(sure(size[name])), down(bend(sure(cost[name])))
        points.append((short(name), words, x, y, _free(x, y, points)))
    unit = 1024.0 ** int(math.log(max(widest, 1.0), 1024))
    whole = [float(k) for k in range(math.ceil(low), math.floor(high) + 1)]
    y_ticks = whole if logarithmic else ticks(low, high, 5)
    digits = 0 if logarithmic else max(len(f"{y:g}".partition(".")[2]) for y in y_ticks)
    x_ticks = [value * unit for value in ticks(0, widest / unit, 3)]
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


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.999 * raw)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step * 1.0001) + 1)]


def bars_of(rows: list[Row], what: str) -> list[Bars]:
    own = [row for row in by_place(rows, what).values() if sure(row) > 0]
    if len(own) < 2:
        return []
    longest = max(map(sure, own))
    bars = [(short(row.where, 36), 100 * sure(row) / longest, shown(row)) for row in own]
    return [Bars(capital(label_of(what)), "; ".join(f"{r.where}: {shown(r)}" for r in own), bars)]


def heat_of(rows: list[Row], what: str) -> list[Heat]:
    """Linears down, layers across; experts share a line, which shows the worst of them."""
    worst: dict[tuple[str, int], Row] = {}
    for where, row in by_place(rows, what).items():
        if match := LAYER.fullmatch(where):
            key = (re.sub(r"\bexpert[0-9]+\b", "experts", match[2] or "block"), int(match[1]))
            if key not in worst or sure(row) > sure(worst[key]):
                worst[key] = row
    layers = sorted({layer for _, layer in worst})
    if len(layers) < 2:
        return []
    rising = sorted(worst.values(), key=sure)
    low, span = sure(rising[0]), sure(rising[-1]) - sure(rising[0]) or 1.0

    def cell(row: Row | None) -> Shaded | None:
        return ((sure(row) - low) / span, f"{row.where}: {shown(row)}", "") if row else None

    lines = [(short(name, 32), [cell(worst.get((name, layer))) for layer in layers])
             for name in dict.fromkeys(name for name, _ in worst)]  # fmt: skip
    ends = [f"{shown(row)} ({row.where})" for row in (rising[0], rising[-1])]
    title = f"{capital(label_of(what))} by layer"
    return [Heat(title, f"From {ends[0]} to {ends[1]}.", layers, lines)]
