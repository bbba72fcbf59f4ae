"""A forward that keeps what losses look at: logits, hidden states and attention of chosen blocks.

With `checkpointing` a block keeps its input alone and is run again on the way back (Chen et al., arXiv
1604.06174): memory for the activations of one block instead of all, for a third more time; the same
bits, as a block has nothing random in it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onecard.nn.transformer import Block, Transformer


@dataclass
class Seen:
    """logits [B, T, V]; by block: its output [B, T, hidden] and its queries, keys and values."""

    logits: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


def forward(
    network: Transformer,
    ids: Tensor,
    checkpointing: bool = False,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
) -> Seen:
    """Run a network on ids [B, T]; keep the outputs of the blocks `hidden`, the attention of `attention`."""
    h, context = network.start(ids)
    seen = Seen(h)
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        if index in attention:
            seen.attention[index] = block.attended(h, context)
        if checkpointing and torch.is_grad_enabled():
            h = checkpoint(block, h, context, use_reentrant=False)
        else:
            h = block(h, context)
        if index in hidden:
            seen.hidden[index] = h
    seen.logits = network.tail(h)
    return seen
