"""One decoder-only transformer for every family, built from a Spec and driven by it.

A block's forward is a generator: it stops at every *site* (an input that linears are about to read)
and yields (site name, input). Running a model drains it; calibration drives the generators of all
batches in lock step, so that a site's statistics are complete before its linears are compressed and
everything after sees the compressed outputs. One forward per block does both.

Shapes: B batch, T new tokens, S tokens seen, H heads, G key/value heads, D head size, N = B*T.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor, nn

from onecard.core.spec import (
    Attention,
    Experts,
    LayerSpec,
    Module,
    Rope,
    Spec,
    block_modules,
    outer_modules,
)
from onecard.kernels import reference
from onecard.nn.layers import Embedding, Linear, Normalize

Sites = Generator[tuple[str, Tensor], None, Tensor]


class Parts:
    """Makes the modules that a Spec says there are; `normalize` and `maybe` give None for others."""

    def __init__(self, modules: Mapping[str, Module], spec: Spec, dtype: torch.dtype) -> None:
        self.modules, self.spec, self.dtype = modules, spec, dtype

    def linear(self, path: str) -> Linear:
        module = self.modules[path]
        return Linear((module.shape[0], module.shape[1]), module.bias, self.dtype)

    def maybe(self, path: str) -> Linear | None:
        return self.linear(path) if path in self.modules else None

    def embedding(self, path: str) -> Embedding:
        count, width = self.modules[path].shape
        return Embedding(count, width, self.dtype)

    def normalize(self, path: str) -> Normalize | None:
        if path not in self.modules:
            return None
        return Normalize(self.modules[path].shape[0], self.spec.norm, self.dtype)


class Cache:
    """Keys and values of every layer, [B, G, capacity, D], allocated once.

    `held` names a smaller format: they are rounded as it would hold them (kernels/reference.py).
    """

    def __init__(self, spec: Spec, batch: int, capacity: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", held: str | None = None) -> None:  # fmt: skip
        self.capacity, self.length, self.held = capacity, 0, held
        self.valid = torch.ones(batch, capacity, dtype=torch.bool, device=device)
        shapes = [
            (batch, layer.attention.num_kv_heads, capacity, layer.attention.head_dim)
            for layer in spec.layers
        ]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, G, T, D] behind `length`; returns all keys and values seen so far."""
        if self.held is not None:
            k, v = reference.round_cache(k, self.held), reference.round_cache(v, self.held)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Context:
    """What one forward shares between its layers: positions, masks, rope tables, the cache."""

    def __init__(self, spec: Spec, positions: Tensor, valid: Tensor | None = None,
                 cache: Cache | None = None) -> None:  # fmt: skip
        self.spec, self.positions, self.cache = spec, positions, cache
        self.new = positions.shape[1]
        self.seen = self.new + (cache.length if cache else 0)
        self.valid = valid
        self._ropes: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}

    def rope(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, dims / 2] in float32."""
        if rope not in self._ropes:
            length = int(self.positions.max()) + 1 if rope.kind in ("dynamic", "longrope") else 0
            inverse, scale = reference.rope_frequencies(rope, length, self.spec.max_context)
            angle = self.positions[:, None, :, None].float() * inverse.to(self.positions.device)
            self._ropes[rope] = angle.cos() * scale, angle.sin() * scale
        return self._ropes[rope]

    def mask(self, window: int | None) -> Tensor | None:
        """bool [B or 1, 1, T, S]; None when plain causal attention says it all."""
        if window is not None and window >= self.seen:
            window = None
        if window not in self._masks:
            plain = self.valid is None and window is None and self.new in (1, self.seen)
            mask = None
            if not plain:
                device = self.positions.device
                mask = reference.causal_mask(self.new, self.seen, window, device)
                if self.valid is not None:
                    mask = mask & self.valid[:, None, None, :]
            self._masks[window] = mask
        return self._masks[window]


class AttentionBlock(nn.Module):
    """Grouped-query attention with its four linears."""

    def __init__(self, parts: Parts, layer: LayerSpec, index: int) -> None:
        super().__init__()
        self.spec = layer.attention
        self.index = index
        self.q = parts.linear("attention.q")
        self.k = parts.linear("attention.k")
        self.v = parts.linear("attention.v")
        self.o = parts.linear("attention.o")
        self.q_norm = parts.normalize("attention.q_norm")
        self.k_norm = parts.normalize("attention.k_norm")

    def project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, G, T, D] of inputs, turned by their positions."""
        a: Attention = self.spec
        q = self.q(x).unflatten(-1, (a.num_heads, a.head_dim)).transpose(1, 2)  # [B, H, T, D]
        k = self.k(x).unflatten(-1, (a.num_kv_heads, a.head_dim)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (a.num_kv_heads, a.head_dim)).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if a.rope is not None:
            cos, sin = (table.to(q.dtype) for table in context.rope(a.rope))
            q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
        return q, k, v

    def stages(self, x: Tensor, context: Context) -> Sites:
        a: Attention = self.spec
        yield "attention.in", x
        q, k, v = self.project(x, context)
        if context.cache is not None:
            k, v = context.cache.extend(self.index, k, v)
        y = reference.attend(q, k, v, context.mask(a.window), a.scale, a.soft_cap)
        y = y.transpose(1, 2).flatten(2)  # [B, T, H * D]
        yield "attention.out", y
        return self.o(y)


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, name: str, parts: Parts, activation: str) -> None:
        super().__init__()
        self.name = name
        self.activation: Callable[[Tensor], Tensor] = reference.ACTIVATIONS[activation]
        self.gate = parts.maybe(f"{name}.gate")
        self.up = parts.linear(f"{name}.up")
        self.down = parts.linear(f"{name}.down")

    def stages(self, x: Tensor) -> Sites:
        yield f"{self.name}.in", x
        if self.gate is None:
            y = self.activation(self.up(x))
        else:
            y = self.activation(self.gate(x)) * self.up(x)
        yield f"{self.name}.out", y
        return self.down(y)


class MoE(nn.Module):
    """A router, its experts, and perhaps a shared expert behind a sigmoid gate."""

    def __init__(self, experts: Experts, parts: Parts, activation: str) -> None:
        super().__init__()
        self.experts = experts
        self.router = parts.linear("feed_forward.router")
        for i in range(experts.count):
            self.add_module(f"expert{i}", Mlp(f"feed_forward.expert{i}", parts, activation))
        shared = "feed_forward.shared"
        self.shared = Mlp(shared, parts, activation) if experts.shared_width else None
        self.shared_gate = parts.maybe("feed_forward.shared_gate")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [N, top] of the experts that each token goes to."""
        chances = torch.softmax(self.router(x).float(), -1)
        weights, chosen = chances.topk(self.experts.top, -1)
        if self.experts.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def stages(self, x: Tensor) -> Sites:
        flat = x.flatten(0, -2)  # [N, hidden]
        weights, chosen = self.route(flat)
        y = torch.zeros_like(flat)
        for i in range(self.experts.count):
            token, slot = torch.where(chosen == i)
            out = yield from self.get_submodule(f"expert{i}").stages(flat[token])  # type: ignore[operator]
            y.index_add_(0, token, (out * weights[token, slot, None]).to(y.dtype))
        if self.shared is not None:
            out = yield from self.shared.stages(flat)
            if self.shared_gate is not None:
                out = out * torch.sigmoid(self.shared_gate(flat))
            y = y + out
        return y.view_as(x)


class Block(nn.Module):
    """One layer: attention, feed-forward, and norms where the layer's `order` puts them."""

    def __init__(self, spec: Spec, index: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        layer = self.layer = spec.layers[index]
        self.index = index

        parts = Parts(block_modules(spec, layer), spec, dtype)
        self.norm_attention_in = parts.normalize("norm_attention_in")
        self.attention = AttentionBlock(parts, layer, index)
        self.norm_attention_out = parts.normalize("norm_attention_out")
        self.norm_feed_forward_in = parts.normalize("norm_feed_forward_in")
        f = layer.feed_forward
        self.feed_forward: Mlp | MoE = (
            MoE(f.experts, parts, f.activation)
            if f.experts
            else Mlp("feed_forward", parts, f.activation)
        )
        self.norm_feed_forward_out = parts.normalize("norm_feed_forward_out")

    def stages(self, h: Tensor, context: Context) -> Sites:
        """Yields (site, input) before each set of linears; returns the block's output [B, T, hidden]."""
        order = self.layer.order
        x = _maybe(self.norm_attention_in, h)
        y = yield from self.attention.stages(x, context)
        if order == "parallel":
            z = yield from self.feed_forward.stages(_maybe(self.norm_feed_forward_in, h))
            return h + y + z
        h = _join(h, y, self.norm_attention_out, order)
        x = _maybe(self.norm_feed_forward_in, h)
        y = yield from self.feed_forward.stages(x)
        return _join(h, y, self.norm_feed_forward_out, order)

    def forward(self, h: Tensor, context: Context) -> Tensor:
        stages = self.stages(h, context)
        while True:
            try:
                next(stages)
            except StopIteration as end:
                return end.value

    def attended(self, h: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the block's inputs, for those who compare attention."""
        return self.attention.project(_maybe(self.norm_attention_in, h), context)

    def linear(self, name: str) -> Linear:
        """The linear of a name such as `attention.q`."""
        module = self.get_submodule(name)
        assert isinstance(module, Linear)
        return module


def _maybe(norm: Normalize | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _join(h: Tensor, y: Tensor, norm: Normalize | None, order: str) -> Tensor:
    """The residual sum, with the outer norm on the branch (sandwich) or on the sum (post)."""
    if norm is None:
        return h + y
    return norm(h + y) if order == "post" else h + norm(y)


class Stem(nn.Module):
    """Token ids to the first hidden state: embedding, learned positions, input projection."""

    def __init__(self, spec: Spec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        parts = Parts(outer_modules(spec), spec, dtype)
        self.embedding = parts.embedding("stem.embedding")
        learned = spec.learned_positions
        self.positions = parts.embedding("stem.positions") if learned else None
        self.project = parts.maybe("stem.project")

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = self.embedding(ids)
        if self.spec.embed_scale != 1.0:
            h = h * torch.tensor(self.spec.embed_scale, dtype=h.dtype)
        if self.project is not None:
            h = self.project(h)
        if self.positions is not None:
            h = h + self.positions(positions + self.spec.position_offset)
        return h


class Tail(nn.Module):
    """The last hidden state to logits: norm, output projection, head, soft cap."""

    def __init__(self, spec: Spec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        parts = Parts(outer_modules(spec), spec, dtype)
        self.norm = parts.normalize("tail.norm")
        self.project = parts.maybe("tail.project")
        self.head = parts.linear("tail.head")

    def forward(self, h: Tensor) -> Tensor:
        logits = self.head(self.read(h))
        cap = self.spec.final_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def read(self, h: Tensor) -> Tensor:
        """What the head reads."""
        h = _maybe(self.norm, h)
        return h if self.project is None else self.project(h)


class Transformer(nn.Module):
    """Stem, blocks, tail. `forward(ids)` gives logits [B, T, vocabulary]."""

    def __init__(self, spec: Spec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec, dtype)
        self.blocks = nn.ModuleList(Block(spec, i, dtype) for i in range(spec.num_layers))
        self.tail = Tail(spec, dtype)
        if spec.tied:
            self.tie()

    def tie(self) -> None:
        """The table of the embedding is the head's matrix."""
        if self.stem.embedding.format.dense:
            self.tail.head.weight = self.stem.embedding.weight
        else:
            self.tail.head.replace(self.stem.embedding.held())

    def forward(
        self, ids: Tensor, valid: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of ids [B, T]. `valid` bool [B, T] marks tokens that are not padding.

        With a cache the tokens follow the ones it holds and are added to it.
        """
        h, context = self.start(ids, valid, cache)
        for block in self.blocks:
            h = block(h, context)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.tail(h)

    def start(
        self, ids: Tensor, valid: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Context]:
        """The first hidden state [B, T, hidden] and the context of this forward."""
        past = cache.length if cache else 0
        if past + ids.shape[1] > (cache.capacity if cache else past + ids.shape[1]):
            raise ValueError(f"{past + ids.shape[1]} tokens do not fit a cache of {cache.capacity}")  # type: ignore[union-attr]
        if cache is not None:
            if valid is not None:
                cache.valid[:, past : past + ids.shape[1]] = valid
            seen = cache.valid[:, : past + ids.shape[1]]
            valid = None if bool(seen.all()) else seen
        context = Context(self.spec, positions_of(ids, valid, past), valid, cache)
        return self.stem(ids, context.positions), context


def positions_of(ids: Tensor, valid: Tensor | None, past: int) -> Tensor:
    """Positions [B, T] of new tokens behind `past` others; padding does not count."""
    if valid is None:
        new = torch.arange(past, past + ids.shape[1], device=ids.device)
        return new.expand(ids.shape)
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def initialize(network: Transformer, seed: int, std: float = 0.02) -> None:
    """Normal weights for training from nothing; norms do nothing, residual outputs start small."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * network.spec.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0 - network.spec.norm.offset)
            else:
                small = name.endswith(("attention.o.weight", "down.weight"))
                parameter.normal_(0, std * (depth if small else 1.0), generator=generator)
