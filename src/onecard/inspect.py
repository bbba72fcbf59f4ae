"""What a model is made of, from its headers alone: nothing is loaded, any size is instant. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from onecard.checkpoint.hub import called, find_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.shards import Checkpoint, read_json
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.fusions import fusions
from onecard.core.report import BITS_PER_WEIGHT, Report, Row, environment
from onecard.core.spec import Spec, parameter_count
from onecard.cost import SPREAD, measured
from onecard.nn.families import family_of
from onecard.roofline import DECODE, PROMPT, PROMPTED, answer, fits
from onecard.runtime.footprint import footprint
from onecard.runtime.pages import position_bytes

MEASURED = (
    f"from this machine's kernels, measured once: give or take {SPREAD:.0%}, at the end of the context and "
    "over all of it; less beside other programs that are busy"
)
MODELLED = (
    f"modelled, not measured: {DECODE:.0%} of reading memory, {PROMPT:.0%} of the peak for a prompt of "
    f"{PROMPTED}, by the maker's figures. A model that is small for its device waits between steps and "
    "stays below this"
)
# The first that fits: embed_out is a head, and self_attn_layer_norm a norm.
PARTS = (
    ("head", ("lm_head", "embed_out")),
    ("embedding", ("embed", "wte", "wpe", "project_in", "project_out")),
    ("experts", (".experts.", ".shared_expert.")),
    ("norms", ("norm", "ln_")),
    ("attention", ("attn", "attention.")),
    ("feed-forward", ("mlp", "feed_forward.", "fc1", "fc2", "block_sparse_moe", "dense_")),
)
USUAL_CONTEXT = 2048  # tokens


def inspect_model(
    model: str, context: int | None = None, batch: int = 1, fused: bool = False,
    device: str | None = None, about_to_measure: Callable[[], None] = lambda: None,
) -> Report:  # fmt: skip
    """Bytes by part, formats, parameters and the KV cache for `context` tokens of `batch` sequences; if none
    are given, for 2048, or for as many as the model is made for.

    `fused` lists what the native engine does in one go instead. `device` ("auto" for this machine, or a name
    of core/devices.py) adds what it takes there in several formats, and how fast it can be; this machine's
    kernels are timed for that, once, and `about_to_measure` is called before.
    """
    if batch < 1 or (context is not None and context < 1):
        raise BadRequest(
            f"a context of {context} for {batch} sequences was asked for", do="both are 1 or more"
        )
    folder = find_model(model)
    if not (folder / "config.json").is_file():
        raise BadRequest(f"{folder} holds no model", seen="there is no config.json")
    config = read_json(folder / "config.json")
    family = family_of(config)
    spec = family.spec(config)
    context = min(USUAL_CONTEXT, spec.max_context) if context is None else context
    if fused:
        return Report(
            tuple(Row(where, " + ".join(f.parts), f"{f.how} ({f.by})") for where, f in fusions(spec)),
            environment(), f"{called(model)}: what the native engine does in one go",
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
    count = parameter_count(spec)
    rows = [
        Row.of("model", "file_bytes", file_bytes),
        Row.of("model", "bits_per_weight", 8 * checkpoint.nbytes / count),
        Row.of("model", "parameters", count),
    ]
    rows += [Row(part, "part_bytes", size, "B") for part, size in sizes.most_common()]
    rows += [
        Row("model", "architecture", family.architecture),
        Row("model", "layers", spec.num_layers),
        Row("model", "hidden", spec.hidden),
        Row("model", "vocabulary", spec.vocab_size),
        Row("model", "max_context", spec.max_context),
        Row("model", "format", ", ".join(formats(config) or [dtypes.most_common(1)[0][0]])),
        *(Row("model", "inputs", name) for name in inputs(config)),
        Row("kv cache", "cache_bytes", kv_bytes(spec, context, batch), "B"),
        *(
            Row(f"kv cache in {held}", "cache_bytes", kv_bytes(spec, context, batch, held), "B")
            for held in ("int8", "fp8", "int4")
        ),
    ]
    told = f"{batch} x {context} tokens, 2 bytes per number; smaller ones with their scales"
    notes = [("convention: bits per weight", BITS_PER_WEIGHT), ("convention: kv cache", told)]
    missing, wrong = lacking(folder)
    if missing:
        rows.insert(3, Row("model", "missing_tensors", len(missing)))
        text = f"{missing[0]} and others" if len(missing) > 1 else missing[0]
        wrong = f"there is no {text}: the download is incomplete, or config.json is another model's"
    if wrong:
        notes.insert(0, ("cannot be loaded", wrong))
    if device is not None:
        source = Source(folder)
        if device == "auto":
            taken = footprint(source, context, batch)  # raises, where it is not possible
            about_to_measure()
            taken = replace(taken, program_bytes=measured().program)
            rows += [Row(part, "memory_bytes", size, "B") for part, size in taken.parts()]
        found = list(fits(source, device, context, batch))
        rows += found
        how = MEASURED if device == "auto" else MODELLED
        notes += [("answer", answer(found, context, batch)), ("convention: speed", how)]
    if context > spec.max_context:
        text = f"{context} tokens are more than the {spec.max_context} that the model is made for"
        notes.append(("context", text))
    return Report(tuple(rows), environment(), called(model), tuple(notes))


def lacking(folder: Path) -> tuple[tuple[str, ...], str]:
    """Tensors that config.json asks for and no header shows; what else keeps a folder from being loaded."""
    try:
        return Source(folder, whole=False).missing, ""
    except BadRequest as problem:
        return (), problem.what


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


def inputs(config: dict[str, Any]) -> list[str]:
    """How inputs of packed linears are rounded, where a folder says so."""
    found = config.get("quantization_config")
    return Schemes(found).inputs() if found else []


def kv_bytes(spec: Spec, context: int, batch: int, held: str | None = None) -> int:
    """Bytes of keys and values, in 16 bits or as the engine holds them in `held`; a layer with a window
    keeps no more than the window."""
    total = 0
    for layer in spec.layers:
        a = layer.attention
        each = 2 * 2 * a.num_kv_heads * a.head_dim
        if held is not None:
            each = position_bytes(a.num_kv_heads, a.head_dim, held)
        total += each * min(context, a.window or context) * batch
    return total
