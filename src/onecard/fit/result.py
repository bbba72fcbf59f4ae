"""What a fit found out, as plain frozen data: `fit.json`, from which pages and comparisons are made.

Bytes, seconds, tokens per second, nats per token; shares lie in 0..1. Everything that is `None` was not
asked for or not measured. Every number says in `how` where it comes from: counted (exact, from the code
that allocates or writes), modelled (predicted), or measured (by running what was made).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onecard.core.errors import BadRequest
from onecard.core.settings import fill
from onecard.fit.goal import Goal

FILE, VERSION = "fit.json", 1


@dataclass(frozen=True)
class Promise:
    """A number that was promised, and what it came to.

    `what`: memory, size, decode, prompt, likelihood, perplexity, agreement ... `asked` is the budget where
    there is one; it holds `at_most` or at least. `uncertainty` is the half width of the prediction, in its
    own unit. `measured` is None where it was not run; `kept` says whether what was asked holds.
    """

    what: str
    unit: str
    asked: float | None
    at_most: bool
    predicted: float | None
    uncertainty: float | None
    measured: float | None
    original: float | None
    kept: bool | None
    how: str


@dataclass(frozen=True)
class Point:
    """A plan on the Pareto front: bytes of the weight files against predicted KL and quality. `left_out`: how
    many blocks it goes without; of more than one the KL is a sum of what each does alone, a first guess."""

    size: int
    memory: int
    bits_per_weight: float
    harm: float
    quality: float
    chosen: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Tried:
    """A candidate of a site: its KL against the original in nats per token, alone, all else untouched."""

    format: str
    harm: float
    size: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Place:
    """A site (the linears that read one input), the tables, the cache, or a whole layer, and what it got.

    `layer` is None outside the blocks; it is counted as in the original. `part`: attention.in, attention.out,
    feed_forward.in ..., tables, cache; layer, whose format is kept or gone. `why` is what
    `--explain` says of it.
    """

    where: str
    layer: int | None
    part: str
    weights: int
    format: str
    bits_per_weight: float
    harm: float
    size: int
    memory: int
    why: str
    tried: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int


@dataclass(frozen=True)
class Held:
    """Memory by component at one length of context."""

    context: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a phase (prompt, decode). `roof`: what the machine could do at best."""

    phase: str
    context: int
    predicted: float | None
    measured: float | None
    original: float | None
    roof: float | None


@dataclass(frozen=True)
class Gate:
    """Quality on one text: `held-out`, `own words`, or the name of a file of questions, where it is that of
    the right answers. Perplexity `before` is the original's; so is `right_before`."""

    text: str
    kl: float
    agreement: float
    perplexity: float
    before: float
    tokens: int
    questions: int = 0
    right: float = 0.0  # share of questions whose likeliest answer by length is right
    right_before: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One round of planning, compressing and judging."""

    size: int
    promised: float
    quality: float
    passed: bool | None
    what: str


@dataclass(frozen=True)
class Sample:
    """A prompt and how both go on, greedily."""

    prompt: str
    original: str
    result: str


@dataclass(frozen=True)
class Said:
    """A name and a text: how a number was obtained, a fact of the environment, seconds of a step."""

    name: str
    text: str


@dataclass(frozen=True)
class FitResult:
    """Everything about a fit. `kept` is whether every budget and the gate hold."""

    model: str
    out: str
    answer: str
    kept: bool
    goal: Goal
    promises: tuple[Promise, ...]
    front: tuple[Point, ...]
    places: tuple[Place, ...]
    memory: tuple[Held, ...]
    speeds: tuple[Speed, ...]
    gates: tuple[Gate, ...]
    attempts: tuple[Attempt, ...]
    samples: tuple[Sample, ...]
    how: tuple[Said, ...]
    seconds: tuple[Said, ...]
    environment: tuple[Said, ...]
    run: str
    version: int = VERSION
    left_out: tuple[int, ...] = ()  # blocks of the original that the result goes without
    largest_batch: int | None = (
        None  # sequences of the context asked for that `--memory` holds at once
    )
    nearest: str = ""  # byte budgets that are predicted to keep a quality that was missed
    bits_per_weight: float | None = None  # of the whole result, as BITS_PER_WEIGHT says
    inputs: tuple[Said, ...] = ()  # the model and the texts it was made from, by their contents

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> FitResult:
        """What `to_json` wrote. Raises BadRequest when it is something else."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise BadRequest("this is no result of a fit", seen=str(error)) from error
        if data.get("version") != VERSION:
            raise BadRequest(f"this result of a fit has version {data.get('version')!r}",
                             do=f"version {VERSION} is read; fit again")  # fmt: skip
        return fill(FitResult, data, FILE)


def read_fit(folder: str | Path) -> FitResult:
    """The result that lies in a folder."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise BadRequest(f"{folder} holds no {FILE}", do="give a folder that `onecard fit` wrote")
    try:
        return FitResult.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", seen=str(error)) from error
    except BadRequest as error:
        raise BadRequest(f"{path}: {error.what}", error.seen, error.do) from error


def _finite(value: Any) -> Any:
    """JSON has no infinity: a number that is none becomes the largest there is."""
    if isinstance(value, float) and not math.isfinite(value):
        return 1.7976931348623157e308 if value > 0 or math.isnan(value) else -1.7976931348623157e308
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
