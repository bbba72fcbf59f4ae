"""Spec: an architecture as frozen data, one row per layer, and layers may differ.

Pruning a head, dropping a layer or taking a subnet is "a new Spec, and which indices to keep". The
network in nn/transformer.py is built from a Spec and from nothing else; nn/families.py reads a Spec
from a `config.json` and writes one back. Sizes are counts (`num_` where a count could be a size).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the first `dims` of each head.

    `kind` is one of default, linear, dynamic, yarn, longrope, llama3; the numbers that a kind needs
    lie in `factors` under the names of `config.json`, with `original_context` where it matters.
    """

    dims: int
    theta: float = 10000.0
    kind: str = "default"
    factors: tuple[tuple[str, Any], ...] = ()
    original_context: int = 0

    def factor(self, name: str, default: Any = None) -> Any:
        return dict(self.factors).get(name, default)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. `window` counts the positions a token sees, itself included."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    bias: bool = False
    out_bias: bool = False
    head_norm: bool = False
    soft_cap: float | None = None


@dataclass(frozen=True)
class Experts:
    """A routed set of feed-forwards: softmax over all, the `top` best, optionally renormalized."""

    count: int
    top: int
    renormalize: bool
    shared_width: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class FeedForward:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated; `width` per expert."""

    width: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    experts: Experts | None = None


@dataclass(frozen=True)
class Norm:
    """RMS or layer norm; `offset` is added to the stored weight (1 for Gemma)."""

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One row. `order` says where norms sit: pre, post, sandwich (both); or parallel branches."""

    attention: Attention
    feed_forward: FeedForward
    order: str = "pre"


@dataclass(frozen=True)
class Spec:
    """A decoder-only transformer."""

    family: str
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    max_context: int
    tied: bool = False
    learned_positions: int = 0
    position_offset: int = 0
    embed_dim: int = 0
    embed_scale: float = 1.0
    final_norm: bool = True
    head_bias: bool = False
    final_soft_cap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def embed_size(self) -> int:
        """Width of the embedding table (differs from `hidden` in OPT-350M only)."""
        return self.embed_dim or self.hidden


def linear_shapes(spec: Spec, layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """name -> [out, in] of every linear of one block, in the order data meets them."""
    a, f, h = layer.attention, layer.feed_forward, spec.hidden
    shapes = {
        "attention.q": (a.num_heads * a.head_dim, h),
        "attention.k": (a.num_kv_heads * a.head_dim, h),
        "attention.v": (a.num_kv_heads * a.head_dim, h),
        "attention.o": (h, a.num_heads * a.head_dim),
    }
    inner = ("gate", "up") if f.gated else ("up",)
    if f.experts is None:
        stacks = {"feed_forward": f.width}
    else:
        shapes["feed_forward.router"] = (f.experts.count, h)
        stacks = {f"feed_forward.expert{i}": f.width for i in range(f.experts.count)}
        if f.experts.shared_width:
            stacks["feed_forward.shared"] = f.experts.shared_width
            if f.experts.shared_gate:
                shapes["feed_forward.shared_gate"] = (1, h)
    for name, width in stacks.items():
        shapes |= {f"{name}.{part}": (width, h) for part in inner}
        shapes[f"{name}.down"] = (h, width)
    return shapes


@dataclass(frozen=True)
class Module:
    """One thing with numbers in it: a linear [out, in], an embedding [count, width], a norm [width]."""

    kind: Literal["linear", "embedding", "norm"]
    shape: tuple[int, ...]
    bias: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of what it holds while its weight is dense."""
        return {"weight": self.shape} | ({"bias": self.shape[:1]} if self.bias else {})


def block_modules(spec: Spec, layer: LayerSpec) -> dict[str, Module]:
    """path -> Module of everything in one block: `attention.q`, `norm_attention_in` ..."""
    a, f = layer.attention, layer.feed_forward
    biased = dict.fromkeys(("attention.q", "attention.k", "attention.v"), a.bias)
    biased |= {"attention.o": a.out_bias, **dict.fromkeys(KEPT_DENSE, False)}
    modules = {
        path: Module("linear", shape, biased.get(path, f.bias))
        for path, shape in linear_shapes(spec, layer).items()
    }
    norms = dict.fromkeys(
        ("attention.q_norm", "attention.k_norm"), a.head_dim if a.head_norm else 0
    )
    before, after = layer.order != "post", layer.order in ("post", "sandwich")
    for part in ("attention", "feed_forward"):
        norms |= {f"norm_{part}_in": spec.hidden * before, f"norm_{part}_out": spec.hidden * after}
    for path, width in norms.items():
        if width:
            modules[path] = Module("norm", (width,), spec.norm.bias)
    return modules


def outer_modules(spec: Spec) -> dict[str, Module]:
    """path -> Module of everything outside the blocks: `stem.embedding` ... `tail.head`."""
    embed, hidden = spec.embed_size, spec.hidden
    modules = {"stem.embedding": Module("embedding", (spec.vocab_size, embed))}
    if spec.learned_positions:
        modules["stem.positions"] = Module("embedding", (spec.learned_positions, hidden))
    if embed != hidden:
        modules["stem.project"] = Module("linear", (hidden, embed))
    if spec.final_norm:
        modules["tail.norm"] = Module("norm", (hidden,), spec.norm.bias)
    if embed != hidden:
        modules["tail.project"] = Module("linear", (embed, hidden))
    modules["tail.head"] = Module("linear", (spec.vocab_size, embed), spec.head_bias)
    return modules


def parameter_count(spec: Spec) -> int:
    """Weights of a model of a Spec, tied tables once."""
    outer = outer_modules(spec)
    if spec.tied:
        outer.pop("tail.head")
    rows = [outer, *(block_modules(spec, layer) for layer in spec.layers)]
    return sum(math.prod(shape) for modules in rows for module in modules.values()
               for shape in module.tensors().values())  # fmt: skip


KEPT_DENSE = ("feed_forward.router", "feed_forward.shared_gate")
"""Linears that no pass touches: a few numbers that steer everything."""


@dataclass(frozen=True)
class Site:
    """One place in a block where an input meets the linears that read it."""

    name: str
    linears: tuple[str, ...] = field(default=())


def sites(layer: LayerSpec) -> tuple[Site, ...]:
    """The sites of a block in the order in which data reaches them."""
    f = layer.feed_forward
    inner = ("gate", "up") if f.gated else ("up",)
    stacks = ["feed_forward"]
    if f.experts:
        stacks = [f"feed_forward.expert{i}" for i in range(f.experts.count)]
        if f.experts.shared_width:
            stacks.append("feed_forward.shared")
    found = [
        Site("attention.in", ("attention.q", "attention.k", "attention.v")),
        Site("attention.out", ("attention.o",)),
    ]
    for stack in stacks:
        found.append(Site(f"{stack}.in", tuple(f"{stack}.{part}" for part in inner)))
        found.append(Site(f"{stack}.out", (f"{stack}.down",)))
    return tuple(found)


@dataclass(frozen=True)
class Producer:
    """The module whose channels a site reads; `heads` rows of values are read by `heads * repeat` heads."""

    path: str
    repeat: int = 1
    head_dim: int = 0


def producer(layer: LayerSpec, site: str) -> Producer | None:
    """What a site's inputs come from, where dividing its channels by s > 0 and multiplying the columns
    of the site's linears by s changes nothing:

        a norm before        its weight and bias (not where a router or an expert's gate reads it too)
        values -> output     rows of v; a row feeds a channel of every head of its group
        up -> down           rows of up, when gated or when the activation is relu

    None where there is no such module.
    """
    f = layer.feed_forward
    part, _, side = site.rpartition(".")
    if site == "attention.out":
        a = layer.attention
        return Producer("attention.v", a.num_heads // a.num_kv_heads, a.head_dim)
    if side == "out":
        return Producer(f"{part}.up") if f.gated or f.activation == "relu" else None
    if layer.order == "post" or (part != "attention" and f.experts):
        return None
    return Producer(f"norm_{part}_in")
