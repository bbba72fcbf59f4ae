"""Guessing ahead: the same ids, fewer calls; and it stops where it does not pay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onecard.runtime.engine import Request
from onecard.runtime.fake import Letters, ReferenceStepper
from onecard.runtime.reply import Reply, Result
from onecard.runtime.sample import Sampling, choose, generator
from onecard.runtime.scheduler import Engine, Limits
from onecard.runtime.speculate import (
    LONG_PAUSE,
    LONGEST,
    SHORT_PAUSE,
    SHORTEST,
    Lookup,
    lookup,
    verify,
)
from onecard.runtime.steps import Fed, Feed

SIZE = 12
LETTERS = Letters(SIZE)


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text], dtype=np.int32)


# Drafts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "draft"),
    [
        ("", 4, ""),
        ("a", 4, ""),
        ("ab", 4, ""),
        ("abcd", 4, ""),
        ("aa", 4, ""),
        ("aaa", 4, "aaaa"),
        ("abxyab", 3, "xya"),
        ("abxyab", 1, "x"),
        ("abxyab", 9, "xyabxyabx"),  # in circles
        ("abXcabYcab", 2, "Yc"),  # the last occurrence
        ("zabXcabYzab", 1, "X"),  # but rather the longer match
        ("1234X234Y1234", 1, "X"),
        ("abc x bc y abc", 2, " x"),
    ],
)
def test_what_followed_last_time(text: str, most: int, draft: str) -> None:
    found = lookup(ids(text), most)
    assert found.dtype == np.int32 and "".join(map(chr, found)) == draft


@given(text=st.text("abc", max_size=40), most=st.integers(1, 12))
def test_lookup_equals_plain_search(text: str, most: int) -> None:
    def plain() -> str:
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = text.rfind(text[-size:], 0, len(text) - 1) if size < len(text) else -1
            if at >= 0:
                follows = text[at + size :]
                return (follows * most)[:most]
        return ""

    assert "".join(map(chr, lookup(ids(text), most))) == plain()


def test_what_comes_true_reaches_further() -> None:
    circle, guess = ids("abcd" * 20), Lookup()
    lengths = []
    for _ in range(6):
        draft = guess.draft(circle, 100)
        lengths.append(len(draft))
        guess.fared(len(circle), len(draft), len(draft))
    assert lengths == [4, 8, 16, 32, 64, 64]
    guess.fared(80, 64, 5)
    assert len(guess.draft(circle, 100)) == 6 and len(guess.draft(circle, 3)) == 3
    assert len(guess.draft(circle, 0)) == 0


def test_what_never_comes_true_pauses_longer_and_longer() -> None:
    guess, row, tried, pauses = Lookup(), ids("ab" * 3000), [], []
    for length in range(10, 3000):
        draft = guess.draft(row[:length], 8)
        if len(draft):
            tried.append(length)
            guess.fared(length, len(draft), 0)
    pauses = [b - a for a, b in itertools.pairwise(tried) if b - a > 1]
    assert pauses[:6] == [SHORT_PAUSE, 32, 64, 128, LONG_PAUSE, LONG_PAUSE]
    assert len(tried) < 60
    for length in range(3000, 4000):  # and comes back when it pays again
        if len(draft := guess.draft(row[:length], 8)):
            guess.fared(length, len(draft), len(draft))
    assert guess.tries(row[:4000]) and guess.pause == SHORT_PAUSE and guess.share > 0.9


# Verification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_verification_chooses_as_the_plain_loop_does(temperature: float, right: int) -> None:
    rng = np.random.default_rng(right)
    rows = rng.normal(size=(6, SIZE)).astype(np.float32) * 2
    s = Sampling(temperature=temperature, seed=5, repetition_penalty=1.2, frequency_penalty=0.3,
                 logprobs=1, ignore_eos=True)  # fmt: skip
    plain, draws, expected = [1, 2, 3], generator(s), []
    for row in rows:
        expected.append(choose(row, plain, s, draws, 3))
        plain.append(expected[-1])
    draft = np.array(expected[:5], dtype=np.int32)
    if right < 5:
        draft[right] = (draft[right] + 1) % SIZE
    reply = Reply(LETTERS, (1, 2, 3), s)  # type: ignore[arg-type]
    for id, told in verify(draft, rows, reply.choose):
        reply.add(id, told)
    assert reply.new == expected[: right + 1]
    assert [told.id for told in reply.logprobs] == reply.new


# In the scheduler --------------------------------------------------------------------------------


class Counting:
    """How many calls, and how many rows in them."""

    def __init__(self, memory: float, pages: int = 64) -> None:
        self.inner = ReferenceStepper(pages, 4, SIZE, memory=memory)
        self.vocab_size, self.max_context, self.pages, self.page_tokens = SIZE, 512, pages, 4
        self.calls, self.rows = 0, []
        self.choose, self.close = self.inner.choose, self.inner.close

    def step(self, batch: Sequence[Feed], steps: int, cancel: np.ndarray) -> list[Fed]:
        self.calls += 1
        self.rows.append(sum(len(feed.ids) for feed in batch))
        return self.inner.step(batch, steps, cancel)


def said(
    memory: float, prompts: list[list[int]], s: Sampling, **limits: Any
) -> tuple[list[Any], Engine]:
    engine = Engine(Counting(memory), LETTERS, Limits(**{"steps": 1, **limits}))  # type: ignore[arg-type]
    results = engine.generate(prompts, s)
    engine.audit()
    assert engine.pool.available == 64
    return [(r.ids, r.text, r.logprobs, r.finish) for r in results if isinstance(r, Result)], engine


@pytest.mark.parametrize("memory", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.5])
def test_on_and_off_say_the_same(memory: float, temperature: float) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        prompts = [
            rng.integers(1, SIZE, int(rng.integers(1, 30))).tolist() for _ in range(1 + seed % 4)
        ]
        s = Sampling(
            max_tokens=int(rng.integers(1, 60)), temperature=temperature, seed=seed, logprobs=seed % 3,
            repetition_penalty=1.0 + 0.2 * (seed % 2), ignore_eos=bool(seed % 3),
            stop=("cab", "fj")[: seed % 3],
        )  # fmt: skip
        off, _ = said(memory, prompts, s, draft=0)
        for draft in (1, 3, 16):
            assert said(memory, prompts, s, draft=draft, steps=1 + seed)[0] == off


def test_what_repeats_takes_fewer_calls() -> None:
    s = Sampling(max_tokens=200, ignore_eos=True)
    off, slow = said(0.0, [[1, 2, 3]], s, draft=0)
    on, fast = said(0.0, [[1, 2, 3]], s, draft=8)
    assert on == off
    assert slow.counts.calls == 200 and fast.counts.calls < 50
    assert fast.counts.accepted > 150 and fast.counts.chosen == 200


def test_noise_costs_little() -> None:
    s = Sampling(max_tokens=250, temperature=2.0, seed=0, ignore_eos=True)
    _, engine = said(1.0, [[1, 2, 3]], s, draft=8)
    assert engine.counts.drafted < 100


def test_a_repeated_prompt_is_drafted_from() -> None:
    """The beginning of the reply already: lookup reads prompts too."""
    whole, _ = said(0.0, [[1, 2, 3]], Sampling(max_tokens=60, ignore_eos=True), draft=0)
    prompt = [1, 2, 3, *whole[0][0]]
    _, engine = said(0.0, [prompt], Sampling(max_tokens=20, ignore_eos=True), draft=16)
    assert engine.counts.calls <= 6


@pytest.mark.parametrize("running", [1, 2, 8])
@pytest.mark.parametrize("draft", [1, 4, 8])
def test_drafts_share_their_budget(running: int, draft: int) -> None:
    stepper = Counting(0.0)
    engine = Engine(stepper, LETTERS, Limits(draft=draft, tokens=12, steps=1))  # type: ignore[arg-type]
    engine.generate(
        [[1, 2, at] for at in range(2, 2 + running)], Sampling(max_tokens=20, ignore_eos=True)
    )
    assert max(stepper.rows) <= 12
    if running > draft:
        assert engine.counts.drafted < draft * engine.counts.calls


def test_no_draft_reaches_beyond_the_last_id() -> None:
    """The fake refuses positions beyond the context; the pool has no page for them either."""
    inner = ReferenceStepper(20, 4, SIZE, max_context=80, memory=0.0)
    ends = []

    class Watched:
        vocab_size, max_context, pages, page_tokens = SIZE, 80, 20, 4
        choose = staticmethod(inner.choose)

        def step(self, batch: Sequence[Feed], *more: Any) -> list[Fed]:
            ends.extend(feed.past + len(feed.ids) for feed in batch)
            return inner.step(batch, *more)

    engine = Engine(Watched(), LETTERS, Limits(draft=16))  # type: ignore[arg-type]
    whole, _ = said(0.0, [[1, 2, 3]], Sampling(max_tokens=140, ignore_eos=True), draft=0)
    prompt = whole[0][0][-72:]  # turns in circles
    (result,) = engine.generate([prompt], Sampling(max_tokens=8, ignore_eos=True))
    assert isinstance(result, Result) and result.new_tokens == 8
    assert engine.counts.drafted > 0 and max(ends) <= 79


@pytest.mark.parametrize("pages", [9, 12, 20])
def test_drafts_never_take_pages_from_others(pages: int) -> None:
    """Few pages, replies in circles, preemption: drafts shrink to what is left."""
    stepper = Counting(0.0, pages)
    engine = Engine(stepper, LETTERS, Limits(draft=32, steps=3))  # type: ignore[arg-type]
    s = Sampling(max_tokens=30, ignore_eos=True)
    requests = [Request((1, 2, at), s) for at in range(2, 8)]
    alone = [said(0.0, [list(r.prompt)], s, draft=0)[0][0][0] for r in requests]
    numbers = [engine.add(request) for request in requests]
    last: dict[int, Result | None] = {}
    while engine.busy:
        for event in engine.step():
            if event.last:
                last[event.request] = event.result
        engine.audit()
    assert [last[number].ids for number in numbers] == alone  # type: ignore[union-attr]
    assert engine.counts.preempted > 0 and engine.counts.accepted > 0


def test_what_was_guessed_wrong_is_not_shared() -> None:
    """Pages that are known hold what was said, although wrong guesses were written to them before."""
    engine = Engine(Counting(0.1), LETTERS, Limits(draft=8))  # type: ignore[arg-type]
    s = Sampling(max_tokens=60, temperature=0.4, seed=2, ignore_eos=True)
    (first,) = engine.generate([[1, 2, 3]], s)
    assert isinstance(first, Result) and engine.counts.drafted > engine.counts.accepted > 0
    talk = [1, 2, 3, *first.ids, 4]
    (shared,) = engine.generate([talk], replace(s, seed=7))
    assert isinstance(shared, Result) and shared.cached_tokens >= 60
    fresh, _ = said(0.1, [talk], replace(s, seed=7), draft=0)
    assert shared.ids == fresh[0][0]
