"""What the native engine does in one go that the plain network does one by one, as rows of a Spec.

Every line names a function of kernels/csrc/forward.cpp, which does it. That nothing changes by it is
shown where the engine's logits are compared with the plain network's (tests/test_engine_families.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from onecard.core.spec import LayerSpec, Spec

NORMED = "a row is normed and rounded to int8 while it is in the cache"
ADDED = "rows are added while they are in the cache"
PAGES = "one pass over the pages of keys and values, no matrix of weights"


@dataclass(frozen=True)
class Fusion:
    """`parts` are done together; `how` says what is saved; `by` is the engine's function."""

    parts: tuple[str, ...]
    how: str
    by: str


def block_fusions(spec: Spec, layer: LayerSpec) -> list[Fusion]:
    """Of one block, in the order data meets them."""
    a, f = layer.attention, layer.feed_forward
    made = []
    if layer.order != "post":
        made.append(Fusion(("norm_attention_in", "rounding of its output"), NORMED, "prepare"))
    made.append(
        Fusion(
            ("attention.q", "attention.k", "attention.v"),
            "one product of one input, which is rounded once",
            "products",
        )
    )
    turned = [
        name for name, on in (("head norms", a.head_norm), ("rope", a.rope is not None)) if on
    ]
    made.append(
        Fusion((*turned, "storing keys and values"), "one pass over a row of heads", "place")
    )
    capped = ("soft cap",) if a.soft_cap is not None else ()
    made.append(Fusion(("q k^T", *capped, "softmax", "weights v"), PAGES, "Attention::run"))
    if layer.order == "pre":
        made.append(Fusion(("attention.o", "residual sum"), ADDED, "product"))
    stack = "feed_forward" if f.experts is None else "each expert"
    if layer.order != "post" and f.experts is None:
        made.append(Fusion(("norm_feed_forward_in", "rounding of its output"), NORMED, "prepare"))
    inner = (f"{stack}.gate", f"{stack}.up") if f.gated else (f"{stack}.up",)
    product = ("product of both",) if f.gated else ()
    made.append(
        Fusion(
            (*inner, f.activation, *product),
            "tile by tile of one input, which is rounded once",
            "inner",
        )
    )
    if f.experts is None and layer.order in ("pre", "parallel"):
        branches = (
            ("residual sum",) if layer.order == "pre" else ("sum of both branches and residual",)
        )
        made.append(Fusion((f"{stack}.down", *branches), ADDED, "product"))
    if a.bias or a.out_bias or f.bias:
        made.append(
            Fusion(("products", "biases"), "added to the tiles a thread has made", "multiply")
        )
    return made


def outer_fusions(spec: Spec) -> list[Fusion]:
    """Outside the blocks, and what is computed once."""
    made = [
        Fusion(
            ("embedding", "its dtype", *(("its scale",) if spec.embed_scale != 1 else ())),
            "rows are gathered from the stored table",
            "embed",
        )
    ]
    if any(layer.attention.rope is not None for layer in spec.layers):
        made.append(Fusion(("cos and sin of all layers",), "once per position of a step", "embed"))
    if spec.norm.offset:
        made.append(
            Fusion(
                ("norm weights", "their offset"),
                "added once, when weights are laid out",
                "laying out",
            )
        )
    if spec.final_soft_cap is not None:
        made.append(Fusion(("head", "soft cap"), "on the tiles a thread has made", "product"))
    made.append(
        Fusion(("logits", "choosing the next token"), "in the same call as the step", "give")
    )
    return made


def fusions(spec: Spec) -> list[tuple[str, Fusion]]:
    """(blocks or model, Fusion) of a whole model; blocks that are alike together."""
    found = []
    for layer in dict.fromkeys(spec.layers):
        alike = [i for i, other in enumerate(spec.layers) if other == layer]
        where = f"blocks.{_runs(alike)}"
        found += [(where, fusion) for fusion in block_fusions(spec, layer)]
    return found + [("model", fusion) for fusion in outer_fusions(spec)]


def _runs(numbers: list[int]) -> str:
    """`0-3,5` of rising numbers."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
