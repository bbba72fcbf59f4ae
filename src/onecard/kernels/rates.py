"""How long products and attention take on this machine, measured once per kernel and then remembered.

The roof is the machine's, the row the kernel's: how much time a weight takes depends on how it is held (its
form), on how long a row of the matrix is, on how many rows of inputs meet it, and on whether it lies in a
cache. So each form is timed on three lengths of row, with 1, 4, 32 and 512 rows of inputs, and once where no
cache holds it. In between, with t(c, n) the seconds of a weight in rows of c columns for n rows of inputs,

    t(c, n) linear in 1 / c            a tile costs something that does not depend on how long it is
    t(n)    linear between the n's     beyond the last one in proportion
    cold    the larger of t(c, n) and what bringing a weight from memory takes, from a mapped file

and attention, of a token over p positions, or of n tokens behind p others:

    decode  p * step                   step where no cache holds keys and values
    prompt  n * store + pairs * pair   pairs = n p + n (n + 1) / 2

Nothing is listed here: what is asked for and not known is measured, in a process of its own, a few tenths of
a second per form; turns go over all of them, and the least of each counts, since other programs only add. The
answers lie in ~/.cache/onecard/rates.json (XDG_CACHE_HOME respected) by processor, cores, features and
library, like those of tune.py.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.core.device import cpu_facts, usable_cores
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.kernels import cpu, forms, layout, tune
from onecard.kernels.structs import SPARSE, Matrix

FILE = "rates.json"
ROWS = (1, 4, 32, 512)
COLUMNS = (
    128,
    1152,
    4224,
)  # few models' rows are powers of two, and those evict themselves from a cache
WARM = 1024  # rows of a matrix that a cache holds
SHORT, NEAR = 32, 512  # positions in front of a token, and how many more
FAR, CHUNK = 3584, 512  # positions in front of a part of a prompt, and its length
LEAST, MOST = 64 << 20, 192 << 20  # bytes of keys and values, or of a matrix, that no cache holds
CACHES = 6  # a last cache that keeps some of what it read is still found in twice its size
ROUNDS, TURNS, MANY = 4, 3, 40  # MANY: of what takes microseconds
SLOW, SLOWEST = 0.1, 0.5  # seconds of one product that are too long to repeat, and to take at all
BRIEF, STEP = 0.002, 0.06  # seconds to fill with products, of a small and of a large matrix
KEEPS = 2.3  # where it cannot be measured
FILLED = 0x3C  # twice this is a scale, or a weight, of 0.0115
SHARES = 20  # steps of the share of slots that sparse forms are told apart by


@dataclass(frozen=True)
class Form:
    """How a matrix is held, apart from its shape. `kept`: of a sparse one, twentieths that are stored."""

    kind: int
    bits: int
    block: int
    dtype: int
    zero_point: int = 0
    kept: int = 0

    @staticmethod
    def of(matrix: Matrix) -> Form:
        kept = 0
        if matrix.kind == SPARSE:
            kept = max(1, round(SHARES * matrix.slots / (matrix.rows * matrix.columns)))
        return Form(matrix.kind, matrix.bits, matrix.block, matrix.dtype, matrix.zero_point, kept)

    def matrix(self, rows: int, columns: int) -> Matrix:
        return Matrix(
            rows=rows, columns=columns, bits=self.bits, block=self.block, dtype=self.dtype,
            zero_point=self.zero_point, kind=self.kind, slots=rows * columns * self.kept // SHARES,
        )  # fmt: skip


USUAL = Form(0, 8, 64, 2)
"""Integers of 8 bits in groups of 64, scales in bf16."""


@dataclass(frozen=True)
class Rate:
    """Seconds per weight of a form: `warm` [length of row][rows of inputs], and `cold` for one row."""

    warm: tuple[tuple[float, ...], ...]
    cold: float

    def seconds(self, matrix: Matrix, rows: int = 1, cached: float = 0.0) -> float:
        """Of a product with `rows` rows of inputs, if the share `cached` of the matrix lies in a cache."""
        lines = [_between(rows, ROWS, line) for line in self.warm]
        columns = -(-matrix.columns // max(1, matrix.block)) * max(1, matrix.block)
        at = min(max(columns, COLUMNS[0]), COLUMNS[-1])
        i = next(i for i in range(1, len(COLUMNS)) if at <= COLUMNS[i])
        share = (1 / at - 1 / COLUMNS[i]) / (1 / COLUMNS[i - 1] - 1 / COLUMNS[i])
        each = share * lines[i - 1] + (1 - share) * lines[i]
        weights = -(-matrix.rows // layout.TILE) * layout.TILE * columns
        return weights * (cached * each + (1 - cached) * max(each, self.cold))


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention, and how keys and values are held."""

    heads: int
    kv_heads: int
    head_dim: int
    cache: str


@dataclass(frozen=True)
class Attending:
    """Seconds of one layer's attention; see the top of this file."""

    step: float
    warm: float  # a step where a cache holds keys and values
    store: float
    pair: float

    def decode(self, positions: float, cached: float = 0.0) -> float:
        return positions * (cached * self.warm + (1 - cached) * self.step)

    def prompt(self, count: int, past: int = 0) -> float:
        return count * self.store + self.pair * (count * past + count * (count + 1) / 2)


def rates(asked: Iterable[Form], threads: int | None = None) -> dict[Form, Rate]:
    """Of forms, from the file or measured now."""
    found = _known({form: ["form", *asdict(form).values()] for form in asked}, threads)
    return {form: Rate(tuple(map(tuple, warm)), cold) for form, (warm, cold) in found.items()}


def attending(asked: Iterable[Heads], threads: int | None = None) -> dict[Heads, Attending]:
    """Of shapes of attention, from the file or measured now."""
    found = _known({heads: ["heads", *asdict(heads).values()] for heads in asked}, threads)
    return {heads: Attending(*values) for heads, values in found.items()}


def _known(asked: dict[Any, list[Any]], threads: int | None) -> dict[Any, Any]:
    threads = threads or usable_cores()
    machine = f"{tune.key(cpu_facts())}, {threads} threads"
    stored = cpu.remembered(FILE).get(machine)
    stored = stored if isinstance(stored, dict) else {}
    missing = [words for words in asked.values() if not _sound(words, stored.get(_name(words)))]
    if missing:
        arguments = json.dumps([threads, missing])
        made = cpu.elsewhere("onecard.kernels.rates", 60 + 30 * len(missing), arguments)
        stored = stored | {_name(words): value for words, value in zip(missing, made, strict=True)}
        cpu.remember(FILE, machine, stored)
    return {key: stored[_name(words)] for key, words in asked.items()}


def _name(words: Sequence[Any]) -> str:
    return " ".join(map(str, words))


def _sound(words: Sequence[Any], value: Any) -> bool:
    """Whether a file holds what was measured: it may be damaged, or of another age."""

    def good(x: Any) -> bool:
        return isinstance(x, float) and 0 <= x < math.inf

    if not isinstance(value, list):
        return False
    if words[0] == "heads":
        return len(value) == 4 and all(map(good, value))
    if len(value) != 2 or not isinstance(value[0], list) or len(value[0]) != len(COLUMNS):
        return False
    lines = [*value[0], [value[1]] * len(ROWS)]
    return all(isinstance(line, list) and len(line) == len(ROWS) and all(map(good, line)) and min(line) > 0
               for line in lines)  # fmt: skip


def _between(x: float, places: Sequence[int], values: Sequence[float]) -> float:
    """Linear between places, beyond the last one in proportion."""
    if x >= places[-1]:
        return values[-1] * x / places[-1]
    i = next(i for i in range(1, len(places)) if x <= places[i])
    share = (x - places[i - 1]) / (places[i] - places[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


# Measuring ----------------------------------------------------------------------------------------


def measure(asked: Sequence[Sequence[Any]], threads: int) -> list[Any]:
    """What the file holds for each of `asked`, measured here and now.

    A machine that others use is slow for seconds at a time: so all are measured, then all again.
    """
    rounds = [
        [
            _of_form(Form(*values), threads)
            if kind == "form"
            else _of_heads(Heads(*values), threads)
            for kind, *values in asked
        ]
        for _ in range(ROUNDS)
    ]
    return _least(rounds)


def _least(found: Sequence[Any]) -> Any:
    """Of numbers, or of lists of them that are alike, the least of each."""
    if isinstance(found[0], list):
        return [_least(each) for each in zip(*found, strict=True)]
    return min(found)


def _of_form(form: Form, threads: int) -> list[Any]:
    """[warm, cold] of a Rate."""
    warm = []
    for columns in COLUMNS:
        rows = max(WARM, 4 * layout.TILE * threads)
        warm.append(list(_rising(_Filled(form, rows, columns, threads), threads)))
    return [warm, _cold(form, warm[-1][0], threads)]


def _rising(matrix: _Filled, threads: int) -> Iterator[float]:
    """Seconds per weight for each number of rows; where that takes too long, as before in proportion."""
    before = 0.0
    for i, rows in enumerate(ROWS):
        expected = before * rows / ROWS[i - 1] * matrix.weights if i else 0.0
        if expected > SLOWEST:
            before *= rows / ROWS[i - 1]
        else:
            before = matrix.least(rows, threads) / matrix.weights
        yield before


def _cold(form: Form, warm: float, threads: int) -> float:
    facts = cpu_facts()
    last = dict(facts.caches).get("L3", 0)
    size = min(max(CACHES * last, LEAST), MOST, facts.memory_available // 8)
    weights = size / layout.size(form.matrix(layout.TILE, COLUMNS[-1])) * layout.TILE * COLUMNS[-1]
    if warm * weights > SLOW:
        return warm
    return _read(form, size, threads) or warm


def _read(form: Form, size: int, threads: int) -> float:
    """Seconds per weight, for one row of inputs, of a matrix of `size` bytes that is met again and again;
    0 where these are too few for all threads."""
    columns = COLUMNS[-1]
    row = layout.size(form.matrix(layout.TILE, columns)) / layout.TILE
    rows = int(size / row) // layout.TILE * layout.TILE
    if rows < layout.TILE * threads:
        return 0.0
    filled = _plain(size) if form.kind != SPARSE else None
    matrix = _Filled(form, rows, columns, threads, filled)
    if filled is None:
        matrix.held(_mapped(matrix.data))
    return matrix.mean(threads) / matrix.weights


def keeps(threads: int) -> float:
    """k of the law (1 / n) ** k: that share of n times its bytes, read again and again in one order, the last
    cache still finds. About 2.3 where a line gives way to any other, less where it keeps what is of use."""
    facts = cpu_facts()
    last = dict(facts.caches).get("L3", 0)
    if not 0 < 4 * last <= facts.memory_available // 8:
        return KEEPS
    sizes = (last // 2, 2 * last, min(CACHES * last, max(MOST, 4 * last)))
    near, twice, far = _least(
        [[_read(USUAL, size, threads) for size in sizes] for _ in range(ROUNDS)]
    )
    if not 0 < near < far:
        return KEEPS
    share = min(max((far - twice) / (far - near), 0.05), 0.95)
    return -math.log2(share)


@cache
def _plain(size: int) -> layout.Bytes:
    """A mapped file of such bytes as a matrix is filled with."""
    return _mapped(np.full(size, FILLED, np.uint8))


def _mapped(data: layout.Bytes) -> layout.Bytes:
    """The same from a mapped file: in small pages, as those of a model's file are."""
    with tempfile.TemporaryFile() as file:
        data.tofile(file)
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


class _Filled:
    """A matrix of a form that holds something: no NaN, no denormals, as many zeros as it says."""

    def __init__(
        self, form: Form, rows: int, columns: int, threads: int, filled: layout.Bytes | None = None
    ) -> None:
        self.matrix = form.matrix(rows, columns)
        self.weights = rows * columns
        self.held(_aligned(layout.size(self.matrix)) if filled is None else filled)
        if form.kind == SPARSE:
            self._fill_sparse(threads)
        elif filled is None:
            self.data[:] = FILLED

    def held(self, data: layout.Bytes) -> None:
        """It lies there."""
        self.data = data
        self.matrix.data = data.ctypes.data

    def _fill_sparse(self, threads: int) -> None:
        m = self.matrix
        inner = Integers(m.bits, m.block, scale="bf16")
        random = np.random.default_rng(0)
        kept = random.random((m.rows, m.columns), np.float32) < 0.999 * m.slots / self.weights
        codes = np.where(kept, np.uint8(2**m.bits - 1), np.uint8(2 ** (m.bits - 1)))
        plain = layout.integers((m.rows, m.columns), inner)
        scale = np.full((m.rows, m.columns // m.block), 0x3C3C, np.uint16)
        dense = _aligned(layout.size(plain))
        words = forms.packed(codes, m.bits, threads)
        layout.fill_integers(plain, words, scale, None, inner, dense, threads)
        layout.fill_sparse(m, dense, self.data, threads)

    def least(self, rows: int, threads: int) -> float:
        """The least seconds of a product in several turns."""
        x = np.tile(np.array([0.5, -1.0, 0.25, 2.0], np.float32), rows * self.matrix.columns // 4)
        y = np.empty(rows * self.matrix.rows, np.float32)
        best, turns, repeats = math.inf, TURNS, 1
        while turns:
            took = self._seconds(x, y, rows, threads, repeats)
            best = min(best, took)
            turns = 0 if took > SLOW else turns - 1
            repeats = max(2, min(100, int(BRIEF / best)))
        return best

    def mean(self, threads: int) -> float:
        """Of one row, the least mean of so many products in a row that a step takes no longer: memory that
        others read as well is fast for a moment now and then, but no step is over in a moment."""
        x, y = np.full(self.matrix.columns, 0.5, np.float32), np.empty(self.matrix.rows, np.float32)
        repeats = max(2, min(100, int(STEP / self._seconds(x, y, 1, threads, 2))))
        means = []
        for _ in range(TURNS):
            begin = time.perf_counter()
            self._seconds(x, y, 1, threads, repeats)
            means.append((time.perf_counter() - begin) / repeats)
        return min(means)

    def _seconds(
        self, x: NDArray[np.float32], y: NDArray[np.float32], rows: int, threads: int, repeats: int
    ) -> float:
        """The least of some products."""
        took = ctypes.c_double()
        code = cpu.library().oc_multiply(
            ctypes.byref(self.matrix), x.ctypes.data, rows, threads, repeats, y.ctypes.data,
            ctypes.byref(took),
        )  # fmt: skip
        if code:
            raise FailedWork("a product could not be measured", seen=f"error {code}")
        return took.value


def _of_heads(heads: Heads, threads: int) -> list[float]:
    """The values of an Attending."""
    cached = dict(cpu_facts().caches).get("L3", 0)
    each = heads.kv_heads * heads.head_dim * {"int8": 2, "fp8": 2, "int4": 1}.get(heads.cache, 4)
    long = min(max(2 * cached, LEAST) // each, 1 << 16)
    _, begin = _attend(heads, SHORT, 1, threads, MANY)
    _, near = _attend(heads, SHORT + NEAR, 1, threads, MANY)
    _, far = _attend(heads, SHORT + long, 1, threads)
    warm = max(near - begin, 0.0) / NEAR
    step = max(warm, (far - begin) / long)
    store, first = _attend(heads, 0, CHUNK, threads)
    _, last = _attend(heads, FAR, CHUNK, threads)
    pair = max(last - first, 0.0) / (FAR * CHUNK)
    rest = max(first - pair * CHUNK * (CHUNK + 1) / 2, 0.0)
    return [step, warm, (store + rest) / CHUNK, pair]


def _attend(
    heads: Heads, past: int, count: int, threads: int, turns: int = TURNS
) -> tuple[float, float]:
    """The least seconds of storing `count` tokens behind `past` others, and of attention."""
    total = past + count
    random = np.random.default_rng(0)
    some = random.standard_normal(1 << 16, np.float32)
    k = np.resize(some, total * heads.kv_heads * heads.head_dim)
    q = np.resize(some, count * heads.heads * heads.head_dim)
    y = np.empty_like(q)
    longs, times = ctypes.c_int64 * 1, (ctypes.c_double * 2)()
    code = cpu.library().oc_attend(
        heads.heads, heads.kv_heads, heads.head_dim, 0, heads.head_dim**-0.5, 0.0,
        cpu.CODES[heads.cache], 1, longs(past), longs(count), k.ctypes.data, k.ctypes.data,
        q.ctypes.data, threads, turns, y.ctypes.data, times,
    )  # fmt: skip
    if code:
        raise FailedWork("attention could not be measured", seen=f"error {code}")
    return times[0] * count / total, times[1]


def _aligned(count: int) -> layout.Bytes:
    memory = np.empty(count + layout.LINE, np.uint8)
    begin = -memory.ctypes.data % layout.LINE
    return memory[begin : begin + count]


if __name__ == "__main__":
    asked_threads, asked_words = json.loads(sys.argv[1])
    tune.settle()
    try:
        print(json.dumps(measure(asked_words, asked_threads)))
    except BadRequest as error:
        sys.exit(str(error))
