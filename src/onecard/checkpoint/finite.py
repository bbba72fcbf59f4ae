"""Whether stored numbers are finite, seen from their bits. No torch.

A float is infinite or NaN when all bits of its exponent are set, so among the patterns without their
sign the largest one tells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.shards import Bytes, Checkpoint, copy_range
from onecard.core.errors import BadRequest

INFINITY: dict[str, tuple[Any, int]] = {
    "bf16": (np.uint16, 0x7F80), "fp16": (np.uint16, 0x7C00), "fp32": (np.uint32, 0x7F80_0000),
    "fp64": (np.uint64, 0x7FF0_0000_0000_0000), "fp8": (np.uint8, 0x7F),
}  # fmt: skip
"""dtype -> what its bits are read as, and the pattern of infinity; integers have none."""


def is_finite(dtype: str, data: Bytes) -> bool:
    """Neither NaN nor infinite anywhere."""
    if dtype not in INFINITY or not data.size:
        return True
    kind, infinity = INFINITY[dtype]
    return bool(_magnitudes(kind, data).max() < infinity)


def not_finite(dtype: str, data: Bytes) -> NDArray[np.bool_]:
    """Which numbers are NaN or infinite, of a dtype of floats."""
    kind, infinity = INFINITY[dtype]
    return np.asarray(_magnitudes(kind, data) >= infinity)


def _magnitudes(kind: Any, data: Bytes) -> NDArray[Any]:
    """The patterns without their signs."""
    return data.view(kind) & kind(np.iinfo(kind).max >> 1)


def count_not_finite(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers of a tensor of floats are NaN or infinite."""
    entry = checkpoint.entries[name]
    return sum(int(not_finite(entry.dtype, piece).sum()) for piece in copy_range(entry))


def damaged(name: str, count: int) -> BadRequest:
    """The error about a tensor with `count` such numbers."""
    return BadRequest(
        f"{name} holds {count} values that are NaN or infinite",
        do="the checkpoint is damaged or was trained into overflow: fetch it again",
    )
