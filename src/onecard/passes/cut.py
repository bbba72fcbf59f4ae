"""Passes that only take parts away: layers, heads, neurons, numbers of the residual stream.

Such a pass first looks (a survey, which may run the model and changes nothing), then decides, and what
it decided is a `Surgery` (nn/graph.py): a smaller Spec and which units stay. Carrying it out needs one
block at a time, so a Cut is streamed like a walk. What is left computes exactly what the model
computes with the parts masked.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.calibrate.walk import give_back
from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.nn.graph import Surgery, cut_block, cut_outer
from onecard.nn.model import Model
from onecard.nn.transformer import Block, Context, Stem, Tail, Transformer, positions_of
from onecard.passes.base import Data, ModelPass
from onecard.passes.memory import look


class Cut(ModelPass):
    """A ModelPass that takes parts away, block by block."""

    @property
    def surveys(self) -> bool:
        return True

    @abstractmethod
    def decide(self, spec: Spec, found: Any) -> tuple[Surgery, list[Row]]:
        """What stays, from what the survey found."""

    @property
    @abstractmethod
    def most(self) -> float | None:
        """How many times the perplexity of the whole model is still delivered; None: any."""

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        if data.ids is None:
            raise BadRequest(f"{self.title} needs calibration text to be judged on", do="give ids")
        found = look(model, self.survey(model.spec), data.ids, data.progress)
        plan, rows = self.decide(model.spec, found)
        made = cut_model(model, plan)
        before, after = (
            loss_of(m.network.stem, m.blocks(), m.network.tail, m.spec, data.ids)
            for m in (model, made)
        )
        return made, rows + judge(self, before, after)

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return 0


JUDGED, CHUNK = 4096, 256
"""Tokens that a cut is judged on; tokens whose logits are held at once."""


def loss_of(
    stem: Stem | Tail, blocks: Iterable[Block], tail: Stem | Tail, spec: Spec, ids: Tensor
) -> float:
    """Mean -log p of the first tokens of `ids`, one block at a time."""
    ids = ids[: max(1, JUDGED // ids.shape[1])]
    with torch.no_grad():
        hidden = [stem(row, positions_of(row, None, 0)) for row in ids.split(1)]  # type: ignore[call-arg]
        contexts = [Context(spec, torch.arange(h.shape[1]).expand(h.shape[:2])) for h in hidden]
        for block in blocks:
            hidden = [block(h, context) for h, context in zip(hidden, contexts, strict=True)]
            give_back()
        nats = 0.0
        for h, row in zip(hidden, ids, strict=True):
            for start in range(0, len(row) - 1, CHUNK):
                end = min(start + CHUNK, len(row) - 1)
                logits = tail(h[0, start:end]).float()  # type: ignore[call-arg]
                nats += float(F.cross_entropy(logits, row[start + 1 : end + 1], reduction="sum"))
    return nats / (ids.shape[0] * (ids.shape[1] - 1))


def judge(cut: Cut, before: float, after: float) -> list[Row]:
    """The perplexity on calibration text, before and after. BadRequest where the model is wrecked."""
    was, now = (math.exp(min(loss, 700.0)) for loss in (before, after))
    if cut.most is not None and not now <= cut.most * was:
        raise BadRequest(
            f"{cut.title} wrecks this model: perplexity {now:.4g} on calibration text, {was:.4g} before",
            f"{now / was:.3g} times as much, {cut.most:g} times are allowed",
            f"cut less, score by something else, or set most: null in {cut.key} and recover afterwards",
        )
    return [Row("calibration", "perplexity", now, "", was)]


def cut_model(model: Model, plan: Surgery) -> Model:
    """The smaller model that a Surgery leaves of one in memory."""
    config = model.family.config(model.config, plan.spec)
    with torch.device("meta"):
        network = Transformer(replace(plan.spec, layers=(), tied=False))
    old = model.network
    blocks: list[Block] = []
    for new, index in enumerate(plan.layers):
        block = old.blocks[index]
        assert isinstance(block, Block)
        blocks.append(cut_block(block, plan, new))
    network.spec = plan.spec
    stem, tail = cut_outer(old.stem, plan), cut_outer(old.tail, plan)
    assert isinstance(stem, Stem) and isinstance(tail, Tail)
    network.stem, network.blocks, network.tail = stem, nn.ModuleList(blocks), tail
    if plan.spec.tied:
        network.tie()
    return replace(model, network=network.eval(), spec=plan.spec, config=config)
