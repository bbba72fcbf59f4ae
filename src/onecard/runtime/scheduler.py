"""Many requests at once on one stepper: who computes what in the next step, and in which pages.

A request is a row of ids, prompt and reply, of which the first `done` are computed. Its next step computes
all that are left or, of a long prompt, a chunk; when all are computed, the next id is chosen. So a
prompt, a reply, and a request that starts again after it was preempted are one and the same case.

    step     receive, admit, compose, run the stepper, take what it gave
    admit    in order of arrival, while pages for all ids are available (and one for every request that
             runs); pages that hold the same beginning are shared
    compose  replies first, those that waited longest; then prompts in order of arrival. While both want to
             go on, a quarter of the step's tokens is the prompts'
    preempt  when a reply needs a page and there is none, the newest request gives up all its pages and waits
             again, at its place. Nothing else is lost: its ids stay, and so do its draws, which belong
             to places in the reply. The oldest request is never preempted, so the work ends
    steps    a call gives several ids where nobody waits for the scheduler: when there are replies only, for
             about `latency` seconds. What comes behind a stop is dropped
    fail     what goes wrong for one request ends that request, with its error; others do not notice

A request's ids depend on its prompt and settings alone, as long as the stepper keeps its promise (steps.py).

Threads: `add` and `cancel` may be called from any thread at any time and never wait for a step; they take
effect when the next step begins, and a call that chooses several ids is cut short for them.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork, Problem
from onecard.runtime.engine import Request, check
from onecard.runtime.pages import Leak, Pool
from onecard.runtime.reply import Piece, Reply, Result
from onecard.runtime.sample import GREEDY, Logits, Logprobs, Sampling
from onecard.runtime.speculate import NOTHING, Chosen, Lookup, verify
from onecard.runtime.steps import Draw, Fed, Feed, Ids, Stepper

FEW = 4
"""Ids per call at most while a reply is searched for stop strings, as what comes behind one is wasted, and
while guessing may pay, as no guess is made inside a call."""


@dataclass(frozen=True)
class Limits:
    """How much is done at once. None of this changes a reply."""

    tokens: int = 512  # positions in a step
    chunk: int = 256  # positions of one prompt in a step
    running: int = 64  # requests that hold pages
    waiting: int = 512  # requests that wait; more are refused
    steps: int = 16  # ids of each request in a call
    latency: float = 0.05  # seconds of a call that chooses several ids, about
    draft: int = 8  # ids guessed in a step, over all requests; 0: none
    reuse: bool = True  # share pages between requests with the same beginning

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk", "running", "waiting", "steps"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name} is {getattr(self, name)}", do="1 or more is needed")


class Busy(FailedWork):
    """Too many requests wait."""


@dataclass(frozen=True)
class Event:
    """News of a request. The last one carries a result or an error."""

    request: int
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    result: Result | None = None
    error: Problem | None = None

    @property
    def last(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass
class Counts:
    """What happened so far."""

    calls: int = 0
    computed: int = 0  # positions
    chosen: int = 0  # ids that joined a reply
    dropped: int = 0  # ids that came behind a stop
    cached: int = 0  # positions that were shared instead of computed
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Live:
    """A request between its arrival and its end."""

    number: int
    request: Request
    reply: Reply
    table: Ids  # room for all pages it may need
    ends: Ids
    arrived: float  # on the engine's clock
    begun: float | None = None
    pages: list[int] = field(default_factory=list)
    done: int = 0  # positions computed
    known: int = 0  # of the pages, those that the pool knows
    served: int = 0  # the last step that it had a part in
    lookup: Lookup = field(default_factory=Lookup)

    @property
    def pending(self) -> int:
        return len(self.reply.ids) - self.done

    @property
    def positions(self) -> int:
        """That will ever be computed: the last id is not."""
        return len(self.reply.buffer) - 1

    @property
    def held(self) -> Ids:
        return self.table[: len(self.pages)]

    def gain(self, pages: Sequence[int]) -> None:
        self.table[len(self.pages) : len(self.pages) + len(pages)] = pages
        self.pages += pages

    def lose(self) -> list[int]:
        pages, self.pages, self.done, self.known = self.pages, [], 0, 0
        return pages


@dataclass(eq=False)
class Part:
    """What one request does in a step."""

    live: Live
    count: int  # of its pending ids
    draft: Ids = field(default_factory=lambda: NOTHING)  # behind them


class Engine:
    """Requests in, events out. `step` does the work; `generate` and `pieces` call it themselves."""

    def __init__(
        self, stepper: Stepper, tokenizer: Tokenizer, limits: Limits | None = None,
        pool: Pool | None = None,
    ) -> None:  # fmt: skip
        self.stepper, self.tokenizer, self.limits = stepper, tokenizer, limits or Limits()
        self.vocab_size, self.max_context = stepper.vocab_size, stepper.max_context
        self.pool = pool or Pool(stepper.pages, stepper.page_tokens)
        self.counts = Counts()
        self.waiting: list[Live] = []  # by number
        self.running: list[Live] = []  # by number
        self.closed = False
        self._live: dict[int, Live] = {}
        self._numbers = itertools.count()
        self._inbox: deque[Live | int] = deque()
        self._events: list[Event] = []
        self._readers: dict[int, deque[Event]] = {}
        self._cut = np.zeros(1, dtype=np.int32)
        self._lock = threading.Lock()
        self._clock = Clock()
        self._pace = 0.0  # seconds that a pass over replies takes
        self._refused: tuple[int, int] | None = None
        self._turn = 0

    # Any thread ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._inbox or self._events)

    @property
    def _full(self) -> bool:
        return len(self._live) - len(self.running) >= self.limits.waiting

    def check(self, request: Request) -> None:
        """Raises BadRequest for a request that cannot be run, whatever else runs."""
        check(self, request)
        ids = len(request.prompt) + request.sampling.max_tokens
        if self.pool.span(ids - 1) > self.pool.pages:
            raise BadRequest(
                f"{len(request.prompt)} prompt tokens and {request.sampling.max_tokens} new ones do not "
                f"fit the memory for {self.pool.pages * self.pool.page_tokens}",
                do="shorten the prompt, ask for fewer tokens, or give the engine more memory",
            )

    def add(self, request: Request, tokenizer: Tokenizer | None = None) -> int:
        """The request's number. Raises BadRequest, or Busy when too many wait."""
        return self._enter(request, tokenizer, None)

    def _enter(
        self, request: Request, tokenizer: Tokenizer | None, reader: deque[Event] | None
    ) -> int:
        self.check(request)
        if self.closed:
            raise FailedWork("the engine is closed")
        if self._full:
            raise Busy(f"{self.limits.waiting} requests wait already", do="try again later")
        reply = Reply(tokenizer or self.tokenizer, request.prompt, request.sampling)
        table = np.zeros(self.pool.span(len(reply.buffer)), dtype=np.int32)
        ends = np.array(sorted(reply.ends), dtype=np.int32)
        live = Live(next(self._numbers), request, reply, table, ends, self._clock.now())
        if reader is not None:
            self._readers[live.number] = reader
        self._live[live.number] = live
        self._inbox.append(live)
        self._cut[0] = 1
        return live.number

    def cancel(self, number: int) -> None:
        """End a request; one that is over, or never was, stays so."""
        self._inbox.append(number)
        self._cut[0] = 1
        if self._lock.acquire(blocking=False):
            try:
                self._receive()
            finally:
                self._lock.release()

    # The loop ------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One call of the stepper, or none where there is nothing to do; what came of it."""
        with self._lock:
            return self._step()

    def _step(self) -> list[Event]:
        with self._clock:
            self._cut[0] = 0
            self._receive()
            self._admit()
            parts = self._grow(self._compose())
            if parts:
                self._turn += 1
                self._guess(parts)
                parts = [part for part in parts if part.live in self.running]
                self._run(parts, self._steps(parts))
        return self._tell()

    def _receive(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Live):
                bisect.insort(self.waiting, item, key=_number)
                if self.closed:
                    self._fail(item, FailedWork("the engine was closed"))
            elif live := self._live.get(item):
                live.reply.finish = "cancelled"
                self._events.append(Event(live.number, result=live.reply.result()))
                self._end(live)

    def _admit(self) -> None:
        """Those who waited longest get pages, as long as there are enough for all of their ids."""
        while self.waiting and len(self.running) < self.limits.running:
            live, before = self.waiting[0], self.pool.releases
            if self._refused == (live.number, before) and self.running:
                return
            with self._alone(live):
                ids = live.reply.ids
                shared = self.pool.match(ids) if self.limits.reuse else []
                live.gain(shared)
                need = self.pool.span(min(len(ids) + 1, live.positions)) - len(shared)
                if self.running and need + len(self.running) > self.pool.available:
                    self.pool.release(live.lose())
                    self._refused = live.number, self.pool.releases
                    return
                live.gain(self.pool.take(need))
                live.known, live.done = len(shared), len(shared) * self.pool.page_tokens
                self.counts.cached += live.done
                if live.begun is None:
                    live.begun, live.reply.cached = self._clock.now(), live.done
                self.waiting.remove(live)
                bisect.insort(self.running, live, key=_number)

    def _compose(self) -> list[Part]:
        """Who computes how many positions in this step."""
        replies = [live for live in self.running if live.pending == 1]
        prompts = [live for live in self.running if live.pending > 1]
        room = self.limits.tokens
        reserved = (max(1, room // 4) if room > 1 else self._turn % 2) if prompts else 0
        replies.sort(key=lambda live: live.served)  # stable: then by number
        parts = [Part(live, 1) for live in replies[: room - reserved]]
        room -= len(parts)
        for live in prompts:
            count = min(live.pending, self.limits.chunk, room)
            if count:
                parts.append(Part(live, count))
                room -= count
        return parts

    def _grow(self, parts: list[Part]) -> list[Part]:
        """Pages for what is to be computed, if need be from those who came last; the parts that are left."""
        for part in sorted(parts, key=lambda part: part.live.number):
            live = part.live
            if live not in self.running:
                continue
            with self._alone(live):
                need = self.pool.span(live.done + part.count) - len(live.pages)
                while need > self.pool.available and len(self.running) > 1:
                    self._preempt(self.running[-1])
                    if live not in self.running:
                        break
                else:
                    live.gain(self.pool.take(max(0, need)))
        return [part for part in parts if part.live in self.running]

    def _preempt(self, live: Live) -> None:
        self.pool.release(live.lose())
        self.running.remove(live)
        bisect.insort(self.waiting, live, key=_number)
        self.counts.preempted += 1

    def _guess(self, parts: list[Part]) -> None:
        """Drafts for the replies among the parts, where tokens and pages are left for them."""
        replies = [part for part in parts if part.live.pending == 1]
        left = self.limits.tokens - sum(part.count for part in parts)
        far = min(self.limits.draft, left) // max(1, len(replies))
        for part in replies if far else ():
            reply = part.live.reply
            with self._alone(part.live):
                draft = part.live.lookup.draft(reply.ids, min(far, reply.room - 1))
                part.draft = draft[: self._stretch(part.live, len(draft))]

    def _stretch(self, live: Live, positions: int) -> int:
        """How many positions behind a request's ids have pages; they are taken where some are available."""
        ids = len(live.reply.ids)
        need = self.pool.span(ids + positions) - len(live.pages)
        if need > 0:
            live.gain(self.pool.take(min(need, self.pool.available)))
        return min(positions, len(live.pages) * self.pool.page_tokens - ids)

    def _steps(self, parts: list[Part]) -> int:
        """How many ids each request may choose in one call."""
        if len(parts) < len(self.running) or self.waiting or not self._pace:
            return 1
        if any(part.live.pending > 1 or len(part.draft) for part in parts):
            return 1
        most = min(self.limits.steps, max(1, int(self.limits.latency / self._pace)))
        guessing = len(parts) <= min(self.limits.draft, self.limits.tokens - len(parts))
        if any(part.live.reply.sampling.stop for part in parts) or (
            guessing and any(part.live.lookup.tries(part.live.reply.ids) for part in parts)
        ):
            return min(most, FEW)
        return most

    def _run(self, parts: list[Part], steps: int) -> None:
        work = []
        for part in parts:
            with self._alone(part.live):
                work.append((part, self._feed(part, steps)))
        feeds = [feed for _, feed in work]
        if not feeds:
            return
        begin = time.perf_counter()
        try:
            fed = self.stepper.step(feeds, steps, self._cut)
            if len(fed) != len(feeds):
                raise FailedWork(f"{len(feeds)} requests were run", f"{len(fed)} came back")
        except Exception:
            fed = [self._again(feed) for feed in feeds]
        self._pace = (time.perf_counter() - begin) / max([1, *(len(each.ids) for each in fed)])
        self.counts.calls += 1
        for (part, _), each in zip(work, fed, strict=True):
            part.live.served = self._turn
            with self._alone(part.live):
                self._take(part, each)

    def _feed(self, part: Part, steps: int) -> Feed:
        live, reply = part.live, part.live.reply
        ids = reply.ids[live.done : live.done + part.count]
        self.counts.computed += part.count + len(part.draft)
        if len(part.draft):
            return Feed(np.append(ids, part.draft), live.done, live.held, "all")
        if live.pending > part.count:
            return Feed(ids, live.done, live.held)
        most = 1 + self._stretch(live, min(steps, reply.room) - 1)
        return Feed(ids, live.done, live.held, draw=_draw(live, most))

    def _again(self, feed: Feed) -> Fed:
        """A call failed and it is not known for whom: each is tried alone."""
        try:
            (fed,) = self.stepper.step([feed], 1, self._cut)
            return fed
        except Exception as error:
            return Fed(status="failed", seen=f"{type(error).__name__}: {error}")

    def _take(self, part: Part, fed: Fed) -> None:
        """What a step gave to one request."""
        live, reply = part.live, part.live.reply
        before, text = len(reply.new), ""
        if fed.status == "ok" and part.count < live.pending:
            live.done += part.count
            self._learn(live)
            return
        try:
            for id, told in self._chosen(part, fed):
                text += self._add(live, id, told)
                if reply.finish:
                    break
        finally:
            said = len(reply.new) - before
            result = reply.result() if reply.finish else None
            if said:
                live.done = len(reply.ids) - 1
                new, chances = tuple(reply.new[before:]), tuple(reply.logprobs[before:])
                self._events.append(Event(live.number, text, new, chances, result))
            self._count(part, fed, said)
        self._learn(live)
        if result is not None:
            self._end(live)
        elif fed.status == "not numbers":
            raise reply.useless(fed.seen)
        elif fed.status != "ok" or not said:
            raise FailedWork(
                f"the model could not be run at token {len(reply.ids)}", fed.seen or "it gave no id"
            )

    def _chosen(self, part: Part, fed: Fed) -> Iterator[Chosen]:
        if len(part.draft) and fed.status == "ok":
            assert fed.logits is not None
            return verify(part.draft, fed.logits, lambda row: self._choose(part.live, row))
        return itertools.zip_longest(fed.ids, fed.logprobs)

    def _choose(self, live: Live, logits: Logits) -> Chosen:
        fed = self.stepper.choose(logits, _draw(live, 1))
        if fed.status == "not numbers":
            raise live.reply.useless(fed.seen)
        if fed.status != "ok":
            raise FailedWork("no id could be chosen", fed.seen)
        return fed.ids[0], fed.logprobs[0] if fed.logprobs else None

    def _add(self, live: Live, id: int, told: Logprobs | None) -> str:
        if not 0 <= id < self.vocab_size:
            raise FailedWork(f"the model chose the id {id}", f"there are {self.vocab_size}")
        text = live.reply.add(id, told)
        now = self._clock.now()
        live.reply.last = now - live.arrived
        if len(live.reply.new) == 1:
            live.reply.first, live.reply.prefilled = now - live.arrived, now - (live.begun or 0)
        return text

    def _count(self, part: Part, fed: Fed, said: int) -> None:
        self.counts.chosen += said
        if drafted := len(part.draft):
            accepted = max(0, said - 1)
            part.live.lookup.fared(len(part.live.reply.ids), drafted, accepted)
            self.counts.drafted += drafted
            self.counts.accepted += accepted
        else:
            self.counts.dropped += max(0, len(fed.ids) - said)
            self.counts.computed += max(0, len(fed.ids) - 1)

    def _learn(self, live: Live) -> None:
        """The pages that are full now may be shared."""
        while self.limits.reuse and (live.known + 1) * self.pool.page_tokens <= live.done:
            page = self.pool.keep(live.reply.ids, live.pages, live.known)
            live.pages[live.known] = live.table[live.known] = page
            live.known += 1

    def _end(self, live: Live, forget: bool = False) -> None:
        self.pool.release(live.lose(), forget)
        for place in (self.waiting, self.running):
            if live in place:
                place.remove(live)
        del self._live[live.number]

    def _fail(self, live: Live, error: Exception) -> None:
        """What a failed request computed is shared with nobody."""
        if not isinstance(error, Problem):
            failed = FailedWork(
                "the request failed inside the engine", f"{type(error).__name__}: {error}"
            )
            failed.__cause__, error = error, failed
        if live.reply.finish is None:  # else its result is told already
            self._events.append(Event(live.number, error=error))
        self._end(live, forget=True)

    @contextlib.contextmanager
    def _alone(self, live: Live) -> Iterator[None]:
        """An error inside ends this request, and no other."""
        try:
            yield
        except Leak:
            raise
        except Exception as error:
            self._fail(live, error)

    def _tell(self) -> list[Event]:
        events, self._events = self._events, []
        for event in events:
            if event.request in self._readers:
                self._readers[event.request].append(event)
        return events

    # Readers -------------------------------------------------------------------------------------

    def pieces(self, request: Request, tokenizer: Tokenizer) -> Generator[Piece, None, None]:
        """The reply as it becomes certain. Whoever reads does the work for all."""
        number = self._listen(request, tokenizer)
        try:
            while True:
                event = self._hear(number)
                if event.error is not None:
                    raise event.error
                if event.text or event.result is not None:
                    yield Piece(event.text, event.result)
                if event.result is not None:
                    return
        finally:
            self._leave(number)

    def generate(
        self, prompts: Iterable[Sequence[int]], sampling: Sampling | Sequence[Sampling] = GREEDY
    ) -> list[Result | Problem]:
        """A result per prompt, or its error. Raises BadRequest before any work."""
        ids = [tuple(prompt) for prompt in prompts]
        settings = [sampling] * len(ids) if isinstance(sampling, Sampling) else sampling
        asked = [Request(*pair) for pair in zip(ids, settings, strict=True)]
        for request in asked:
            self.check(request)
        numbers: list[int] = []
        try:
            for request in asked:
                while self._full and not self.closed:
                    self.step()
                numbers.append(self._listen(request))
            return [self._outcome(number) for number in numbers]
        finally:
            for number in numbers:
                self._leave(number)

    def _outcome(self, number: int) -> Result | Problem:
        while True:
            event = self._hear(number)
            if outcome := event.result or event.error:
                return outcome

    def _listen(self, request: Request, tokenizer: Tokenizer | None = None) -> int:
        return self._enter(request, tokenizer, deque())

    def _hear(self, number: int) -> Event:
        events = self._readers[number]
        while not events:
            with self._lock:
                if not events:
                    self._step()
        return events.popleft()

    def _leave(self, number: int) -> None:
        del self._readers[number]
        if number in self._live:
            self.cancel(number)

    # -----------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Raises Leak unless every page is accounted for."""
        with self._lock:
            self.pool.audit(live.pages for live in self.running)

    def close(self) -> None:
        """End all requests and give the memory back. Closing twice does no harm."""
        self.closed = True
        self._cut[0] = 1
        with self._lock:
            self._receive()
            for live in list(self._live.values()):
                self._fail(live, FailedWork("the engine was closed"))
            self._tell()
            self.stepper.close()


class Clock:
    """Runs inside `with` only."""

    def __init__(self) -> None:
        self.spent, self.begun = 0.0, 0.0

    def now(self) -> float:
        begun = self.begun
        return self.spent + (time.perf_counter() - begun if begun else 0)

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        self.spent, self.begun = self.now(), 0.0


def _number(live: Live) -> int:
    return live.number


def _draw(live: Live, most: int) -> Draw:
    """How the next ids of a request are chosen."""
    reply = live.reply
    uniforms = reply.uniforms.of(len(reply.new), most)
    return Draw(reply.sampling, reply.ids, reply.prompt, uniforms, live.ends, most)
