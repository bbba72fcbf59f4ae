"""Logits to the next id: penalties, temperature, top-k, top-p, min-p, one draw; in this order.

The order and each filter's rule are those of the transformers library:

    repetition  l / r where l > 0, l * r elsewhere, for every id of the prompt and the reply
    presence    l - p, frequency  l - f * count, for the ids of the reply alone
    temperature l / t; t = 0 takes the largest logit, the lowest id on ties, and draws nothing
    top-k       ids below the k-th largest logit go; ties with it stay
    top-p       from the likeliest down, an id stays while those before it sum to less than p
    min-p       ids less likely than p times the likeliest go

A request owns its generator and takes one number from it per token, so its ids depend on its seed
and its logits, never on its neighbours. NumPy alone: every engine uses this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import BadRequest

Logits = NDArray[np.float32]

WHOLE = {
    "max_tokens": (1, 1 << 24), "top_k": (0, 1 << 31), "seed": (0, 2**64 - 1), "logprobs": (0, 20),
}  # fmt: skip
REAL = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0), "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}  # fmt: skip
MOST_STOPS, LONGEST_STOP = 16, 256


@dataclass(frozen=True)
class Sampling:
    """How a reply is chosen and where it ends. The defaults are greedy and without penalties.

    `top_k` 0 keeps all; `seed` None draws anew each time; `logprobs` n tells those of each id and of the
    n likeliest, None none. Raises BadRequest out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if not (name in ("seed", "logprobs") and value is None):
                _check(name, value, low, high, (int,))
        for name, (least, most) in REAL.items():
            _check(name, getattr(self, name), least, most, (int, float))
        if not isinstance(self.ignore_eos, bool):
            raise BadRequest(f"ignore_eos is {self.ignore_eos!r}", do="true or false is needed")
        _check_stops(self.stop)


def _check(name: str, value: object, low: float, high: float, kinds: tuple[type, ...]) -> None:
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if float not in kinds else "a number"
        seen = repr(value) if not isinstance(value, int) or abs(value) < 1e20 else "enormous"
        raise BadRequest(f"{name} is {seen[:80]}", do=f"{kind} from {low} to {high} is needed")


def _check_stops(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(s, str) and s for s in stop):
        raise BadRequest("stop is not a tuple of strings", do="give strings that are not empty")
    if len(stop) > MOST_STOPS or any(len(s) > LONGEST_STOP for s in stop):
        raise BadRequest(
            f"{len(stop)} stop strings, the longest of {max(map(len, stop))} characters",
            do=f"at most {MOST_STOPS} of at most {LONGEST_STOP} characters are taken",
        )


GREEDY = Sampling()


def generator(settings: Sampling) -> np.random.Generator:
    """The source of one request's draws."""
    return np.random.Generator(np.random.PCG64(settings.seed))


class Uniforms:
    """One request's draws, by the place of the id in the reply: whatever is computed twice draws alike."""

    def __init__(self, settings: Sampling) -> None:
        self.rng = generator(settings) if settings.temperature else None
        self.drawn = np.empty(0)

    def of(self, first: int, count: int) -> NDArray[np.float64]:
        """Those of ids first, first + 1, ...; none for a greedy request."""
        if self.rng is None:
            return self.drawn
        missing = first + count - len(self.drawn)
        if missing > 0:
            self.drawn = np.append(self.drawn, self.rng.random(max(64, missing)))
        return self.drawn[first : first + count]


def choose(
    logits: Logits, previous: Sequence[int], settings: Sampling, rng: np.random.Generator,
    prompt: int = 0,
) -> int:  # fmt: skip
    """The next id from logits [vocabulary]; `prompt` of the previous ids are the prompt's."""
    uniform = rng.random() if settings.temperature else 0.0
    return pick(logits, previous, settings, uniform, prompt)


def pick(
    logits: Logits, previous: Sequence[int] | NDArray[np.int32], settings: Sampling, uniform: float,
    prompt: int = 0,
) -> int:  # fmt: skip
    """`choose` with its draw from [0, 1) given."""
    penalized = penalize(logits, previous, settings, prompt)
    if settings.temperature == 0:
        return int(np.argmax(penalized))
    chances = np.cumsum(distribution(penalized, settings))
    drawn = np.searchsorted(chances, uniform * chances[-1], side="right")
    last = np.searchsorted(chances, chances[-1])  # the last id with a chance, should r round up
    return int(min(drawn, last))


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of chances: of the id that was chosen, and of the likeliest, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs(logits: Logits, id: int, count: int) -> Logprobs:
    """By the model's own logits: before penalties, temperature and filters. Ties: the lowest id."""
    x = logits.astype(np.float64) - logits.max()
    x -= np.log(np.exp(x).sum())
    likeliest: list[int] = []
    if count := min(count, len(x)):
        least = np.partition(x, -count)[-count]
        above, level = np.flatnonzero(x > least), np.flatnonzero(x == least)
        likeliest = [*above[np.argsort(-x[above], kind="stable")], *level[: count - len(above)]]
    return Logprobs(id, float(x[id]), tuple((int(i), float(x[i])) for i in likeliest))


def penalize(
    logits: Logits, previous: Sequence[int] | NDArray[np.int32], settings: Sampling, prompt: int = 0
) -> NDArray[np.floating]:
    """Logits with the three penalties; the array itself when there are none."""
    s = settings
    counted = bool(s.presence_penalty or s.frequency_penalty)
    if not len(previous) or (s.repetition_penalty == 1 and not counted):
        return logits
    logits = logits.copy()
    seen = np.unique(np.asarray(previous))
    held = logits[seen]
    logits[seen] = np.where(held < 0, held * s.repetition_penalty, held / s.repetition_penalty)
    if counted and len(previous) > prompt:
        ids, counts = np.unique(np.asarray(previous[prompt:]), return_counts=True)
        logits[ids] -= (s.presence_penalty + s.frequency_penalty * counts).astype(np.float32)
    return logits


def distribution(logits: NDArray[np.floating], settings: Sampling) -> NDArray[np.float64]:
    """Chances of every id, float64 [vocabulary], not normalized; zero for those filtered out."""
    with np.errstate(over="ignore"):
        x = (logits.astype(np.float64) - logits.max()) / settings.temperature
    if 0 < settings.top_k < len(x):
        x[x < np.partition(x, -settings.top_k)[-settings.top_k]] = -math.inf
    chances: NDArray[np.float64] = np.exp(x)
    if settings.top_p < 1:
        chances[~_nucleus(chances, settings.top_p)] = 0
    if settings.min_p > 0:
        chances[chances < settings.min_p * chances.max()] = 0
    return chances


def _nucleus(chances: NDArray[np.float64], p: float) -> NDArray[np.bool_]:
    """The likeliest ids, each kept while those before it sum to less than p; one at least."""
    likely = np.flatnonzero(chances > chances.sum() * (1 - p) / len(chances) / 2)
    order = likely[np.argsort(-chances[likely], kind="stable")]
    before = np.cumsum(chances[order]) - chances[order]
    keep = np.zeros(len(chances), dtype=bool)
    keep[order[before < p * chances.sum()]] = True
    keep[order[0]] = True
    return keep
