"""Pruned matrices are stored without their zeros, where that is smaller.

While a block is worked on, its matrices are plain: passes see zeros, calibration multiplies what it is
used to. `opened` makes them so when a block comes, and says which were sparse; `closed` stores them
when it goes: the weights that are not zero as they are held by then (the numbers, or integers that a
quantizer of the same stage made), and a bit for each weight that says where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from onecard.core.format import Dense, Format, Integers, Sparse
from onecard.core.report import Row
from onecard.core.spec import sites
from onecard.kernels import reference, storage
from onecard.nn.layers import Linear
from onecard.nn.transformer import Block
from onecard.passes.base import BlockPass, zeros_of

Patterns = Mapping[str, str | None]
"""Paths of linears that are to be stored sparse, and the pattern of each."""


@dataclass
class Keeper:
    """What a walk does to blocks that come and go; `stage` are the passes between."""

    stage: Sequence[BlockPass]
    stored: str

    def __post_init__(self) -> None:
        self.found: dict[int, Patterns] = {}

    def opened(self, block: Block, dtype: torch.dtype | None = None) -> None:
        """Sparse matrices of a block become plain ones, in `dtype` or in the one they are stored in."""
        found: dict[str, str | None] = {}
        zeros = zeros_of(self.stage)
        if zeros is not None:
            found = {name: zeros.pattern for site in sites(block.layer) for name in site.linears}
        for site in sites(block.layer):
            for name in site.linears:
                linear = block.linear(name)
                if isinstance(linear.format, Sparse):
                    found.setdefault(name, linear.format.pattern)
                    own = reference.DTYPES[linear.format.inner.dense or self.stored]
                    linear.replace(reference.from_dense(linear.matrix(dtype or own)))
        self.found[block.index] = found

    def closed(self, block: Block, rows: list[Row]) -> None:
        """What is to be sparse is stored so; a `format` row says it."""
        for name, pattern in self.found.pop(block.index, {}).items():
            linear = block.linear(name)
            format = without_zeros(linear, pattern, self.stored)
            if format is not None:
                rows.append(Row(f"blocks.{block.index}.{name}", "format", format.name))


def without_zeros(linear: Linear, pattern: str | None, stored: str) -> Format | None:
    """Store a linear without its zeros. None, and nothing done, where that is no smaller."""
    held = linear.held()
    if isinstance(held.format, Integers) and not held.format.zero_point:
        codes = reference.unpack(held.parts["weight_packed"], held.format.bits, held.shape[1])
        zero = codes == 0
        format = storage.sparse_format(zero, held.format, pattern)
        if format.bytes(held.shape) >= held.format.bytes(held.shape):
            return None
        scale = held.parts["weight_scale"]
        linear.replace(storage.hold_sparse_integers(codes, scale, zero, held.format, pattern))
    elif held.format.dense:
        dtype = reference.DTYPES[stored]
        w = held.parts["weight"].to(dtype)
        format = storage.sparse_format(w == 0, Dense(stored), pattern)
        if format.bytes(held.shape) >= Dense(stored).bytes(held.shape):
            return None
        linear.replace(storage.hold_sparse(w, dtype, pattern))
    else:
        return None
    return linear.format
