"""How far a model's answers move when some of its blocks change: what sensitivity is measured in.

The answers p to a few tokens are kept, and what went into every block. After a change in block b the
blocks from b on are run again, and the movement is

    mean over tokens of KL(p || p') = sum p (log p - log p')     in nats

Memory: float32 [tokens, vocabulary] three times over, [tokens, hidden] for every block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.core.spec import Spec
from onecard.nn.model import Model
from onecard.nn.transformer import Context


class Judge:
    """The answers of a model as it is now to `ids` [B, T], or those of another one to compare it with.

    `answers` are log probabilities [B, T, vocabulary].
    """

    def __init__(self, model: Model, ids: Tensor, answers: Tensor | None = None) -> None:
        self.model, self.blocks = model, list(model.blocks())
        self.inputs: list[Tensor] = []
        with torch.no_grad():
            h, _ = model.network.start(ids)
            self.context = Context(model.spec, torch.arange(h.shape[1]).expand(h.shape[:2]))
            for block in self.blocks:
                self.inputs.append(h)
                h = block(h, self.context)
            self.answers = (
                torch.log_softmax(model.network.tail(h).float(), -1) if answers is None else answers
            )
        self.said = self.answers.exp()

    def moved(self, index: int) -> float:
        """Nats per token between the answers then and now, where blocks below `index` did not change."""
        with torch.no_grad():
            return self.far(self.ran(index))

    def ran(self, index: int) -> Tensor:
        """What the last block gives now [B, T, hidden], where blocks below `index` did not change."""
        h = self.inputs[index]
        for block in self.blocks[index:]:
            h = block(h, self.context)
        return h

    def far(self, h: Tensor) -> float:
        """Nats per token between the answers and those that follow from last hidden states."""
        now = torch.log_softmax(self.model.network.tail(h).float(), -1)
        return float((self.said * (self.answers - now)).sum(-1).mean())


def judge_bytes(spec: Spec, tokens: int) -> int:
    """What a Judge of so many tokens holds, and takes while it looks."""
    return 4 * tokens * (4 * spec.vocab_size + (spec.num_layers + 8) * spec.hidden)
