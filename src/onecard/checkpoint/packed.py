"""`quantization_config`, both ways: compressed-tensors' pack-quantized schemes <-> formats.

A scheme names the modules it covers (`Linear`, a module name, or `re:` and a pattern) and the grid of
their weights. What transformers cannot hold as a Linear (GPT-2's transposed Conv1D) is stored in the
same layout under `quant_method: onecard`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onecard.core.errors import BadRequest
from onecard.core.format import Format, integers

METHODS = ("compressed-tensors", "onecard")


class Schemes:
    """The weight formats that a `quantization_config` declares."""

    def __init__(self, config: Any) -> None:
        config = _object(config, "itself")
        method = config.get("quant_method")
        layout = config.get("format", "pack-quantized")
        if method not in METHODS or layout not in ("pack-quantized", "dense"):
            raise BadRequest(
                f"the model is quantized as {method} / {layout}, which is not read yet",
                do="readable: compressed-tensors pack-quantized (integers of 2 to 8 bits)",
            )
        self.targets: list[tuple[str, Format]] = []
        for name, found in _object(config.get("config_groups"), "config_groups").items():
            group = _object(found, name)
            if group.get("input_activations"):
                raise BadRequest("the model quantizes activations too, which is not run yet")
            format = _format(_object(group.get("weights"), "weights"))
            self.targets += [(target, format) for target in _targets(group.get("targets"))]

    def format_of(self, module: str) -> Format:
        """The format of a packed module; exact names win over patterns, patterns over classes."""
        for test in (_exact, _pattern, _class):
            for target, format in self.targets:
                if test(target, module):
                    return format
        raise BadRequest(f"{module} is packed, but no scheme of quantization_config covers it")


def _object(value: Any, name: str) -> Mapping[str, Any]:
    """An object of the file; it may hold anything, absent is empty."""
    if value is not None and not isinstance(value, Mapping):
        raise BadRequest(f"quantization_config: {name} is not an object")
    return value or {}


def _targets(value: Any) -> list[str]:
    """The names of what a scheme covers."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadRequest("quantization_config: targets is not a list of names")
    return value


def _exact(target: str, module: str) -> bool:
    return target == module


def _pattern(target: str, module: str) -> bool:
    """Patterns come from a file: only literals with `.*` are honoured, so none can run away.

    They are looked for one behind the other: as a regular expression, twenty of them could take years.
    """
    if not target.startswith("re:"):
        return False
    first, *rest = (piece.replace("\\.", ".") for piece in target[3:].rstrip("$").split(".*"))
    at = len(first) if module.startswith(first) else -1
    for piece in rest:
        start = module.find(piece, at) if at >= 0 else -1
        at = start + len(piece) if start >= 0 else -1
    return at >= 0


def _class(target: str, module: str) -> bool:
    return target == "Linear"


def _format(weights: Mapping[str, Any]) -> Format:
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise BadRequest(
            f"weights stored as {weights.get('type')} per {weights.get('strategy')} are not read yet",
            do="readable: integers of 2 to 8 bits, per group or per channel",
        )
    if weights.get("actorder") in ("group", True):
        raise BadRequest("weights in activation order with moving groups (g_idx) are not read yet")
    group = weights.get("group_size") if weights["strategy"] == "group" else None
    bits = weights.get("num_bits")
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise BadRequest(f"quantization_config: num_bits is {bits!r}")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise BadRequest(f"quantization_config: symmetric is {str(symmetric)[:80]}")
    return integers(bits, group, zero_point=not symmetric)


def quantization_config(
    formats: Mapping[str, Format], linears: Sequence[str], standard: bool
) -> dict[str, Any]:
    """The config for packed modules (`formats`: stored name -> Format) among all `linears`.

    `standard`: every packed module is a Linear to transformers, so it loads there and in vLLM.
    """
    kinds = sorted({format.name: format for format in formats.values()}.items())
    groups = {}
    for number, (name, format) in enumerate(kinds):
        covered = sorted(module for module, held in formats.items() if held.name == name)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else covered,
            "weights": {
                "num_bits": format.bits,
                "type": "int",
                "symmetric": not format.zero_point,
                "strategy": "group" if format.group else "channel",
                "group_size": format.group,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors" if standard else "onecard",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(linears) - set(formats)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
