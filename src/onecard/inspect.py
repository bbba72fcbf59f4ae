"""What a model is made of, from its headers alone: nothing is loaded, any size is instant. No torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from onecard.checkpoint.hub import find_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.shards import Checkpoint, read_json
from onecard.core.errors import BadRequest
from onecard.core.fusions import fusions
from onecard.core.report import Report, Row, environment
from onecard.core.spec import Spec
from onecard.nn.families import family_of

# The first that fits: embed_out is a head, and self_attn_layer_norm a norm.
PARTS = (
    ("head", ("lm_head", "embed_out")),
    ("embedding", ("embed", "wte", "wpe", "project_in", "project_out")),
    ("experts", (".experts.", ".shared_expert.")),
    ("norms", ("norm", "ln_")),
    ("attention", ("attn", "attention.")),
    ("feed-forward", ("mlp", "feed_forward.", "fc1", "fc2", "block_sparse_moe", "dense_")),
)


def inspect_model(model: str, context: int = 2048, batch: int = 1, fused: bool = False) -> Report:
    """Bytes by part, formats, parameters and the KV cache for `context` tokens of `batch` sequences.

    `fused` lists what the native engine does in one go instead.
    """
    if context < 1 or batch < 1:
        raise BadRequest(f"a context of {context} for {batch} sequences was asked for")
    folder = find_model(model)
    if not (folder / "config.json").is_file():
        raise BadRequest(f"{folder} holds no model", seen="there is no config.json")
    config = read_json(folder / "config.json")
    family = family_of(config)
    spec = family.spec(config)
    if fused:
        return Report(
            tuple(Row(where, " + ".join(f.parts), f"{f.how} ({f.by})") for where, f in fusions(spec)),
            environment(), f"{folder.name}: what the native engine does in one go",
        )  # fmt: skip
    checkpoint = Checkpoint(folder)
    if not checkpoint.entries:
        raise BadRequest(f"{folder} holds no model", seen="there are no tensors in its files")
    file_bytes = sum(path.stat().st_size for path in checkpoint.files)
    sizes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, entry in checkpoint.entries.items():
        sizes[part_of(name)] += entry.nbytes
        dtypes[entry.dtype] += entry.nbytes
    sizes["headers"] = file_bytes - checkpoint.nbytes
    rows = [Row.of("model", "file_bytes", file_bytes)]
    rows += [Row(part, "part_bytes", size, "B") for part, size in sizes.most_common()]
    rows += [
        Row("model", "architecture", family.architecture),
        Row("model", "layers", spec.num_layers),
        Row("model", "hidden", spec.hidden),
        Row("model", "vocabulary", spec.vocab_size),
        Row("model", "max_context", spec.max_context),
        Row(
            "model",
            "format",
            ", ".join(formats(config) or [dtypes.most_common(1)[0][0]]),
        ),
        Row("kv cache", "cache_bytes", kv_bytes(spec, context, batch), "B"),
    ]
    notes = [("convention: kv cache", f"{batch} x {context} tokens, 2 bytes per number")]
    if context > spec.max_context:
        text = f"{context} tokens are more than the {spec.max_context} that the model is made for"
        notes.append(("context", text))
    return Report(tuple(rows), environment(), folder.name, tuple(notes))


def part_of(name: str) -> str:
    """The part of a model that a stored tensor belongs to."""
    for part, marks in PARTS:
        if any(mark in name for mark in marks):
            return part
    return "other"


def formats(config: dict[str, Any]) -> list[str]:
    """Names of the packed formats in a folder, none for a dense one."""
    found = config.get("quantization_config")
    return Schemes(found).names() if found else []


def kv_bytes(spec: Spec, context: int, batch: int) -> int:
    """Bytes of keys and values in 16 bits; a layer with a window keeps no more than the window."""
    total = 0
    for layer in spec.layers:
        a = layer.attention
        kept = min(context, a.window or context)
        total += 2 * 2 * a.num_kv_heads * a.head_dim * kept * batch
    return total
