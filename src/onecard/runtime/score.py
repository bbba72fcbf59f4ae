"""How likely a model finds given ids: what evaluation asks of an executor. No torch here.

A `Scorer` reads contexts and says of each id, from a place on, how well the ids before it predicted it.
`NativeScorer` does it with any stepper (steps.py): contexts are packed into steps one behind the other,
the next beginning where the last one ends, so that every step is full whatever the lengths. Logits are
kept for one step at a time. `TorchScorer` (reference.py) does it with the network in torch.

    nats    -log p(id | the ids before it)
    kl      KL(reference || model) of the same prediction, in nats
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.runtime.sample import Logits
from onecard.runtime.steps import Feed, Ids, Stepper

LOGITS = 128 << 20
"""Bytes of logits of one step, at most."""
ROWS = 512
"""Ids of one step, at most."""
BLOCK = 1 << 17
"""Numbers that are worked on together, so that they stay in a cache."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Of a run of ids, [n]. `kl` and `agreed` (whether both find the same id likeliest) with a reference."""

    nats: NDArray[np.float64]
    best: NDArray[np.bool_]  # whether the id was the likeliest
    kl: NDArray[np.float64] | None = None
    agreed: NDArray[np.bool_] | None = None


class Scorer(Protocol):
    """A model that reads."""

    tokenizer: Tokenizer
    vocab_size: int
    max_context: int

    def scores(
        self,
        contexts: Sequence[Sequence[int]],
        firsts: Sequence[int],
        reference: Self | None = None,
    ) -> Iterator[tuple[int, Scores]]:
        """Scores of the ids of context i from firsts[i] >= 1 on: (i, a run of them), run by run.

        The runs of one context come in their order. A context has at most max_context + 1 ids, as the
        last is predicted and not read. BadRequest for any other, and for ids that the model has not.
        """


def check(scorer: Scorer, contexts: Sequence[Sequence[int]], firsts: Sequence[int]) -> None:
    """Raises BadRequest for what cannot be scored, before any work."""
    for ids, first in zip(contexts, firsts, strict=True):
        if first < 1:
            raise BadRequest(
                f"scores from id {first} on", do="the first id follows none: 1 or more"
            )
        if len(ids) > scorer.max_context + 1:
            raise BadRequest(
                f"{len(ids)} ids do not fit a context of {scorer.max_context}",
                do="the last is not read: one more than that is possible",
            )
        for id in (min(ids), max(ids)) if len(ids) else ():
            if not 0 <= id < scorer.vocab_size:
                raise BadRequest(
                    f"a context holds the id {str(id)[:40]}",
                    do=f"this model's ids are 0 to {scorer.vocab_size - 1}",
                )


class NativeScorer:
    """A stepper that nobody else uses meanwhile, as a Scorer. It takes the pages from the first on."""

    def __init__(self, stepper: Stepper, tokenizer: Tokenizer, rows: int = ROWS) -> None:
        self.stepper, self.tokenizer = stepper, tokenizer
        self.vocab_size, self.max_context = stepper.vocab_size, stepper.max_context
        self.rows = max(1, min(rows, LOGITS // (4 * stepper.vocab_size)))

    def scores(
        self,
        contexts: Sequence[Sequence[int]],
        firsts: Sequence[int],
        reference: Self | None = None,
    ) -> Iterator[tuple[int, Scores]]:
        readers = [self] if reference is None else [self, reference]
        for reader in readers:
            check(reader, contexts, firsts)
        given = [np.array(context, dtype=np.int32) for context in contexts]
        packed = steps(
            [len(ids) - 1 for ids in given],
            min(reader.rows for reader in readers),
            min(reader.stepper.pages for reader in readers),
            self.stepper.page_tokens,
        )
        for parts in packed:
            feeds = [
                Feed(
                    given[part.context][part.begin : part.end], part.begin, part.table,
                    "all" if part.end >= firsts[part.context] else "none",
                )
                for part in parts
            ]  # fmt: skip
            told = [reader._logits(feeds) for reader in readers]
            for i, part in enumerate(parts):
                skip = max(0, firsts[part.context] - 1 - part.begin)
                if part.begin + skip >= part.end:
                    continue
                targets = given[part.context][part.begin + skip + 1 : part.end + 1]
                mine, *theirs = (logits[i] for logits in told)
                assert mine is not None
                wanted = theirs[0] if theirs else None
                yield (
                    part.context,
                    judged(mine[skip:], targets, None if wanted is None else wanted[skip:]),
                )

    def _logits(self, feeds: Sequence[Feed]) -> list[Logits | None]:
        fed = self.stepper.step(feeds, 1, np.zeros(1, np.int32))
        for each in fed:
            if each.status == "failed":
                raise FailedWork("the model could not be run", seen=each.seen)
        return [each.logits for each in fed]


@dataclass(frozen=True, eq=False)
class Part:
    """The ids from `begin` to `end` of a context, in the pages of `table`."""

    context: int
    begin: int
    end: int
    table: Ids


def steps(lengths: Sequence[int], rows: int, pages: int, page_tokens: int) -> Iterator[list[Part]]:
    """Contexts of so many ids one behind the other, cut into steps of `rows` ids and `pages` pages."""
    parts: list[Part] = []
    free, room = np.arange(pages, dtype=np.int32), rows
    for context, length in enumerate(lengths):
        need = -(-length // page_tokens)
        if need > pages:
            raise BadRequest(
                f"a context of {length} ids", do=f"there is memory for {pages * page_tokens}"
            )
        if need > len(free):  # the contexts before this one are over with the step
            if parts:
                yield parts
            parts, free, room = [], np.arange(pages, dtype=np.int32), rows
        table, free = free[:need], free[need:]
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            parts.append(Part(context, begin, end, table))
            begin, room = end, room - (end - begin)
            if not room:
                yield parts
                parts, room = [], rows
                free = np.setdiff1d(np.arange(pages, dtype=np.int32), table)
    if parts:
        yield parts


def judged(logits: Logits, targets: Ids, wanted: Logits | None = None) -> Scores:
    """Scores of `targets` [n] by logits [n, vocabulary], which are overwritten."""
    n, vocabulary = logits.shape
    nats, best = np.empty(n), np.empty(n, np.bool_)
    kl, agreed = np.empty(n), np.empty(n, np.bool_)
    size = max(1, BLOCK // vocabulary)
    for begin in range(0, n, size):
        some = slice(begin, begin + size)
        mine, ids = logits[some], targets[some, None]
        top = mine.argmax(-1)
        total = _shifted(mine, top)
        nats[some] = total - np.take_along_axis(mine, ids, -1)[:, 0]
        best[some] = top == targets[some]
        if wanted is not None:
            theirs = wanted[some]
            other = theirs.argmax(-1)
            their_total = _shifted(theirs, other)
            agreed[some] = top == other
            np.subtract(theirs, mine, out=mine)
            np.subtract(theirs, their_total[:, None], out=theirs)
            np.exp(theirs, out=theirs)
            np.multiply(theirs, mine, out=mine)
            kl[some] = mine.sum(-1) + (total - their_total)
    return Scores(nats, best) if wanted is None else Scores(nats, best, kl, agreed)


def _shifted(logits: Logits, top: NDArray[np.int64]) -> Logits:
    """Takes the largest from each row, in place; the logarithm of the sum of exponentials of a row then."""
    np.subtract(logits, np.take_along_axis(logits, top[:, None], -1), out=logits)
    return np.log(np.exp(logits).sum(-1))
