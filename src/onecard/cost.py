"""What a model costs on this machine, in any mix of formats: memory, and seconds of a step and of a prompt.

    memory   what the allocating code says (runtime/footprint.py)
    decode   sum over matrices of seconds(shape, form, rows)     kernels/rates.py, measured
           + sum over layers of attention(positions)             the same
           + layers * layer + step + vocabulary * choice         fitted: barriers, norms, a step's begin
    prompt   the same with 512 rows of inputs instead of one, by the token, and nothing else

all but the second line times a share above 1, one for each: in a network a kernel finds its caches full of
other things, and between the kernels numbers are normed, rounded and activated. This too is fitted, to a
model of six real layers (SOLID), the rest to the steps of three small ones that differ in one thing each;
once per machine, in a process of its own, which also tells what the program itself takes. All of it is
additive, so that a planner can sum what it chooses:

    costs = Costs(source, context=4096)
    costs.of_matrix((2048, 2048), Integers(4))   -> Share(memory, decode, prompt)
    costs.rest()                                 -> Share of all that is no linear of a block
    cost(source, {"blocks.0.attention.q": Integers(4), ...}, context=4096)   -> Cost, with all of them summed

`decode` is seconds of a step of `batch` sequences, each with `context` positions behind it; `prompt` is
seconds per token of a prompt of `context` tokens. A model that fits into the processor's cache is read
faster: Costs takes the share that does from the bytes of a step (`size`; as stored where nobody says). Work
space is that of the formats as stored; products of two need a little more, which `cost` knows.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from onecard.checkpoint.packed import quantization_config
from onecard.checkpoint.source import Source
from onecard.core.device import cpu_facts, resident, usable_cores
from onecard.core.format import Format, Integers, Shape
from onecard.core.scheme import Scheme
from onecard.core.spec import LayerSpec, Spec
from onecard.kernels import cpu, layout, rates, tune
from onecard.kernels.rates import Form, Heads
from onecard.kernels.structs import Matrix
from onecard.runtime.cpu import CpuSettings, CpuStepper, usual_cache
from onecard.runtime.footprint import USUAL, footprint
from onecard.runtime.sample import GREEDY
from onecard.runtime.steps import Draw, Feed
from onecard.runtime.weights import Formats, Weights, matrices, planned_weights

FILE = "overheads.json"
PROMPTED = 512  # rows of inputs at once
BARRIERS = 8  # of a layer whose matrices are no products of two
LOWERED = 1.2  # more for each that is one: two, and a rounding, for the matrices of one input
SPREAD = 0.15
"""Half width of a predicted time, as a share of it: nearly all cases of benchmarks/cost.py stay within."""


@dataclass(frozen=True)
class Share:
    """Bytes, seconds of a step, seconds per token of a prompt. They add up."""

    memory: int = 0
    decode: float = 0.0
    prompt: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.memory + other.memory, self.decode + other.decode, self.prompt + other.prompt
        )


@dataclass(frozen=True)
class Cost:
    """Of a whole model: bytes resident, seconds of a step, seconds per token of a prompt, and `spread`, the
    share by which a time may be off to either side."""

    memory: int
    decode: float
    prompt: float
    spread: float = SPREAD


@dataclass(frozen=True)
class Overheads:
    """What the small models said: seconds per layer, step and entry of the vocabulary; how many times longer
    kernels take in a network; and the bytes of a process that has opened nothing yet. `keeps`: how well the
    last cache keeps what is larger (rates.keeps)."""

    layer: float
    step: float
    choice: float
    decode: float
    prompt: float
    program: int
    keeps: float


NONE = Overheads(0.0, 0.0, 0.0, 1.0, 1.0, 0, rates.KEEPS)


class Costs:
    """The parts of what a model costs, in any formats. Raises BadRequest where the engine cannot run it."""

    def __init__(
        self, source: Source, context: int = 2048, batch: int = 1, settings: CpuSettings = USUAL,
        size: int | None = None, overheads: Overheads | None = None,
    ) -> None:  # fmt: skip
        self.source, self.spec, self.settings = source, source.spec, settings
        self.context, self.batch = context, batch
        self.threads = settings.threads or usable_cores()
        self.overheads = overheads or measured()
        self._rates: dict[Form, rates.Rate] = {}
        self.footprint = footprint(source, context, batch, settings, program=self.overheads.program)
        self.stored = planned_weights(source, settings.head)
        read = sum(self.stored.linears().values()) if size is None else size
        self.cached = cached(read + self.footprint.kv_bytes, self.overheads.keeps)

    def prepare(self, wanted: Iterable[tuple[Shape, Format]]) -> None:
        """Measures what is not known yet of all of these at once, instead of one by one."""
        self._measure(m for shape, format in wanted for m in matrices(format, shape).values())

    def of_matrix(self, shape: Shape, format: Format, chosen: float = 1.0) -> Share:
        """A linear of `shape` [out, in]; `chosen` is the share of tokens that meet it, of an expert's."""
        return self._share(list(matrices(format, shape).values()), chosen)

    def all(self, weights: Weights) -> Share:
        """The rest, and all linears of blocks as they lie in `weights`."""
        total = self.rest()
        for path in weights.linears():
            if path.startswith("blocks."):
                total += self._share(weights.linear(path), _chosen(self.spec, path))
        return total

    def rest(self) -> Share:
        """All that is no linear of a block: embedding, head, norms, attention, keys and values, the rest of
        the steps, the program."""
        linears = self.stored.linears().items()
        blocks = sum(size for path, size in linears if path.startswith("blocks."))
        made = Share(self.footprint.total - blocks) + self._steps() + self._attention()
        for path in self.stored.linears():
            if not path.startswith("blocks."):
                own = self._share(self.stored.linear(path), 1.0)
                once = 1 / self.context if path.startswith("tail.") else 1.0
                made += Share(0, own.decode, own.prompt * once)
        return made

    def _share(self, made: list[Matrix], chosen: float) -> Share:
        self._measure(made)
        lowered = LOWERED * self.overheads.layer / BARRIERS if len(made) > 1 else 0.0
        decode = prompt = 0.0
        for m in made:
            rate = self._rates[Form.of(m)]
            decode += rate.seconds(m, self.batch, self.cached)
            prompt += rate.seconds(m, PROMPTED, self.cached) / PROMPTED
        met = 1 - (1 - chosen) ** self.batch
        o = self.overheads
        size = sum(map(layout.size, made))
        return Share(
            size, met * (o.decode * decode + lowered), chosen * (o.prompt * prompt + lowered)
        )

    def _measure(self, made: Iterable[Matrix]) -> None:
        missing = {Form.of(m) for m in made} - self._rates.keys()
        if missing:
            self._rates |= rates.rates(missing, self.threads)

    def _steps(self) -> Share:
        o, spec = self.overheads, self.spec
        layers = sum(_barriers(layer) / BARRIERS for layer in spec.layers)
        return Share(0, o.step + layers * o.layer + self.batch * spec.vocab_size * o.choice)

    def _attention(self) -> Share:
        rates.attending({self._heads(layer) for layer in self.spec.layers}, self.threads)
        return sum((self._attends(layer) for layer in self.spec.layers), Share())

    def block(self, layer: LayerSpec) -> Share:
        """What a block takes beside its linears: attention, and the rest of its steps. Seconds alone."""
        steps = _barriers(layer) / BARRIERS * self.overheads.layer
        return Share(0, steps) + self._attends(layer)

    def _attends(self, layer: LayerSpec) -> Share:
        shape, seen = self._heads(layer), min(self.context, layer.attention.window or self.context)
        known = rates.attending({shape}, self.threads)[shape]
        o = self.overheads
        decode = o.decode * self.batch * known.decode(seen, self.cached)
        return Share(0, decode, o.prompt * known.prompt(seen) / seen)

    def _heads(self, layer: LayerSpec) -> Heads:
        a = layer.attention
        cache = self.settings.cache or usual_cache()
        return Heads(a.num_heads, a.num_kv_heads, a.head_dim, cache)


def cost(
    source: Source, formats: Formats | None = None, context: int = 2048, batch: int = 1,
    settings: CpuSettings = USUAL,
) -> Cost:  # fmt: skip
    """Of a model as stored, with all linears of blocks in one format, or each in its own by its path."""
    weights = planned_weights(source, settings.head, formats)
    costs = Costs(source, context, batch, settings, sum(weights.linears().values()))
    total = costs.all(weights)
    held = footprint(source, context, batch, settings, formats, costs.overheads.program)
    return Cost(held.total, total.decode, total.prompt)


def cached(size: float, keeps: float) -> float:
    """The share of `size` bytes, read again and again in one order, that the last cache still holds."""
    last = max(dict(cpu_facts().caches).values(), default=0)
    return 1.0 if size <= last else (last / size) ** keeps


def _chosen(spec: Spec, path: str) -> float:
    """The share of tokens that meet a linear of a block."""
    experts = spec.layers[int(path.split(".")[1])].feed_forward.experts
    return experts.top / experts.count if experts and ".expert" in path else 1.0


def _barriers(layer: LayerSpec) -> float:
    experts = layer.feed_forward.experts
    return BARRIERS + (6 * experts.top if experts else 0)


# What is fitted -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A model that is there to be timed: a Llama with heads of HEAD numbers."""

    hidden: int
    width: int
    layers: int
    vocabulary: int


FEW, MANY, WORDY = SMALL = (
    Small(128, 128, 2, 256), Small(128, 128, 34, 256), Small(128, 128, 2, 32768),
)  # fmt: skip
SOLID, HELD = Small(1024, 2816, 6, 256), Integers(8, 64)
"""A model that no cache holds, and the format of its linears."""
MOST = 1.5
"""A share above that was measured beside something else."""
TURNS, MOST_TURNS = 7, 60
"""Turns in a row in which nothing was faster, by SETTLED, that end the timing; and all turns there may be."""
SETTLED = 0.01
TOKENS, HEAD = 16, 64


@functools.cache
def measured() -> Overheads:
    """Of this machine, from the file or measured now."""
    machine = tune.key(cpu_facts())
    stored = cpu.remembered(FILE).get(machine)
    try:
        return Overheads(**{k: _number(v) for k, v in stored.items()})  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        pass
    found = cpu.elsewhere("onecard.cost", 120)
    cpu.remember(FILE, machine, found)
    return Overheads(**found)


def known() -> bool:
    """Whether this machine has been measured already."""
    return cpu.remembered(FILE).get(tune.key(cpu_facts())) is not None


def forget() -> None:
    """Measure kernels and overheads again when they are next asked for."""
    for name in (rates.FILE, FILE):
        cpu.forget(name)


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e18:
        raise ValueError("no number")
    return value


def measure() -> Overheads:
    """Here and now. What the matrices and attention of the small models take is taken off."""
    program = resident()
    with tempfile.TemporaryDirectory() as folder:
        models = [write(Path(folder) / f"{i}", small) for i, small in enumerate(SMALL)]
        models.append(write(Path(folder) / "solid", SOLID, HELD))
        timed = [_Timed(model) for model in models]
        idle = 0
        for _ in range(MOST_TURNS):
            idle = 0 if any([each.turn() for each in timed]) else idle + 1
            if idle == TURNS:
                break
        few, many, wordy, _ = (each.left(NONE).decode for each in timed)
        layer = max(0.0, many - few) / (MANY.layers - FEW.layers)
        choice = max(0.0, wordy - few) / (WORDY.vocabulary - FEW.vocabulary)
        step = max(0.0, few - FEW.layers * layer - FEW.vocabulary * choice)
        keeps = rates.keeps(usable_cores())
        solid, found = timed[-1], Overheads(layer, step, choice, 1.0, 1.0, program, keeps)
        known = Costs(solid.source, PROMPTED, overheads=NONE).all(solid.stepper.weights)
        more = solid.left(found)
    shares = [1 + more.decode / known.decode, 1 + more.prompt / known.prompt]
    decode, prompt = (min(max(share, 1.0), MOST) for share in shares)
    return replace(found, decode=decode, prompt=prompt)


class _Timed:
    """The least seconds of a step, and of a token of a prompt, that were seen."""

    def __init__(self, folder: Path) -> None:
        self.source = Source(folder)
        self.stepper = CpuStepper(self.source, CpuSettings(context=1024))
        self.pages = np.arange(self.stepper.pages, dtype=np.int32)
        self.decode = self.prompt = float("inf")

    def turn(self) -> bool:
        """Whether it was faster than ever before."""
        before = self.prompt, self.decode
        self.prompt = min(self.prompt, self._step(PROMPTED, 0, 1) / PROMPTED)
        self.decode = min(self.decode, self._step(1, PROMPTED, TOKENS) / TOKENS)
        now = self.prompt, self.decode
        return any(a < (1 - SETTLED) * b for a, b in zip(now, before, strict=True))

    def _step(self, count: int, past: int, most: int) -> float:
        ids, none = np.arange(count, dtype=np.int32) % 250, np.empty(0, np.int32)
        feed = Feed(ids, past, self.pages, draw=Draw(GREEDY, ids, count, np.empty(0), none, most))
        begin = time.perf_counter()
        self.stepper.step([feed], most, np.zeros(1, np.int32))
        return time.perf_counter() - begin

    def left(self, overheads: Overheads) -> Share:
        """What is not explained."""
        costs = Costs(self.source, PROMPTED, overheads=overheads)
        known = costs.all(self.stepper.weights)
        return Share(0, self.decode - known.decode, self.prompt - known.prompt)


def write(folder: Path, small: Small, held: Integers | None = None) -> Path:
    """A model folder with random weights, those of linears in a format."""
    h, w, random = small.hidden, small.width, np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    linears: dict[str, Scheme] = {}

    def draw(name: str, *shape: int) -> None:
        if held is None or not name.endswith("_proj"):
            numbers = random.standard_normal(shape, np.float32) * np.float32(0.02)
            arrays[f"model.{name}.weight"] = numbers
            return
        linears[f"model.{name}"] = Scheme(held)
        for part, (dtype, sizes) in held.scaled("fp32").parts((shape[0], shape[1])).items():
            made = {"int32": random.integers(-(1 << 31), 1 << 31, sizes, np.int32, endpoint=False)
                    if dtype == "int32" else None, "int64": np.array(shape)}  # fmt: skip
            arrays[f"model.{name}.{part}"] = made.get(dtype, np.full(sizes, 0.01, np.float32))

    draw("embed_tokens", small.vocabulary, h)
    draw("norm", h)
    for i in range(small.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            draw(f"layers.{i}.{name}", h)
        for name in "qkvo":
            draw(f"layers.{i}.self_attn.{name}_proj", h, h)
        for name in ("gate", "up"):
            draw(f"layers.{i}.mlp.{name}_proj", w, h)
        draw(f"layers.{i}.mlp.down_proj", h, w)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h,
        "num_hidden_layers": small.layers, "num_attention_heads": h // HEAD, "num_key_value_heads": h // HEAD,
        "intermediate_size": w, "vocab_size": small.vocabulary, "tie_word_embeddings": True,
        "max_position_embeddings": 1024, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    if linears:
        names = sorted(linears)
        config["quantization_config"] = quantization_config(linears, names, True, False, "fp32")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))
