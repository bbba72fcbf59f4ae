"""The native executor: a model folder and a processor become a stepper (steps.py). No torch.

Weights are mapped in the kernel layout (weights.py) and described once by structs that hold addresses;
from then on a step is one native call over all requests, with the interpreter's lock released.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.source import Source
from onecard.core.device import usable_cores
from onecard.core.errors import BadRequest, FailedWork, nearest
from onecard.core.settings import format_size
from onecard.core.spec import FeedForward, LayerSpec, Rope, sites
from onecard.kernels import cpu, rope, structs, tune
from onecard.runtime.pages import CACHES
from onecard.runtime.sample import Logits, Logprobs
from onecard.runtime.steps import Draw, Fed, Feed, Ids
from onecard.runtime.weights import HEADS, Head, Weights, open_weights

PAGE = 32
ACTIVATIONS = {"silu": structs.SILU, "relu": structs.RELU, "gelu": structs.GELU,
               "gelu_tanh": structs.GELU_TANH}  # fmt: skip
ORDERS = {"pre": structs.PRE, "post": structs.POST, "sandwich": structs.SANDWICH,
          "parallel": structs.PARALLEL}  # fmt: skip
WANT = {"none": structs.NONE, "last": structs.LAST, "all": structs.ALL}
NOT_FINITE = -3
NO_MEMORY = -2
NOTHING = np.empty(0, np.int32)
MOST = {"threads": 1024, "context": 1 << 20, "rows": 1 << 20}


@dataclass(frozen=True)
class CpuSettings:
    """How a model runs on a processor. `exact` names linears (by the last words of their path, `down` or
    `attention.o` say) whose inputs stay float32; "all" names them all."""

    threads: int | None = None  # None: one per usable core
    context: int | None = None  # positions in the pool; None: the model's, at most 4096
    rows: int = 512  # new ids in a step, at most
    cache: str | None = None  # how keys and values are held; None: bf16 with tile units, else fp16
    head: Head = "int8"
    exact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cache is not None and self.cache not in CACHES:
            raise BadRequest(f"there is no cache {self.cache!r}", do=nearest(self.cache, CACHES))
        if self.head not in HEADS:
            raise BadRequest(f"there is no head {self.head!r}", do=nearest(self.head, HEADS))
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise BadRequest(f"{name} is {value}", do=f"1 to {most} is possible")


def usual_cache() -> str:
    """How keys and values are held where nobody says: bf16 where tiles multiply them, else fp16."""
    return "bf16" if cpu.isa() == "amx" else "fp16"


class Described:
    """A model as the native engine sees it: structs with the addresses of its weights. Nothing runs yet."""

    page_tokens = PAGE

    def __init__(self, source: Source, settings: CpuSettings, weights: Weights) -> None:
        self.spec, self.settings, self.weights = source.spec, settings, weights
        self.threads = settings.threads or usable_cores()
        self.cache = settings.cache or usual_cache()
        self.vocab_size = self.spec.vocab_size
        context = settings.context or min(self.spec.max_context, 4096)
        self.max_context = min(self.spec.max_context, context)
        self.pages = -(-context // PAGE)
        self._kept: list[Any] = [self.weights]
        self._check_names()
        self._model = self._described()
        self._check_inputs()
        self._native = cpu.library()
        self._asked = structs.EngineSettings(
            self.threads, cpu.CODES[self.cache], self.pages, settings.rows
        )

    def need(self) -> tuple[int, int]:
        """Bytes that the engine would take: work space, and keys and values."""
        work, kv = ctypes.c_int64(), ctypes.c_int64()
        error = self._native.oc_engine_need(
            ctypes.byref(self._model),
            ctypes.byref(self._asked),
            ctypes.byref(work),
            ctypes.byref(kv),
        )
        if error:
            raise BadRequest("the engine cannot run this model", seen=f"its error {error}")
        return work.value, kv.value

    # the model as structs

    def _described(self) -> structs.Model:
        spec, weights = self.spec, self.weights
        found = (layer.attention.rope for layer in spec.layers)
        ropes = list(dict.fromkeys(each for each in found if each))
        layers = [self._layer(i, layer, ropes) for i, layer in enumerate(spec.layers)]
        return structs.Model(
            vocab=spec.vocab_size, hidden=spec.hidden, embed=spec.embed_size,
            layers=len(layers), ropes=len(ropes),
            layer=self._array(structs.Layer, layers),
            rope=self._array(structs.Rope, [self._rope(r) for r in ropes]),
            embedding=weights.embedding, embedding_dtype=cpu.CODES[weights.embedding_dtype],
            embed_scale=spec.embed_scale,
            positions=weights.vector("stem.positions"), learned=spec.learned_positions,
            position_offset=spec.position_offset,
            project_in=self.matrix("stem.project"), project_out=self.matrix("tail.project"),
            norm=weights.norm("tail.norm"), head=self.matrix("tail.head"),
            soft_cap=spec.final_soft_cap or 0.0,
        )  # fmt: skip

    def _array(self, kind: type[ctypes.Structure], items: list[Any]) -> Any:
        array = (kind * max(1, len(items)))(*items)
        self._kept.append(array)
        return array

    def matrix(self, path: str) -> structs.Matrix:
        """A linear as it runs; one without data where the model has none such."""
        exact = self.settings.exact
        return self.weights.matrix(path, "all" in exact or any(_is(path, name) for name in exact))

    def _check_names(self) -> None:
        paths = self.weights.linears()
        for name in self.settings.exact:
            if name != "all" and not any(_is(path, name) for path in paths):
                known = {path.rpartition(".")[2] for path in paths}
                raise BadRequest(f"the model has no linear {name!r}", do=nearest(name, known))

    def _check_inputs(self) -> None:
        """An input is rounded once, for all linears that read it."""
        for index, layer in enumerate(self.spec.layers):
            for site in sites(layer):
                linears = {name: self.matrix(f"blocks.{index}.{name}") for name in site.linears}
                read = [
                    (w.rounding, w.input_scale) for w in linears.values() if w.bits and not w.exact
                ]
                if len(set(read)) > 1:
                    raise BadRequest(
                        f"blocks.{index}: linears that read one input round it each in its own way",
                        seen=", ".join(linears),
                        do="run it with --engine reference",
                    )

    def _rope(self, spec: Rope) -> structs.Rope:
        inverse, scale = rope.frequencies(spec, self.max_context, self.spec.max_context)
        self._kept.append(inverse)
        return structs.Rope(inverse.ctypes.data, len(inverse), scale)

    def _layer(self, index: int, layer: LayerSpec, ropes: list[Rope]) -> structs.Layer:
        a, f, at = layer.attention, layer.feed_forward, f"blocks.{index}"
        norm = self.weights.norm
        experts = f.experts
        stacks = ["feed_forward"]
        if experts:
            stacks = [f"feed_forward.expert{i}" for i in range(experts.count)]
            stacks += ["feed_forward.shared"] if experts.shared_width else []
        mlps = [self._mlp(f"{at}.{name}", name, f) for name in stacks]
        return structs.Layer(
            order=ORDERS[layer.order],
            heads=a.num_heads, kv_heads=a.num_kv_heads, head_dim=a.head_dim,
            window=a.window or 0, rope=ropes.index(a.rope) if a.rope else -1,
            scale=a.scale, soft_cap=a.soft_cap or 0.0,
            attention_in=norm(f"{at}.norm_attention_in"),
            attention_out=norm(f"{at}.norm_attention_out"),
            feed_forward_in=norm(f"{at}.norm_feed_forward_in"),
            feed_forward_out=norm(f"{at}.norm_feed_forward_out"),
            q_norm=norm(f"{at}.attention.q_norm"), k_norm=norm(f"{at}.attention.k_norm"),
            **{name: self.matrix(f"{at}.attention.{name}") for name in "qkvo"},
            experts=experts.count if experts else 0,
            top=experts.top if experts else 0,
            renormalize=int(bool(experts and experts.renormalize)),
            router=self.matrix(f"{at}.feed_forward.router"),
            shared_gate=self.matrix(f"{at}.feed_forward.shared_gate"),
            shared=int(bool(experts and experts.shared_width)),
            mlps=self._array(structs.Mlp, mlps),
        )  # fmt: skip

    def _mlp(self, path: str, name: str, f: FeedForward) -> structs.Mlp:
        width = f.width
        if name == "feed_forward.shared" and f.experts:
            width = f.experts.shared_width
        parts = {part: self.matrix(f"{path}.{part}") for part in ("gate", "up", "down")}
        return structs.Mlp(width=width, activation=ACTIVATIONS[f.activation], **parts)


class CpuStepper(Described):
    """A model that is ready to run on this processor. Raises BadRequest where it cannot be."""

    def __init__(self, folder: str | Path | Source, settings: CpuSettings = CpuSettings()) -> None:
        source = folder if isinstance(folder, Source) else Source(folder)
        tune.settle()
        threads = settings.threads or usable_cores()
        super().__init__(source, settings, open_weights(source, threads, settings.head))
        self._scratch = np.empty(self._native.oc_sample_scratch(self.vocab_size), np.uint8)
        self._engine = ctypes.c_void_p()
        error = self._native.oc_engine_open(
            ctypes.byref(self._model), ctypes.byref(self._asked), ctypes.byref(self._engine)
        )
        if error == NO_MEMORY:
            work, kv = map(format_size, self.need())
            raise FailedWork(
                f"there is no memory for a context of {self.pages * PAGE} positions",
                seen=f"keys and values take {kv}, work space {work}",
                do="a smaller --context (run: --max-tokens), or --cache int8 or int4",
            )
        if error:
            raise BadRequest(f"the engine cannot run {source.folder}", seen=f"its error {error}")

    @property
    def nbytes(self) -> int:
        """Memory of the engine: keys and values, activations; without the weights."""
        return int(self._native.oc_engine_bytes(self._engine))

    def close(self) -> None:
        """Give the memory back. Closing twice does no harm."""
        if self._engine:
            self._native.oc_engine_close(self._engine)
            self._engine = ctypes.c_void_p()

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self.close()

    # one step

    def step(self, batch: Sequence[Feed], steps: int, cancel: Ids) -> list[Fed]:
        """See `Stepper`. Raises BadRequest for a feed that makes no sense, FailedWork without memory."""
        if not self._engine:
            raise ValueError("the stepper is closed")
        calls = [_Call(feed, self.vocab_size) for feed in batch]
        feeds = (structs.Feed * len(calls))(*(call.feed for call in calls))
        error = self._native.oc_engine_step(
            self._engine, feeds, len(calls), steps, cancel.ctypes.data
        )
        if error == NO_MEMORY:
            raise FailedWork("the engine found no memory for a step", do="run fewer requests")
        if error:
            raise BadRequest(
                "a step makes no sense to the engine",
                seen=f"{sum(len(feed.ids) for feed in batch)} new ids, {self.settings.rows} at most",
            )
        return [call.fed(feed) for call, feed in zip(calls, feeds, strict=True)]

    def choose(self, logits: Logits, draw: Draw) -> Fed:
        """See `Stepper`."""
        call = _Call(Feed(NOTHING, 0, NOTHING, draw=draw), self.vocab_size)
        call.choose(logits, draw, self._scratch)
        return call.fed(call.feed)


def _is(path: str, name: str) -> bool:
    """Whether a path ends in the words of a name."""
    return f".{path}".endswith(f".{name}")


class _Call:
    """One feed's struct, and the arrays that it points to."""

    def __init__(self, feed: Feed, vocab: int) -> None:
        self.given = feed
        rows = {"none": 0, "last": 1, "all": len(feed.ids)}[feed.want]
        self.logits = np.empty((rows, vocab), np.float32)
        self.feed = structs.Feed(
            ids=feed.ids.ctypes.data, count=len(feed.ids), past=feed.past,
            table=feed.table.ctypes.data, want=WANT[feed.want],
            logits=self.logits.ctypes.data if rows else None,
        )  # fmt: skip
        if feed.draw is not None:
            self._draw(feed.draw)

    def _draw(self, draw: Draw) -> None:
        s, most = draw.sampling, draw.most
        likeliest = s.logprobs or 0
        self.chosen = np.empty(most, np.int32)
        self.logprobs = np.empty(most, np.float32)
        self.ids = np.empty((most, likeliest), np.int32)
        self.likely = np.empty((most, likeliest), np.float32)
        self.previous = np.empty(0, np.int32)
        count = 0
        if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty:
            count = len(draw.previous)
            self.previous = np.concatenate([draw.previous, np.empty(most, np.int32)])
        self.feed.sampling = structs.Sampling(
            temperature=s.temperature, top_p=s.top_p, min_p=s.min_p,
            repetition=s.repetition_penalty, presence=s.presence_penalty,
            frequency=s.frequency_penalty, top_k=s.top_k,
            previous=self.previous.ctypes.data if count else None, count=count,
            prompt=min(draw.prompt, count), likeliest=likeliest,
        )  # fmt: skip
        self.feed.most = most
        self.feed.draws = draw.uniforms.ctypes.data if len(draw.uniforms) else None
        self.feed.ends, self.feed.ends_count = draw.ends.ctypes.data, len(draw.ends)
        self.feed.chosen = self.chosen.ctypes.data
        if s.logprobs is not None:
            self.feed.logprobs = self.logprobs.ctypes.data
        self.feed.likeliest_ids = self.ids.ctypes.data
        self.feed.likeliest_logprobs = self.likely.ctypes.data

    def choose(self, logits: Logits, draw: Draw, scratch: NDArray[np.uint8]) -> None:
        """The first id, from these logits."""
        feed, s = self.feed, self.feed.sampling
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        s.draw = draw.uniforms[0] if feed.draws else 0.0
        s.logprob, s.ids, s.logprobs = feed.logprobs, feed.likeliest_ids, feed.likeliest_logprobs
        id = cpu.library().oc_sample(
            logits.ctypes.data, len(logits), ctypes.byref(s), scratch.ctypes.data
        )
        feed.status, feed.chosen_count, self.chosen[0] = min(id, 0), int(id >= 0), id

    def fed(self, feed: structs.Feed) -> Fed:
        logits = self.logits if len(self.logits) else None
        draw, count = self.given.draw, feed.chosen_count
        told: tuple[Logprobs, ...] = ()
        if draw is not None and draw.sampling.logprobs is not None:
            told = tuple(self._told(i) for i in range(count))
        ids = tuple(int(id) for id in self.chosen[:count]) if draw is not None else ()
        if feed.status == NOT_FINITE:
            return Fed(ids, logits, told, "not numbers", "NaN or infinite logits")
        if feed.status:
            return Fed(ids, logits, told, "failed", f"the sampler's error {feed.status}")
        return Fed(ids, logits, told)

    def _told(self, i: int) -> Logprobs:
        top = tuple(zip(self.ids[i].tolist(), self.likely[i].tolist(), strict=True))
        return Logprobs(int(self.chosen[i]), float(self.logprobs[i]), top)
