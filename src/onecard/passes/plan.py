"""A job before it starts: settings, what it will take, and what its result is made of.

A result is written in parts: the stem, a part per block, the tail. What is not changed is copied, byte
by byte, and looked through for NaN on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onecard import __version__
from onecard.calibrate.data import Calibration, digest
from onecard.checkpoint.finite import count_not_finite, damaged, is_finite
from onecard.checkpoint.journal import Journal, fingerprint
from onecard.checkpoint.save import SINGLE_FILE
from onecard.checkpoint.shards import Array, Bytes
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.format import Format, Sparse, parse_format
from onecard.core.report import Row
from onecard.core.scheme import Scheme, parse_inputs
from onecard.core.settings import format_size
from onecard.passes.base import Recipe

if TYPE_CHECKING:
    from torch import Tensor

SMALL_FILES = 4 << 20


@dataclass(frozen=True)
class Settings:
    """How to go about it. `dtype` is what blocks are run in while calibrating."""

    calibration: Calibration = field(default_factory=Calibration)
    data: Path | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    memory: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Plan:
    """What a job will take, known before it starts. Bytes and seconds.

    `dtype` is what blocks are run in. So does the number of `threads` decide the result where they are:
    the native kernels give the same bits for any, but torch's matrix products cut their sums by it (the
    shipped model by gptq-int4 differs between one thread and two). It is 0 where none is run. `replay`
    and `in_memory` say of every stage whether its walk re-runs blocks, and whether it holds the model.
    """

    peak: int
    disk: int
    output: int
    seconds: float
    dtype: str
    replay: tuple[bool, ...] = ()
    in_memory: tuple[bool, ...] = ()
    threads: int = 0

    def rows(self) -> tuple[Row, ...]:
        found = [
            Row("plan", "planned_peak_bytes", self.peak, "B"),
            Row("plan", "disk_bytes", self.disk, "B"),
            Row("plan", "output_bytes", self.output, "B"),
            Row("plan", "seconds", round(self.seconds, 1), "s"),
        ]
        whole = [number + 1 for number, here in enumerate(self.in_memory) if here]
        if whole:
            stages = ", ".join(map(str, whole))
            found.append(Row("plan", "in_memory", f"the whole model, in stage {stages}"))
        return tuple(found)


@dataclass(frozen=True)
class Prepared:
    """A job that was checked: everything it needs, nothing done yet."""

    source: Source
    out: Path
    recipe: Recipe
    settings: Settings
    ids: Tensor | None
    plan: Plan

    def key(self) -> dict[str, Any]:
        """What decides the result: another key is another job."""
        return {
            "onecard": __version__,
            "source": fingerprint(self.source.checkpoint),
            "config": self.source.config,
            "recipe": self.recipe.settings(),
            "calibration": digest(self.ids),
            "dtype": self.plan.dtype,
            "threads": self.plan.threads,
        }


def disk_bytes(output: int, state: int = 0) -> int:
    """The most that lies on the disk at once; `state` is what a block hands to the next."""
    copies = 2 if output <= SINGLE_FILE else 1  # parts are joined while they are still there
    return copies * output + 2 * state + SMALL_FILES


class BeyondCap(BadRequest):
    """A job needs more memory than it may take."""


def beyond_cap(
    source: Source, recipe: Recipe, cap: int, least: int, base: int, do: str = "raise --memory",
    where: str = "",
) -> BadRequest:  # fmt: skip
    """The error about a memory cap that cannot be kept; `base` is what the process takes already."""
    return BeyondCap(
        f"{recipe.name} on {source.called} does not fit into {format_size(cap)}",
        f"the smallest cap that works is {format_size(least)}"
        f" ({format_size(base)} of it is the running process)" + (f"; {where}" if where else ""),
        do,
    )


@dataclass(frozen=True)
class Made:
    """What lies in a journal when it is full: the layout it was written in, the schemes of packed
    modules by stored name, what was measured, whether fused matrices lie in parts.
    """

    source: Source
    schemes: Mapping[str, Scheme]
    rows: list[Row]
    split: bool = False


def made_of(
    source: Source, journal: Journal, split: bool = False, held: Mapping[str, Scheme] | None = None
) -> Made:
    """What was noted with every part of a model that kept its layout; `held` was packed before."""
    parts = ("stem", *(part_name(i) for i in range(source.spec.num_layers)), "tail")
    rows = [Row(*row) for part in parts for row in journal.rows(part)]
    return Made(source, {**(held or {}), **output_schemes(source, rows, split)}, rows, split)


def output_schemes(source: Source, rows: list[Row], split: bool) -> dict[str, Scheme]:
    """stored name -> Scheme, from the `format` and `inputs` rows of the blocks."""
    named = {row.where: parse_format(str(row.value)) for row in rows if row.what == "format"}
    fed = {row.where: parse_inputs(str(row.value)) for row in rows if row.what == "inputs"}
    schemes = {}
    for index in range(source.spec.num_layers):
        for place in source.places(index, split):
            path = f"blocks.{index}.{place.path}"
            if path in named:
                schemes[place.stored.name] = Scheme(named[path], fed.get(path))
    return schemes


def quantized(format: Format) -> bool:
    """Whether a matrix is held in anything but its numbers; some of them may be left out as zeros."""
    inner = format.inner if isinstance(format, Sparse) else format
    return inner.dense is None


# Parts --------------------------------------------------------------------------------------------


def part_name(index: int) -> str:
    return f"block-{index:05d}"


def outer_arrays(source: Source, part: str) -> dict[str, Array]:
    """The stem or the tail, as the source has it."""
    modules = {p.stored.name for p in source.places(None) if p.path.startswith(f"{part}.")}
    if part == "tail" and source.spec.tied:
        modules.discard(source.name(source.family.outer["stem.embedding"].name))
    names = (n for n in source.checkpoint.entries if n.rpartition(".")[0] in modules)
    return {name: copied(source, name) for name in names}


def copied(source: Source, name: str) -> Array:
    """A tensor that is copied. BadRequest, when its bytes are taken, where one is NaN or infinite."""
    entry = source.checkpoint.entries[name]

    def pieces() -> Iterator[Bytes]:
        for piece in source.checkpoint.pieces(name):
            if not is_finite(entry.dtype, piece):
                raise damaged(name, count_not_finite(source.checkpoint, name))
            yield piece

    return entry.dtype, entry.shape, pieces()
