"""Recovery: what is left of a pruned, cut or quantized model is trained to make good what went.

    full     every surviving number, on the next token
    lora     a low-rank change of each linear, merged at the end: zeros and grids are respected by the
             change itself, so merging loses nothing (Hu et al., LoRA, arXiv 2106.09685)
    blocks   one block at a time against the block of the original model on the original's inputs,

                 min ||block(X') - Y||^2 / ||Y||^2       X' what the blocks before it now give

             so that each makes good the errors before it. Activations of one block are alive, no head;
             block-wise training before end-to-end: Chen et al., EfficientQAT, arXiv 2407.11062

A mask is where the stored matrix is zero; integers keep their scales (calibrate/latent.py). To train
towards what the original model says instead of the text, use `distil`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onecard.calibrate.data import digest
from onecard.calibrate.forward import forward
from onecard.calibrate.grids import Grid, grid_of
from onecard.calibrate.latent import trainable
from onecard.calibrate.losses import hidden_states, next_token
from onecard.calibrate.train import Course, Training, checked_ids, train
from onecard.calibrate.walk import Progress, weight_count
from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes
from onecard.nn.layers import Linear
from onecard.nn.model import Model
from onecard.nn.transformer import Context
from onecard.passes.base import Data, ModelPass, Pass
from onecard.passes.rotate import Rotate

How = Literal["full", "lora", "blocks"]


@dataclass(frozen=True)
class Recover(ModelPass):
    """Settings: how, the rank of `lora`, whether zeros among integers stay, and the training."""

    how: How = "full"
    rank: int = 8
    keep_zeros: bool = False
    training: Training = field(default_factory=Training)

    key: ClassVar[str] = "recover"
    title: ClassVar[str] = "recovery"
    paper: ClassVar[str] = "Han et al., Learning both Weights and Connections, arXiv 1506.02626"
    takes_packed: ClassVar[bool] = True

    def check(self, spec: Spec) -> None:
        check_length(self.training, spec)
        smallest = min(spec.hidden, *(layer.feed_forward.width for layer in spec.layers))
        if self.how == "lora" and not 1 <= self.rank <= smallest:
            raise BadRequest(f"a change of rank {self.rank} in matrices of {smallest}",
                             do=f"a rank from 1 to {smallest}")  # fmt: skip

    def beside(self, spec: Spec, original: Spec) -> None:
        if self.how == "blocks":
            check_counterparts(spec, original)

    def follows(self, earlier: Sequence[Pass]) -> None:
        super().follows(earlier)
        turned = next((p for p in earlier if isinstance(p, Rotate) and p.residual != "never"), None)
        if self.how == "blocks" and turned is not None:
            raise BadRequest(
                "blocks can only be recovered where they read and write what the original's do",
                f"{self.title} follows {turned.title}", "residual: never in rotate, or how: full",
            )  # fmt: skip

    def reads(self, ids: Tensor) -> str:
        return check_windows(self.training, ids)

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return training_bytes(spec, self.training, self.rank if self.how == "lora" else 0)

    def grid(self, name: str, linear: Linear) -> Grid:
        return grid_of(linear.held(), self.keep_zeros)

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        ids = learned_from(data, self.training)
        if self.how == "blocks":
            if data.original is None:
                raise BadRequest(
                    "blocks are recovered against the original model, which is not here",
                    do="give it in Data, or how: full",
                )
            return model, recover_blocks(model, data.original(), ids, self, data)
        rank = self.rank if self.how == "lora" else 0

        def loss(batch: Tensor) -> Tensor:
            seen = forward(model.network, batch, self.training.checkpointing)
            return next_token(seen.logits, batch)

        with trainable(model, self.grid, rank, seed=self.training.seed) as trainee:
            course = train(trainee.parameters, loss, ids, self.training, settle=trainee.settle,
                           folder=data.folder, key={"pass": self.key}, progress=data.progress)  # fmt: skip
        return model, course.rows(self.key)


def learned_from(data: Data, training: Training) -> Tensor:
    """The windows that a pass trains on."""
    if data.ids is None:
        raise BadRequest("training needs text", do="give ids")
    return checked_ids(data.ids, training)


def check_length(training: Training, spec: Spec) -> None:
    """BadRequest where windows do not fit the model's context."""
    if training.length > spec.max_context:
        raise BadRequest(f"windows of {training.length} tokens, the context is {spec.max_context}",
                         do="lower training.length")  # fmt: skip


def check_windows(training: Training, ids: Tensor) -> str:
    """What is to be said where windows [samples, length] are shorter than the training asks for.

    BadRequest where they do not fill one batch.
    """
    checked_ids(ids, training)
    if ids.shape[1] >= training.length:
        return ""
    return (
        f"on windows of {ids.shape[1]} tokens, as long as the text is cut; training.length is "
        f"{training.length}"
    )


def check_counterparts(spec: Spec, original: Spec) -> None:
    """BadRequest where a block has none in the original."""
    if (spec.num_layers, spec.hidden) != (original.num_layers, original.hidden):
        raise BadRequest(
            "blocks can only be recovered where each has its counterpart in the original",
            f"{spec.num_layers} blocks {spec.hidden} wide, {original.num_layers} of {original.hidden}",
            "use how: full, or distil",
        )


def recover_blocks(
    model: Model, original: Model, ids: Tensor, settings: Recover, data: Data
) -> list[Row]:
    """Train the blocks of a model one after the other towards those of the original."""
    check_counterparts(model.spec, original.spec)
    rows, training = [], settings.training
    numbers = torch.arange(len(ids))[:, None]
    context = Context(model.spec, torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        targets, inputs = (m.network.start(ids)[0].float() for m in (original, model))
    for index, (block, dense) in enumerate(zip(model.blocks(), original.blocks(), strict=True)):
        with torch.no_grad():
            targets = _through(dense.float(), targets, context)

        def loss(batch: Tensor, index: int = index, inputs: Tensor = inputs,
                 targets: Tensor = targets) -> Tensor:  # fmt: skip
            at = batch[:, 0]
            return hidden_states(model.network.blocks[index](inputs[at], context), targets[at])

        chosen = f"blocks.{index}."
        with trainable(model, settings.grid, within=chosen) as trainee:
            course = train(
                trainee.parameters, loss, numbers, training, settle=trainee.settle,
                folder=None if data.folder is None else data.folder / f"block-{index}",
                key={"pass": settings.key, "block": index, "text": digest(ids)},
                progress=_part(data, index, model.spec.num_layers),
            )  # fmt: skip
        tokens = course.tokens * ids.shape[1]
        rows += Course(course.losses, course.seconds, tokens).rows(f"blocks.{index}")[:1]
        with torch.no_grad():
            inputs = _through(block, inputs, context)
    return rows


def _through(block: torch.nn.Module, hidden: Tensor, context: Context) -> Tensor:
    return torch.cat([block(h, context).float() for h in hidden.split(8)])


def _part(data: Data, index: int, count: int) -> Progress:
    """The progress of one block as a part of all."""

    def progress(done: int, total: int, what: str) -> None:
        data.progress(index * total + done, count * total, f"block {index}, {what}")

    return progress


def training_bytes(spec: Spec, training: Training, rank: int = 0, teacher: bool = False) -> int:
    """Bytes that training holds beside the stored weights: latents, gradients, moments, activations."""
    linears = sum(weight_count(spec, layer) for layer in spec.layers)
    outer = spec.vocab_size * spec.embed_size * (1 if spec.tied else 2)
    trained = 4 * 5 * (linears + outer)
    if rank:
        sides = sum(
            sum(shape) for layer in spec.layers for shape in linear_shapes(spec, layer).values()
        )
        trained = 4 * (linears + outer) + 20 * rank * sides
    tokens = -(-training.batch // training.accumulate) * training.length
    wide = max(layer.feed_forward.width for layer in spec.layers)
    block = 4 * (16 * spec.hidden + 5 * wide)
    blocks = block * spec.num_layers
    if training.checkpointing:
        blocks = block + 4 * spec.hidden * spec.num_layers
    logits = (2 if teacher else 1) * 3 * 4 * spec.vocab_size
    return trained + tokens * (blocks + logits)
