"""Whether a model fits a device, in which format, and how fast it can be there. Headers alone are read.

    memory    weights + keys and values of all positions + work space + program
    decode    a step reads every weight once (of experts those that are chosen), and all keys and values:
                  tokens/s = batch * DECODE * bandwidth / bytes of a step
    prompt    two operations per weight and token, and in attention four per position and number of a head:
                  tokens/s = PROMPT * peak / operations of a token

That is for another device: the bytes are those of the stored formats, its maker's figures stand for what it
does, and DECODE and PROMPT are the shares of the roofs that good kernels reach: the speeds are modelled, and
reports say so. For this machine the bytes are those that the native engine would take, from its own code
(runtime/footprint.py), and the speeds follow from its kernels as measured here (cost.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onecard.checkpoint.source import Place, Source
from onecard.core.device import Device
from onecard.core.devices import device as known_device
from onecard.core.format import Format, Integers
from onecard.core.report import Row
from onecard.core.settings import format_size
from onecard.core.spec import KEPT_DENSE, Spec, linear_shapes
from onecard.cost import Cost, cost, measured
from onecard.kernels import cpu
from onecard.runtime.footprint import footprint

DECODE, PROMPT = 0.85, 0.6
PROMPTED = 512
"""Tokens of the prompt that a speed is told for."""
CARD_PROGRAM = 512 << 20
"""What a card's driver and libraries take of its memory."""
SIXTEEN = 2  # bytes of a number of 16 bits
CANDIDATES: tuple[Format | None, ...] = (
    None, Integers(8), Integers(4), Integers(3), Integers(2),
)  # fmt: skip
"""None: as the model is stored."""


@dataclass(frozen=True)
class Need:
    """What a model in one format takes: bytes, bytes read per step and operations per token of a prompt."""

    memory: int  # with keys and values of all positions
    fixed: int  # without them
    position: float  # bytes of keys and values of one position
    step: float
    operations: float

    def longest(self, memory: int) -> int:
        """Positions of all sequences that fit into `memory` bytes; 0 where the rest does not fit."""
        return max(0, int((memory - self.fixed) / self.position))


def device_of(name: str) -> Device:
    """This machine for `auto` (measured once and remembered), else a known device. Raises BadRequest."""
    return cpu.probe() if name == "auto" else known_device(name)


STORED = "as stored"


def fits(source: Source, name: str, context: int, batch: int = 1) -> Iterator[Row]:
    """For every candidate: memory, whether that is there, the longest context, speeds at `context`."""
    device = device_of(name)
    here = name == "auto"
    memory = device.memory_available if here else device.memory_bytes
    yield Row("device", "name", device.name)
    yield Row("device", "memory_available", memory, "B")
    for format in CANDIDATES:
        where = format.name if format else STORED
        need = (needed_here if here else needed)(source, format, context, batch)
        found = cost(source, format, context, batch) if here else None
        yield Row(where, "needed_bytes", need.memory, "B")
        yield Row(where, "fits", need.memory <= memory)
        yield Row(
            where, "longest_context", min(need.longest(memory) // batch, source.spec.max_context)
        )
        decode, prompt = speeds(device, need, batch, found)
        yield Row.of(where, "decode_tokens_per_second", decode)
        yield Row.of(where, "prompt_tokens_per_second", prompt)


def answer(rows: Sequence[Row], context: int, batch: int) -> str:
    """Whether it fits, in a sentence, from the rows of `fits`."""
    needs = {row.where: int(row.value) for row in rows if row.what == "needed_bytes"}  # type: ignore[arg-type]
    good = [row.where for row in rows if row.what == "fits" and row.value]
    facts = {row.what: row.value for row in rows if row.where == "device"}
    asked = f"{context} tokens" + (f" of {batch} sequences" if batch > 1 else "")
    room = format_size(int(facts["memory_available"]))  # type: ignore[arg-type]
    said = f"With {asked} it needs {format_size(needs[STORED])} {STORED}, and {facts['name']} has {room}"
    if STORED in good:
        return f"{said}: it fits."
    if good:
        return f"{said}: it fits in {good[0]} and fewer bits ({format_size(needs[good[0]])})."
    least, name = min((size, name) for name, size in needs.items())
    return f"{said}: it does not fit in any format tried, {name} needs {format_size(least)}."


def speeds(
    device: Device, need: Need, batch: int, found: Cost | None
) -> tuple[float | None, float | None]:
    """Tokens/s of decoding and of a prompt: from a cost where there is one, else from the roofs."""
    if found is not None:
        return batch / found.decode, 1 / found.prompt
    return decode_speed(device, need, batch), prompt_speed(device, need)


def decode_speed(device: Device, need: Need, batch: int) -> float | None:
    """Tokens/s of all sequences together; None where the device's bandwidth is not known."""
    bandwidth = device.bandwidth()
    return None if bandwidth is None else batch * DECODE * bandwidth / need.step


def prompt_speed(device: Device, need: Need) -> float | None:
    """Tokens/s; None where no peak is known. A CPU multiplies in int8, a card in 16 bits where it can."""
    order = ("int8", "bf16") if device.kind == "cpu" else ("bf16", "int8")
    peak = next((p for p in map(device.peak, order) if p), None)
    return None if peak is None else PROMPT * peak / need.operations


def needed_here(source: Source, format: Format | None, context: int, batch: int) -> Need:
    """On this machine, by the native engine."""
    found = footprint(source, context, batch, formats=format, program=measured().program)
    sizes = dict(found.weights)
    idle = (1 - _chosen(source.spec, batch)) * sizes.get("experts", 0)
    read = found.weight_bytes - sizes["embedding"] - idle
    return Need(
        found.total, found.total - found.kv_bytes, found.kv_bytes / found.positions,
        read + found.kv_bytes, _operations(source.spec),
    )  # fmt: skip


def needed(source: Source, format: Format | None, context: int, batch: int) -> Need:
    """On a device of which only its maker's figures are known: formats as stored, the rest in 16 bits."""
    spec = source.spec
    stored = read = 0.0
    for index in source.parts():
        for place in source.places(index):
            size = _size(source, place, index, format)
            if not (place.path == "tail.head" and spec.tied):
                stored += size
            if not place.path.startswith("stem."):
                read += size * (_chosen(spec, batch) if ".expert" in place.path else 1.0)
    widest = max(layer.feed_forward.width for layer in spec.layers)
    fixed = int(stored) + 4 * SIXTEEN * PROMPTED * (spec.hidden + widest) + CARD_PROGRAM
    position = 2 * SIXTEEN * sum(
        layer.attention.num_kv_heads * layer.attention.head_dim for layer in spec.layers
    )  # fmt: skip
    cache = position * context * batch
    return Need(fixed + cache, fixed, position, read + cache, _operations(spec))


def _size(source: Source, place: Place, index: int | None, other: Format | None) -> int:
    """Bytes of a module; linears of blocks in another format, if there is one."""
    shape = place.module.shape
    if index is not None and place.module.kind == "linear" and place.path not in KEPT_DENSE:
        matrix = (shape[0], shape[1])
        found = other.for_row(shape[1]) if other else source.format_at(place)
        if found is not None:
            return found.bytes(matrix)
    return SIXTEEN * math.prod(shape)


def _chosen(spec: Spec, batch: int) -> float:
    """The share of experts that `batch` tokens read, were they chosen evenly; 1 without experts."""
    every = [layer.feed_forward.experts for layer in spec.layers]
    shares = [1 - (1 - e.top / e.count) ** batch for e in every if e]
    return sum(shares) / len(shares) if shares else 1.0


def _operations(spec: Spec) -> float:
    """Of a token of a prompt of PROMPTED tokens; its last one alone needs the head."""
    total = 2.0 * spec.vocab_size * spec.embed_size / PROMPTED
    for layer in spec.layers:
        experts, a = layer.feed_forward.experts, layer.attention
        for path, shape in linear_shapes(spec, layer).items():
            share = experts.top / experts.count if experts and ".expert" in path else 1.0
            total += 2.0 * share * math.prod(shape)
        total += 4.0 * PROMPTED / 2 * a.num_heads * a.head_dim
    return total
