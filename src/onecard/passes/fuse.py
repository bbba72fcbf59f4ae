"""Folding: what does nothing of its own is multiplied into its neighbours, once.

    norm scales    W (g * x) = (W diag g) x: the weight of a norm goes into all linears that read it
    norm biases    W (g * x + b) = (W diag g) x + W b, into their biases
    value bias     attention rows sum to 1, so W_o (A v + b_v) = W_o A v + W_o b_v: into the bias of o
    key bias       q . (k + b_k) adds the same to a query's scores of all keys: softmax does not see it
                   (not with rope, which turns b_k by position, nor with soft caps)

The network says the same; the report shows by how much logits of random ids differ, relative to the largest:
in float32, and when the folded weights are rounded to the dtype they are stored in. It is what rotations
need (Ashkboos et al., QuaRot, arXiv 2404.00456), and it makes columns of W comparable. The shapes do not
change: a norm without a weight still divides by its mean square. Tied heads keep the last norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onecard.calibrate.walk import weight_count
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Row
from onecard.core.spec import LayerSpec, Spec
from onecard.nn.layers import Linear, Normalize
from onecard.nn.model import Model
from onecard.nn.transformer import Block
from onecard.passes.base import Data, ModelPass

TOKENS, ALLOWED = 64, 1e-4
"""Random ids that are compared; the largest difference in float32 before it counts as failed."""


@dataclass(frozen=True)
class Fuse(ModelPass):
    """Settings: whether norms are folded, and whether biases of keys and values are."""

    norms: bool = True
    biases: bool = True

    key: ClassVar[str] = "fuse"
    title: ClassVar[str] = "folding of norms and biases"
    paper: ClassVar[str] = "Ashkboos et al., SliceGPT, arXiv 2401.15024, section 3.1"
    takes_sparse: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        return False

    def check(self, spec: Spec) -> None:
        pass

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        linears = sum(weight_count(spec, layer) for layer in spec.layers)
        return 4 * (linears + 2 * spec.vocab_size * spec.embed_size) + 8 * TOKENS * spec.vocab_size

    @torch.no_grad()
    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        if any(not linear.format.dense for _, linear in model.linears()):
            raise BadRequest("only dense matrices can be folded into", do="put fuse first")
        generator = torch.Generator().manual_seed(0)
        length = min(TOKENS, model.spec.max_context)
        ids = torch.randint(model.spec.vocab_size, (1, length), generator=generator)
        kinds = {p: p.dtype for p in model.network.parameters()}
        for p in kinds:
            p.data = p.data.float()
        before = model.network(ids)
        rows = [Row(where, "folded", told) for where, told in self.fold(model)]
        after = model.network(ids)
        if (lost := _difference(before, after)) > ALLOWED:
            raise FailedWork(
                f"folding changes the logits by {lost:.2g}", do="--debug, and report it"
            )
        for p, kind in kinds.items():
            p.data = p.data.to(kind).float()
        stored = _difference(before, model.network(ids))
        for p, kind in kinds.items():
            p.data = p.data.to(kind)
        return model, [*rows, Row("model", "logit_difference_float32", lost),
                       Row("model", "logit_difference_stored", stored)]  # fmt: skip

    def fold(self, model: Model) -> Iterator[tuple[str, str]]:
        """Fold everything that can be, in place; (where, what went where)."""
        for block in model.blocks():
            where = f"blocks.{block.index}"
            for name, readers in norm_readers(block.layer) if self.norms else ():
                linears = [block.linear(path) for path in readers]
                if fold_norm(getattr(block, name), linears):
                    yield where, f"{name} -> {', '.join(readers)}"
            if self.biases:
                for told in fold_biases(block):
                    yield where, told
        tail = model.network.tail
        if self.norms and tail.norm is not None:
            reader, name = (
                (tail.head, "head") if tail.project is None else (tail.project, "project")
            )
            if (reader is not tail.head or not model.spec.tied) and fold_norm(tail.norm, [reader]):
                yield "tail", f"norm -> {name}"


def norm_readers(layer: LayerSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(norm before a branch, the linears that read it)."""
    if layer.order == "post":
        return
    yield "norm_attention_in", ("attention.q", "attention.k", "attention.v")
    f = layer.feed_forward
    inner = ("gate", "up") if f.gated else ("up",)
    stacks, more = ["feed_forward"], []
    if f.experts is not None:
        stacks, more = (
            [f"feed_forward.expert{i}" for i in range(f.experts.count)],
            ["feed_forward.router"],
        )
        if f.experts.shared_width:
            stacks.append("feed_forward.shared")
            more += ["feed_forward.shared_gate"] if f.experts.shared_gate else []
    yield "norm_feed_forward_in", (*(f"{s}.{part}" for s in stacks for part in inner), *more)


def fold_norm(norm: Normalize | None, readers: list[Linear]) -> bool:
    """A norm's scale and bias into the linears that read it; False where they have nowhere to go."""
    if norm is None or (norm.bias is not None and any(linear.bias is None for linear in readers)):
        return False
    scale = norm.weight.float() + norm.norm.offset
    for linear in readers:
        w = linear.matrix()
        if norm.bias is not None and linear.bias is not None:
            linear.bias.add_(w @ norm.bias)
        _put(linear, w * scale)
    norm.weight.fill_(1.0 - norm.norm.offset)
    if norm.bias is not None:
        norm.bias.zero_()
    return True


def fold_biases(block: Block) -> Iterator[str]:
    """Biases of values and keys, where they can be."""
    part, a = block.attention, block.attention.spec
    if part.v.bias is not None and part.o.bias is not None:
        heads = part.v.bias.view(a.num_kv_heads, a.head_dim)
        spread = heads.repeat_interleave(a.num_heads // a.num_kv_heads, 0).flatten()
        part.o.bias.add_(part.o.matrix() @ spread)
        part.v.bias.zero_()
        yield "bias of attention.v -> bias of attention.o"
    if part.k.bias is not None and a.rope is None and a.soft_cap is None and part.k_norm is None:
        part.k.bias.zero_()
        yield "bias of attention.k -> nothing: softmax does not see it"


def _put(linear: Linear, w: Tensor) -> None:
    """Another matrix in the place of a dense one, so that whoever holds the parameter sees it."""
    assert linear.weight is not None
    linear.weight.copy_(w)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
