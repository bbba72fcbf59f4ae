"""Schemes: the format that a linear's weights are held in, and how it rounds what it reads.

    int8-token    x = q * s,  q = round(x / s) in -127..127,  s = max|x| / 127 of each token as it comes
    int8-static   the same with one s for all tokens, found beforehand: `input_scale` [1]
    fp8-token     q = e4m3(x / s),  s = max|x| / 448 of each token
    fp8-static    the same with one s for all tokens

So W8A8 is `int8-row` with `int8-token`. -128 is left out: products of integers are the same without
it, and a scale that covers the largest input never asks for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from onecard.core.errors import BadRequest, nearest
from onecard.core.format import DTYPE_BYTES, Format, Integers, Parts, Shape

INPUTS = ("int8-token", "int8-static", "fp8-token", "fp8-static")


@dataclass(frozen=True)
class Inputs:
    """How inputs are rounded: to integers or floats of 8 bits, with a scale per token or a stored one."""

    kind: Literal["int8", "fp8"]
    static: bool = False

    @property
    def name(self) -> str:
        """As `parse_inputs` reads it."""
        return f"{self.kind}-{'static' if self.static else 'token'}"

    @property
    def top(self) -> int:
        """The largest number of the grid: a scale is the largest input over this."""
        return 127 if self.kind == "int8" else 448


def parse_inputs(name: str) -> Inputs:
    """The rounding of a name. BadRequest for any other text."""
    if name not in INPUTS:
        raise BadRequest(f"there is no rounding of inputs {name[:80]!r}", do=nearest(name, INPUTS))
    kind, _, scale = name.partition("-")
    return Inputs("int8" if kind == "int8" else "fp8", scale == "static")


@dataclass(frozen=True)
class Scheme:
    """What a folder says of a linear."""

    format: Format
    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        return self.format.name + (f" {self.inputs.name}" if self.inputs else "")

    @property
    def bytewise(self) -> bool:
        """Integers of 8 bits beside rounded inputs are stored as int8 bytes, as others read them."""
        f = self.format
        return (
            self.inputs is not None and isinstance(f, Integers) and f.bits == 8 and not f.zero_point
        )

    def parts(self, shape: Shape, scale: str) -> Parts:
        """name -> (dtype, shape) of all that is stored of a linear but its bias; `scale` is the model's."""
        parts = byte_parts(self.format, shape) if self.bytewise else self.format.parts(shape)
        static = self.inputs is not None and self.inputs.static
        return parts | ({"input_scale": (scale, (1,))} if static else {})

    def bytes(self, shape: Shape, scale: str) -> int:
        """Exact bytes of them."""
        own = self.parts(shape, scale).values()
        return sum(DTYPE_BYTES[dtype] * math.prod(sizes) for dtype, sizes in own)


def byte_parts(format: Format, shape: Shape) -> Parts:
    """The parts of symmetric integers, a byte each: compressed-tensors' int-quantized layout."""
    return {"weight": ("int8", shape), "weight_scale": format.parts(shape)["weight_scale"]}
