"""Stages on a model in memory: walks and surveys over its blocks, and what a loss says of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.calibrate.walk import (
    TOKENS_PER_BATCH,
    Blocks,
    Progress,
    SitePass,
    batches,
    walk,
    weight_count,
)
from onecard.core.format import Sparse
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels.reference import DTYPES, NAMES, from_dense
from onecard.nn.layers import Linear
from onecard.nn.model import Model
from onecard.nn.transformer import Block, positions_of
from onecard.passes.base import BlockPass, Data, ModelPass, Stage, Survey, needs_of
from onecard.passes.sparse import Keeper


def quiet(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""


@dataclass
class ModelBlocks:
    """The blocks of a model in memory."""

    model: Model
    stage: Sequence[BlockPass] = ()

    def __post_init__(self) -> None:
        self.spec = self.model.spec
        self.stored = NAMES[next(self.model.network.parameters()).dtype]
        self.keeper = Keeper(self.stage, self.stored)

    def load(self, index: int) -> Block:
        block = self.model.network.blocks[index]
        assert isinstance(block, Block)
        self.keeper.opened(block)
        return block

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        self.keeper.closed(block, rows)


class Watched:
    """Blocks that a survey looks at and that nobody keeps."""

    def __init__(self, blocks: Blocks, survey: Survey, hidden: Sequence[Tensor]) -> None:
        self.blocks, self.survey, self.before = blocks, survey, list(hidden)
        self.spec, self.stored = blocks.spec, blocks.stored

    def load(self, index: int) -> Block:
        return self.blocks.load(index)

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        self.survey.block(index, self.before, hidden)
        if isinstance(self.blocks, ModelBlocks):  # it goes back as it came
            self.blocks.done(index, block, [], hidden)
        self.before = list(hidden)


def inputs(model: Model, ids: Tensor | None) -> list[Tensor]:
    """The inputs of the first block, per batch."""
    if ids is None:
        return []
    with torch.no_grad():
        return [model.network.stem(b, positions_of(b, None, 0)) for b in batches(ids)]


@contextmanager
def with_zeros(model: Model) -> Iterator[None]:
    """Sparse matrices of a model held as plain ones, for as long as it is looked at."""
    held = {m: m.held() for _, m in model.linears() if isinstance(m.format, Sparse)}
    for linear, was in held.items():
        stored = was.format.inner.dense if isinstance(was.format, Sparse) else None
        linear.replace(from_dense(linear.matrix(DTYPES[stored] if stored else torch.float32)))
    try:
        yield
    finally:
        for linear, was in held.items():
            linear.replace(was)


def look(model: Model, survey: Survey, ids: Tensor | None, progress: Progress = quiet) -> Any:
    """What a survey finds in a model in memory."""
    if survey.whole:
        assert ids is not None, "this survey needs text"
        with with_zeros(model):
            survey.model(model, ids, progress)
        return survey.result()
    hidden = inputs(model, ids) if survey.runs else []
    walk(Watched(ModelBlocks(model), survey, hidden), (survey,), hidden, progress=progress)
    return survey.result()


def differentiated(model: Model, ids: Tensor, progress: Progress = quiet) -> Iterator[None]:
    """Batch by batch, with the gradient of the batch's mean loss in every linear: see `gradient`.

    Memory: a gradient per weight, and what one batch keeps of all blocks for its way back.
    """
    linears = [linear for _, linear in model.linears()]
    weights = [linear.weight for linear in linears if linear.weight is not None]
    parts = batches(ids)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for number, batch in enumerate(parts):
            progress(number, len(parts), "gradients")
            with torch.enable_grad():
                logits = model.network(batch)[:, :-1].flatten(0, 1)
                F.cross_entropy(logits.float(), batch[:, 1:].flatten()).backward()
            yield
            for weight in weights:
                weight.grad = None
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def gradient_bytes(spec: Spec, ids: Tensor | None) -> int:
    """A float32 gradient per weight, and what one batch keeps of all blocks and of the logits."""
    tokens = 0 if ids is None else min(ids.numel(), max(TOKENS_PER_BATCH, ids.shape[1]))
    kept = 0
    for layer in spec.layers:
        a, f = layer.attention, layer.feed_forward
        kept += 10 * spec.hidden + 4 * a.head_dim * (a.num_heads + a.num_kv_heads) + 5 * f.width
    weights = sum(weight_count(spec, layer) for layer in spec.layers)
    return 8 * weights + 4 * tokens * (kept + 4 * spec.vocab_size)


def gradient(linear: Linear) -> Tensor:
    """dL/dW of a linear, float32 [out, in]; zeros where the loss does not see it (an idle expert)."""
    weight = linear.weight
    if weight is None or weight.grad is None:
        return torch.zeros(linear.shape)
    return weight.grad.float()


def run_stage(model: Model, stage: Stage, data: Data) -> tuple[Model, list[Row]]:
    """One stage of a recipe on a model in memory."""
    if isinstance(stage, ModelPass):
        return stage.model(model, data)
    chosen: list[SitePass] = []
    for p in stage:
        chosen.append(surveyed(model, p, data) if p.surveys else p)
    hidden = inputs(model, data.ids) if needs_of(stage) else []
    return model, walk(ModelBlocks(model, stage), chosen, hidden, progress=data.progress)


def surveyed(model: Model, p: BlockPass, data: Data) -> SitePass:
    """The pass, with what its survey found."""
    return p.informed(look(model, p.survey(model.spec), data.ids, data.progress))
