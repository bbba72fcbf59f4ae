"""Layers that differ, in a config.json: the sizes of a Spec go back into the settings they came from.

What most layers have stands where a family has always had it; `per_layer_config`, the schema that the
transformers library reads, names for each other layer what it has instead:

    "intermediate_size": 5632, "per_layer_config": {"03": {"intermediate_size": 4096}}

A layer with such settings is read as if they were the whole model's, and that layer is taken, so no
family has to know of it. What was written is read again and compared: a Spec that a family's settings
cannot say is refused, not approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from onecard.core.errors import BadRequest
from onecard.core.spec import LayerSpec, Spec
from onecard.nn.config import Config, shown

PER_LAYER = "per_layer_config"
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Sizes:
    """What a family calls the sizes of a layer; None where it has no setting for one."""

    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str = "head_dim"
    width: str = "intermediate_size"
    routed: str = "moe_intermediate_size"
    shared: str = "shared_expert_intermediate_size"
    types: str | None = "layer_types"

    def per_layer(self) -> set[str]:
        """Settings that may differ from layer to layer."""
        names = (self.heads, self.kv_heads, self.head_dim, self.width, self.routed, self.shared)
        return {name for name in names if name}

    def of(self, layer: LayerSpec) -> dict[str, int]:
        """The settings of one layer."""
        a, f = layer.attention, layer.feed_forward
        found = {self.heads: a.num_heads, self.head_dim: a.head_dim}
        if self.kv_heads:
            found[self.kv_heads] = a.num_kv_heads
        found[self.routed if f.experts else self.width] = f.width
        if f.experts and f.experts.shared_width:
            found[self.shared] = f.experts.shared_width
        return found


def read_layers(read: Callable[[Config], Spec], config: Config, sizes: Sizes) -> Spec:
    """The Spec of a config whose layers may differ. `read` takes one whose layers do not."""
    given = config.get(PER_LAYER)
    if not given:
        return read(config)
    plain = {key: value for key, value in config.items() if key != PER_LAYER}
    spec = read(plain)
    if not isinstance(given, Mapping) or len(given) > MOST_LAYERS:
        raise BadRequest(f"config.json: {PER_LAYER} is {shown(given)}", do="layer: {setting: size}")
    layers, known = list(spec.layers), dict[tuple[tuple[str, Any], ...], Spec]()
    for key, more in given.items():
        where = f"config.json: {PER_LAYER} of layer {shown(key)}"
        index = int(key) if isinstance(key, str) and key.isdigit() and len(key) < 6 else -1
        if not 0 <= index < len(layers) or not isinstance(more, Mapping):
            raise BadRequest(
                where, do=f"a layer from 0 to {len(layers) - 1} and an object of sizes"
            )
        for name, value in more.items():
            if name not in sizes.per_layer() or isinstance(value, bool) or type(value) is not int:
                raise BadRequest(
                    f"{where} sets {shown(name)} to {shown(value)}",
                    do="sizes that may differ: " + ", ".join(sorted(sizes.per_layer())),
                )
        row = tuple(sorted(more.items()))
        if row not in known:
            known[row] = read({**plain, **more})
        if replace(known[row], layers=()) != replace(spec, layers=()):
            raise BadRequest(f"{where} changes what layers have in common")
        layers[index] = known[row].layers[index]
    return replace(spec, layers=tuple(layers))


def config_of(
    read: Callable[[Config], Spec], config: Config, sizes: Sizes, spec: Spec
) -> dict[str, Any]:
    """`config` with the sizes of `spec`. BadRequest where the family's settings cannot say them.

    `read` takes a config whose layers may differ.
    """
    if read(config) == spec:
        return dict(config)
    made = {key: value for key, value in config.items() if key != PER_LAYER}
    if sizes.kv_heads is None:  # a family that has as many as heads, whatever else is said
        made.pop("num_key_value_heads", None)
    rows = [sizes.of(layer) for layer in spec.layers]
    made[sizes.layers], made[sizes.hidden] = len(rows), spec.hidden
    for name in sorted({name for row in rows for name in row}):
        counts = Counter(row[name] for row in rows if name in row)
        made[name] = counts.most_common(1)[0][0]
    digits = len(str(len(rows) - 1))
    differing = {
        str(index).zfill(digits): {k: v for k, v in row.items() if made[k] != v}
        for index, row in enumerate(rows) if any(made[k] != v for k, v in row.items())
    }  # fmt: skip
    if differing:
        made[PER_LAYER] = differing
    windows = [layer.attention.window for layer in spec.layers]
    if sizes.types and (config.get(sizes.types) or len(set(windows)) > 1):
        kinds = ("full_attention", "sliding_attention")
        made[sizes.types] = [kinds[window is not None] for window in windows]
    if any(layer.feed_forward.experts for layer in spec.layers) and "mlp_only_layers" in config:
        plain = [i for i, layer in enumerate(spec.layers) if not layer.feed_forward.experts]
        made |= {"mlp_only_layers": plain, "decoder_sparse_step": 1}
    try:
        same = read(made) == spec
    except BadRequest as error:
        raise BadRequest(
            "the config.json of the result would not be read", str(error), "leave another count"
        ) from error
    if not same:
        raise BadRequest(
            f"a config.json of {spec.family} cannot say what the layers would be like",
            do="cut every layer alike, or other parts",
        )
    return made
