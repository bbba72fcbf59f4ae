"""The result of a fit as pictures, as strings and positions: templates/fit.html draws them as SVG.

    front    bytes of the weight files across, predicted KL on a logarithmic scale: every plan that no other
             beats in both, the chosen one, what it came to when it was measured, and the budgets
    bits     layers across, parts down; a cell says the bits of a weight there, and how it is stored
    harm     the same places, shaded by the KL that one candidate alone costs there (logarithmic)
    memory   a bar per length of context, its components one behind the other, and the budget
    speeds   bars per phase: original, promised, measured, on a track that ends at the machine's roof

Positions across are per cent, so that the text of a picture keeps its size on a phone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from onecard.core.settings import format_size
from onecard.fit.result import FitResult, Place, Speed
from onecard.render.plots import Heat, Picture, Shaded, ticks
from onecard.render.values import capital, short

HEIGHT, TOP = 340, 34
LEAST = 1e-7
"""The smallest KL that a picture tells from none, in nats."""
COLOURS = 9
PARTS = ("attention.in", "attention.out", "feed_forward.in", "feed_forward.out")


@dataclass(frozen=True)
class Mark:
    """A point or a line across: place in per cent and pixels, words, and which kind of thing it is."""

    x: float
    y: float
    words: str
    kind: str


@dataclass(frozen=True)
class Front(Picture):
    height: int
    marks: list[Mark]
    budgets: list[Mark]  # kind "size": a line down at x; kind "quality": a line across at y
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Stack:
    """One bar of components: (start, length, colour, words)."""

    name: str
    total: str
    pieces: list[tuple[float, float, int, str]]


@dataclass(frozen=True)
class Stacked(Picture):
    bars: list[Stack]
    legend: list[tuple[int, str]]
    budget: tuple[float, str] | None


@dataclass(frozen=True)
class Phase:
    """Bars (name, length in per cent of the track, value, kind), and the roof at the end of the track."""

    name: str
    roof: str
    bars: list[tuple[str, float, str, str]]


@dataclass(frozen=True)
class Speeds(Picture):
    phases: list[Phase]


def front_of(fit: FitResult) -> Front | None:
    points = [point for point in fit.front if point.size > 0 and math.isfinite(point.harm)]
    if len(points) < 2:
        return None
    asked = {p.what: p.asked for p in fit.promises}
    size, goal = asked.get("size"), asked.get("likelihood")
    limit = -math.log(goal) if goal and 0 < goal < 1 else None
    measured = {p.what: p.measured for p in fit.promises if p.measured is not None}
    sizes = [float(p.size) for p in points] + [x for x in (size, measured.get("size")) if x]
    harms = [_floor(p.harm) for p in points] + [_floor(x) for x in (limit, measured.get("kl")) if x]
    low, high = min(sizes), max(sizes)
    pad = 0.06 * (high - low or high)
    low, high = max(0.0, low - pad), high + pad
    bottom, top = math.log10(min(harms)) - 0.15, math.log10(max(harms)) + 0.15

    def across(value: float) -> float:
        return 9 + 88 * (value - low) / (high - low)

    def down(harm: float) -> float:
        return TOP + (HEIGHT - TOP - 50) * (top - math.log10(_floor(harm))) / (top - bottom)

    def words(point: object, size: float, harm: float) -> str:
        return f"{point}: {format_size(size)}, KL {harm:.3g}"

    marks = [
        Mark(across(p.size), down(p.harm),
             words("chosen" if p.chosen else f"{p.bits_per_weight:.2f} bits" + _without(p.left_out),
                   p.size, p.harm),
             "chosen" if p.chosen else "plan")
        for p in sorted(points, key=lambda p: (p.chosen, p.size))
    ]  # fmt: skip
    if "size" in measured and "kl" in measured:
        bytes_, kl = measured["size"] or 0.0, measured["kl"] or 0.0
        marks.append(
            Mark(across(bytes_), down(kl), words("measured", bytes_, _floor(kl)), "measured")
        )
    budgets = [Mark(across(size), 0, f"asked: {format_size(size)}", "size")] if size else []
    if limit:
        budgets.append(
            Mark(0, down(limit), f"asked: {_share(goal or 0)}, KL {limit:.3g}", "quality")
        )
    unit = 1024.0 ** int(math.log(max(high, 1.0), 1024))
    x_ticks = [x * unit for x in ticks(low / unit, high / unit, 4)]
    y_ticks = [float(k) for k in range(math.ceil(bottom), math.floor(top) + 1)]
    if len(y_ticks) < 2:
        y_ticks = [bottom + 0.15, top - 0.15]
    return Front(
        "What was possible", "; ".join(mark.words for mark in marks), HEIGHT, marks, budgets,
        [(across(x), format_size(x).replace(".00 ", " ")) for x in x_ticks],
        [(down(10**y), f"{10**y:.2g}") for y in y_ticks],
    )  # fmt: skip


def _without(blocks: int) -> str:
    return f" without {blocks} blocks" if blocks > 1 else " without a block" if blocks else ""


def _floor(harm: float) -> float:
    return max(harm, LEAST)


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


# Layers across, parts down ------------------------------------------------------------------------


def bits_of(fit: FitResult) -> Heat | None:
    found = _grid(fit, _bits)
    if found is None:
        return None
    known = [place for place in fit.places if place.layer is not None and place.bits_per_weight > 0]
    rising = sorted(known or fit.places, key=lambda place: place.bits_per_weight)
    ends = [
        f"{p.bits_per_weight:.3g} bits ({p.where}, {p.format})" for p in (rising[0], rising[-1])
    ]
    return Heat("Bits of a weight, by layer", f"From {ends[0]} to {ends[1]}.", *found)


def _bits(place: Place) -> Shaded | None:
    if place.part == "layer":  # its sites say so
        return None
    words = f"{place.where}: {place.format}, {place.bits_per_weight:.2f} bits, {place.why}"
    return min(1.0, place.bits_per_weight / 8.5), words, kind_of(place.format)


def kind_of(format: str) -> str:
    """A format in a few letters: 4, 16, 4s (sparse), 3c (codebook), r64 (low rank), 4t (levels)."""
    if match := re.fullmatch(r"int([0-9]+)-.*", format):
        return match[1]
    if match := re.fullmatch(r"sparse[0-9.:]+\((.*)\)", format):
        return f"{kind_of(match[1])}s"
    if match := re.match(r"lowrank([0-9]+)", format):
        return f"r{match[1]}"
    if match := re.match(r"codebook([0-9])", format):
        return f"{match[1]}c"
    if match := re.match(r"(nf|fp|mxfp|nvfp|fp-)([0-9]+)", format):
        return f"{match[2]}t"
    return {"bf16": "16", "fp16": "16", "fp32": "32", "gone": "-", "ternary": "1.6"}.get(
        format.partition("-")[0], format[:3]
    )


def harm_of(fit: FitResult) -> list[Heat]:
    """One picture per candidate that was tried in as many places as there are layers, most harmful first, all
    on one scale."""
    inside = [place for place in fit.places if place.layer is not None]
    counts = Counter(tried.format for place in inside for tried in place.tried)
    layers = len({place.layer for place in inside})
    names = [name for name, count in counts.items() if count >= layers]
    known = {(place.where, tried.format): tried.harm for place in inside for tried in place.tried}
    values = [_floor(harm) for (_, name), harm in known.items() if name in names]
    if not values:
        return []
    low, high = math.log10(min(values)), math.log10(max(values))

    def cell(name: str, place: Place) -> Shaded | None:
        harm = known.get((place.where, name))
        if harm is None:
            return None
        shade = (math.log10(_floor(harm)) - low) / (high - low or 1.0)
        return shade, f"{place.where} in {name}: KL {max(harm, 0.0):.3g}", ""

    pictures = []
    total = {
        name: sum(max(0.0, harm) for (_, n), harm in known.items() if n == name) for name in names
    }
    for name in sorted(names, key=lambda name: -total[name]):
        found = _grid(fit, partial(cell, name))
        if found is not None:
            said = f"From KL {10**low:.2g} to {10**high:.2g} over all candidates, on a logarithmic scale."
            pictures.append(Heat(f"{name} alone", said, *found))
    return pictures


def _grid(
    fit: FitResult, cell: Callable[[Place], Shaded | None]
) -> tuple[list[int], list[tuple[str, list[Shaded | None]]]] | None:
    """(layers, lines) of places inside the layers; experts share a line, the one of most bits shows."""
    inside: dict[tuple[str, int], Place] = {}
    for place in fit.places:
        if place.layer is None:
            continue
        key = (re.sub(r"\bexpert[0-9]+\b", "experts", place.part), place.layer)
        if key not in inside or place.bits_per_weight > inside[key].bits_per_weight:
            inside[key] = place
    layers = sorted({layer for _, layer in inside})
    if not layers:
        return None
    parts = sorted({part for part, _ in inside}, key=lambda part: (part not in PARTS, PARTS.index(part)
                   if part in PARTS else 0, part))  # fmt: skip
    lines: list[tuple[str, list[Shaded | None]]] = []
    for part in parts:
        places = [inside.get((part, layer)) for layer in layers]
        cells = [cell(place) if place else None for place in places]
        if any(cells):
            lines.append((short(part.replace("_", "-"), 32), cells))
    return (layers, lines) if lines else None


# Bars ---------------------------------------------------------------------------------------------


def memory_of(fit: FitResult) -> Stacked | None:
    if not fit.memory:
        return None
    asked = next((p.asked for p in fit.promises if p.what == "memory"), None)
    totals = [sum(part.bytes for part in held.parts) for held in fit.memory]
    widest = max([*map(float, totals), asked or 0.0]) or 1.0
    order: Counter[str] = Counter()
    for held in fit.memory:
        for part in held.parts:
            order[part.name] += part.bytes
    colour = {name: i % COLOURS for i, (name, size) in enumerate(order.most_common()) if size}
    bars = []
    for held, total in zip(fit.memory, totals, strict=True):
        pieces, start = [], 0.0
        sizes = {part.name: part.bytes for part in held.parts}
        for name, which in colour.items():
            length = 100 * sizes.get(name, 0) / widest
            words = f"{name}: {format_size(sizes.get(name, 0))}"
            pieces.append((start, length, which, words))
            start += length
        bars.append(Stack(f"{held.context:,} tokens", format_size(total), pieces))
    said = "; ".join(f"{bar.name}: {bar.total}" for bar in bars)
    budget = (100 * asked / widest, f"asked: {format_size(asked)}") if asked else None
    return Stacked("Memory over the length of the context", said, bars,
                   [(which, name) for name, which in colour.items()], budget)  # fmt: skip


def speeds_of(fit: FitResult) -> Speeds | None:
    phases = [phase for speed in fit.speeds if (phase := _phase(speed)) is not None]
    if not phases:
        return None
    said = "; ".join(f"{phase.name}: " + ", ".join(f"{n} {v}" for n, _, v, _ in phase.bars)
                     for phase in phases)  # fmt: skip
    return Speeds("Speed beside the roof", said, phases)


def _phase(speed: Speed) -> Phase | None:
    found = [("original", speed.original, "other"), ("promised", speed.predicted, "hollow"),
             ("measured", speed.measured, "mark")]  # fmt: skip
    bars = [(name, value, kind) for name, value, kind in found if value]
    if not bars:
        return None
    most = max([value for _, value, _ in bars] + [speed.roof or 0.0])
    roof = f"roof {tokens(speed.roof)}" if speed.roof else ""
    return Phase(
        f"{capital(speed.phase)}, {speed.context:,} tokens", roof,
        [(name, 100 * value / most, tokens(value) + _of(value, speed.roof), kind)
         for name, value, kind in bars],
    )  # fmt: skip


def _of(value: float, roof: float | None) -> str:
    return f" ({100 * value / roof:.0f} % of the roof)" if roof else ""


def tokens(value: float) -> str:
    """Tokens per second."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} tok/s"
