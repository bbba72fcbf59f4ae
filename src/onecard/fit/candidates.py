"""What is tried: formats by name for each effort, and which of them can hold a site's matrices.

`tokens` and `length` are what statistics are collected on; harms are measured on the first `tried` of them.
`anchors` are bits per weight: the candidate nearest to each is measured in the answers, the others follow
from their errors at the site itself (sensitivity.py). `together`: blocks that one stream
disturbs as a whole; 0: each site has streams of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onecard.core.errors import BadRequest
from onecard.core.format import Dense, Format, Shape, parse_format
from onecard.passes.planned import Rounding

INTEGERS = (
    "int2-g32-zp", "int2-g64-zp", "int2-g128-zp", "int3-g32", "int3-g64", "int3-g128", "int3-g64-zp",
    "int4-g32", "int4-g64", "int4-g128", "int5-g64", "int5-g128", "int6-g128", "int8-g128",
)  # fmt: skip
CODEBOOKS = ("codebook2", "codebook2-row", "codebook8x4", "codebook3", "codebook3-row", "codebook4")
MORE = (
    "int2-g32", "int2-g64", "int2-row", "int3-row", "int3-g128-zp", "int3-g32-zp", "int4-g64-zp", "int4-row",
    "int4-g32-zp", "int5-g32", "int6-g64", "int8-row", "codebook6x2", "codebook8x2",
    "codebook4-row", "codebook5", "codebook6", "sparse0.5(int4-g64)", "sparse0.3(int3-g64)",
    "lowrank16(int8-row)+int2-g64", "lowrank16(int8-row)+int3-g64", "nf4-g64",
)  # fmt: skip
FINE = ("int6-g32", "int7-g128", "int7-g32")
TABLES = ("int3-g32", "int4-g32", "int4-g64", "int5-g64", "int6-g64", "int6-g128", "int8-g128")
CACHES = ("fp16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class Trial:
    """How much is tried."""

    tokens: int
    length: int
    tried: int
    anchors: tuple[float, ...]
    together: int
    rounding: Rounding
    formats: tuple[str, ...]
    rounds: int  # of measuring again around the plan
    uncertainty: float  # the quality is promised within this factor of its KL
    tables: tuple[str, ...] = TABLES
    left_out: bool = True  # whether every block is left out once, too


TRIALS = {
    "quick": Trial(8192, 256, 512, (3.25,), 1, "nearest", INTEGERS, 0, 2.0),
    "normal": Trial(16384, 256, 1024, (2.2, 3.2, 4.2), 0, "gptq", INTEGERS + CODEBOOKS + FINE, 1, 1.5),
    "thorough": Trial(32768, 512, 4096, (2.0, 2.25, 2.6, 3.1, 3.6, 4.2, 5.2), 0, "gptq",
                      INTEGERS + CODEBOOKS + FINE + MORE, 3, 1.3),
}  # fmt: skip


LARGE = 150_000_000
"""Parameters from which quick effort tries less, so that it stays quick."""
QUICK_LARGE = Trial(
    1024, 256, 256, (3.25,), 2, "nearest",
    ("int2-g32-zp", "int2-g64-zp", "int3-g32", "int3-g64", "int3-g128", "int4-g32", "int4-g64", "int4-g128",
     "int6-g128", "int8-g128"), 0, 2.0, ("int4-g32", "int6-g64", "int8-g128"), False,
)  # fmt: skip


def trial_of(effort: str, parameters: int) -> Trial:
    """How much is tried of a model of a size."""
    return QUICK_LARGE if effort == "quick" and parameters > LARGE else TRIALS[effort]


def possible(names: Iterable[str], shapes: Sequence[Shape], stored: str) -> dict[str, Format]:
    """name -> format of those that hold all `shapes` in less than the dense matrices, and the dense one.

    Groups that do not divide the rows become the largest that do; what becomes the same counts once.
    """
    dense = sum(Dense(stored).bytes(shape) for shape in shapes)
    found: dict[str, Format] = {}
    for name in names:
        format = parse_format(name).for_row(shapes[0][1])
        try:
            size = size_of(format, shapes, stored)
        except BadRequest:
            continue
        if size < dense:
            found.setdefault(format.name, format)
    return found | {stored: Dense(stored)}


def size_of(format: Format, shapes: Sequence[Shape], stored: str) -> int:
    """Exact bytes of matrices in a format, scales in the dtype of the model."""
    return sum(format.scaled(stored).bytes(shape) for shape in shapes)
