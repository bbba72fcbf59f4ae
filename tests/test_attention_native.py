"""Attention over the paged cache against float64, in every instruction-set class, and its promise:
a query's bits do not depend on chunks, batches or threads."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from onecard.kernels import cpu, reference

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

DTYPES = ("fp16", "bf16", "int8", "fp8", "int4")
FUSED = tuple(isa for isa in CLASSES if isa not in ("plain", "amx"))


def float32(dtype: str) -> bool:
    """Whether queries and weights stay float32 in this class; else they are rounded to bf16."""
    return dtype == "fp16" or cpu.isa() != "amx"


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    dim: int
    window: int = 0
    cap: float = 0.0
    scale: float | None = None

    @property
    def factor(self) -> float:
        return self.dim**-0.5 if self.scale is None else self.scale


Sequences = Sequence[
    tuple[Tensor, Tensor, Tensor]
]  # q [T,H,D], k and v [T,G,D] of one request each


def draw(
    heads: Heads, length: int, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    q = torch.randn(length, heads.heads, heads.dim, generator=generator) * spread
    k = torch.randn(length, heads.kv_heads, heads.dim, generator=generator)
    v = torch.randn(length, heads.kv_heads, heads.dim, generator=generator) + 0.5
    return q, k, v


def attend(
    heads: Heads, dtype: str, requests: Sequences, past: Sequence[int], threads: int = 1
) -> list[Tensor]:
    """The outputs of the positions from `past` on."""
    count = [len(q) - p for (q, _, _), p in zip(requests, past, strict=True)]
    q = torch.cat([q[p:] for (q, _, _), p in zip(requests, past, strict=True)]).contiguous()
    k, v = (torch.cat([request[i] for request in requests]).contiguous() for i in (1, 2))
    y = torch.full_like(q, 7.0)
    longs = ctypes.c_int64 * len(past)
    code = cpu.library().oc_attend(
        heads.heads, heads.kv_heads, heads.dim, heads.window, heads.factor, heads.cap, cpu.CODES[dtype],
        len(past), longs(*past), longs(*count), k.data_ptr(), v.data_ptr(), q.data_ptr(), threads, 1,
        y.data_ptr(), None,
    )  # fmt: skip
    assert code == 0
    return list(y.split(count))


def alone(
    heads: Heads, dtype: str, request: tuple[Tensor, Tensor, Tensor], past: int = 0
) -> Tensor:
    return attend(heads, dtype, [request], [past])[0]


def rounded(x: Tensor, dtype: str) -> Tensor:
    """What the cache keeps."""
    return reference.round_cache(x, dtype)


def expected(
    heads: Heads, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """reference.attend, in `dtype`."""
    q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (q, k, v))
    mask = reference.causal_mask(q.shape[2], k.shape[2], heads.window or None, q.device)
    if dtype == torch.float64:  # the reference's softmax is float32
        repeat = heads.heads // heads.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = q @ k.transpose(-1, -2) * heads.factor
        if heads.cap:
            scores = heads.cap * torch.tanh(scores / heads.cap)
        y = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ v
    else:
        y = reference.attend(q, k, v, mask, heads.factor, heads.cap or None)
    return y[0].transpose(0, 1)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, up to which NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32)
    )


SHAPES = [
    Heads(8, 2, 64), Heads(1, 1, 16), Heads(3, 3, 40), Heads(5, 1, 80, scale=0.3), Heads(6, 2, 96),
    Heads(4, 4, 128), Heads(2, 1, 256), Heads(40, 2, 72), Heads(2, 2, 17), Heads(3, 1, 50),
]  # fmt: skip
MASKS = [
    {},
    {"window": 1},
    {"window": 33},
    {"window": 250},
    {"cap": 2.0},
    {"cap": 50.0, "window": 300},
]


# Right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_shapes(isa: str, heads: Heads, dtype: str) -> None:
    for length in (1, 31, 33, 257):
        check(heads, dtype, length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks(isa: str, mask: dict[str, float], dtype: str) -> None:
    for heads in (Heads(4, 1, 40), Heads(2, 2, 64)):
        for length in (7, 256, 600):
            check(replace(heads, **mask), dtype, length)


def check(heads: Heads, dtype: str, length: int) -> None:
    """At most twice the error of plain code in the cache's dtype; in float32, near the exact answer."""
    q, k, v = draw(heads, length)
    mine = alone(heads, dtype, (q, k, v)).double()
    exact = expected(heads, q, k, v)
    kept = rounded(k, dtype), rounded(v, dtype)
    if dtype in ("int8", "fp8", "int4"):
        plain = expected(heads, q, *kept, torch.float32)
    else:
        plain = expected(heads, q, k, v, reference.DTYPES[dtype])
    for measure in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        assert measure(mine - exact) <= 2 * measure(plain.double() - exact) + 1e-6
    if float32(dtype):
        assert (mine - expected(heads, q, *kept)).abs().max() < 2e-5


def test_large_scores_are_told_apart(isa: str) -> None:
    heads = Heads(2, 1, 64)
    for dtype in DTYPES:
        q, k, v = draw(heads, 300, spread=30.0)
        mine, kept = alone(heads, dtype, (q, k, v)), (rounded(k, dtype), rounded(v, dtype))
        if float32(dtype):
            assert (mine - expected(heads, q, *kept)).abs().max() < 1e-3


# The same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        Heads(8, 2, 64), Heads(8, 2, 64, window=33), Heads(3, 3, 40, window=1, cap=2.0),
        Heads(3, 3, 40, window=300), Heads(20, 1, 96, window=250), Heads(20, 1, 96, cap=50.0),
    ],
    ids=str,
)  # fmt: skip
def test_chunks_batches_and_threads(isa: str, heads: Heads, dtype: str) -> None:
    request = draw(heads, 590)
    whole = alone(heads, dtype, request)
    # Chunks, each of which has all before it as its past.
    cuts = [0, 1, 2, 33, 64, 100, 255, 256, 400, 511, 590]
    for begin, end in itertools.pairwise(cuts):
        chunk = alone(heads, dtype, tuple(x[:end] for x in request), begin)
        assert same(chunk, whole[begin:end]), (begin, end)
    # One at a time, all in one batch with chunks of other requests, on several threads.
    steps = [0, 1, 30, 31, 32, 254, 255, 256, 257, 287, 288, 511, 512, 589]
    other = draw(heads, 77, seed=1)
    for threads in (1, 3):
        requests = [tuple(x[: p + 1] for x in request) for p in steps] + [other, request, other]
        past = [*steps, 0, 300, 76]
        results = attend(heads, dtype, requests, past, threads)
        for p, result in zip(steps, results, strict=False):
            assert same(result, whole[p : p + 1]), p
        assert same(results[-2], whole[300:])
        assert same(results[-3], alone(heads, dtype, other))
        assert same(results[-1], results[-3][76:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context_is_split_and_merged(isa: str, dtype: str) -> None:
    for heads in (Heads(8, 2, 64), Heads(2, 1, 80, window=1500), Heads(1, 1, 16, cap=5.0)):
        q, k, v = draw(heads, 2100)
        whole = attend(heads, dtype, [(q, k, v)], [2000], threads=2)[0]
        for p in (2000, 2047, 2048, 2099):
            one = (q[: p + 1], k[: p + 1], v[: p + 1])
            for threads in (1, 4):
                assert same(
                    attend(heads, dtype, [one], [p], threads)[0], whole[p - 2000 : p - 1999]
                )
        kept = rounded(k, dtype), rounded(v, dtype)
        exact = expected(heads, q, *kept)[2000:]
        assert (whole - exact).abs().max() < (2e-5 if float32(dtype) else 3e-3)


# What is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_it_reaches_those_who_see_it_and_nobody_else(
    isa: str, what: str, bad: float, dtype: str
) -> None:
    for heads in (Heads(8, 2, 64), Heads(2, 2, 40, window=50), Heads(3, 1, 32, cap=5.0)):
        request = draw(heads, 300)
        good = alone(heads, dtype, request)
        at = 137
        broken = [x.clone() for x in request]
        broken["qkv".index(what)][at, 0, 5] = bad
        seen = torch.zeros(300, heads.heads, dtype=torch.bool)
        if what == "q":
            seen[at, 0] = True
        else:
            last = at + heads.window if heads.window else 300
            seen[at:last, : heads.heads // heads.kv_heads] = True
        mine = alone(heads, dtype, tuple(broken))
        if what != "q" or math.isnan(bad) or not heads.cap:  # a cap makes an infinite score finite
            assert mine[seen].isnan().all()
        assert same(mine[~seen], good[~seen])
        for p in (at - 1, at, at + 60, 299):
            one = tuple(x[: p + 1] for x in broken)
            assert same(alone(heads, dtype, one, p), mine[p : p + 1])


def test_numbers_beyond_fp16_are_not_finite(isa: str) -> None:
    heads = Heads(1, 1, 16)
    q, k, v = draw(heads, 40)
    v[20, 0, 3] = 70000.0
    mine = alone(heads, "fp16", (q, k, v))
    assert not mine[:20].isnan().any() and mine[20:].isnan().all()
    assert not alone(heads, "bf16", (q, k, v)).isnan().any()


def test_any_nan_is_kept(isa: str) -> None:
    """Of any sign and payload."""
    heads = Heads(1, 1, 16)
    for pattern in (0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF):
        for what in range(3):
            request = draw(heads, 3)
            request[what].view(torch.int32)[1, 0, 0] = pattern
            assert request[what].isnan().sum() == 1
            for dtype in DTYPES:
                assert alone(heads, dtype, request)[1].isnan().all()


def test_zeros(isa: str) -> None:
    heads = Heads(2, 1, 24)
    for dtype in DTYPES:
        q, k, v = (torch.zeros_like(x) for x in draw(heads, 45))
        assert same(alone(heads, dtype, (q, k, -v)), q)
        assert torch.allclose(alone(heads, dtype, (q, k, v + 3)), q + 3, rtol=4e-3)


# Refusals -----------------------------------------------------------------------------------------


def test_nonsense_is_refused() -> None:
    buffer = (ctypes.c_float * 65536)()
    one = (ctypes.c_int64 * 1)(3)
    sound = {
        "heads": 2, "kv_heads": 1, "head_dim": 16, "window": 0, "scale": 1.0, "cap": 0.0, "dtype": 1,
        "requests": 1, "past": one, "count": one, "k": buffer, "v": buffer, "q": buffer, "threads": 1,
        "repeats": 1, "y": buffer, "seconds": None,
    }  # fmt: skip
    nonsense = {
        "heads": [0, -1, 3, 1 << 20], "kv_heads": [0, -1, 4], "head_dim": [0, -1, 257],
        "window": [-1], "scale": [math.nan, math.inf], "cap": [-1.0, math.nan], "dtype": [-1, 0, 6],
        "requests": [0, -1], "past": [None, (ctypes.c_int64 * 1)(-1)],
        "count": [None, (ctypes.c_int64 * 1)(0)], "threads": [0, 5000], "repeats": [0],
        **{name: [None] for name in "kvqy"},
    }  # fmt: skip
    function = cpu.library().oc_attend
    assert function(*sound.values()) == 0
    sound["kv_heads"] = 2
    for name, values in nonsense.items():
        for value in values:
            assert function(*(sound | {name: value}).values()) == -1, (name, value)


@pytest.mark.skipif(len(FUSED) < 2, reason="one class alone")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_classes_agree(dtype: str) -> None:
    """Bit for bit: which of them a machine takes is a matter of speed."""
    cases = (Heads(6, 2, 64), Heads(4, 4, 40, window=70), Heads(8, 1, 96, cap=5.0))
    for heads, (length, past) in itertools.product(cases, ((600, 0), (530, 529), (290, 250))):
        request = draw(heads, length, spread=3.0)
        found = []
        for isa in FUSED:
            cpu.force_isa(isa)
            found.append(alone(heads, dtype, request, past))
        cpu.force_isa(None)
        for other in found[1:]:
            assert same(found[0], other), (heads, length, past)
