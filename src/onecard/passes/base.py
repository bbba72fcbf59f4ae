"""Pass and Recipe: frozen settings and one method; an ordered chain of passes, cut into stages.

A `BlockPass` sees one site of one block at a time (all linears that read one input, with its
statistics) and may be streamed. Neighbouring BlockPasses share one walk: at a site they act in order
on the same statistics, which stay true because a site's inputs do not depend on its own weights.

A `ModelPass` needs the whole model: it takes one and gives one, perhaps of another Spec. It is a stage
of its own; one that only takes parts away, and can do so block by block, is a `Cut` (cut.py).

A pass may send a `Survey` ahead, a walk that changes nothing: what it found decides budgets before
the first weight goes. A pass with a survey begins a stage, because the survey has to see what the
passes before it left.

    prune, gptq              one walk
    drop_layers, gptq        [drop_layers] [gptq]
    prune, recover, prune    [prune] [recover] [prune]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from onecard.checkpoint.packed import must_split
from onecard.core.errors import BadRequest
from onecard.core.format import Dense, Format, Grouped, Integers, LowRank, Shape, Sparse
from onecard.core.report import Row
from onecard.core.scheme import Inputs, Scheme
from onecard.core.spec import LayerSpec, Spec, linear_shapes, sites

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.calibrate.walk import Progress, Reached, SitePass, Whole
    from onecard.nn.model import Model


class Survey(ABC):
    """What is looked at before a stage changes anything; its result is plain data, as JSON has it.

    `runs`: blocks are run, on inputs in which statistics named in `needs` are collected. `whole`: it
    looks at the model in memory instead, with `model`, and holds `whole_bytes` beside its weights.
    """

    needs: frozenset[str] = frozenset()
    runs: bool = False
    whole: bool = False

    def site(self, site: Reached) -> Iterator[Row]:
        """Look at a site; nothing is yielded and nothing changed."""
        yield from ()

    def finish(self, whole: Whole) -> Iterator[Row]:
        """Nothing: it asks for no original to compare with."""
        yield from ()

    def block(self, index: int, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Look at what block `index` made of its inputs [B, T, hidden]; empty where it was not run."""
        return None

    def model(self, model: Model, ids: Tensor, progress: Progress) -> None:
        """Look at a whole model, where it is `whole`."""
        return None

    def whole_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return 0

    @abstractmethod
    def result(self) -> Any:
        """What was found, once everything was seen."""


class Pass(ABC):
    """`key` names it in recipe files, `title` and `paper` in reports."""

    key: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    takes_packed: ClassVar[bool] = False
    """It may follow a pass that quantizes."""
    takes_sparse: ClassVar[bool] = True
    """It may follow a pass whose zeros are left out."""
    prunes: ClassVar[bool] = False
    """It sets single weights to zero."""

    @property
    def quantizes(self) -> bool:
        """It leaves matrices packed, which few passes can follow."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Weights that are zero stay so: what it leaves matrices in has a zero for each."""
        return True

    @property
    @abstractmethod
    def calibrated(self) -> bool:
        """It needs ids to learn from."""

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise BadRequest when the settings do not suit a model."""

    def follows(self, earlier: Sequence[Pass]) -> None:
        """Raise BadRequest where it cannot come after these passes, and say why."""
        sparse = next((p for p in earlier if p.zeros), None)
        if sparse is not None and not self.takes_sparse:
            raise BadRequest(
                "it changes matrices that are stored without their zeros",
                f"{self.title} follows {sparse.title}", f"put {self.title} first",
            )  # fmt: skip
        pruned = next((p for p in earlier if p.prunes), None)
        if pruned is not None and not self.keeps_zeros:
            raise BadRequest(
                "weights that were set to zero would not stay so",
                f"{self.title} follows {pruned.title}, and leaves no zero for each of them",
                "leave out one of them, or round to integers or to levels with a zero",
            )
        packed = next((p for p in earlier if p.quantizes), None)
        if packed is None or self.takes_packed:
            return
        if self.quantizes:
            raise BadRequest(
                "it quantizes twice", f"{packed.title}, {self.title}",
                f"put {self.title} first" if packed.takes_packed else "keep one of them",
            )  # fmt: skip
        raise BadRequest(
            "it changes weights after quantizing them", f"{self.title} follows {packed.title}",
            f"put {self.title} first",
        )  # fmt: skip

    def beside(self, spec: Spec, original: Spec) -> None:
        """Raise BadRequest where it cannot learn from the model before the recipe."""
        return None

    def reads(self, ids: Tensor) -> str:
        """What is to be said of the text [samples, length] it learns from, if anything; BadRequest where
        that will not do."""
        return ""

    def leaves(self, spec: Spec) -> Spec:
        """The Spec it leaves, as far as sizes go and settings tell."""
        return spec

    def format_for(self, shape: Shape) -> Format | None:
        """The format it leaves a matrix of `shape` in, the largest it can come to where its weights
        decide; None keeps what it found."""
        return None

    def foretold(self, spec: Spec) -> Sequence[Mapping[str, Format | None]]:
        """The same of every linear of every block that a walk reaches, as far as settings tell."""
        return [
            {name: self.format_for(shapes[name]) for site in sites(layer) for name in site.linears}
            for layer in spec.layers
            for shapes in (linear_shapes(spec, layer),)
        ]

    def table_for(self, spec: Spec) -> Format | None:
        """The same of the embedding and the head."""
        return None

    @property
    def rounding(self) -> Inputs | None:
        """How it leaves inputs rounded; None keeps what it found."""
        return None

    @property
    def zeros(self) -> Zeros | None:
        """The zeros it leaves, where matrices are to be stored without them."""
        return None

    @property
    def surveys(self) -> bool:
        """It looks at the whole model before it begins."""
        return False

    def survey(self, spec: Spec) -> Survey:
        """What is looked at, where it `surveys`."""
        raise NotImplementedError(f"{self.key} sends no survey")


class BlockPass(Pass):
    """One idea applied site by site."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Which statistics of a site's inputs it uses (names of calibrate.stats)."""

    @abstractmethod
    def site(self, site: Reached) -> Iterator[Row]:
        """Replace the weights of a site's linears; yield what was measured."""

    def finish(self, whole: Whole) -> Iterator[Row]:
        """Work on a block whose sites are done; only called where it needs `original`."""
        return iter(())

    @abstractmethod
    def format_of(self, columns: int) -> Format | None:
        """The format it leaves a matrix of `columns` inputs in; None keeps what it found."""

    def format_for(self, shape: Shape) -> Format | None:
        return self.format_of(shape[1])

    def informed(self, found: Any) -> SitePass:
        """What walks when the survey has found something: the pass with its budgets."""
        return self

    @property
    def calibrated(self) -> bool:
        return bool(self.needs)

    @property
    def quantizes(self) -> bool:
        return self.format_of(128) is not None

    def site_bytes(self, rows: int, columns: int) -> int:
        """Bytes it holds while it works on a site of linears [rows, columns] in all."""
        return 3 * 4 * rows * columns


@dataclass(frozen=True)
class Zeros:
    """What pruning leaves: about which share of a matrix is zero, or in which pattern."""

    share: float
    pattern: str | None = None

    def stored(self, inner: Format, shape: tuple[int, int]) -> Format:
        """The smaller of `inner` and `inner` without zeros."""
        if not isinstance(inner, (Dense, Integers)) or getattr(inner, "zero_point", False):
            return inner
        sparse = Sparse(inner, self.share, self.pattern)
        return sparse if sparse.bytes(shape) < inner.bytes(shape) else inner


@dataclass(frozen=True)
class Data:
    """What a ModelPass learns from: ids [samples, length], and the model before the recipe.

    `folder` is its own to keep what a killed job goes on from; None where nothing is kept.
    """

    ids: Tensor | None = None
    original: Callable[[], Model] | None = None
    folder: Path | None = None
    progress: Progress = lambda done, total, what: None


class ModelPass(Pass):
    """One idea applied to a whole model, in memory."""

    @property
    def calibrated(self) -> bool:
        return True

    @abstractmethod
    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        """The model it makes (the same object or another), and what was measured."""

    @abstractmethod
    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        """Bytes it holds at its worst, beside the weights in the dtype they are stored in."""


Stage = tuple[BlockPass, ...] | ModelPass
"""Block passes that share one walk, or one model pass."""


@dataclass(frozen=True)
class Recipe:
    """An ordered tuple of passes with a name and a line on what it is good for."""

    name: str
    passes: tuple[Pass, ...]
    good_for: str = ""

    def __post_init__(self) -> None:
        passes = self.passes if isinstance(self.passes, (tuple, list)) else (self.passes,)
        if not all(isinstance(p, Pass) for p in passes):
            raise BadRequest(
                f"the recipe {self.name}: its passes are {str(passes)[:80]}",
                do='a tuple of passes is needed; find_recipe("gptq-int4") takes names',
            )
        object.__setattr__(self, "passes", tuple(passes))

    @property
    def calibrated(self) -> bool:
        return any(p.calibrated for p in self.passes)

    def stages(self) -> tuple[Stage, ...]:
        """The passes as stages. A pass that wants a survey of the model begins one."""
        found: list[Stage] = []
        for p in self.passes:
            last = found[-1] if found else None
            if isinstance(p, ModelPass):
                found.append(p)
            elif isinstance(p, BlockPass):
                if isinstance(last, tuple) and not p.surveys:
                    found[-1] = (*last, p)
                else:
                    found.append((p,))
        return tuple(found)

    def check(self, spec: Spec) -> None:
        """Order conflicts and settings that do not suit the model, before any work."""
        if not self.passes:
            raise BadRequest(
                f"the recipe {self.name} has no passes", do="passes: [{gptq: {bits: 4}}]"
            )
        original = spec
        for number, p in enumerate(self.passes):
            try:
                p.follows(self.passes[:number])
                p.check(spec)
                p.beside(spec, original)
            except BadRequest as error:
                raise BadRequest(
                    f"the recipe {self.name}: {error.what}", error.seen, error.do
                ) from error
            spec = p.leaves(spec)

    def output_format(self, shape: Shape) -> Format | None:
        """The format that linears of a shape end in, where all passes share a walk."""
        return output_format(self._walked, shape)

    def output_bytes(self, spec: Spec, layer: LayerSpec, stored: str) -> int:
        """Exact bytes of a block's linears, where all passes share a walk."""
        return output_bytes(self._walked, spec, layer, stored)

    @property
    def _walked(self) -> tuple[BlockPass, ...]:
        return tuple(p for p in self.passes if isinstance(p, BlockPass))

    def settings(self) -> list[dict[str, Any]]:
        """The passes and their settings as plain data, as a recipe file has them."""
        return [{p.key: asdict(p)} for p in self.passes]  # type: ignore[call-overload]


def needs_of(stage: Sequence[BlockPass]) -> frozenset[str]:
    return frozenset().union(*(p.needs for p in stage))


def zeros_of(stage: Sequence[Pass]) -> Zeros | None:
    """The zeros that a stage leaves."""
    return next((p.zeros for p in reversed(stage) if p.zeros is not None), None)


def splits(stage: Sequence[BlockPass]) -> bool:
    """Whether fused matrices end up in parts (checkpoint.packed)."""
    return zeros_of(stage) is not None or must_split([p.format_of(128) for p in stage])


def output_format(stage: Sequence[Pass], shape: Shape) -> Format | None:
    """The format that linears of a shape end in."""
    formats = [p.format_for(shape) for p in stage]
    return next((format for format in reversed(formats) if format), None)


def output_bytes(stage: Sequence[Pass], spec: Spec, layer: LayerSpec, stored: str) -> int:
    """Exact bytes of a block's linears after a walk over a model stored in the dtype `stored`."""
    touched = {name for site in sites(layer) for name in site.linears}
    total = 0
    for name, shape in linear_shapes(spec, layer).items():
        scheme = Scheme(Dense(stored))
        if name in touched:
            scheme = output_scheme(stage, shape, stored, output_format(stage, shape), None)
        total += scheme.bytes(shape, stored)
    return total


def output_scheme(
    stage: Sequence[Pass], shape: Shape, stored: str, format: Format | None, before: Scheme | None
) -> Scheme:
    """How a linear is stored behind a stage whose passes leave it in `format`, None: as it was `before`."""
    held = before.format if before else Dense(stored)
    zeros = zeros_of(stage)
    if zeros is None and isinstance(held, Sparse):
        zeros, held = Zeros(held.share, held.pattern), held.inner
    format = format or held
    if zeros is not None:
        format = zeros.stored(format, shape)
    if isinstance(format, LowRank):
        format = format.stored_in(stored)
    inputs = next((p.rounding for p in reversed(stage) if p.rounding), None)
    return Scheme(format.scaled(stored), inputs or (before.inputs if before else None))


def check_width(format: Grouped, width: int) -> None:
    """The group size divides the rows of the embedding and the head."""
    try:
        format.groups((1, width))
    except BadRequest as error:
        raise BadRequest(f"embedding and head: {error.what}", do=error.do) from error


def check_groups(format: Grouped, spec: Spec, explicit: bool) -> None:
    """The group size divides every row that will be quantized."""
    if not explicit:
        return
    for layer in set(spec.layers):
        for name, shape in linear_shapes(spec, layer).items():
            try:
                format.groups(shape)
            except BadRequest as error:
                raise BadRequest(f"{name}: {error.what}", do=error.do) from error
