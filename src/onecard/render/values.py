"""Numbers and names for eyes: a row's value with its unit, its change, its label."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from onecard.core.report import Row, Value
from onecard.core.settings import format_size

LABELS = {
    "file_bytes": "file size", "disk_bytes": "working space on disk",
    "output_bytes": "output size", "part_bytes": "size",
    "kl": "KL", "top1_agreement": "top-1 agreement", "energy_joules": "energy",
    "decode_tokens_per_second": "decode", "prompt_tokens_per_second": "prompt reading",
    "bandwidth_share": "share of bandwidth", "operations_share": "share of operations",
    "foreign_share": "taken by other programs", "peak_memory_bytes": "peak memory",
    "planned_peak_bytes": "planned peak memory", "needed_bytes": "memory needed",
    "memory_bytes": "memory",
    "seconds": "time", "time_to_first_token": "first token",
}  # fmt: skip
SHARES = {"top1_agreement", "accuracy", "accuracy_by_length", "bandwidth_share",
          "operations_share", "foreign_share", "sparsity",
          "relative_output_error", "relative_weight_error"}  # fmt: skip
DECIMALS = {"perplexity": 3, "bits_per_weight": 2, "nats_per_token": 4, "bits_per_byte": 4, "kl": 4}
WORDS = {"B": ("larger", "smaller"), "1/s": ("faster", "slower"), "s": ("longer", "shorter"),
         "B/s": ("faster", "slower")}  # fmt: skip
ORIGINALS = ("dense", "original", "baseline")
STAGE = re.compile(r"(stage [0-9]{1,6}): (.+)")
LAYER = re.compile(r"(?:stage [0-9]{1,6}: )?blocks\.([0-9]{1,6})(?:\.(.+))?")
MISSING = "n/a"


def number_of(value: Value) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def sure(row: Row) -> float:
    """The value of a row that is known to hold a number."""
    number = number_of(row.value)
    assert number is not None
    return number


def by_place(rows: list[Row], what: str) -> dict[str, Row]:
    """The rows of one name that hold a number, by place."""
    return {row.where: row for row in rows if row.what == what and number_of(row.value) is not None}


def original_of(names: list[str]) -> str:
    """What variants are compared with: the one that is named so, else the first."""
    return next((name for name in names if name.lower() in ORIGINALS), names[0])


def _unit(row: Row) -> str:
    endings = {"bytes": "B", "per_second": "1/s", "seconds": "s"}
    return row.unit or next((unit for end, unit in endings.items() if row.what.endswith(end)), "")


def shown(row: Row) -> str:
    """The value with its unit."""
    number, unit, what = number_of(row.value), _unit(row), row.what
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
    if what == "bits_per_weight":
        unit = ""  # its name says it
    known = what in DECIMALS and abs(number) < 1e5
    text = f"{number:,.{DECIMALS[what]}f}" if known else _figures(number)
    return f"{text} {unit}".rstrip()


def before_of(row: Row) -> str:
    return "" if row.before is None else shown(replace(row, value=row.before))


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


def change_of(row: Row) -> str:
    """Against `before`: a factor with a word from 1.5 on, per cent below, points of a share."""
    after, before = number_of(row.value), number_of(row.before)
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


def label_of(what: str) -> str:
    return LABELS.get(what, what.replace("_", " "))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."
