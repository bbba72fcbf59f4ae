"""What a reader gets: pieces of text, a result at the end; and the growing reply that they come from.

A `Reply` is one request's ids, draws, text and clock, the same above every executor. It chooses ids from
logits (or takes ids that an executor chose by the same rule) and knows when it is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onecard.checkpoint.tokenizer import Stream, Tokenizer
from onecard.core.errors import FailedWork
from onecard.core.report import Row
from onecard.runtime.sample import Logits, Logprobs, Sampling, Uniforms, logprobs, pick
from onecard.runtime.steps import Ids
from onecard.runtime.stop import Stops

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Result:
    """A finished reply. `ids` includes the end token that stopped it, `text` no stop string.

    Rates are per second of engine time: the prompt's over the prefill, the reply's over the steps
    behind its first token (None when there were none).
    """

    text: str
    ids: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    time_to_first_token: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float | None
    logprobs: tuple[Logprobs, ...] = ()
    cached_tokens: int = 0  # of the prompt, that another request had computed

    @property
    def new_tokens(self) -> int:
        return len(self.ids)

    def rows(self) -> tuple[Row, ...]:
        return (
            Row("prompt", "tokens", self.prompt_tokens),
            Row("decode", "tokens", self.new_tokens),
            Row.of("prompt", "time_to_first_token", self.time_to_first_token),
            Row.of("prompt", "prompt_tokens_per_second", self.prompt_tokens_per_second),
            Row.of("decode", "decode_tokens_per_second", self.decode_tokens_per_second),
            Row("decode", "finish", self.finish),
        )


@dataclass(frozen=True)
class Piece:
    """Text that became certain; the last piece carries the result (its text may be empty)."""

    text: str
    result: Result | None = None


class Reply:
    """The growing reply of one request. Times are seconds in which the engine worked."""

    def __init__(self, tokenizer: Tokenizer, prompt: tuple[int, ...], sampling: Sampling) -> None:
        self.sampling, self.prompt, self.text = sampling, len(prompt), ""
        self.buffer = np.empty(len(prompt) + sampling.max_tokens, dtype=np.int32)
        self.buffer[: len(prompt)] = prompt
        self.new: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish: Finish | None = None
        self.uniforms = Uniforms(sampling)
        self.stream, self.stops = Stream(tokenizer), Stops(sampling.stop)
        self.ends = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
        self.prefilled = self.first = self.last = 0.0
        self.cached = 0

    @property
    def ids(self) -> Ids:
        """The prompt's and the reply's: a view."""
        return self.buffer[: self.prompt + len(self.new)]

    @property
    def room(self) -> int:
        """How many ids may still come."""
        return self.sampling.max_tokens - len(self.new)

    def choose(self, logits: Logits) -> tuple[int, Logprobs | None]:
        """The next id. The reply does not change."""
        if not np.isfinite(logits.max()):
            raise self.useless(f"{int(np.isnan(logits).sum())} of {len(logits)} are NaN")
        s = self.sampling
        uniform = float(self.uniforms.of(len(self.new), 1)[0]) if s.temperature else 0.0
        id = pick(logits, self.ids, s, uniform, self.prompt)
        return id, None if s.logprobs is None else logprobs(logits, id, s.logprobs)

    def add(self, id: int, told: Logprobs | None = None) -> str:
        """Take the next id; returns the text that became certain by it."""
        self.buffer[self.prompt + len(self.new)] = id
        self.new.append(id)
        if told is not None:
            self.logprobs.append(told)
        return self._show(id)

    def useless(self, seen: str) -> FailedWork:
        """The error for logits that are no numbers."""
        return FailedWork(
            f"the model's logits at step {len(self.new)} are not numbers",
            seen=seen,
            do="try float32 (--engine reference --dtype fp32); if that fails too, the weights are damaged",
        )

    def _show(self, id: int) -> str:
        ended = id in self.ends
        full = len(self.new) == self.sampling.max_tokens
        text = "" if ended else self.stream.add(id)
        text = self.stops.feed(text)
        if (ended or full) and not self.stops.hit:
            text += self.stops.feed(self.stream.finish())
            text += self.stops.rest()
        if ended or self.stops.hit:
            self.finish = "stop"
        elif full:
            self.finish = "length"
        self.text += text
        return text

    def result(self) -> Result:
        assert self.finish is not None
        steps, decoding = len(self.new) - 1, self.last - self.first
        return Result(
            text=self.text,
            ids=tuple(self.new),
            finish=self.finish,
            prompt_tokens=self.prompt,
            time_to_first_token=self.first,
            prompt_tokens_per_second=self.prompt / max(self.prefilled, 1e-9),
            decode_tokens_per_second=steps / max(decoding, 1e-9) if steps > 0 else None,
            logprobs=tuple(self.logprobs),
            cached_tokens=self.cached,
        )
