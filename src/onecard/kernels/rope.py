"""Inverse frequencies of rotary positions, in NumPy's float32; the reference has them in torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from onecard.core.spec import Rope

Floats = NDArray[np.float32]


def frequencies(rope: Rope, length: int, max_context: int) -> tuple[Floats, float]:
    """Inverse frequencies [dims / 2] and the scale on cos and sin, for contexts of `length`.

    The kinds are those of `kernels/reference.py`'s rope_frequencies.
    """
    exponent = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    inverse: Floats = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    factor = rope.factor("factor") or 1.0
    context = rope.original_context or max_context
    scale = 1.0
    match rope.kind:
        case "default":
            pass
        case "linear":
            inverse = inverse / np.float32(factor)
        case "dynamic":
            stretch = factor * max(length, max_context) / max_context - (factor - 1)
            theta = rope.theta * stretch ** (rope.dims / (rope.dims - 2))
            inverse = np.float32(1.0) / np.float32(theta) ** exponent
        case "llama3":
            low, high = rope.factor("low_freq_factor"), rope.factor("high_freq_factor")
            smooth = ((context * inverse / (2 * math.pi) - low) / (high - low)).clip(0, 1)
            inverse = inverse * (smooth + (1 - smooth) / factor)
        case "yarn":
            inverse, scale = _yarn(rope, inverse, factor, context)
        case "longrope":
            kind = "long_factor" if length > context else "short_factor"
            stretched: Floats = np.array(rope.factor(kind), np.float32)
            inverse = inverse / stretched
            factor = rope.factor("factor") or max_context / context
            given = rope.factor("attention_factor")
            grown = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
            scale = grown if given is None else given
        case _:
            raise ValueError(f"unknown rope kind {rope.kind!r}")
    return np.ascontiguousarray(inverse, np.float32), scale


def _yarn(rope: Rope, inverse: Floats, factor: float, context: int) -> tuple[Floats, float]:
    def dim_of(rotations: float) -> float:
        turns = context / (rotations * 2 * math.pi)
        return rope.dims * math.log(turns) / (2 * math.log(rope.theta))

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dim_of(rope.factor("beta_fast") or 32), dim_of(rope.factor("beta_slow") or 1)
    if rope.factor("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    ramp = (np.arange(rope.dims // 2, dtype=np.float32) - np.float32(low)) / max(high - low, 0.001)
    keep = 1 - ramp.clip(0, 1)
    scale = rope.factor("attention_factor")
    if scale is None:
        m, m_all = rope.factor("mscale"), rope.factor("mscale_all_dim")
        scale = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)
    return (inverse / np.float32(factor) * (1 - keep) + inverse * keep).astype(np.float32), scale
