"""One prompt in, pieces of text out, above whatever runs the model.

An `Executor` turns ids into logits and knows nothing else; it opens one `Session` per request,
which holds that request's keys and values. For it, `generate` owns the loop: prefill, then choose, show,
step. What is `Shared` runs many requests at once and owns its loop itself (scheduler.py); `generate` is
one of its readers. What does not fit the model's context is refused before any work; nothing is cut off
silently. Clocks run only while the engine works, not while the reader of the pieces does.

This file needs no torch. The executors lie beside it: `reference.py` holds the one in torch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, runtime_checkable

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest
from onecard.runtime.reply import Piece, Reply, Result
from onecard.runtime.sample import GREEDY, Logits, Sampling


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


@runtime_checkable
class Shared(Protocol):
    """What runs many requests at once."""

    vocab_size: int
    max_context: int

    def check(self, request: Request) -> None:
        """Raises BadRequest for a request that cannot be run as asked."""

    def pieces(self, request: Request, tokenizer: Tokenizer) -> Generator[Piece, None, None]:
        """The reply as it becomes certain; the work is shared with other readers."""


Runner = Executor | Shared


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a plain prompt as the tokenizer begins one; of "" the begin token, if any."""
    ids = tokenizer.encode(text, special=True)
    if not ids and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return ids


def generate(
    executor: Runner, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling = GREEDY
) -> Generator[Piece, None, None]:
    """Pieces of the reply as they become certain. Raises BadRequest at once, before any work."""
    request = Request(tuple(prompt), sampling)
    if isinstance(executor, Shared):
        executor.check(request)
        return executor.pieces(request, tokenizer)
    check(executor, request)
    return _pieces(executor, tokenizer, request)


def complete(
    executor: Runner, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling = GREEDY
) -> Result:
    """The whole reply at once."""
    *_, last = generate(executor, tokenizer, prompt, sampling)
    assert last.result is not None
    return last.result


def check(executor: Runner, request: Request) -> None:
    """Raises BadRequest for a prompt that cannot be run as asked."""
    ids, new = request.prompt, request.sampling.max_tokens
    if not ids:
        raise BadRequest("the prompt is empty", do="give at least one token")
    for id in ids:
        if (
            not isinstance(id, Integral)
            or isinstance(id, bool)
            or not 0 <= id < executor.vocab_size
        ):
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
        reply = Reply(tokenizer, request.prompt, request.sampling)
        begin = time.perf_counter()
        logits = session.prefill(request.prompt)
        reply.prefilled = time.perf_counter() - begin
        while True:
            text = reply.add(*reply.choose(logits))
            reply.last += time.perf_counter() - begin
            if len(reply.new) == 1:
                reply.first = reply.last
            if reply.finish:
                yield Piece(text, reply.result())
                return
            if text:
                yield Piece(text)
            begin = time.perf_counter()
            logits = session.step(reply.new[-1])
    finally:
        session.close()
