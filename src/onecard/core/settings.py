"""Settings: sizes with units, and frozen dataclasses filled from untrusted mappings.

Sizes: `6GiB` and `6g` are binary (2**30), `6GB` is decimal (10**9), a bare number is bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from onecard.core.errors import BadRequest, nearest

T = TypeVar("T")

LARGEST = 1 << 63
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str | float) -> int:
    """Bytes from `"6GiB"`, `"6g"`, `"6GB"` or a number. Raises BadRequest for anything else."""
    if isinstance(text, (int, float)):
        value, unit = text, ""
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        if not match or match[2].lower() not in _UNITS:
            raise BadRequest(
                f"a size was expected, got {text!r}",
                do="write it as 6GiB (binary), 6GB (decimal), 6g or as a number of bytes",
            )
        value, unit = float(match[1]), match[2].lower()
    size = value * _UNITS[unit]
    if not 1 <= size < 2**60:
        raise BadRequest(
            f"the size {text!r} is not a possible number of bytes", do="from 1 byte to 1 EiB"
        )
    return int(size)


def format_size(size: float) -> str:
    """`1.50 GiB` for people; reports carry plain bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def fill(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the frozen dataclass `cls` from a mapping read from a file.

    Unknown keys, missing keys and wrong types are refused, with the nearest known key.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise BadRequest(f"{where} has no setting {key!r}", do=nearest(str(key), fields))
    checked = {key: _check(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in checked
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadRequest(f"{where} needs a value for {', '.join(missing)}",
                         do=f"{missing[0]}: ...")  # fmt: skip
    return cls(**checked)


def _check(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`: bool, int, float, str, a Literal, a union or a tuple of these, or settings.

    YAML reads 1e-4 as text (it wants 1.0e-4): where a number is needed it is one.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise BadRequest(
            f"{where} is a number of {len(str(abs(value)))} digits", do="at most 2**63 is read"
        )
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise BadRequest(f"{where} is {value!r}", do="a mapping of settings is needed")
        return fill(hint, value, where)
    if origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
        raise BadRequest(
            f"{where} is {value!r}", do=nearest(str(value), map(str, typing.get_args(hint)))
        )
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        problems = []
        for option in (option for option in options if option is not type(None)):
            try:
                return _check(option, value, where)
            except BadRequest as error:
                problems.append(error.do)
        raise BadRequest(f"{where} is {value!r}", do=" or ".join(problems))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise BadRequest(f"{where} is {value!r}", do="a list is needed")
        return tuple(_check(typing.get_args(hint)[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE]-?\d+", value):
        value = float(value)
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise BadRequest(f"{where} is {value!r}", do=f"{KINDS[hint]} is needed")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"{where} is {value!r}", do="a finite number is needed")
    return value
