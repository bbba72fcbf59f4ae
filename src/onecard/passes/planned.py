"""A plan carried out: each site in the format that was chosen for it, by the pass that makes that format.

    integers            GPTQ                          ternary, nf4 ...   GPTQ on levels
    codebook            k-means codebook              sparse(integers)   SparseGPT, then GPTQ
    lowrank + integers  low rank plus a remainder     dense              left as it is

`how: nearest` rounds integers instead of solving for them, and needs no statistics where all are
integers. What a site costs and what it does to the answers was measured before (onecard.fit); here it is
only done, so that such a job is streamed, journaled and resumed like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from onecard.calibrate.walk import Reached
from onecard.core.errors import BadRequest, nearest
from onecard.core.format import (
    Codebook,
    Dense,
    Format,
    Integers,
    Levels,
    LowRank,
    Shape,
    Sparse,
    parse_format,
)
from onecard.core.report import Row
from onecard.core.spec import Spec, linear_shapes, sites
from onecard.passes.base import BlockPass
from onecard.passes.codebook import Cluster
from onecard.passes.gptq import GPTQ
from onecard.passes.gptq_levels import GPTQLevels
from onecard.passes.quantize import RoundToNearest
from onecard.passes.remainder import LowRankPlus
from onecard.passes.sparse import without_zeros
from onecard.passes.sparsegpt import SparseGPT

Rounding = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Chosen:
    """A site, `blocks.3.attention.in`, and the name of its format."""

    site: str
    format: str


@dataclass(frozen=True)
class Planned(BlockPass):
    """Settings: the format of every site; how integers are rounded; GPTQ's `sweeps` and `correct`."""

    choices: tuple[Chosen, ...]
    how: Rounding = "gptq"
    sweeps: int = 0
    correct: float = 0.0

    key: ClassVar[str] = "planned"
    title: ClassVar[str] = "planned formats"
    paper: ClassVar[str] = (
        "Kellerer et al., Knapsack Problems, chapter 11; and those of its formats"
    )

    def __post_init__(self) -> None:
        for format in self.formats:
            makers(format, self.how, self.sweeps, self.correct)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Those that occur."""
        return tuple(parse_format(name) for name in sorted({c.format for c in self.choices}))

    @property
    def needs(self) -> frozenset[str]:
        makes = (makers(f, self.how, self.sweeps, self.correct) for f in self.formats)
        return frozenset().union(*(p.needs for passes in makes for p in passes))

    def format_of(self, columns: int) -> Format | None:
        """The largest for such a row; one that is not of integers first, as it decides on layouts."""
        packed = [f for f in self.formats if f.dense is None]
        other = [f for f in packed if not isinstance(f, Integers)]
        found = [f for f in other or packed if _fits(f, (columns, columns))]
        return max(found or packed, key=lambda f: _bytes(f, (columns, columns)), default=None)

    def format_for(self, shape: Shape) -> Format | None:
        """The largest that occurs, dense ones too: what a matrix of `shape` can come to."""
        fitting = [f for f in self.formats if _fits(f, shape)]
        largest = max(fitting, key=lambda f: f.bytes(shape), default=None)
        return None if largest is None or largest.dense else largest

    def foretold(self, spec: Spec) -> Sequence[Mapping[str, Format | None]]:
        index = _index(self.choices)
        return [
            {
                name: parse_format(index[f"blocks.{number}.{site.name}"])
                for site in sites(layer)
                for name in site.linears
            }
            for number, layer in enumerate(spec.layers)
        ]

    def check(self, spec: Spec) -> None:
        known = {
            f"blocks.{i}.{site.name}": [linear_shapes(spec, layer)[name] for name in site.linears]
            for i, layer in enumerate(spec.layers)
            for site in sites(layer)
        }
        for chosen in self.choices:
            if chosen.site not in known:
                raise BadRequest(f"the plan names {chosen.site!r}, which the model has not",
                                 do=nearest(chosen.site, known))  # fmt: skip
            for shape in known.pop(chosen.site):
                try:
                    parse_format(chosen.format).bytes(shape)
                except BadRequest as error:
                    raise BadRequest(f"{chosen.site}: {error.what}", do=error.do) from error
        if known:
            raise BadRequest(
                f"the plan says nothing of {next(iter(known))}",
                f"{len(known)} such sites",
                "name a format for each; bf16 leaves it as it is",
            )

    def site_bytes(self, rows: int, columns: int) -> int:
        makes = [makers(f, self.how, self.sweeps, self.correct) for f in self.formats]
        return max((p.site_bytes(rows, columns) for passes in makes for p in passes), default=0)

    def site(self, site: Reached) -> Iterator[Row]:
        name = _index(self.choices)[f"{site.block}.{site.name}"]
        yield from carry_out(site, parse_format(name), self.how, self.sweeps, self.correct)


@lru_cache(maxsize=8)
def _index(choices: tuple[Chosen, ...]) -> dict[str, str]:
    return {chosen.site: chosen.format for chosen in choices}


def _fits(format: Format, shape: Shape) -> bool:
    try:
        format.bytes(shape)
    except BadRequest:
        return False
    return True


def _bytes(format: Format, shape: Shape) -> int:
    return format.bytes(shape) if _fits(format, shape) else 0


def carry_out(
    site: Reached, format: Format, rounding: Rounding = "gptq", sweeps: int = 0, correct: float = 0.0
) -> Iterator[Row]:  # fmt: skip
    """Bring the linears of a site into a format."""
    for p in makers(format, rounding, sweeps, correct):
        rows = p.site(site)
        yield from (
            row for row in rows if not (isinstance(format, Sparse) and row.what == "format")
        )
    if isinstance(format, Sparse):
        for name, linear in site.linears.items():
            made = without_zeros(linear, format.pattern, site.stored) or linear.format
            yield Row(f"{site.block}.{name}", "format", made.name)


@lru_cache(maxsize=256)
def makers(
    format: Format, rounding: Rounding = "gptq", sweeps: int = 0, correct: float = 0.0
) -> Sequence[BlockPass]:
    """The passes that bring a matrix into a format, in order. BadRequest where none does."""
    if isinstance(format, Dense):
        return ()
    if isinstance(format, Integers):
        if rounding == "nearest":
            return (RoundToNearest(format.bits, format.group, format.zero_point),)
        return (GPTQ(format.bits, format.group, format.zero_point, sweeps=sweeps, correct=correct),)
    if isinstance(format, Codebook):
        return (Cluster(format.bits, format.vector, "row" if format.per_row else "matrix"),)
    if isinstance(format, Levels):
        return (GPTQLevels(format.table, format.group, correct=correct),)
    if isinstance(format, Sparse) and isinstance(format.inner, Integers):
        prune = SparseGPT(format.share, format.pattern, stored="dense")
        return (prune, GPTQ(format.inner.bits, format.inner.group, sweeps=sweeps))
    if isinstance(format, LowRank) and isinstance(format.rest, Integers):
        inner = format.factors
        bits = inner.bits if isinstance(inner, Integers) else None
        made = LowRankPlus(
            format.rank, factor_bits=bits, bits=format.rest.bits, group=format.rest.group
        )
        if made.format_of(128) == format:
            return (made,)
    raise BadRequest(f"no pass plans matrices in {format.name}",
                     do="integers, codebooks, levels, sparse integers, lowrank + integers")  # fmt: skip
