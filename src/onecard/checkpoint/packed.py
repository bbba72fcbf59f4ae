"""`quantization_config`, both ways: how a folder says in which formats its matrices are.

Integers are compressed-tensors' pack-quantized (int-quantized, a byte each, where they have 8 bits and
inputs are rounded too), fp8 its float-quantized: a scheme names the modules it covers (`Linear`, a
module name, or `re:` and a pattern), the grid of their weights, and that of their inputs where these are
rounded. transformers and vLLM read these folders. Everything else, and what transformers cannot hold as
a Linear (GPT-2's transposed Conv1D), is `quant_method: onecard`:

    {"quant_method": "onecard", "formats": {"nf4-g64": [module, ...], ...}, "scale": "bf16", "split": false,
     "inputs": {"int8-token": [module, ...]}}

`split`: the parts of a fused matrix lie each alone, because their formats differ or cannot be joined.
`inputs` is only there where some are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onecard.core.errors import BadRequest
from onecard.core.format import DENSE, Float8, Format, Integers, parse_format
from onecard.core.scheme import Inputs, Scheme, parse_inputs

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "mixed-precision", "dense")


class Schemes:
    """What a `quantization_config` declares of linears."""

    def __init__(self, config: Any) -> None:
        config = _object(config, "itself")
        method, layout = config.get("quant_method"), config.get("format", "pack-quantized")
        self.own = method == "onecard" and "formats" in config
        self.split = False
        self.scale: str | None = None  # of our own formats; others have it in each matrix
        self.targets: list[tuple[str, Scheme]] = []
        if self.own:
            self._read_own(config)
            return
        if method not in ("compressed-tensors", "onecard") or layout not in LAYOUTS:
            stated = [_short(config[k]) for k in ("quant_method", "format") if k in config]
            raise BadRequest(
                f"the model is quantized as {' / '.join(stated) or 'nothing named'}, which is not read "
                "yet",
                do="readable: compressed-tensors pack-quantized and int-quantized (integers of 2 to "
                "8 bits) and float-quantized (fp8), and onecard's own",
            )
        for name, found in _object(config.get("config_groups"), "config_groups").items():
            group = _object(found, name)
            format = _format(_object(group.get("weights"), "weights"))
            inputs = _inputs(_object(group.get("input_activations"), "input_activations"))
            scheme = Scheme(format, inputs)
            self.targets += [(target, scheme) for target in _targets(group.get("targets"))]

    def _read_own(self, config: Mapping[str, Any]) -> None:
        scale, split = config.get("scale", "bf16"), config.get("split", False)
        if scale not in DENSE or not isinstance(split, bool):
            raise BadRequest(
                f"quantization_config: scale is {_short(scale)}, split is {_short(split)}"
            )
        self.scale, self.split = scale, split
        fed: dict[str, Inputs] = {}
        for name, modules in _object(config.get("inputs"), "inputs").items():
            fed |= dict.fromkeys(_targets(modules), parse_inputs(str(name)))
        for name, modules in _object(config["formats"], "formats").items():
            format = parse_format(str(name)).scaled(scale)
            self.targets += [(t, Scheme(format, fed.get(t))) for t in _targets(modules)]
        self._exact = dict(self.targets)

    def names(self) -> list[str]:
        """Names of all formats."""
        return sorted({scheme.format.name for _, scheme in self.targets})

    def inputs(self) -> list[str]:
        """Names of all roundings of inputs."""
        return sorted({scheme.inputs.name for _, scheme in self.targets if scheme.inputs})

    def find(self, module: str) -> Scheme | None:
        """The scheme of a module; exact names win over patterns, patterns over classes."""
        if self.own:
            return self._exact.get(module)
        for test in (_exact, _pattern, _class):
            for target, scheme in self.targets:
                if test(target, module):
                    return scheme
        return None


def _short(value: Any) -> str:
    return str(value)[:80]


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
    if weights.get("type") == "float" and weights.get("num_bits") == 8:
        per = {"channel": "row", "tensor": "tensor"}.get(str(weights.get("strategy")))
        if per is not None and weights.get("symmetric", True) is True:
            return Float8(per)
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise BadRequest(
            f"weights stored as {weights.get('type')} per {weights.get('strategy')} are not read yet",
            do="readable: integers of 2 to 8 bits per group or channel, fp8 per channel or tensor",
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
    return Integers(bits, group, zero_point=not symmetric)


def _inputs(given: Mapping[str, Any]) -> Inputs | None:
    if not given:
        return None
    kind = {"int": "int8", "float": "fp8"}.get(str(given.get("type", "int")))
    how = f"{given.get('dynamic', False)} {given.get('strategy')}"
    scale = {"True token": "token", "False tensor": "static"}.get(how)
    if (
        kind is None
        or scale is None
        or given.get("num_bits") != 8
        or not given.get("symmetric", True)
    ):
        raise BadRequest(
            f"inputs rounded to {_short(given.get('type'))}{_short(given.get('num_bits'))} per "
            f"{_short(given.get('strategy'))} are not read yet",
            do="readable: symmetric int8 and fp8, dynamic per token or static per tensor",
        )
    return parse_inputs(f"{kind}-{scale}")


def must_split(formats: Sequence[Format | None]) -> bool:
    """Whether the parts of fused matrices have to lie alone: only integers can be cut and joined."""
    return any(format is not None and not isinstance(format, Integers) for format in formats)


def quantization_config(
    schemes: Mapping[str, Scheme], linears: Sequence[str], plain: bool, split: bool, scale: str
) -> dict[str, Any]:
    """The config for packed modules (`schemes`: stored name -> Scheme) among all `linears`.

    `plain`: every packed module is a Linear to transformers, under the name it has there. Then integers
    and fp8 load there and in vLLM.
    """
    kinds = sorted({scheme.name: scheme for scheme in schemes.values()}.items())
    covered = {
        name: sorted(module for module, held in schemes.items() if held.name == name)
        for name, _ in kinds
    }
    layouts = {layout_of(scheme) for _, scheme in kinds}
    if not plain or layouts not in STANDARD:
        return _own(schemes, split, scale)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(kinds) == 1 else covered[name],
            "weights": _weights(scheme.format),
            "input_activations": _activations(scheme.inputs),
            "output_activations": None,
            **({"format": layout_of(scheme)} if scheme.inputs else {}),
        }
        for number, (name, scheme) in enumerate(kinds)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(layouts) > 1 else layouts.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(linears) - set(schemes)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _own(schemes: Mapping[str, Scheme], split: bool, scale: str) -> dict[str, Any]:
    formats: dict[str, list[str]] = {}
    inputs: dict[str, list[str]] = {}
    for module, scheme in sorted(schemes.items()):
        formats.setdefault(scheme.format.name, []).append(module)
        if scheme.inputs:
            inputs.setdefault(scheme.inputs.name, []).append(module)
    config = {"quant_method": "onecard", "formats": dict(sorted(formats.items())), "scale": scale,
              "split": split}  # fmt: skip
    return config | ({"inputs": dict(sorted(inputs.items()))} if inputs else {})


STANDARD = (
    {"pack-quantized"},
    {"int-quantized"},
    {"int-quantized", "pack-quantized"},
    {"float-quantized"},
)


def layout_of(scheme: Scheme) -> str | None:
    """The layout of compressed-tensors that holds a scheme."""
    if isinstance(scheme.format, Integers):
        return "int-quantized" if scheme.bytewise else "pack-quantized"
    if isinstance(scheme.format, Float8) and scheme.format.per != "block":
        return "float-quantized"
    return None


def _activations(inputs: Inputs | None) -> dict[str, Any] | None:
    """The `input_activations` of a scheme."""
    if inputs is None:
        return None
    return {
        "num_bits": 8,
        "type": "int" if inputs.kind == "int8" else "float",
        "symmetric": True,
        "strategy": "tensor" if inputs.static else "token",
        "group_size": None,
        "dynamic": not inputs.static,
        "actorder": None,
    }


def _weights(format: Format) -> dict[str, Any]:
    """The `weights` of a scheme."""
    common = {"dynamic": False, "actorder": None}
    if isinstance(format, Float8):
        strategy = {"row": "channel", "tensor": "tensor"}[format.per]
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
                "group_size": None, **common}  # fmt: skip
    assert isinstance(format, Integers)
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": not format.zero_point,
        "strategy": "group" if format.group else "channel",
        "group_size": format.group,
        **common,
    }
