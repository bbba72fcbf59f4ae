"""Quantization-aware training: the weights learn while they are rounded, and are stored as they multiply.

A latent W is rounded in every forward, q = clamp(round(W / s)), y = x (s q)^T; the rounding has the
gradient of the identity inside the grid and none outside (straight-through, arXiv 1308.3432). The scales:

    straight   from the latent group as it is now, as rounding to nearest would take them
    lsq        learned: d(s q)/ds = q - W / s inside, the grid's end outside, times 1 / sqrt(n Q), n the
               weights under a scale, Q the largest integer; at first 2 mean|W| / sqrt(Q)
               (Esser et al., LSQ, arXiv 1902.08153)
    ternary    s = mean|W|, q in {-1, 0, 1}; the gradient passes everywhere (BitNet b1.58, arXiv 2402.17764)
    binary     s = mean|W|, q = sign W, sign 0 = 1; it passes where |W| <= 1, and latents are kept there
               (Courbariaux et al., BinaryConnect, arXiv 1511.00363; the scale: XNOR-Net, arXiv 1603.05279)

Scales are rounded to the dtype they are stored in before they are used. Zeros of a pruned matrix stay
zero (not in binary, which has no zero). `soft` adds the KL to what the original model says, which is
what holds 2 bits and less together on little text (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from onecard.calibrate.forward import forward
from onecard.calibrate.grids import Grid, straight
from onecard.calibrate.latent import trainable
from onecard.calibrate.losses import check_loss, next_token, soft_targets
from onecard.calibrate.train import Training, computes_bf16, train
from onecard.core.errors import BadRequest
from onecard.core.format import Format, Integers, Levels, Shape, Weight
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import reference, storage
from onecard.kernels.reference import DTYPES
from onecard.nn.layers import Linear
from onecard.nn.model import Model
from onecard.passes.base import Data, ModelPass, check_groups
from onecard.passes.quantize import AUTO
from onecard.passes.recover import check_length, check_windows, learned_from, training_bytes

Kind = Literal["lsq", "straight", "ternary", "binary"]


class StraightGrid(Grid):
    """Integers on the grid that rounding the latent to nearest takes, anew in every forward."""

    keep: Tensor | None

    def __init__(self, w: Tensor, format: Integers) -> None:
        super().__init__()
        self.format = format
        self.register_buffer("keep", None if bool((w != 0).all()) else w != 0)

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, groups, size] with their gradient, scale and zero point [out, groups, 1]."""
        w = w if self.keep is None else w * self.keep
        low, high = self.format.levels
        blocks = reference.grouped(w, self.format)
        scale, zero = (part[..., None] for part in self.scales(blocks))
        t = (blocks / scale + zero).clamp(low, high)
        return straight(torch.round(t), t), scale, zero

    def scales(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return reference.grid(blocks.detach(), self.format)

    def forward(self, w: Tensor) -> Tensor:
        q, scale, zero = self.codes(w)
        return ((q - zero) * scale).flatten(1)

    def store(self, w: Tensor) -> Weight:
        q, scale, zero = self.codes(w)
        return reference.hold(q.flatten(1), scale[..., 0], zero[..., 0], self.format)


class LearnedGrid(StraightGrid):
    """LSQ: symmetric integers whose scales are parameters."""

    def __init__(self, w: Tensor, format: Integers) -> None:
        super().__init__(w, format)
        blocks = reference.grouped(w, format).abs()
        most = format.levels[1]
        scale = 2 * blocks.mean(-1) / math.sqrt(most)
        self.scale = nn.Parameter(torch.where(scale > 0, scale, torch.ones_like(scale)))
        self.share = 1 / math.sqrt(blocks.shape[-1] * most)

    def scales(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        smallest = torch.finfo(torch.float32).tiny
        slowed = straight(self.scale, self.scale * self.share)
        held = self.scale.abs().to(DTYPES[self.format.scale]).float().clamp(min=smallest)
        return straight(held, slowed), torch.zeros_like(self.scale)


class LevelGrid(Grid):
    """Ternary or binary: the mean magnitude of a group times a level."""

    keep: Tensor | None

    def __init__(self, w: Tensor, format: Levels) -> None:
        super().__init__()
        self.format, self.ternary = format, format.table == "ternary"
        whole = not self.ternary or bool((w != 0).all())
        self.register_buffer("keep", None if whole else w != 0)

    def levels(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Levels [out, groups, size] and scales [out, groups, 1]."""
        blocks = w.detach().unflatten(1, (self.format.groups((w.shape[0], w.shape[1])), -1))
        scale = blocks.abs().mean(-1, keepdim=True).to(DTYPES[self.format.scale]).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if self.ternary:
            return torch.round(blocks / scale).clamp(-1, 1), scale
        return torch.where(blocks >= 0, 1.0, -1.0), scale

    def forward(self, w: Tensor) -> Tensor:
        w = w if self.keep is None else w * self.keep
        levels, scale = self.levels(w)
        through = w if self.ternary else w.clamp(-1, 1)
        return straight((levels * scale).flatten(1), through)

    def store(self, w: Tensor) -> Weight:
        levels, scale = self.levels(w if self.keep is None else w * self.keep)
        codes = levels.flatten(1) + 1 if self.ternary else (levels.flatten(1) + 1) / 2
        parts = {"weight_scale": scale[..., 0].to(DTYPES[self.format.scale])}
        return storage.hold_levels(codes.to(torch.int16), parts, self.format)

    def settle(self, w: Tensor) -> None:
        if not self.ternary:
            w.clamp_(-1, 1)


@dataclass(frozen=True)
class QAT(ModelPass):
    """Settings: the kind of grid, its bits and groups, what is learned, the training.

    `hard` is the weight of the next token in the loss, `soft` that of what the original says of it.
    """

    kind: Kind = "lsq"
    bits: int = 2
    group: int | Literal["auto"] | None = AUTO
    hard: float = 1.0
    soft: float = 1.0
    temperature: float = 1.0
    training: Training = field(default_factory=lambda: Training(rate=1e-3))

    key: ClassVar[str] = "qat"
    title: ClassVar[str] = "quantization-aware training"
    paper: ClassVar[str] = "Esser et al., Learned Step Size Quantization, arXiv 1902.08153"

    def __post_init__(self) -> None:
        self.format_of(128)
        if not (self.soft or self.hard):
            raise BadRequest("qat: hard and soft are 0", do="one of them with a weight above 0")
        check_loss(self.soft, self.hard, temperature=self.temperature)

    @property
    def keeps_zeros(self) -> bool:
        return self.kind != "binary"

    @property
    def quantizes(self) -> bool:
        return True

    def format_for(self, shape: Shape) -> Format | None:
        return self.format_of(shape[1])

    def format_of(self, columns: int) -> Integers | Levels:
        group = 128 if self.group == AUTO else self.group
        made: Integers | Levels = Integers(self.bits, group)
        if self.kind in ("ternary", "binary"):
            made = Levels(self.kind, group)
        return made.for_row(columns) if self.group == AUTO else made

    def check(self, spec: Spec) -> None:
        check_length(self.training, spec)
        check_groups(self.format_of(128), spec, self.group != AUTO)

    def reads(self, ids: Tensor) -> str:
        return check_windows(self.training, ids)

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return training_bytes(spec, self.training, teacher=self.soft > 0)

    def grid(self, name: str, linear: Linear) -> Grid:
        """The grid that a linear learns on."""
        w, parts = linear.matrix(), linear.held().parts.values()
        dtype = next(part.dtype for part in parts if part.is_floating_point())  # pruned: sparse
        format = storage.rescaled(self.format_of(w.shape[1]), dtype)
        if isinstance(format, Levels):
            return LevelGrid(w, format)
        assert isinstance(format, Integers)
        return (LearnedGrid if self.kind == "lsq" else StraightGrid)(w, format)

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        ids = learned_from(data, self.training)
        teacher = None
        if self.soft:
            if data.original is None:
                raise BadRequest("the original model is not here", do="set soft: 0")
            original = data.original()
            bf16 = computes_bf16(self.training.dtype, original.parameters)
            teacher = original.network.to(torch.bfloat16 if bf16 else torch.float32)

        def loss(batch: Tensor) -> Tensor:
            logits = forward(model.network, batch, self.training.checkpointing).logits
            value = self.hard * next_token(logits, batch)
            if teacher is None:
                return value
            with torch.no_grad():
                said = teacher(batch)
            return value + self.soft * soft_targets(logits, said, self.temperature)

        with trainable(model, self.grid, seed=self.training.seed) as trainee:
            course = train(trainee.parameters, loss, ids, self.training, settle=trainee.settle,
                           folder=data.folder, key={"pass": self.key}, progress=data.progress)  # fmt: skip
        rows = [Row(name, "format", linear.format.name) for name, linear in model.linears()]
        return model, rows + course.rows(self.key)
