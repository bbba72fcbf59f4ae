"""Every operator in plain PyTorch: the oracle of the fast kernels, the fallback, the documentation.

Shapes: B batch, T new tokens, S tokens seen so far, H heads, G key/value heads, D head size,
[out, in] a matrix. Integer weights follow the layout told in core/format.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.core.format import Dense, Integers, Weight, words
from onecard.core.scheme import Inputs
from onecard.core.spec import Norm, Rope

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn, "int64": torch.int64, "int32": torch.int32, "int16": torch.int16,
    "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


# Integer grids ---------------------------------------------------------------------------------


def grid(w: Tensor, format: Integers) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32 [rows, groups]) that cover w [rows, groups, size].

    Symmetric: scale = max|w| / (2**bits - 1) * 2, so that 4 bits reach -8..7 (the convention of
    compressed-tensors); else the range always contains zero, which therefore has an exact code.
    The scale is rounded to its stored dtype before anything is divided by it.
    """
    low, high = format.levels
    w = w.float()
    if format.zero_point:
        least, most = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = _stored((most - least) / float(high - low), format)
        return scale, torch.round(low - least / scale).clamp(low, high)
    scale = _stored(w.abs().amax(-1) / ((high - low) / 2), format)
    return scale, torch.zeros_like(scale)


def _stored(scale: Tensor, format: Integers) -> Tensor:
    """The scale as its dtype holds it; a group of zeros (or of float32 denormals) gets scale 1."""
    scale = scale.to(DTYPES[format.scale]).float()
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def encode(w: Tensor, scale: Tensor, zero: Tensor, format: Integers) -> Tensor:
    """Nearest codes (float32 integers) of w; scale and zero broadcast against it."""
    low, high = format.levels
    return (torch.round(w.float() / scale) + zero).clamp(low, high)


def decode(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of codes: (q - zero) * scale, float32."""
    return (q - zero) * scale


def grouped(w: Tensor, format: Integers) -> Tensor:
    """[rows, columns] -> [rows, groups, size]."""
    return w.unflatten(1, (format.groups((w.shape[0], w.shape[1])), -1))


# Packing ---------------------------------------------------------------------------------------


def pack(q: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] (any dtype, -2**(bits-1) ..) -> int32 [rows, ceil(n * bits / 32)].

    Value i takes bits [i * bits, (i + 1) * bits) of its row, low bits first; 32 values make
    exactly `bits` words, so rows are padded to 32 and cut afterwards.
    """
    rows, count = q.shape
    if 8 % bits == 0:  # the same layout, made of whole bytes
        lanes = F.pad((q.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), (0, -count % 32))
        out8 = lanes[:, :: 8 // bits].clone(memory_format=torch.contiguous_format)
        for lane in range(1, 8 // bits):
            out8 |= lanes[:, lane :: 8 // bits] << (lane * bits)
        return out8.view(torch.int32)[:, : words(count, bits)].contiguous()
    q = F.pad(q.to(torch.int64) + 2 ** (bits - 1), (0, -count % 32)).view(rows, -1, 32)
    out = q.new_zeros(rows, q.shape[1], bits)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        out[..., word] |= q[..., i] << shift
        if shift + bits > 32:
            out[..., word + 1] |= q[..., i] >> (32 - shift)
    out &= 0xFFFFFFFF
    out = torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
    return out.flatten(1)[:, : words(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> codes int8 [rows, count]; the inverse of `pack`."""
    rows = packed.shape[0]
    if 8 % bits == 0:
        bytes8 = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        lanes = [(bytes8 >> (lane * bits)) & (2**bits - 1) for lane in range(8 // bits)]
        q = torch.stack(lanes, -1).flatten(1)[:, :count]
        return (q.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    w = packed.to(torch.int64) & 0xFFFFFFFF
    w = F.pad(w, (0, -w.shape[1] % bits)).view(rows, -1, bits)
    out = torch.empty(rows, w.shape[1], 32, dtype=torch.int8, device=packed.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = w[..., word] >> shift
        if shift + bits > 32:
            value = value | (w[..., word + 1] << (32 - shift))
        out[..., i] = ((value & (2**bits - 1)) - 2 ** (bits - 1)).to(torch.int8)
    return out.flatten(1)[:, :count]


def hold(q: Tensor, scale: Tensor, zero: Tensor, format: Integers) -> Weight:
    """Codes [rows, columns], scale and zero point [rows, groups] -> the stored Weight."""
    shape = (q.shape[0], q.shape[1])
    parts = {
        "weight_packed": pack(q, format.bits),
        "weight_scale": scale.to(DTYPES[format.scale]),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if format.zero_point:
        parts["weight_zero_point"] = pack(zero.T, format.bits).T.contiguous()
    return Weight(format, shape, parts)


def codes(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """What a stored integer Weight holds: codes [rows, columns], scale and zero [rows, groups]."""
    format, (rows, columns) = weight.format, weight.shape
    assert isinstance(format, Integers)
    q = unpack(weight.parts["weight_packed"], format.bits, columns)
    scale = weight.parts["weight_scale"].float()
    zero = torch.zeros_like(scale)
    if format.zero_point:
        packed = weight.parts["weight_zero_point"].T.contiguous()
        zero = unpack(packed, format.bits, rows).T.float()
    return q, scale, zero


def to_dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in] that a Weight stands for."""
    if weight.format.dense:
        return weight.parts["weight"].to(dtype)
    q, scale, zero = codes(weight)
    assert isinstance(weight.format, Integers)
    w = decode(grouped(q.float(), weight.format), scale[..., None], zero[..., None])
    return w.flatten(1).to(dtype)


def from_dense(w: Tensor) -> Weight:
    """A dense Weight around a matrix, no copy."""
    return Weight(Dense(NAMES[w.dtype]), (w.shape[0], w.shape[1]), {"weight": w})


def round_to_nearest(w: Tensor, format: Integers) -> Weight:
    """w [out, in] rounded to the nearest grid points of a format."""
    blocks = grouped(w, format)
    scale, zero = grid(blocks, format)
    q = encode(blocks, scale[..., None], zero[..., None], format)
    return hold(q.flatten(1), scale, zero, format)


# Rounded inputs --------------------------------------------------------------------------------


def round_inputs(x: Tensor, inputs: Inputs, scale: Tensor | None = None) -> Tensor:
    """x [..., in] as 8 bits hold it, in x's dtype: per token (`scale` None), or on one stored scale [1].

    A token of zeros stays. The gradient goes straight through (arXiv 1308.3432).
    """
    wide = x.detach().float()
    if scale is None:
        most = wide.abs().amax(-1, keepdim=True)
        top = torch.full_like(most, inputs.top)  # a plain number over a tensor is rounded twice
        q, s = wide * torch.where(most > 2.0**-120, top / most, 0.0), most / inputs.top
    else:
        s = scale.float()
        q = wide / s
    q = q.clamp(-inputs.top, inputs.top)
    q = q.round() if inputs.kind == "int8" else q.to(torch.float8_e4m3fn).float()
    y = (q * s).to(x.dtype)
    return x + (y - x).detach() if x.requires_grad else y


def round_cache(x: Tensor, cache: str) -> Tensor:
    """Keys or values x [..., D] as a cache holds them, in x's dtype.

    int8 and fp8 have a scale per vector, as rounded inputs. int4 has one in bf16 for each 32 numbers, the
    one of the largest magnitude over -8: the grid from -8 to 7 holds that number itself.
    """
    if cache in ("fp16", "bf16"):
        return x.to(DTYPES[cache]).to(x.dtype)
    if cache in ("int8", "fp8"):
        return round_inputs(x, Inputs("int8" if cache == "int8" else "fp8"))
    assert cache == "int4", cache
    wide = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    most = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
    scale = (most * -0.125).bfloat16().float()
    q = (wide * torch.where(scale == 0, 0.0, 1 / scale)).round().clamp(-8, 7)
    return (q * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


# Norms, positions, attention -------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, spec: Norm) -> Tensor:
    """RMS or layer norm over the last axis, computed in float32, returned in x's dtype."""
    y = x.float()
    if spec.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + spec.eps)
    y = y * (weight.float() + spec.offset)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rope_frequencies(rope: Rope, length: int, max_context: int) -> tuple[Tensor, float]:
    """Inverse frequencies [dims / 2] and the scale on cos and sin, for contexts of `length`.

    Kinds: linear (position interpolation), dynamic (NTK, grows with length), yarn (arXiv
    2309.00071), longrope (arXiv 2402.13753), llama3 (by wavelength).
    """
    exponent = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    inverse = 1.0 / rope.theta**exponent
    factor = rope.factor("factor") or 1.0
    context = rope.original_context or max_context
    match rope.kind:
        case "default":
            return inverse, 1.0
        case "linear":
            return inverse / factor, 1.0
        case "dynamic":
            length = max(length, max_context)
            stretch = factor * length / max_context - (factor - 1)
            theta = rope.theta * stretch ** (rope.dims / (rope.dims - 2))
            return 1.0 / theta**exponent, 1.0
        case "llama3":
            low, high = rope.factor("low_freq_factor"), rope.factor("high_freq_factor")
            smooth = ((context * inverse / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            return inverse * (smooth + (1 - smooth) / factor), 1.0
        case "yarn":
            return _yarn(rope, inverse, factor, context)
        case "longrope":
            kind = "long_factor" if length > context else "short_factor"
            spread = torch.tensor(rope.factor(kind), dtype=torch.float32)
            factor = rope.factor("factor") or max_context / context
            scale = rope.factor("attention_factor")
            if scale is None:
                scale = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
            return inverse / spread, scale
    raise ValueError(f"unknown rope kind {rope.kind!r}")


def _yarn(rope: Rope, inverse: Tensor, factor: float, context: int) -> tuple[Tensor, float]:
    def dim_of(rotations: float) -> float:
        turns = context / (rotations * 2 * math.pi)
        return rope.dims * math.log(turns) / (2 * math.log(rope.theta))

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dim_of(rope.factor("beta_fast") or 32), dim_of(rope.factor("beta_slow") or 1)
    if rope.factor("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    ramp = (torch.arange(rope.dims // 2) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    scale = rope.factor("attention_factor")
    if scale is None:
        m, m_all = rope.factor("mscale"), rope.factor("mscale_all_dim")
        scale = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)
    return inverse / factor * (1 - keep) + inverse * keep, scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first dims of x [B, H, T, D]; cos, sin [B, 1, T, dims / 2]."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, x[..., 2 * half :]), -1) if 2 * half < x.shape[-1] else turned


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """q [B,H,T,D], k and v [B,G,S,D], mask bool [B,1,T,S] (None: causal with S = T) -> [B,H,T,D].

    A query that sees nothing (padding) gets zeros.
    """
    if soft_cap is None and mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], None, q.device)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return torch.nan_to_num(weights).to(v.dtype) @ v


def causal_mask(new: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, new, seen]: the last `new` of `seen` positions look back, at most `window`."""
    rows = torch.arange(seen - new, seen, device=device)[:, None]
    columns = torch.arange(seen, device=device)[None, :]
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    return visible[None, None]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
