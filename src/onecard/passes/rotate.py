"""Rotations that are fused into the weights: outliers are spread over all channels, nothing else changes.

The residual stream h [T, hidden] becomes h R with R orthogonal. A norm without a scale commutes with
that, |h R| = |h|, so the scales g of norms are folded into what reads them first, and then

    reads the stream (q, k, v, gate, up, router)    W  <- W diag(g) R        embedding  E <- E R
    writes to it (o, down)                          W  <- R^T W, b <- R^T b  head       W <- W diag(g) R

Values get a rotation U [head_dim, head_dim] of their own, the same for every head, as attention only mixes
tokens: v <- U^T v in each head, o <- o U. No product is added anywhere: the result is an ordinary model.

Only for RMS norms before each part: a layer norm also takes off the mean, and norms behind a part have
nothing linear to give their scale to. A head that is tied to the embedding has to become a matrix of its
own (the final norm's scale goes into it): `residual: auto` leaves the stream alone there, as that costs
more bytes than most rotations save, and rotates values only.

Ashkboos et al., QuaRot, arXiv 2404.00456; Liu et al., SpinQuant, arXiv 2405.16406 (R1 and R2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.kernels.orthogonal import orthogonal
from onecard.kernels.reference import from_dense
from onecard.nn.layers import Linear, Normalize
from onecard.nn.model import Model
from onecard.nn.transformer import Block, Stem, Tail
from onecard.passes.base import Data, ModelPass

TRIED = 128
"""Tokens on which a rotated model is compared with what it was."""


@dataclass(frozen=True)
class Rotate(ModelPass):
    """Settings: whether the stream is rotated (auto: where the model allows it and its head is its own),
    whether values are, and the seed of the signs."""

    residual: Literal["auto", "always", "never"] = "auto"
    values: bool = True
    seed: int = 0

    key = "rotate"
    title = "rotation"
    paper = "Ashkboos et al., QuaRot, arXiv 2404.00456"
    takes_sparse = False

    @property
    def calibrated(self) -> bool:
        return False

    def check(self, spec: Spec) -> None:
        if self.residual == "never" and not self.values:
            raise BadRequest("rotate: neither the stream nor values are to be rotated",
                             do="residual: always, or values: true")  # fmt: skip
        if self.residual == "always":
            check_rotatable(spec)
            if spec.tied:
                raise BadRequest("the model's head is tied to its embedding: only one of them takes "
                                 "the last norm's scale", do="residual: auto")  # fmt: skip

    def turns(self, spec: Spec) -> bool:
        if self.residual != "auto" or spec.tied:
            return self.residual == "always"
        try:
            check_rotatable(spec)
        except BadRequest:
            return False
        return True

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        """The same model, rotated; with ids to try it on, how far its answers have moved by rounding."""
        spec, network = model.spec, model.network
        tried = None if data.ids is None else data.ids[:1, :TRIED]
        with torch.no_grad():
            before = None if tried is None else network(tried)
            r = rotation(spec.hidden, self.seed) if self.turns(spec) else None
            if r is not None:
                rotate_stem(network.stem, r)
                rotate_tail(network.tail, r)
            for block in model.blocks():
                size = block.layer.attention.head_dim
                rotate_block(block, r, rotation(size, self.seed + 1) if self.values else None)
            if before is None:
                return model, []
            moved = (network(tried).float() - before.float()).square().sum()
        lost = float(moved / before.float().square().sum())
        return model, [Row("model", "relative_output_error", lost)]

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        widest = max(rows * columns for layer in spec.layers
                     for rows, columns in linear_shapes(spec, layer).values())  # fmt: skip
        outer = spec.vocab_size * spec.hidden if self.turns(spec) else 0
        return 3 * 8 * max(widest, outer) + 16 * spec.hidden**2 + 8 * TRIED * spec.vocab_size


def check_rotatable(spec: Spec) -> None:
    """BadRequest where the stream of a model cannot be rotated, with the reason."""
    if spec.norm.kind != "rms":
        raise BadRequest("the model has layer norms, which do not commute with a rotation",
                         do="rotate only values (residual: never)")  # fmt: skip
    orders = sorted({layer.order for layer in spec.layers} - {"pre"})
    if orders:
        raise BadRequest(
            f"the model's norms are {', '.join(orders)}: a scale behind a part cannot be folded",
            do="rotate only values (residual: never)",
        )
    if spec.embed_size != spec.hidden or spec.learned_positions or not spec.final_norm:
        raise BadRequest("the model's stream has projections or learned positions of its own",
                         do="rotate only values (residual: never)")  # fmt: skip


def rotation(size: int, seed: int) -> Tensor:
    """float64 [size, size]."""
    return torch.from_numpy(orthogonal(size, seed))


def rotate_stem(stem: Stem, r: Tensor) -> None:
    table = stem.embedding.weight
    assert table is not None
    stem.embedding.weight = _parameter(table.double() @ r, table)


def rotate_tail(tail: Tail, r: Tensor) -> None:
    """The head must be a matrix of its own."""
    assert tail.norm is not None
    _read(tail.head, _taken(tail.norm), r)


def rotate_block(block: Block, r: Tensor | None, u: Tensor | None) -> None:
    """Rotate the stream by r and the values by u, in place; weights keep their dtype."""
    attention, forward = block.attention, block.feed_forward
    if r is not None:
        assert block.norm_attention_in is not None and block.norm_feed_forward_in is not None
        g = _taken(block.norm_attention_in)
        for linear in (attention.q, attention.k, attention.v):
            _read(linear, g, r)
        _write(attention.o, r)
        g = _taken(block.norm_feed_forward_in)
        for name, linear in forward.named_modules():
            if isinstance(linear, Linear):
                if name.rpartition(".")[2] == "down":
                    _write(linear, r)
                else:
                    _read(linear, g, r)
    if u is not None:
        v, o, size = attention.v, attention.o, u.shape[0]
        w = v.matrix(torch.float64).unflatten(0, (-1, size))  # [heads, head_dim, hidden]
        _hold(v, (u.T @ w).flatten(0, 1))
        if v.bias is not None:
            b = v.bias.double().unflatten(0, (-1, size))
            v.bias = _parameter((b @ u).flatten(), v.bias)
        w = o.matrix(torch.float64).unflatten(1, (-1, size))  # [hidden, heads, head_dim]
        _hold(o, (w @ u).flatten(1))


def _taken(norm: Normalize) -> Tensor:
    """The scale of a norm [width], which it has no more."""
    g = norm.weight.double() + norm.norm.offset
    norm.weight = _parameter(torch.full_like(g, 1.0 - norm.norm.offset), norm.weight)
    return g


def _read(linear: Linear, g: Tensor, r: Tensor) -> None:
    _hold(linear, (linear.matrix(torch.float64) * g) @ r)


def _write(linear: Linear, r: Tensor) -> None:
    _hold(linear, r.T @ linear.matrix(torch.float64))
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias.double() @ r, linear.bias)


def _hold(linear: Linear, w: Tensor) -> None:
    linear.replace(from_dense(w.to(linear.held().parts["weight"].dtype)))


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=False)
