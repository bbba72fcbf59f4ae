"""One prompt in, pieces of text out: the loop over tokens, above any executor.

An `Executor` turns ids into logits and knows nothing else; it opens one `Session` per request,
which holds that request's keys and values. `generate` owns the loop: prefill, then choose, show,
step. What does not fit the model's context is refused before any work; nothing is cut off silently.
Clocks run only while the engine works, not while the reader of the pieces does.

This file needs no torch. The executors lie beside it: `reference.py` holds the one in torch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from onecard.checkpoint.tokenizer import Stream, Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Row
from onecard.runtime.sample import GREEDY, Logits, Sampling, choose, generator
from onecard.runtime.stop import Stops


class Session(Protocol):
    """One request's state. Ids follow those given before; logits are float32 [vocabulary]."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Take one or more ids; the logits after the last of them."""

    def step(self, id: int) -> Logits:
        """Take one id; the logits after it."""

    def close(self) -> None:
        """Give the memory back. Closing twice does no harm."""


class Executor(Protocol):
    """A model that is ready to run."""

    vocab_size: int
    max_context: int

    def open(self, capacity: int) -> Session:
        """A fresh session with room for `capacity` ids, at most `max_context`."""


@dataclass(frozen=True)
class Request:
    """A prompt's ids and how its reply is chosen."""

    prompt: tuple[int, ...]
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Result:
    """A finished reply. `ids` includes the end token that stopped it, `text` no stop string.

    Rates are per second of engine time: the prompt's over the prefill, the reply's over the steps
    behind its first token (None when there were none).
    """

    text: str
    ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    time_to_first_token: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float | None

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


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a plain prompt as the tokenizer begins one; of "" the begin token, if any."""
    ids = tokenizer.encode(text, special=True)
    if not ids and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return ids


def generate(
    executor: Executor, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling = GREEDY
) -> Generator[Piece, None, None]:
    """Pieces of the reply as they become certain. Raises BadRequest at once, before any work."""
    request = Request(tuple(prompt), sampling)
    check(executor, request)
    return _pieces(executor, tokenizer, request)


def complete(
    executor: Executor, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling = GREEDY
) -> Result:
    """The whole reply at once."""
    *_, last = generate(executor, tokenizer, prompt, sampling)
    assert last.result is not None
    return last.result


def check(executor: Executor, request: Request) -> None:
    """Raises BadRequest for a prompt that cannot be run as asked."""
    ids, new = request.prompt, request.sampling.max_tokens
    if not ids:
        raise BadRequest("the prompt is empty", do="give at least one token")
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < executor.vocab_size:
            raise BadRequest(
                f"the prompt holds the id {str(id)[:40]}",
                do=f"this model's ids are 0 to {executor.vocab_size - 1}",
            )
    room = executor.max_context - len(ids)
    if new > room:
        raise BadRequest(
            f"{len(ids)} prompt tokens and {new} new ones do not fit a context of "
            f"{executor.max_context}",
            do=f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt",
        )


def _pieces(
    executor: Executor, tokenizer: Tokenizer, request: Request
) -> Generator[Piece, None, None]:
    session = executor.open(len(request.prompt) + request.sampling.max_tokens)
    try:
        reply = _Reply(tokenizer, request)
        begin = time.perf_counter()
        logits = session.prefill(request.prompt)
        reply.prefilled = time.perf_counter() - begin
        while True:
            text = reply.take(logits)
            reply.clock += time.perf_counter() - begin
            if len(reply.new) == 1:
                reply.first = reply.clock
            if reply.finish:
                yield Piece(text, reply.result())
                return
            if text:
                yield Piece(text)
            begin = time.perf_counter()
            logits = session.step(reply.new[-1])
    finally:
        session.close()


class _Reply:
    """The growing reply of one request."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self.sampling, self.prompt = request.sampling, len(request.prompt)
        self.ids, self.text = list(request.prompt), ""
        self.new: list[int] = []
        self.finish: Literal["stop", "length"] | None = None
        self.rng = generator(self.sampling)
        self.stream, self.stops = Stream(tokenizer), Stops(self.sampling.stop)
        self.ends = frozenset() if self.sampling.ignore_eos else tokenizer.eos_ids
        self.clock = self.prefilled = self.first = 0.0

    def take(self, logits: Logits) -> str:
        """Choose the next id; returns the text that became certain by it."""
        if not np.isfinite(logits.max()):
            raise FailedWork(
                f"the model's logits at step {len(self.new)} are not numbers",
                seen=f"{int(np.isnan(logits).sum())} of {len(logits)} are NaN",
                do="try dtype fp32; if that fails too, the weights are damaged",
            )
        id = choose(logits, self.ids, self.sampling, self.rng, self.prompt)
        self.ids.append(id)
        self.new.append(id)
        return self._show(id)

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
        steps, decoding = len(self.new) - 1, self.clock - self.first
        return Result(
            text=self.text,
            ids=tuple(self.new),
            finish=self.finish,
            prompt_tokens=self.prompt,
            time_to_first_token=self.first,
            prompt_tokens_per_second=self.prompt / max(self.prefilled, 1e-9),
            decode_tokens_per_second=steps / max(decoding, 1e-9) if steps else None,
        )
