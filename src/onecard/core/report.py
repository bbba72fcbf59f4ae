"""Row and Report: the only result type.

A row says where (the model, a layer, a phase), what (a fixed name), the value in SI base units, and
what it was before. A report is rows plus the environment they were measured in, and a short story of
what was done; it becomes JSON and comes back unchanged. Rendering lives in render/.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onecard.core.errors import BadRequest

Value = float | int | str | bool | None

UNITS = {
    "perplexity": "", "nats_per_token": "nat", "bits_per_byte": "bit", "kl": "nat",
    "top1_agreement": "", "accuracy": "", "file_bytes": "B", "bits_per_weight": "bit",
    "parameters": "", "prompt_tokens_per_second": "1/s", "decode_tokens_per_second": "1/s",
    "time_to_first_token": "s", "peak_memory_bytes": "B", "bandwidth_share": "",
    "operations_share": "", "energy_joules": "J",
}  # fmt: skip
BITS_PER_WEIGHT = "8 * bytes of all tensors / parameters, embeddings and scales included"
"""How `bits_per_weight` is counted."""


@dataclass(frozen=True)
class Row:
    """One measured or stated value: `where` is the model, a layer or a phase."""

    where: str
    what: str
    value: Value
    unit: str = ""
    before: Value = None

    @staticmethod
    def of(where: str, what: str, value: Value, before: Value = None) -> Row:
        """A row whose unit follows from one of the fixed names in `UNITS`."""
        return Row(where, what, value, UNITS[what], before)


@dataclass(frozen=True)
class Report:
    """Rows, the environment they were measured in, and notes for people (title, text pairs)."""

    rows: tuple[Row, ...]
    environment: dict[str, Value] = field(default_factory=dict)
    title: str = ""
    notes: tuple[tuple[str, str], ...] = ()

    def with_rows(self, *rows: Row) -> Report:
        return replace(self, rows=self.rows + rows)

    def value(self, what: str, where: str | None = None) -> Value:
        """The first value named `what` (at `where`). KeyError if there is none."""
        for row in self.rows:
            if row.what == what and where in (None, row.where):
                return row.value
        raise KeyError(what if where is None else f"{where}: {what}")

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote. Raises BadRequest when it is something else."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
                raise TypeError("it is not an object with a list of rows")
            rows = tuple(_row(row) for row in data["rows"])
            notes = tuple((_text(a), _text(b)) for a, b in data.get("notes", ()))
            facts = {key: _value(key, fact) for key, fact in data.get("environment", {}).items()}
            return Report(rows, facts, _text(data.get("title", "")), notes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadRequest("this is not a report", str(error),
                             "give a report.json that onecard wrote") from error  # fmt: skip


def _row(data: dict[str, Any]) -> Row:
    row = Row(**data)
    for text in (row.where, row.what, row.unit):
        _text(text)
    for value in (row.value, row.before):
        _value(row.what, value)
    return row


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"a text was expected, not {type(given).__name__}")
    return given


def _value(name: str, given: Any) -> Value:
    if not isinstance(given, (float, int, str, bool, type(None))):
        raise TypeError(f"{name} is {type(given).__name__}")
    return given


def environment(**more: Value) -> dict[str, Value]:
    """The facts a number must be read with; `more` adds the caller's own."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    } | more


def write_text(path: Path, text: str) -> None:
    """`text` under its final name at once or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
