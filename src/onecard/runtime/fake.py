"""A stepper that computes next to nothing, honestly: for tests of whatever stands above steppers.

Its network has two "layers" in whole numbers. Each position stores in its page what the layers made
of it, and the logits mix what *all* earlier positions stored: a wrong page, a stale one, a lost or an
unwritten position changes every id that follows. Pages begin full of noise.

`memory` is how much the past weighs against the last two ids: 1 gives noise, less gives replies that
repeat themselves now and then, as text does. Whatever breaks the contract of steps.py raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onecard.runtime.sample import Logits, logprobs, pick
from onecard.runtime.steps import Draw, Fed, Feed, Ids

Words = NDArray[np.uint64]

FIRST, SECOND, THIRD = map(np.uint64, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
SHIFTS = tuple(map(np.uint64, (30, 27, 31)))
FACTORS = tuple(map(np.uint64, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))


class ReferenceStepper:
    """A Stepper in NumPy."""

    def __init__(
        self, pages: int = 64, page_tokens: int = 32, vocab_size: int = 50, max_context: int = 512,
        memory: float = 1.0,
    ) -> None:  # fmt: skip
        self.pages, self.page_tokens = pages, page_tokens
        self.vocab_size, self.max_context = vocab_size, max_context
        self.memory = np.float32(memory)
        noise = np.random.default_rng(0).integers(0, 2**63, (3, pages, page_tokens))
        self.cells = noise.astype(np.uint64)  # [id, first layer, second layer][page][position]
        self.spread = np.arange(vocab_size, dtype=np.uint64) * SECOND
        self.calls, self.closed = 0, False

    def step(self, batch: Sequence[Feed], steps: int, cancel: Ids) -> list[Fed]:
        assert not self.closed and batch and steps >= 1
        self._check(batch, steps)
        self.calls += 1
        fed = [self._first(feed) for feed in batch]
        for done in range(1, steps):
            if cancel[0]:
                break
            fed = [self._next(feed, old, done) for feed, old in zip(batch, fed, strict=True)]
        return fed

    def close(self) -> None:
        self.closed = True

    def choose(self, logits: Logits, draw: Draw) -> Fed:
        return _drawn(Fed(), draw, logits)

    def logits(self, ids: Ids, past: int, table: Ids) -> Logits:
        """One pass: logits [len(ids), vocabulary]."""
        end, shape = past + len(ids), self.page_tokens
        place = np.arange(past, end)
        page, row = table[place // shape], place % shape
        used = table[: -(-end // shape)]
        own = ids.astype(np.uint64)
        first = _mix(own * FIRST + place.astype(np.uint64) * SECOND)
        self.cells[0, page, row], self.cells[1, page, row] = own, first
        old, seen = self.cells[:2, used].reshape(2, -1)[:, :end]
        weights = np.arange(1, 2 * end, 2, dtype=np.uint64)
        self.cells[2, page, row] = _mix(np.cumsum(seen * weights)[past:])
        out = _mix(np.cumsum(self.cells[2, used].reshape(-1)[:end])[past:] + first)
        before = old[np.maximum(place - 1, 0)]
        states = np.stack([out, (before * THIRD + own) * FIRST])
        noise = (_mix(states[..., None] + self.spread) >> np.uint64(40)).astype(np.float32)
        logits: Logits = self.memory * noise[0] + (1 - self.memory) * noise[1]
        return logits * np.float32(10 / 2**24)

    def _first(self, feed: Feed) -> Fed:
        logits = self.logits(feed.ids, feed.past, feed.table)
        wanted = {"none": None, "last": logits[-1:], "all": logits}[feed.want]
        return replace(_drawn(Fed(), feed.draw, logits[-1]), logits=wanted)

    def _next(self, feed: Feed, fed: Fed, done: int) -> Fed:
        draw, ids = feed.draw, fed.ids
        if draw is None or len(ids) != done or done >= draw.most or ids[-1] in draw.ends:
            return fed
        place = feed.past + len(feed.ids) + done - 1
        logits = self.logits(np.array(ids[-1:], dtype=np.int32), place, feed.table)
        return _drawn(fed, draw, logits[-1])

    def _check(self, batch: Sequence[Feed], steps: int) -> None:
        tables = [set(feed.table.tolist()) for feed in batch]
        for number, feed in enumerate(batch):
            draw, end = feed.draw, feed.past + len(feed.ids)
            for ids in (feed.ids, feed.table, *((draw.previous, draw.ends) if draw else ())):
                assert ids.dtype == np.int32 and ids.ndim == 1 and ids.flags.c_contiguous
            assert len(feed.ids) and ((feed.ids >= 0) & (feed.ids < self.vocab_size)).all()
            assert feed.past >= 0 and end <= self.max_context
            if draw is not None:
                assert draw.most >= 1 and len(draw.previous) == end
                assert (draw.previous[feed.past :] == feed.ids).all()
                assert 0 < draw.prompt <= len(draw.previous)
                assert len(draw.uniforms) >= (
                    min(draw.most, steps) if draw.sampling.temperature else 0
                )
                end += min(draw.most, steps) - 1
            assert len(feed.table) * self.page_tokens >= end
            assert ((feed.table >= 0) & (feed.table < self.pages)).all()
            assert len(set(feed.table.tolist())) == len(feed.table)
            mine = feed.table[feed.past // self.page_tokens : -(-end // self.page_tokens)].tolist()
            others = set().union(*tables[:number], *tables[number + 1 :])
            assert others.isdisjoint(mine), f"pages {others & set(mine)} are written and shared"


def _drawn(fed: Fed, draw: Draw | None, logits: Logits) -> Fed:
    """`fed` with one more id."""
    if draw is None:
        return fed
    if not np.isfinite(logits.max()):
        return replace(fed, status="not numbers", seen=f"{int(np.isnan(logits).sum())} are NaN")
    place, sampling = len(fed.ids), draw.sampling
    previous = np.append(draw.previous, np.array(fed.ids, dtype=np.int32))
    uniform = float(draw.uniforms[place]) if sampling.temperature else 0.0
    id = pick(logits, previous, sampling, uniform, draw.prompt)
    told = () if sampling.logprobs is None else (logprobs(logits, id, sampling.logprobs),)
    return replace(fed, ids=(*fed.ids, id), logprobs=fed.logprobs + told)


def _mix(x: Words) -> Words:
    """A bijection of 64-bit words in which every bit depends on every bit (splitmix64's last step)."""
    x = (x ^ (x >> SHIFTS[0])) * FACTORS[0]
    x = (x ^ (x >> SHIFTS[1])) * FACTORS[1]
    return x ^ (x >> SHIFTS[2])


class Letters:
    """A tokenizer whose ids are letters: 0 ends a text, 1 begins one, id i > 1 is chr(95 + i)."""

    def __init__(self, size: int = 50) -> None:
        self.size, self.bos_id, self.eos_ids = size, 1, frozenset({0})
        self.chat_template = None

    def visible(self, token: int) -> bool:
        return token > 1

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [1] * special + [ord(letter) - 95 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(95 + id) for id in ids if id > 1)
