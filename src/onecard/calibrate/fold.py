"""Scaling a site's inputs, undone in what makes them: the network stays the same function.

For a site that reads x and linears W, any s > 0 gives W x = (W diag(s)) (x / s), and x / s costs nothing
where x comes out of a norm's weight, the rows of a linear, or both with a bias. Which module that is
tells core.spec.producer. Nothing may be lost by it, so s is what the producer can hold exactly:

    a norm       its new weight is rounded to the dtype it is stored in, and s is old / new
    a linear     s is a power of two: rows that are packed already only change the exponents of
                 their scales, and dense ones those of their weights

Values feed one channel of each head in their group, so s is per channel of the producer and `source`
says which of them an input channel is a copy of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onecard.core.format import Weight
from onecard.core.spec import Producer
from onecard.kernels.reference import DTYPES
from onecard.nn.layers import Linear, Normalize


def source_of(producer: Producer, columns: int) -> Tensor:
    """[in]: the channel of the producer that an input channel is a copy of."""
    if producer.repeat == 1:
        return torch.arange(columns)
    heads = columns // producer.head_dim // producer.repeat
    rows = torch.arange(heads * producer.head_dim).view(heads, 1, producer.head_dim)
    return rows.expand(-1, producer.repeat, -1).flatten()


def divisible(module: nn.Module) -> bool:
    """Whether a producer's channels can be divided as it is held now."""
    if isinstance(module, Linear):
        part = module.held().parts.get("weight" if module.format.dense else "weight_scale")
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return part is not None and part.dtype in floats and part.shape[0] == module.shape[0]
    return isinstance(module, Normalize)


def exact(module: nn.Module, s: Tensor, stored: str) -> Tensor:
    """The divisors next to s [channels] that the producer can hold exactly."""
    if isinstance(module, Linear):
        return torch.exp2(torch.round(torch.log2(s)))
    assert isinstance(module, Normalize)
    whole = module.weight.float() + module.norm.offset
    new = _stored(whole / s - module.norm.offset, stored, module.weight.dtype).float()
    new += module.norm.offset
    return torch.where((new != 0) & (whole != 0), whole / new, s)


def divide(module: nn.Module, s: Tensor, stored: str) -> None:
    """Divide a producer's channels by s [channels], which `exact` gave."""
    if isinstance(module, Normalize):
        offset, kind = module.norm.offset, module.weight.dtype
        new = _stored((module.weight.float() + offset) / s - offset, stored, kind)
        module.weight = nn.Parameter(new, requires_grad=False)
    elif isinstance(module, Linear):
        module.replace(_rows_divided(module.held(), s))
    bias = getattr(module, "bias", None)
    if bias is not None:
        new = _stored(bias.float() / s, stored, bias.dtype)
        module.bias = nn.Parameter(new, requires_grad=False)


def _rows_divided(weight: Weight, s: Tensor) -> Weight:
    """Rows of a Weight divided by s [out]: of its scales, when it is packed."""
    name = "weight" if weight.format.dense else "weight_scale"
    part = weight.parts[name]
    parts = {**weight.parts, name: (part.float() / s[:, None]).to(part.dtype)}
    return Weight(weight.format, weight.shape, parts)


def _stored(values: Tensor, stored: str, kind: torch.dtype) -> Tensor:
    return values.to(DTYPES[stored]).to(kind)
