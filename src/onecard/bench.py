"""How fast a model reads and writes on this processor, beside what the machine could do. No torch.

    prompt N     contexts of N random ids go in, the logits of the last one come out
    decode N     behind contexts of `behind` ids, which are not timed, N ids are chosen one by one, the
                 likeliest each time, in native calls of CALL ids as the scheduler makes them

Ids are drawn anew for every measurement, and nothing is shared between contexts. A figure is the median over
the repeats; where several models or instruction-set classes are compared they take turns, A B A B, and
a ratio is taken inside each turn: what slows the machine for a while slows both.

The roofs are measured in the same minute, before and behind, in a process of their own:

    bandwidth_share    bytes of weights that a step reads * steps per second / speed of reading memory
    operations_share   seconds that the products of a prompt need at the peak of their unit / seconds taken

A step reads every linear once, whatever the batch, the embedding but for its rows, and of experts those
that are expected to be chosen. Keys, values and attention are counted by neither share.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

import numpy as np

from onecard.checkpoint.source import Source
from onecard.core.device import Device, resident, resident_peak
from onecard.core.errors import BadRequest, FailedWork, Problem
from onecard.core.report import Report, Row, environment
from onecard.core.settings import format_size
from onecard.kernels import cpu, forms
from onecard.kernels.structs import PLAIN, SPARSE
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.sample import GREEDY
from onecard.runtime.score import steps
from onecard.runtime.steps import Draw, Fed, Feed, Ids

LEAD, CALL = 8, 16
SPECIAL = 3
"""The first ids, which are not drawn: they begin and end texts."""
NEVER = np.zeros(1, np.int32)
NOTHING = np.empty(0, np.int32)
NEAR = 0.7
"""Share of a roof from which on it is the limit."""
SERVED = 4096
"""Positions that `serve` has memory for."""
USUAL = CpuSettings()

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    prompt: tuple[int, ...] = (128, 512)
    decode: tuple[int, ...] = (128,)
    batch: tuple[int, ...] = (1, 4)
    repeat: int = 3
    behind: int = LEAD  # ids in front of those that are decoded

    def __post_init__(self) -> None:
        for name in ("prompt", "decode", "batch"):
            for value in getattr(self, name):
                if not 1 <= value <= 1 << 20:
                    raise BadRequest(f"{name} is {value}", do="1 to 1048576 is possible")
        if not 1 <= self.behind <= 1 << 20:
            raise BadRequest(f"behind is {self.behind}", do="1 to 1048576 is possible")
        if not 1 <= self.repeat <= 1000:
            raise BadRequest(f"repeat is {self.repeat}", do="1 to 1000 is possible")
        if not (self.prompt or self.decode) or not self.batch:
            raise BadRequest("there is nothing to measure", do="give --prompt or --decode")

    def cases(self) -> list[Case]:
        kinds = [("prompt", n) for n in self.prompt] + [("decode", n) for n in self.decode]
        return [Case(kind, n, batch, self.behind) for kind, n in kinds for batch in self.batch]


@dataclass(frozen=True)
class Case:
    """One measurement: `count` ids of each of `batch` contexts."""

    kind: str
    count: int
    batch: int
    behind: int = LEAD  # ids in front of those that are decoded

    def __str__(self) -> str:
        return f"{self.kind} {self.count}" + (f" x {self.batch}" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        return self.count * self.batch

    @property
    def positions(self) -> int:
        """Of one context."""
        return self.count + (self.behind if self.kind == "decode" else 0)

    @property
    def pages(self) -> int:
        return self.batch * -(-self.positions // CpuStepper.page_tokens)


class Timed:
    """A model that is ready to be measured."""

    def __init__(
        self, model: str | Source, settings: CpuSettings = USUAL, isa: str | None = None
    ) -> None:
        self.source = model if isinstance(model, Source) else Source(model)
        cpu.force_isa(isa)
        try:
            self.stepper = CpuStepper(self.source, settings)
            self.isa = cpu.isa()
        finally:
            cpu.force_isa(None)
        self.threads, self.rows = self.stepper.threads, settings.rows
        self.random = np.random.default_rng(0)

    def check(self, case: Case) -> None:
        """BadRequest for a case that cannot be run."""
        if case.kind == "decode" and case.batch > self.rows:
            raise BadRequest(f"{case} takes {case.batch} ids in a step", f"{self.rows} is the most")
        if case.positions > self.source.spec.max_context:
            raise BadRequest(
                f"{case} needs {case.positions} positions",
                f"the model's context is {self.source.spec.max_context}",
            )
        if case.pages > self.stepper.pages:
            raise BadRequest(
                f"{case} needs {case.pages * CpuStepper.page_tokens} positions of memory",
                f"there are {self.stepper.pages * CpuStepper.page_tokens}",
            )

    def measure(self, case: Case) -> float:
        """Seconds."""
        self.check(case)
        if case.kind == "prompt":
            return self._prompt(case.count, case.batch)
        return self._decode(case.count, case.batch, case.behind)

    def _prompt(self, count: int, batch: int) -> float:
        contexts = [self._ids(count) for _ in range(batch)]
        begin = time.perf_counter()
        self._read(contexts, count)
        return time.perf_counter() - begin

    def _read(self, contexts: Sequence[Ids], room: int) -> dict[int, tuple[Ids, int]]:
        """Computes contexts of equal length; pages for `room` positions and the likeliest next id of each."""
        read: dict[int, tuple[Ids, int]] = {}
        count = len(contexts[0])
        pages = -(-room // CpuStepper.page_tokens)
        for parts in steps([count] * len(contexts), self.rows, len(contexts), count):
            feeds = []
            for part in parts:
                table = np.arange(pages, dtype=np.int32) + np.int32(pages * part.context)
                ids, ended = contexts[part.context], part.end == count
                draw = Draw(GREEDY, ids, count, np.empty(0), NOTHING, 1) if ended else None
                feeds.append(Feed(ids[part.begin : part.end], part.begin, table, draw=draw))
            for part, feed, fed in zip(parts, feeds, self._step(feeds, 1), strict=True):
                if fed.ids:
                    read[part.context] = feed.table, fed.ids[0]
        return read

    def _decode(self, count: int, batch: int, behind: int) -> float:
        read = self._read([self._ids(behind) for _ in range(batch)], behind + count)
        tables = [read[i][0] for i in range(batch)]
        last = [read[i][1] for i in range(batch)]
        seconds, done = 0.0, 0
        while done < count:
            most = min(CALL, count - done)
            draw = Draw(GREEDY, NOTHING, 0, np.empty(0), NOTHING, most)
            feeds = [
                Feed(np.array([id], np.int32), behind + done, table, draw=draw)
                for id, table in zip(last, tables, strict=True)
            ]
            begin = time.perf_counter()
            fed = self._step(feeds, most)
            seconds += time.perf_counter() - begin
            last = [each.ids[-1] for each in fed]
            done += most
        return seconds

    def _step(self, feeds: list[Feed], count: int) -> list[Fed]:
        fed = self.stepper.step(feeds, count, NEVER)
        for each in fed:
            if each.status != "ok":
                raise FailedWork("the model could not be run", seen=each.seen)
        return fed

    def _ids(self, count: int) -> Ids:
        size = self.stepper.vocab_size
        return self.random.integers(min(SPECIAL, size - 1), size, count, dtype=np.int32)

    # what it takes

    def step_bytes(self, batch: int = 1) -> float:
        """Bytes of weights that one step of `batch` contexts with an id each reads."""
        linears = self.stepper.weights.linears()
        return sum(size * self._chosen(path, batch) for path, size in linears.items())

    def operations(self, case: Case) -> dict[str, float]:
        """Operations of a prompt's products by the dtype whose unit does them; a multiply-add is two."""
        found = {"int8": 0.0, "int4": 0.0, "fp32": 0.0}
        for path in self.stepper.weights.linears():
            matrix = self.stepper.matrix(path)
            once = path in ("tail.head", "tail.project")  # for the last id of a context
            ids = case.batch if once else case.tokens
            codes = "int4" if matrix.bits <= 4 and matrix.kind in (PLAIN, SPARSE) else "int8"
            kind = codes if matrix.bits and not matrix.exact else "fp32"
            found[kind] += 2.0 * matrix.rows * matrix.columns * ids * self._share(path)
        return found

    def _share(self, path: str) -> float:
        """The share of ids that a linear sees: of an expert's, those that choose it."""
        if ".expert" not in path:
            return 1.0
        experts = self.source.spec.layers[int(path.split(".")[1])].feed_forward.experts
        return experts.top / experts.count if experts else 1.0

    def _chosen(self, path: str, batch: int) -> float:
        """The chance that a linear is read at all."""
        return 1.0 - (1.0 - self._share(path)) ** batch


@dataclass(frozen=True)
class Variant:
    """What is measured beside others: a model in a class of instruction sets."""

    name: str
    timed: Timed
    seconds: dict[Case, list[float]]


def bench(
    models: Sequence[str], sizes: Sizes = Sizes(), settings: CpuSettings = USUAL,
    isas: Sequence[str] = (), roofs: Callable[[], Device] = lambda: cpu.probe(refresh=True),
    progress: Progress = lambda done, total, what: None,
) -> Report:  # fmt: skip
    """The first model measured, and beside a second one if there is one; in each of `isas` ("all")."""
    cases = sizes.cases()
    context = max(case.pages for case in cases) * CpuStepper.page_tokens
    settings = replace(settings, context=context)
    classes: Sequence[str | None] = cpu.isas() if "all" in isas else isas or (None,)
    variants = []
    for model in models:
        for isa in classes:
            timed = Timed(model, settings, isa)
            name = ", ".join([model] * (len(models) > 1) + [timed.isa] * (len(classes) > 1))
            variants.append(Variant(name, timed, {case: [] for case in cases}))
    for variant in variants:
        for case in cases:
            variant.timed.check(case)
    device = roofs()
    for variant in variants:  # not counted: the weights are read in
        variant.timed.measure(cases[0])
    total, before = sizes.repeat * len(cases), _worked()
    for turn in range(sizes.repeat):
        for i, case in enumerate(cases):
            progress(turn * len(cases) + i, total, str(case))
            for variant in variants:
                variant.seconds[case].append(variant.timed.measure(case))
    peak, after = resident_peak(), _worked()
    device = _best(device, roofs())
    progress(total, total, "done")
    rows = [*_rows(variants, len(models), device), Row.of("model", "peak_memory_bytes", peak)]
    rows += [*_machine(variants, device), Row("machine", "foreign_share", _foreign(before, after))]
    first = variants[0].timed
    answer = " ".join(_limit(variants[0], case, device) for case in _telling(cases))
    return Report(
        tuple(rows), environment(threads=first.threads, repeat=sizes.repeat),
        f"{models[0]} on {device.name}",
        (("answer", answer), *forms.not_time(Source(models[0]).format_names()), *_conventions(sizes)),
    )  # fmt: skip


def _conventions(sizes: Sizes) -> tuple[tuple[str, str], ...]:
    return (
        ("convention: speed", f"median of {sizes.repeat}; contexts of random ids; decoding is greedy, "
         f"behind {sizes.behind} ids; a batch's tokens are added up"),
        ("convention: shares", "of the speed at which memory can be read, by bytes of weights; of the "
         "peak of the unit that multiplies, by the products of the linears"),
    )  # fmt: skip


def _best(one: Device, other: Device) -> Device:
    """The faster of two measurements of a machine: a roof is the most that it gives."""

    def best(a: tuple[tuple[object, float], ...], b: tuple[tuple[object, float], ...]) -> tuple:  # type: ignore[type-arg]
        return tuple((key, max(value, dict(b).get(key, 0.0))) for key, value in a)

    return replace(one, read_bandwidth=best(one.read_bandwidth, other.read_bandwidth),
                   peaks=best(one.peaks, other.peaks))  # fmt: skip


def _worked() -> tuple[float, float, float] | None:
    """Seconds so far: of all cores at work, of this process at work, and of time. Linux alone tells."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, soft, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return None
    used = os.times()
    busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    return busy, used.user + used.system, time.monotonic()


def _foreign(before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> float | None:
    """The share of the machine that other programs took meanwhile: figures with a large one are low."""
    if before is None or after is None:
        return None
    busy, own, seconds = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, busy - own) / ((os.cpu_count() or 1) * max(seconds, 1e-9))


# Figures ------------------------------------------------------------------------------------------


def _rows(variants: list[Variant], models: int, device: Device) -> Iterator[Row]:
    half = len(variants) // models
    for i, variant in enumerate(variants[:half]):
        other = variants[half + i] if models > 1 else None
        for case in variant.seconds:
            named = half > 1 and variant.timed.isa
            where = f"{case}, {named}" if named else str(case)
            found = _figures(variant, case, device)
            before = _figures(other, case, device) if other else {}
            for what, value in found.items():
                yield Row.of(where, what, value, before.get(what))
            if other:
                yield from _ratio(where, other.seconds[case], variant.seconds[case])


def _figures(variant: Variant, case: Case, device: Device) -> dict[str, float | None]:
    seconds = statistics.median(variant.seconds[case])
    found: dict[str, float | None] = {f"{case.kind}_tokens_per_second": case.tokens / seconds}
    if case.kind == "prompt":
        if case.batch == 1:
            found["time_to_first_token"] = seconds
        needed = _needed(variant.timed, case, device)
        found["operations_share"] = None if needed is None else needed / seconds
    else:
        bandwidth = device.bandwidth(variant.timed.threads)
        read = variant.timed.step_bytes(case.batch) * case.count / seconds
        found["bandwidth_share"] = None if bandwidth is None else read / bandwidth
    return found


def _needed(timed: Timed, case: Case, device: Device) -> float | None:
    """Seconds that the products of a prompt take at the peaks of their units."""
    share = min(1.0, timed.threads / device.cores)
    seconds = 0.0
    for dtype, count in timed.operations(case).items():
        peak = device.peak(dtype)
        if peak is None:
            return None
        seconds += count / (peak * share)
    return seconds


def _ratio(where: str, base: list[float], mine: list[float]) -> Iterator[Row]:
    """How much faster, turn by turn."""
    ratios = sorted(b / a for a, b in zip(mine, base, strict=True))
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    yield Row(where, "speed_ratio", statistics.median(ratios))
    yield Row(where, "speed_ratio_low", low)
    yield Row(where, "speed_ratio_high", high)


def _machine(variants: list[Variant], device: Device) -> Iterator[Row]:
    timed = variants[0].timed
    yield Row("model", "weight_bytes", timed.stepper.weights.nbytes, "B")
    yield Row("model", "weight_bytes_per_token", timed.step_bytes(), "B")
    yield Row("model", "engine_bytes", timed.stepper.nbytes, "B")
    yield Row("machine", "native_class", ", ".join(dict.fromkeys(v.timed.isa for v in variants)))
    yield Row("machine", "read_bandwidth", device.bandwidth(timed.threads), "B/s")
    used = {dtype for dtype, n in timed.operations(Case("prompt", 1, 1)).items() if n}
    for dtype in sorted(used):
        yield Row("machine", f"peak_{dtype}", device.peak(dtype), "1/s")
        yield Row("machine", f"unit_{dtype}", dict(device.units).get(dtype))


# Why it is no faster ------------------------------------------------------------------------------


def _telling(cases: list[Case]) -> list[Case]:
    """The longest prompt and the longest decoding, alone if that was measured."""
    kinds = dict.fromkeys(case.kind for case in cases)
    return [
        max((case for case in cases if case.kind == kind), key=lambda c: (-c.batch, c.count))
        for kind in kinds
    ]


def _limit(variant: Variant, case: Case, device: Device) -> str:
    """What a speed is measured against, and whether that is what holds it back."""
    timed, seconds = variant.timed, statistics.median(variant.seconds[case])
    reached, verb = case.tokens / seconds, "reads" if case.kind == "prompt" else "writes"
    said = f"It {verb} {reached:,.0f} tokens/s ({case})"
    if case.kind == "prompt":
        needed = _needed(timed, case, device)
        if needed is None:
            return f"{said}; the peaks of this machine are not known."
        most = case.tokens / needed
        work = sum(timed.operations(case).values()) / case.tokens / 1e9
        roof = f"{work:.3g} billion operations per token at the units' peak"
    else:
        bandwidth, size = device.bandwidth(timed.threads), timed.step_bytes(case.batch)
        if bandwidth is None:
            return f"{said}; the bandwidth of this machine is not known."
        most = case.batch * bandwidth / size
        roof = f"{format_size(size)} of weights per step at {bandwidth / 1e9:.1f} GB/s"
        cache = device.cache("L3") or 0
        if size < cache:
            roof += f" (they fit into the cache of {format_size(cache)})"
    share = reached / most
    held = (
        "that is the limit"
        if share >= NEAR
        else "the rest goes to attention, small matrices and waiting threads"
    )
    return f"{said}; {roof} would allow {most:,.0f}: {100 * share:.0f} %, {held}."


# One model, asked line by line --------------------------------------------------------------------


def serve(
    model: str, settings: CpuSettings, lines: IO[str] = sys.stdin, out: IO[str] = sys.stdout
) -> None:
    """Measures on request, until the lines end: `prompt 512` or `decode 128` gives one line of JSON.

        ready
        prompt 512              ->  {"seconds": 1.9, "tokens": 512, "rss": 812000000}
        decode 128 behind 512   ->  the same; without `behind` it is LEAD ids

    `rss` is this process' resident memory in bytes. What cannot be done gives {"error": ...}.
    """
    source = Source(model)
    context = settings.context or min(SERVED, source.spec.max_context)
    timed = Timed(source, replace(settings, context=context))
    print("ready", file=out, flush=True)
    for line in lines:
        if line.strip():
            print(json.dumps(_answer(timed, line)), file=out, flush=True)


def _answer(timed: Timed, line: str) -> dict[str, float | str]:
    try:
        case = _asked(line.split())
        seconds = timed.measure(case)
    except Problem as problem:
        return {"error": str(problem)}
    return {"seconds": seconds, "tokens": case.count, "rss": resident()}


def _asked(words: list[str]) -> Case:
    match words:
        case [("prompt" | "decode") as kind, count]:
            return Case(kind, _number(count), 1)
        case ["decode", count, "behind", behind]:
            return Case("decode", _number(count), 1, _number(behind))
    raise BadRequest(
        f"{' '.join(words)[:80]!r} is none of `prompt N`, `decode N` and `decode N behind M`"
    )


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= 1 << 20:
        raise BadRequest(f"{text[:80]!r} is no number of ids", do="1 to 1048576 is possible")
    return int(text)
