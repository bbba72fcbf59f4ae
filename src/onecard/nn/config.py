"""A config.json read with suspicion: every value is checked for its type and range before it is used.

A config comes with a model and may hold anything: text for a number, NaN, a list of a million names.
`Reader` has a method per kind of value; each gives a value that the rest of the program can rely on,
or raises a BadRequest that names the setting. Ropes are read here too, because every family has the
same ones: what a kind reads, and the least it may be, is a row of `ROPE_NUMBERS`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from onecard.core.errors import BadRequest, nearest
from onecard.core.spec import Rope

Config = Mapping[str, Any]


class Reader:
    """A config.json read by allow-listed keys; `where` is what errors call it."""

    def __init__(self, config: Config, where: str = "config.json") -> None:
        self.config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def bad(self, key: str, value: Any, do: str) -> BadRequest:
        """The error about one setting; a long value is shown by its ends."""
        return BadRequest(f"{self.where}: {key} is {shown(value)}", do=do)

    def count(
        self, key: str, default: int | None = None, most: int = 10_000_000, least: int = 1
    ) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.bad(key, value, f"a whole number from {least} to {most} is needed")
        return value

    def number(
        self, key: str, default: float | None = None, least: float = -1e12, most: float = 1e12
    ) -> float:
        value = self.get(key, default)
        if not _is_number(value, least, most):
            raise self.bad(key, value, f"a number from {least:g} to {most:g} is needed")
        return float(value)

    def positive(self, key: str, default: float | None = None, most: float = 1e6) -> float:
        """A number that something is divided by, so neither zero nor next to it."""
        return self.number(key, default, 1e-6, most)

    def epsilon(self, key: str, default: float) -> float:
        """What a norm adds to a mean square."""
        return self.number(key, default, 0.0, 1.0)

    def cap(self, key: str) -> float | None:
        """A soft cap on scores or logits, if there is one."""
        return None if self.get(key) is None else self.positive(key)

    def theta(self, key: str = "rope_theta") -> float:
        """The base of rope frequencies; yarn divides by its logarithm."""
        return self.number(key, 10000.0, 1.001)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false is needed")
        return value

    def refuse(self, key: str, *allowed: Any) -> None:
        """Refuse a setting of this family that is not built."""
        value = self.config.get(key)
        if value is not None and value not in allowed:
            raise BadRequest(f"config.json: {key} = {shown(value)} is not supported by onecard")

    def heads(self) -> tuple[int, int, int]:
        """Heads, key/value heads, head size."""
        heads = self.count("num_attention_heads", most=4096)
        kv_heads = self.count("num_key_value_heads", heads, most=4096)
        if heads % kv_heads:
            raise BadRequest(f"config.json: {heads} heads cannot share {kv_heads} key/value heads")
        if self.get("head_dim") is None and self.count("hidden_size") % heads:
            raise BadRequest(
                f"config.json: hidden_size {self.get('hidden_size')} over {heads} heads"
            )
        return (
            heads,
            kv_heads,
            self.count("head_dim", self.count("hidden_size") // heads, most=8192),
        )

    def layers(self, key: str = "num_hidden_layers") -> int:
        return self.count(key, most=4096)

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        value = self.get(key, default)
        known = {
            "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu",
            "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        }  # fmt: skip
        if not isinstance(value, str) or value not in known:
            raise self.bad(key, value, nearest(str(value)[:80], known))
        return known[value]

    def context(self) -> int:
        return self.count("max_position_embeddings", 2048)

    def rope(self, head_dim: int, layer_type: str | None = None) -> Rope:
        """The rope of a layer, from `rope_parameters` (transformers 5) or the older keys."""
        given = {key: value for key, value in self._rope(layer_type).items() if value is not None}
        outer = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        outside = {key: self.get(key) for key in outer}
        read = Reader({**outside, **given}, f"{self.where}, rope")
        kind = read.get("rope_type", read.get("type", "default"))
        kind = "longrope" if kind == "su" else kind
        if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
            raise read.bad("rope_type", kind, nearest(str(kind)[:80], ROPE_NUMBERS))
        dims = int(head_dim * read.number("partial_rotary_factor", 1.0, 1e-6, 1.0))
        least = 4 if kind == "dynamic" else 2  # its exponent is dims / (dims - 2)
        if dims < least or dims % 2:
            raise BadRequest(
                f"{self.where}: rope would turn {dims} of the {head_dim} numbers of a head",
                do=f"an even count from {least} is needed",
            )
        original = read.count("original_max_position_embeddings", 0, least=0)
        if kind == "longrope" and (original or self.context()) < 2:
            raise read.bad(outer[2], original, "longrope needs at least 2")
        return Rope(dims, read.theta(), kind, _rope_factors(read, kind, dims), original)

    def _rope(self, layer_type: str | None) -> Config:
        """The rope settings that hold for a layer type, as they stand in the file."""
        given: Any = {}
        for key in ("rope_parameters", "rope_scaling"):
            given = given or self.get(key, {})
            if not isinstance(given, Mapping):
                raise self.bad(key, given, "an object of settings is needed")
        if layer_type is not None and layer_type in given:
            given = given[layer_type]
            if not isinstance(given, Mapping):
                raise self.bad(f"rope of {layer_type}", given, "an object of settings is needed")
        return given


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value from a file, short enough for one line of an error."""
    return _SHORT.repr(value)


def _is_number(value: Any, least: float, most: float) -> bool:
    """A number in the range; NaN is in none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and least <= value <= most


ROPE_NUMBERS: Mapping[str, Mapping[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"factor": None, "attention_factor": 1e-6, "beta_fast": 1e-6, "beta_slow": 1e-6,
             "mscale": 0.0, "mscale_all_dim": 0.0},
    "longrope": {"factor": 1e-6, "attention_factor": 1e-6},
}  # fmt: skip
"""kind -> the numbers it reads: the least one may be where it is optional, None where it is needed.

What else stands in the file (`finetuned`, say) changes nothing and is left there.
"""


def _rope_factors(read: Reader, kind: str, dims: int) -> tuple[tuple[str, Any], ...]:
    """The factors of a rope, all of them numbers, tuples of numbers or a flag: a Rope is a key."""
    found: dict[str, Any] = {}
    for name, least in ROPE_NUMBERS[kind].items():
        if least is None:
            found[name] = read.positive(name)
        elif read.get(name) is not None:
            found[name] = read.number(name, None, least, 1e6)
    if kind == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
        low, high = found["low_freq_factor"], found["high_freq_factor"]
        raise BadRequest(f"{read.where}: low_freq_factor {low:g} is not below high_freq_factor "
                         f"{high:g}")  # fmt: skip
    if kind == "yarn" and read.get("truncate") is not None:
        found["truncate"] = read.flag("truncate", True)
    if kind == "longrope":
        for name in ("long_factor", "short_factor"):
            values = read.get(name)
            if not isinstance(values, list) or len(values) != dims // 2:
                raise read.bad(name, values, f"a list of {dims // 2} numbers is needed")
            if not all(_is_number(value, 1e-6, 1e6) for value in values):
                raise read.bad(name, values, "numbers from 1e-06 to 1e+06 are needed")
            found[name] = tuple(float(value) for value in values)
    return tuple(sorted(found.items()))
