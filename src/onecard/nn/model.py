"""Model: a network with its Spec, family, tokenizer and source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.core.spec import KEPT_DENSE, Spec
from onecard.nn.families import Family
from onecard.nn.layers import Linear, Matrix
from onecard.nn.transformer import Block, Transformer


@dataclass
class Model:
    """What `load_model` returns and passes take: everything about one model, in memory."""

    network: Transformer
    spec: Spec
    family: Family
    config: dict[str, Any]
    tokenizer: Any = None
    source: Path | None = None

    def blocks(self) -> Iterator[Block]:
        for block in self.network.blocks:
            assert isinstance(block, Block)
            yield block

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """(path, linear) of everything that passes may touch, in the order data meets them."""
        for index, block in enumerate(self.blocks()):
            for name, module in block.named_modules():
                if isinstance(module, Linear) and name not in KEPT_DENSE:
                    yield f"blocks.{index}.{name}", module

    @property
    def parameters(self) -> int:
        """Weights counted once, tied tables once."""
        total = {id(p): p.numel() for p in self.network.parameters()}
        once = self.network.tail.head if self.spec.tied else None
        packed = (
            m.shape[0] * m.shape[1]
            for m in self.network.modules()
            if isinstance(m, Matrix) and not m.format.dense and m is not once
        )
        return sum(total.values()) + sum(packed)
