"""Pass and Recipe: frozen settings and one method; an ordered tuple of passes.

A `BlockPass` sees one site of one block at a time (all linears that read one input, with its
statistics) and may be streamed. Neighbouring BlockPasses share one walk: at a site they act in order
on the same statistics, which stay true because a site's inputs do not depend on its own weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from onecard.checkpoint.packed import must_split
from onecard.core.errors import BadRequest
from onecard.core.format import Dense, Format, Integers
from onecard.core.report import Row
from onecard.core.spec import LayerSpec, Spec, linear_shapes, sites

if TYPE_CHECKING:
    from onecard.calibrate.walk import Reached


class BlockPass(ABC):
    """One idea applied site by site. `key` names it in recipe files, `title` and `paper` in reports."""

    key: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Which statistics of a site's inputs it uses (names of calibrate.stats)."""

    @abstractmethod
    def site(self, site: Reached) -> Iterator[Row]:
        """Replace the weights of a site's linears; yield what was measured."""

    @abstractmethod
    def format_of(self, columns: int) -> Format | None:
        """The format it leaves a matrix of `columns` inputs in; None keeps what it found."""

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise BadRequest when the settings do not suit a model."""

    def site_bytes(self, rows: int, columns: int) -> int:
        """Bytes it holds while it works on a site of linears [rows, columns] in all."""
        return 3 * 4 * rows * columns


@dataclass(frozen=True)
class Recipe:
    """An ordered tuple of passes with a name and a line on what it is good for."""

    name: str
    passes: tuple[BlockPass, ...]
    good_for: str = ""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(p.needs for p in self.passes))

    def check(self, spec: Spec) -> None:
        """Order conflicts and settings that do not suit the model, before any work."""
        if not self.passes:
            raise BadRequest(f"the recipe {self.name} has no passes")
        quantizers = [i for i, p in enumerate(self.passes) if p.format_of(128) is not None]
        if len(quantizers) > 1:
            raise BadRequest(
                f"the recipe {self.name} quantizes twice",
                seen=", ".join(self.passes[i].title for i in quantizers), do="keep one of them",
            )  # fmt: skip
        if quantizers and quantizers[0] != len(self.passes) - 1:
            later = self.passes[quantizers[0] + 1].title
            raise BadRequest(
                f"the recipe {self.name} changes weights after quantizing them",
                f"{later} follows {self.passes[quantizers[0]].title}", f"put {later} first",
            )  # fmt: skip
        for p in self.passes:
            p.check(spec)

    @property
    def splits(self) -> bool:
        """Whether fused matrices end up in parts (checkpoint.packed)."""
        return must_split([p.format_of(128) for p in self.passes])

    def output_format(self, columns: int) -> Format | None:
        """The format that linears with `columns` inputs end in."""
        formats = [p.format_of(columns) for p in self.passes]
        return next((format for format in reversed(formats) if format), None)

    def output_bytes(self, spec: Spec, layer: LayerSpec, stored: str) -> int:
        """Exact bytes of a block's linears after the recipe of a model stored in the dtype `stored`."""
        shapes = linear_shapes(spec, layer)
        touched = {name for site in sites(layer) for name in site.linears}
        total = 0
        for name, shape in shapes.items():
            format = self.output_format(shape[1]) if name in touched else None
            total += (format or Dense(stored)).scaled(stored).bytes(shape)
        return total

    def settings(self) -> list[dict[str, Any]]:
        """The passes and their settings as plain data, as a recipe file has them."""
        return [{p.key: asdict(p)} for p in self.passes]  # type: ignore[call-overload]


def check_groups(format: Integers, spec: Spec, explicit: bool) -> None:
    """The group size divides every row that will be quantized."""
    if not explicit:
        return
    for layer in set(spec.layers):
        for name, shape in linear_shapes(spec, layer).items():
            try:
                format.groups(shape)
            except BadRequest as error:
                raise BadRequest(f"{name}: {error.what}", do=error.do) from error
