"""The scheduler: in whatever company and with however few pages, a request gives what it gives alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA

from onecard.checkpoint.load import load_model
from onecard.core.errors import BadRequest, FailedWork
from onecard.runtime.engine import Request, complete, generate, prompt_ids
from onecard.runtime.fake import Letters, ReferenceStepper
from onecard.runtime.pages import Exhausted, Leak, Pool
from onecard.runtime.reference import TorchExecutor
from onecard.runtime.reply import Reply, Result
from onecard.runtime.sample import Sampling
from onecard.runtime.scheduler import Busy, Engine, Event, Limits
from onecard.runtime.steps import Fed, Feed

SIZE, PAGE = 12, 4
LETTERS = Letters(SIZE)
SLOW = Limits(latency=100)  # never cut short by the clock


def stepper(pages: int = 64, **more: Any) -> ReferenceStepper:
    settings: dict[str, Any] = {"vocab_size": SIZE, "page_tokens": PAGE, "memory": 0.2}
    return ReferenceStepper(pages, **{**settings, **more})


def alone(request: Request, memory: float = 0.2) -> Result:
    """The plain loop: one request, whole prompt at once, one id after the other."""
    network, reply = stepper(512, memory=memory), Reply(LETTERS, request.prompt, request.sampling)
    table, done = np.arange(512, dtype=np.int32), 0
    while not reply.finish:
        logits = network.logits(reply.ids[done:], done, table)
        done = len(reply.ids)
        reply.add(*reply.choose(logits[-1]))
    return reply.result()


def a_request(rng: np.random.Generator) -> Request:
    """Prompts share beginnings; settings are all there are."""
    whole = rng.random() < 0.5
    prompt = [1, *[2, 3, 4, 5, 6, 7] * 3][: rng.integers(1, 19)] if whole else [1]
    prompt += rng.integers(1, SIZE, rng.integers(0, 24 if rng.random() < 0.3 else 5)).tolist()
    sampled = rng.random() < 0.6
    sampling = Sampling(
        max_tokens=int(rng.integers(1, 40 if rng.random() < 0.3 else 12)),
        temperature=float(rng.choice([0.5, 1.0, 2.0])) if sampled else 0.0,
        top_k=int(rng.choice([0, 3])), top_p=float(rng.choice([1.0, 0.8])),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
        presence_penalty=float(rng.choice([0.0, 0.0, 0.5])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.5])),
        seed=int(rng.integers(5)), ignore_eos=bool(rng.random() < 0.6),
        stop=tuple(rng.choice(["b", "cd", "eaf", "jjj"], rng.integers(0, 2)).tolist()),
        logprobs=None if rng.random() < 0.7 else int(rng.integers(0, 3)),
    )  # fmt: skip
    return Request(tuple(prompt), sampling)


@pytest.fixture(scope="module")
def known() -> list[tuple[Request, Result]]:
    """Requests and what they give alone."""
    rng = np.random.default_rng(1)
    requests = [a_request(rng) for _ in range(400)]
    return [(request, alone(request)) for request in requests]


def some_limits(rng: np.random.Generator) -> Limits:
    return Limits(
        tokens=int(rng.choice([1, 2, 3, 5, 8, 40])), chunk=int(rng.choice([1, 3, 8, 40])),
        running=int(rng.choice([1, 2, 4, 16])), steps=int(rng.integers(1, 17)), latency=100,
        draft=int(rng.choice([0, 4, 12])), reuse=bool(rng.random() < 0.8),
    )  # fmt: skip


def check_events(events: list[Event], expected: Result, cancelled: bool) -> None:
    """What was told adds up to the result, and that is what the request gives alone."""
    *_, last = events
    assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
    assert last.error is None and last.result is not None
    result = last.result
    assert sum((event.ids for event in events), ()) == result.ids
    assert "".join(event.text for event in events) == result.text
    assert sum((event.logprobs for event in events), ()) == result.logprobs
    if cancelled and result.finish == "cancelled":
        assert result.ids == expected.ids[: len(result.ids)] != expected.ids
        assert expected.text.startswith(result.text)
    else:
        assert (result.ids, result.text) == (expected.ids, expected.text)
        assert result.finish == expected.finish
        assert result.logprobs == expected.logprobs


def run_schedule(rng: np.random.Generator, known: list[tuple[Request, Result]]) -> Engine:
    pages = int(rng.choice([8, 12, 16, 20, 40]))
    keys = int(rng.integers(1, 4))
    digest = (lambda data: bytes([sum(data) % keys])) if rng.random() < 0.3 else None
    engine = Engine(stepper(pages), LETTERS, some_limits(rng), Pool(pages, PAGE, digest))
    fit = [
        pair
        for pair in known
        if len(pair[0].prompt) + pair[0].sampling.max_tokens - 1 <= pages * PAGE
    ]
    chosen = rng.choice(len(fit), int(rng.integers(1, 9)))
    arrivals = sorted(int(turn) for turn in rng.integers(0, 12, len(chosen)))
    waiting = list(zip(arrivals, (fit[at] for at in chosen), strict=True))
    expected: dict[int, Result] = {}
    told: dict[int, list[Event]] = {}
    cancelled = set()
    for turn in itertools.count():
        while waiting and waiting[0][0] <= turn:
            request, result = waiting.pop(0)[1]
            number = engine.add(request)
            expected[number], told[number] = result, []
        if expected and rng.random() < 0.03:
            number = int(rng.choice(list(expected)))
            engine.cancel(number)
            cancelled.add(number)
        for event in engine.step():
            told[event.request].append(event)
        engine.audit()
        if not waiting and not engine.busy:
            break
        assert turn < 3000, "it never ends"
    for number, events in told.items():
        check_events(events, expected[number], number in cancelled)
    assert engine.pool.available == pages and not engine.running and not engine.waiting
    return engine


@pytest.mark.parametrize("seed", range(20))
def test_company_changes_nothing(seed: int, known: list[tuple[Request, Result]]) -> None:
    """Many schedules each: arrivals, lengths, cancels, few pages, collisions, all limits."""
    rng = np.random.default_rng(seed)
    total: dict[str, int] = {}
    for _ in range(80):
        for name, count in vars(run_schedule(rng, known).counts).items():
            total[name] = total.get(name, 0) + count
    assert all(total.values()), f"something never happened: {total}"


def test_the_fake_notices_what_it_should() -> None:
    """Logits change with any earlier id, and with any page of the table."""
    row, table = np.arange(1, 12, dtype=np.int32), np.arange(8, dtype=np.int32)
    network = stepper(8, memory=1.0)
    whole = network.logits(row, 0, table)
    network.logits(row[:5], 0, table)
    np.testing.assert_array_equal(network.logits(row[5:], 5, table), whole[5:])
    for place in range(10):
        other = row.copy()
        other[place] = 0
        assert (network.logits(other, 0, table)[-1] != whole[-1]).any()
    network.logits(row[:10], 0, table)
    for place in range(2):
        wrong = table.copy()
        wrong[place] = 7
        assert (network.logits(row[10:], 10, wrong) != whole[10:]).any()


# What a user sees --------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_prompts(known: list[tuple[Request, Result]]) -> None:
    engine = Engine(stepper(40), LETTERS, replace(SLOW, waiting=3, running=4))
    asked = known[:40]
    results = engine.generate([r.prompt for r, _ in asked], [r.sampling for r, _ in asked])
    for result, (_, expected) in zip(results, asked, strict=True):
        assert isinstance(result, Result)
        assert (result.ids, result.text) == (expected.ids, expected.text)
    assert not engine.busy and engine.pool.available == 40


def test_generate_and_complete_work_over_both_kinds() -> None:
    engine = Engine(stepper(memory=1.0), LETTERS, SLOW)
    s = Sampling(max_tokens=30, ignore_eos=True)
    expected = alone(Request((1, 2, 3), s), memory=1.0)
    result = complete(engine, LETTERS, [1, 2, 3], s)
    assert (result.ids, result.text, result.new_tokens) == (expected.ids, expected.text, 30)
    pieces = list(generate(engine, LETTERS, [1, 2, 3], s))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert pieces[-1].result is not None and all(piece.text for piece in pieces[:-1])


def test_readers_take_turns() -> None:
    engine = Engine(stepper(memory=1.0), LETTERS, Limits(steps=1))
    runs = [
        ([1, 2], Sampling(max_tokens=20)),
        ([1, 3, 4], Sampling(max_tokens=9, temperature=1, seed=4)),
    ]
    turns = itertools.zip_longest(*(generate(engine, LETTERS, ids, s) for ids, s in runs))
    last = [[p for p in pieces if p][-1].result for pieces in zip(*turns, strict=True)]
    assert [r.ids for r in last if r] == [alone(Request(tuple(i), s), 1.0).ids for i, s in runs]


def test_a_reader_who_leaves_frees_its_pages() -> None:
    engine = Engine(stepper(), LETTERS, Limits(steps=1))
    pieces = generate(engine, LETTERS, [1, 2, 3], Sampling(max_tokens=100, ignore_eos=True))
    next(pieces)
    assert engine.running
    pieces.close()
    assert not engine.running and engine.pool.available == 64
    assert [event.last for event in engine.step()] == [True]
    generate(engine, LETTERS, [1, 2, 3], Sampling(max_tokens=9))  # never read: nothing is begun
    assert engine.step() == [] and not engine.busy


def test_the_result_adds_up() -> None:
    engine = Engine(stepper(memory=1.0), LETTERS, SLOW)
    prompt = list(range(1, 12)) * 3
    result = complete(engine, LETTERS, prompt, Sampling(max_tokens=20, ignore_eos=True, logprobs=2))
    assert (result.new_tokens, result.prompt_tokens, result.finish) == (20, 33, "length")
    assert result.decode_tokens_per_second is not None and result.decode_tokens_per_second > 0
    assert result.time_to_first_token >= result.prompt_tokens / result.prompt_tokens_per_second > 0
    assert [told.id for told in result.logprobs] == list(result.ids)
    assert all(
        told.top[0] == (told.id, told.logprob) and len(told.top) == 2 for told in result.logprobs
    )
    assert result.cached_tokens == 0
    again = complete(engine, LETTERS, prompt, Sampling(max_tokens=20, ignore_eos=True))
    assert (again.ids, again.cached_tokens, again.logprobs) == (result.ids, 32, ())


def test_clocks_do_not_run_while_the_reader_dawdles() -> None:
    engine = Engine(stepper(), LETTERS, Limits(steps=1))
    result = None
    for piece in generate(engine, LETTERS, [1, 2], Sampling(max_tokens=8, ignore_eos=True)):
        result = piece.result
        time.sleep(0.03)
    assert result is not None and result.decode_tokens_per_second is not None
    assert 7 / result.decode_tokens_per_second < 0.1


def test_a_beginning_is_computed_once() -> None:
    """Whole pages of a common prompt, of a reply that became a prompt, and nothing behind a stop."""
    engine = Engine(stepper(memory=1.0), LETTERS, SLOW)
    first = complete(
        engine, LETTERS, [1, *range(2, 12)] * 4, Sampling(max_tokens=9, ignore_eos=True)
    )
    computed = engine.counts.computed
    talk = [1, *range(2, 12)] * 4 + list(first.ids) + [5, 5]
    complete(engine, LETTERS, talk, Sampling(max_tokens=1))
    assert engine.counts.cached == 52 and engine.counts.computed == computed + len(talk) - 52
    engine.audit()


def test_what_comes_behind_a_stop_is_not_kept() -> None:
    engine = Engine(stepper(memory=1.0), LETTERS, replace(SLOW, draft=0))
    prompt = (1, 2, 3)
    free = alone(Request(prompt, Sampling(max_tokens=40, ignore_eos=True)), 1.0)
    stop = free.text[1:8]
    complete(engine, LETTERS, [1], Sampling(max_tokens=3, ignore_eos=True))  # the pace is known
    s = Sampling(max_tokens=40, ignore_eos=True, stop=(stop,))
    result = complete(engine, LETTERS, prompt, s)
    assert result.text == free.text[:1] and result.finish == "stop"
    ids = len(prompt) + len(result.ids)
    kept = [
        known for known in engine.pool.known if known and np.frombuffer(known.ids, np.int32)[0] == 1
    ]
    assert kept and sum(k is not None for k in engine.pool.known) == (ids - 1) // PAGE
    assert engine.counts.dropped > 0


def test_neither_replies_nor_prompts_starve() -> None:
    """Ten endless replies and a budget of four: a prompt behind them gets its turn, and they get theirs."""
    engine = Engine(stepper(512), LETTERS, Limits(tokens=4, draft=0, latency=100))
    endless = Sampling(max_tokens=300, ignore_eos=True)
    numbers = [engine.add(Request((1, at), endless)) for at in range(2, 12)]
    told: dict[int, list[int]] = {}
    for turn in range(200):
        if turn == 60:
            numbers.append(
                engine.add(Request((1, 2) * 20, Sampling(max_tokens=5, ignore_eos=True)))
            )
        for event in engine.step():
            told.setdefault(event.request, []).append(turn)
    assert len(told[numbers[-1]]) == 5 and told[numbers[-1]][0] <= 60 + 45
    for number in numbers[:-1]:
        assert np.diff(told[number]).max() <= 5
    engine.close()


def test_a_prompt_of_one_token_at_a_time_comes_through() -> None:
    engine = Engine(stepper(512), LETTERS, Limits(tokens=1, draft=0))
    engine.add(Request((1, 2), Sampling(max_tokens=400, ignore_eos=True)))
    for _ in range(5):
        engine.step()
    other = engine.add(Request((1, 2, 3) * 5, Sampling(max_tokens=2, ignore_eos=True)))
    turns = [turn for turn in range(60) for event in engine.step() if event.request == other]
    assert len(turns) == 2 and turns[-1] < 40
    engine.close()


def test_the_oldest_is_never_preempted() -> None:
    engine = Engine(stepper(20), LETTERS, Limits(draft=0, steps=4, latency=100))
    endless = Sampling(max_tokens=60, ignore_eos=True)
    numbers = [engine.add(Request((1, at), endless)) for at in range(2, 8)]
    over = [event.request for _ in range(1000) for event in engine.step() if event.last]
    assert over == numbers and engine.counts.preempted > 0 and not engine.busy
    engine.audit()


def test_calls_are_long_only_when_nobody_waits() -> None:
    spy = Spy(stepper(512))
    engine = Engine(spy, LETTERS, Limits(latency=100, draft=0, steps=8, running=2))
    s = Sampling(max_tokens=60, ignore_eos=True)
    for _ in range(2):
        engine.add(Request((1, 2), s))
    for _ in range(3):
        engine.step()
    assert spy.steps == [1, 8, 8]  # the first measures
    third = engine.add(Request((1, 2), s))
    engine.step()
    assert spy.steps[-1] == 1
    engine.cancel(third)
    engine.step()
    assert spy.steps[-1] == 8
    engine.close()
    spy = Spy(stepper(512))
    engine = Engine(spy, LETTERS, Limits(latency=0.01, draft=0, steps=8))
    spy.before = lambda batch: time.sleep(0.004 * spy.steps[-1])
    engine.generate([[1, 2]], s)
    assert max(spy.steps) == 2
    spy.before, spy.steps = lambda batch: None, []
    engine.generate([[1, 2]], replace(s, stop=("qqq",)))
    assert 1 < max(spy.steps) <= 4


# What goes wrong ---------------------------------------------------------------------------------


class Spy:
    """A stepper with a look, and a hand, into its calls."""

    def __init__(self, inner: ReferenceStepper) -> None:
        self.inner = inner
        self.vocab_size, self.max_context = inner.vocab_size, inner.max_context
        self.pages, self.page_tokens = inner.pages, inner.page_tokens
        self.choose = inner.choose
        self.steps: list[int] = []
        self.before: Callable[[Sequence[Feed]], object] = lambda batch: None
        self.after: Callable[[Feed, Fed], Fed] = lambda feed, fed: fed

    def step(self, batch: Sequence[Feed], steps: int, cancel: np.ndarray) -> list[Fed]:
        self.steps.append(steps)
        self.before(batch)
        fed = self.inner.step(batch, steps, cancel)
        return [self.after(*pair) for pair in zip(batch, fed, strict=True)]

    def close(self) -> None:
        self.inner.close()


GOOD = [Request((1, 2, at), Sampling(max_tokens=20, ignore_eos=True)) for at in range(3, 9)]
BAD = Request((1, 11, 11, 11), Sampling(max_tokens=20, ignore_eos=True))


def check_failure(engine: Engine, said: str, bad: Request = BAD) -> list[Any]:
    """The bad one of seven fails, with these words; the others give what they always give."""
    requests = [*GOOD[:3], bad, *GOOD[3:]]
    results = engine.generate([r.prompt for r in requests], [r.sampling for r in requests])
    failed = results.pop(3)
    assert isinstance(failed, FailedWork) and said in str(failed), failed
    assert [r.ids for r in results if isinstance(r, Result)] == [alone(r).ids for r in GOOD]
    engine.audit()
    assert engine.pool.available == engine.pool.pages and not engine.busy
    return results


def is_bad(feed: Feed) -> bool:
    return 11 in feed.ids.tolist() and feed.past == 0


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("steps", [1, 5])
def test_logits_that_are_no_numbers_fail_one(at: int, steps: int) -> None:
    spy = Spy(stepper())

    def after(feed: Feed, fed: Fed) -> Fed:
        draw = feed.draw
        if draw is None or draw.previous[:2].tolist() != [1, 11]:
            return fed
        left = at - (len(draw.previous) - draw.prompt)
        if left >= len(fed.ids):
            return fed
        return Fed(fed.ids[: max(0, left)], status="not numbers", seen="50 are NaN")

    spy.after = after
    check_failure(
        Engine(spy, LETTERS, Limits(steps=steps, latency=100, draft=0)), f"step {at} are not"
    )


def test_the_logits_of_a_draft_are_checked() -> None:
    spy = Spy(stepper(memory=0.05))
    requests = [Request((1, 2, 3, 4) * 4, Sampling(max_tokens=30, ignore_eos=True))]

    def after(feed: Feed, fed: Fed) -> Fed:
        if feed.want == "all" and fed.logits is not None:
            fed.logits[0] = np.nan
        return fed

    engine = Engine(spy, LETTERS)
    assert isinstance(engine.generate([requests[0].prompt], requests[0].sampling)[0], Result)
    spy.after = after
    (failed,) = engine.generate([requests[0].prompt], requests[0].sampling)
    assert isinstance(failed, FailedWork) and "12 are NaN" in str(failed)
    engine.audit()


def test_what_a_failed_request_computed_is_not_shared() -> None:
    spy = Spy(stepper())
    engine = Engine(spy, LETTERS, Limits(chunk=4))
    spy.after = lambda feed, fed: fed if feed.draw is None else Fed(status="not numbers")
    prompt = [1, *[2, 3] * 10]
    assert isinstance(engine.generate([prompt], Sampling(max_tokens=9))[0], FailedWork)
    assert not any(engine.pool.known) and len(engine.pool.free) == 64


@pytest.mark.parametrize("error", [RuntimeError("kernel"), MemoryError(), ValueError("odd")])
def test_a_call_that_raises_fails_only_whose_fault_it_is(error: Exception) -> None:
    spy = Spy(stepper())

    def before(batch: Sequence[Feed]) -> None:
        if any(map(is_bad, batch)):
            raise error

    spy.before = before
    check_failure(Engine(spy, LETTERS, SLOW), type(error).__name__)


def test_a_call_that_raises_once_fails_nobody() -> None:
    for call in range(1, 12):
        spy = Spy(stepper())

        def before(batch: Sequence[Feed], spy: Spy = spy, call: int = call) -> None:
            if len(spy.steps) == call:
                raise RuntimeError("once")

        spy.before = before
        engine = Engine(spy, LETTERS, replace(SLOW, chunk=2))
        results = engine.generate([r.prompt for r in GOOD], [r.sampling for r in GOOD])
        assert [r.ids for r in results if isinstance(r, Result)] == [alone(r).ids for r in GOOD]


def test_a_dead_stepper_fails_everybody_and_ends() -> None:
    spy = Spy(stepper())

    def before(batch: Sequence[Feed]) -> None:
        if len(spy.steps) > 4:
            raise RuntimeError("dead")

    spy.before = before
    engine = Engine(spy, LETTERS, Limits(steps=1, draft=0))
    for _ in range(2):
        results = engine.generate([r.prompt for r in GOOD], [r.sampling for r in GOOD])
        assert all(isinstance(r, FailedWork) and "dead" in str(r) for r in results)
        engine.audit()
    with pytest.raises(FailedWork, match="dead"):
        complete(engine, LETTERS, [1, 2], Sampling(max_tokens=9))


@pytest.mark.parametrize(
    ("fed", "said"),
    [
        (Fed(), "gave no id"),
        (Fed((99,)), "chose the id 99"),
        (Fed((-1,)), "chose the id -1"),
        (Fed(status="failed", seen="no scratch memory"), "no scratch memory"),
    ],
)
def test_an_answer_that_makes_no_sense_fails_one(fed: Fed, said: str) -> None:
    spy = Spy(stepper())
    spy.after = lambda feed, good: fed if is_bad(feed) else good
    check_failure(Engine(spy, LETTERS, SLOW), said)


def test_too_few_answers() -> None:
    spy = Spy(stepper())
    inner = spy.inner.step
    spy.inner.step = lambda batch, *more: inner(batch, *more)[:1]  # type: ignore[method-assign]
    engine = Engine(spy, LETTERS, SLOW)
    results = engine.generate([r.prompt for r in GOOD[:2]], GOOD[0].sampling)
    assert [r.ids for r in results if isinstance(r, Result)] == [alone(r).ids for r in GOOD[:2]]


class Poor(Pool):
    """A pool that fails at one of its calls."""

    fail_at, error = -1, Exception()

    def take(self, count: int) -> list[int]:
        self.fail_at -= count > 0
        if count and self.fail_at == 0:
            raise self.error
        return super().take(count)


@pytest.mark.parametrize("call", range(1, 21))
def test_an_allocation_that_fails_fails_one(call: int) -> None:
    engine = Engine(stepper(24), LETTERS, SLOW, Poor(24, PAGE))
    engine.pool.fail_at = call  # type: ignore[attr-defined]
    engine.pool.error = [Exhausted("no page"), MemoryError("no page")][call % 2]  # type: ignore[attr-defined]
    results = engine.generate([r.prompt for r in GOOD], [r.sampling for r in GOOD])
    failed = [r for r in results if not isinstance(r, Result)]
    assert len(failed) == 1 and "no page" in str(failed[0])
    for request, result in zip(GOOD, results, strict=True):
        assert not isinstance(result, Result) or result.ids == alone(request).ids
    engine.audit()
    assert engine.pool.available == 24


def test_every_request_ends_once_whatever_fails() -> None:
    """Books that fail when a page becomes known, at any call, the last of a reply too."""

    class Forgetful(Pool):
        left = 0

        def keep(self, *given: Any) -> int:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no page")
            return super().keep(*given)

    for call in range(1, 30):
        engine = Engine(stepper(), LETTERS, SLOW, Forgetful(64, PAGE))
        engine.pool.left = call  # type: ignore[attr-defined]
        numbers = [engine.add(request) for request in GOOD]
        told = []
        while engine.busy:
            told += engine.step()
            engine.audit()
        assert sorted(event.request for event in told if event.last) == numbers
        assert sum(event.error is not None for event in told) <= 1


def test_a_tokenizer_that_fails_fails_one() -> None:
    class Broken(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            raise RuntimeError("no such letter")

    engine = Engine(stepper(), LETTERS, SLOW)
    good = engine.add(GOOD[0])
    bad = engine.add(BAD, Broken(SIZE))  # type: ignore[arg-type]
    last = {event.request: event for _ in range(60) for event in engine.step() if event.last}
    assert "no such letter" in str(last[bad].error)
    assert last[good].result is not None and last[good].result.ids == alone(GOOD[0]).ids
    engine.audit()


@pytest.mark.parametrize(
    ("prompt", "tokens", "said"),
    [
        ([], 1, "prompt is empty"),
        ([SIZE], 1, "holds the id 12"),
        ([-1], 1, "holds the id -1"),
        ([True], 1, "holds the id True"),
        (["a"], 1, "holds the id a"),
        ([1] * 100, 1, "100 prompt tokens and 1 new ones do not fit a context of 100"),
        ([1] * 200, 7, "200 prompt tokens and 7 new ones do not fit a context of 100"),
        ([1] * 60, 21, "60 prompt tokens and 21 new ones do not fit the memory for 76"),
    ],
)
def test_impossible_requests_are_refused_at_once(prompt: list[Any], tokens: int, said: str) -> None:
    engine = Engine(stepper(19, max_context=100), LETTERS)
    s = Sampling(max_tokens=tokens)
    for ask in (
        lambda: engine.add(Request(tuple(prompt), s)),
        lambda: engine.generate([[1], prompt], s),
        lambda: generate(engine, LETTERS, prompt, s),
    ):
        with pytest.raises(BadRequest, match=said):
            ask()
    assert not engine.busy


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_ids_of_numpy_are_ids(kind: type) -> None:
    engine = Engine(stepper(19, max_context=100), LETTERS)
    wanted, found = engine.generate([[1, 2, 3], np.array([1, 2, 3], kind)], Sampling(max_tokens=5))
    assert isinstance(wanted, Result) and isinstance(found, Result) and found.ids == wanted.ids


@pytest.mark.parametrize(("prompt", "tokens"), [(60, 17), (76, 1), (1, 76)])
def test_what_just_fits_is_run(prompt: int, tokens: int) -> None:
    engine = Engine(stepper(19, max_context=100), LETTERS, SLOW)
    result = complete(engine, LETTERS, [1] * prompt, Sampling(max_tokens=tokens, ignore_eos=True))
    assert result.new_tokens == tokens


@pytest.mark.parametrize("name", ["tokens", "chunk", "running", "waiting", "steps"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        Limits(**{name: 0})


def test_a_full_queue_refuses() -> None:
    engine = Engine(stepper(), LETTERS, Limits(waiting=2, running=1))
    for _ in range(2):
        engine.add(GOOD[0])
    with pytest.raises(Busy, match="2 requests wait"):
        engine.add(GOOD[0])
    engine.step()
    engine.add(GOOD[0])
    with pytest.raises(Busy):
        engine.add(GOOD[0])
    engine.close()


# Ends --------------------------------------------------------------------------------------------


def test_cancelling_at_any_moment_frees_everything() -> None:
    whole = alone(BAD)
    for moment in range(30):
        engine = Engine(stepper(), LETTERS, Limits(chunk=1, steps=1, running=2))
        for request in GOOD[:2]:
            engine.add(request)
        number = engine.add(BAD)
        told = [event for _ in range(moment) for event in engine.step()]
        engine.cancel(number)
        engine.cancel(number)
        engine.cancel(12345)
        held = [live.number for live in engine.running + engine.waiting]
        assert number not in held
        engine.audit()
        told += [event for _ in range(100) for event in engine.step()]
        mine = [event for event in told if event.request == number]
        assert sum(event.last for event in mine) == 1
        check_events(mine, whole, True)
        assert engine.pool.available == 64 and not engine.busy


def test_a_storm_of_cancels() -> None:
    engine = Engine(stepper(64), LETTERS, Limits(waiting=10_000, running=8))
    rng = np.random.default_rng(0)
    for turn in range(3000):
        number = engine.add(GOOD[turn % len(GOOD)])
        if turn % 10 == 0:
            engine.step()
        engine.cancel(number if rng.random() < 0.9 else int(rng.integers(number + 1)))
    while engine.busy:
        engine.step()
    engine.audit()
    assert engine.pool.available == 64 and not engine._live and not engine._readers


def test_closing_ends_all_that_is_left() -> None:
    inner = stepper()
    engine = Engine(inner, LETTERS, Limits(running=2))
    pieces = generate(engine, LETTERS, [1, 2, 3], Sampling(max_tokens=100, ignore_eos=True))
    next(pieces)
    for request in GOOD:
        engine.add(request)
    engine.close()
    engine.close()
    engine.audit()
    assert inner.closed and engine.pool.available == 64
    with pytest.raises(FailedWork, match="closed"):
        list(pieces)
    with pytest.raises(FailedWork, match="closed"):
        engine.add(GOOD[0])
    assert engine.step() == [] and not engine.busy
    late = Engine(stepper(), LETTERS)
    late.add(GOOD[0])
    late.closed = True  # by another thread, at this moment
    (event,) = late.step()
    assert "closed" in str(event.error) and not late.busy


def test_another_thread_cuts_a_long_call_short() -> None:
    spy = Spy(stepper(memory=1.0))
    engine = Engine(spy, LETTERS, Limits(steps=16, latency=100, draft=0))
    first = engine.add(Request((1, 2), Sampling(max_tokens=100, ignore_eos=True)))
    engine.step()
    engine.step()
    arrived = []

    def before(batch: Sequence[Feed]) -> None:
        if not arrived:
            thread = threading.Thread(target=lambda: arrived.append(engine.add(GOOD[0])))
            thread.start()
            thread.join()

    spy.before = before
    (event,) = engine.step()
    assert spy.steps[-1] == 16 and (event.request, len(event.ids)) == (first, 1)
    assert arrived[0] in [event.request for event in engine.step()]
    engine.close()


def test_readers_on_many_threads(known: list[tuple[Request, Result]]) -> None:
    engine = Engine(stepper(40), LETTERS, SLOW)
    wrong = []

    def read(part: list[tuple[Request, Result]]) -> None:
        for request, expected in part:
            result = complete(engine, LETTERS, request.prompt, request.sampling)
            if result.ids != expected.ids or result.text != expected.text:
                wrong.append(request)

    threads = [
        threading.Thread(target=read, args=(known[at : at + 12],)) for at in range(0, 72, 12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not engine.busy and engine.pool.available == 40
    engine.audit()


def test_a_leak_is_loud() -> None:
    engine = Engine(stepper(), LETTERS, Limits(steps=1))
    engine.add(GOOD[0])
    engine.step()
    engine.audit()
    engine.pool.held[engine.running[0].pages[0]] = 0
    with pytest.raises(Leak):
        engine.audit()


# A real model ------------------------------------------------------------------------------------


class Recomputing:
    """A stepper over a network that keeps ids in its pages and computes everything anew."""

    def __init__(self, model: Any, pages: int) -> None:
        self.network, self.fake = model.network, ReferenceStepper(pages, 8, model.spec.vocab_size)
        self.vocab_size, self.max_context = model.spec.vocab_size, model.spec.max_context
        self.pages, self.page_tokens = pages, 8
        self.fake.max_context = self.max_context
        self.fake.logits = self.logits  # type: ignore[method-assign]
        self.step, self.choose, self.close = self.fake.step, self.fake.choose, self.fake.close

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, past: int, table: np.ndarray) -> np.ndarray:
        place = np.arange(past, past + len(ids))
        cells = self.fake.cells[0]
        cells[table[place // 8], place % 8] = ids
        row = cells[table].reshape(-1)[: past + len(ids)].astype(np.int64)
        return self.network(torch.from_numpy(row)[None])[0, past:].numpy()


def test_a_real_model_says_what_it_says_alone() -> None:
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    model = load_model(DATA / "stories260K")
    tok = model.tokenizer
    asked = [
        (text, Sampling(max_tokens=24, temperature=t, seed=3, stop=stop))
        for text, t, stop in (("Once upon a time", 0, ()), ("Once upon a day", 1.0, ()), ("从前", 0, ()),
                              ("Lily and Tom", 0, (" and",)))
    ]  # fmt: skip
    engine = Engine(Recomputing(model, 24), tok, Limits(chunk=5, latency=100))
    results = engine.generate([prompt_ids(tok, text) for text, _ in asked], [s for _, s in asked])
    executor = TorchExecutor(model)
    for (text, s), result in zip(asked, results, strict=True):
        plain = complete(executor, tok, prompt_ids(tok, text), s)
        assert isinstance(result, Result)
        assert (result.ids, result.text, result.finish) == (plain.ids, plain.text, plain.finish)
    engine.audit()
