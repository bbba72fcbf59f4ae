"""What is wanted of a fit: budgets, what the model is to be used for, and how much is tried.

    memory     bytes of the running engine with keys and values of `context` tokens of `batch` sequences
    size       bytes of the saved weight files
    speed      tokens per second of one sequence while it writes
    quality    the share of `measure` that is kept, in (0, 1]

    measure      what it is, per predicted token, on held-out text and on text that the original wrote
    likelihood   exp(-KL(original || result)): what the result gives to what the original would say, the
                 geometric mean. On the original's own words it is how much of its perplexity is kept;
                 it is 1 for equal answers and nothing else, so no damage hides in it
    perplexity   perplexity of the original over that of the result; it may be above 1
    agreement    how often both put the same token first
    accuracy     right answers to the questions given over those of the original (where it is more, 1)

The worst text counts; questions, where some are given, are one more, that of their right answers. A goal
without any budget asks for the smallest model of its quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from onecard.core.errors import BadRequest, nearest
from onecard.core.settings import format_size, parse_size

MEASURES = {
    "likelihood": "exp(-KL(original || result)) per token, the worse of held-out text and of text that "
    "the original wrote itself; 1 only for equal answers",
    "perplexity": "perplexity of the original over that of the result, the worse of held-out text and of "
    "text that the original wrote itself",
    "agreement": "share of tokens where both put the same one first, the worse of held-out text and of "
    "text that the original wrote itself",
    "accuracy": "right answers over the original's, likeliest answer by length, on the questions given",
}
EFFORTS = ("quick", "normal", "thorough")
Measure = Literal["likelihood", "perplexity", "agreement", "accuracy"]
Effort = Literal["quick", "normal", "thorough"]
FASTEST, LONGEST, MOST, HOURS = 1e7, 1 << 24, 4096, 24 * 60 * 30


@dataclass(frozen=True)
class Goal:
    """Budgets and use. Bytes, tokens, tokens per second, a share, minutes. None: no such budget."""

    memory: int | None = None
    size: int | None = None
    context: int | None = None  # None: 2048, or what the model is made for where that is less
    speed: float | None = None
    quality: float | None = None
    measure: Measure = "likelihood"
    batch: int = 1
    effort: Effort = "normal"
    recover: float = 0.0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("memory", "size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1 << 60:
                raise BadRequest(f"--{name} is {value} bytes", do="write it as 6GiB, 6GB or 6g")
        _within("context", self.context, 1, LONGEST, "tokens")
        _within("batch", self.batch, 1, MOST, "sequences at once")
        _within("recover", self.recover, 0, HOURS, "minutes")
        if self.speed is not None and not 0 < self.speed <= FASTEST:
            raise BadRequest(f"--speed is {self.speed:g} tokens per second",
                             do=f"a number above 0, at most {FASTEST:,.0f}")  # fmt: skip
        if self.quality is not None and not 0 < self.quality <= 1:
            raise BadRequest(
                f"--quality is {self.quality:g}", do="a share above 0 and at most 1, 0.99 say"
                + (f" ({self.quality:g} % is {self.quality / 100:g})" if 1 < self.quality <= 100 else "")
            )  # fmt: skip
        if self.quality == 1 and self.measure == "likelihood":
            raise BadRequest("--quality is 1", "that is the original, bit for bit",
                             "0.9999 is the most that can be told")  # fmt: skip
        if self.measure not in MEASURES:
            raise BadRequest(
                f"there is no measure {self.measure!r}", do=nearest(self.measure, MEASURES)
            )
        if self.effort not in EFFORTS:
            raise BadRequest(
                f"there is no effort {self.effort!r}", do=nearest(self.effort, EFFORTS)
            )
        if self.memory and self.size and self.size > self.memory:
            raise BadRequest(
                f"--size {format_size(self.size)} is more than --memory {format_size(self.memory)}",
                "a model's weights have to fit into memory with everything else",
                "lower --size, or leave one of the two out",
            )
        if not (self.memory or self.size or self.speed or self.quality):
            raise BadRequest(
                "nothing is asked for", do="give --memory, --size, --speed or --quality"
            )

    def bounds(self) -> tuple[tuple[str, str], ...]:
        """What is asked for, as (flag, value) in words."""
        found = [
            ("--memory", self.memory and format_size(self.memory)),
            ("--size", self.size and format_size(self.size)),
            ("--speed", self.speed and f"{self.speed:g} tokens/s"),
            ("--quality", self.quality and f"{self.quality:g} ({self.measure})"),
        ]
        return tuple((flag, str(value)) for flag, value in found if value)


def goal_of(
    memory: str | float | None = None, size: str | float | None = None, **more: object
) -> Goal:
    """A goal from sizes as people write them."""
    return Goal(bytes_of("memory", memory), bytes_of("size", size), **more)  # type: ignore[arg-type]


def bytes_of(name: str, text: str | float | None) -> int | None:
    """The bytes that a flag of this name was given."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except BadRequest as error:
        raise BadRequest(f"--{name}: {error.what}", error.seen, error.do) from error


def _within(name: str, value: float | None, least: float, most: float, what: str) -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise BadRequest(
            f"--{name} is {value:g} {what}", do=f"{least:,g} to {most:,.0f} is possible"
        )
