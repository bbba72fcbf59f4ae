"""The native sampler against runtime/sample.py: the same id for any settings, in every class."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from onecard.kernels import cpu, structs
from onecard.runtime.sample import Sampling, choose, distribution, penalize

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

BAD_ARGUMENT, NOT_FINITE = -1, -3


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


class Draw:
    """A generator that gives one number again and again."""

    def __init__(self, number: float):
        self.number = number

    def random(self) -> float:
        return self.number


def sample(
    logits: np.ndarray, settings: Sampling, seen: Sequence[int] = (), prompt: int = 0,
    draw: float = 0.5, **more: object,
) -> int:  # fmt: skip
    """The id, or the code of an error."""
    vocab, s, previous = len(logits), settings, np.array(seen, dtype=np.int32)
    size = cpu.library().oc_sample_scratch(vocab)
    scratch = np.full(size // 8 + 2, np.nan)
    scratch[-1] = 77.0
    fields: dict[str, object] = {
        "temperature": s.temperature, "top_p": s.top_p, "min_p": s.min_p, "top_k": s.top_k,
        "repetition": s.repetition_penalty, "presence": s.presence_penalty,
        "frequency": s.frequency_penalty, "draw": draw,
        "previous": previous.ctypes.data, "count": len(seen), "prompt": prompt,
    }  # fmt: skip
    choice = structs.Sampling(**(fields | more))
    before = logits.copy()
    id = cpu.library().oc_sample(
        logits.ctypes.data, vocab, ctypes.byref(choice), scratch.ctypes.data
    )
    assert np.array_equal(logits, before, equal_nan=True) and scratch[-1] == 77
    return int(id)


def oracle(
    logits: np.ndarray, settings: Sampling, previous: Sequence[int], prompt: int, draw: float
) -> int:
    with np.errstate(all="ignore"):
        return choose(logits, previous, settings, Draw(draw), prompt)  # type: ignore[arg-type]


def logits_of(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth, rounded to ties, two values, partly forbidden, or enormous."""
    x = rng.normal(size=size) * rng.choice([0.1, 1, 3, 30, 1e4])
    match rng.integers(5):
        case 0:
            x = np.round(x)
        case 1:
            x = rng.integers(0, 2, size)
        case 2:
            x[rng.random(size) < 0.5] = -np.inf
            x[rng.integers(size)] = 1
        case 3:
            x = x * 1e30
    return np.asarray(x, dtype=np.float32)


def settings_of(rng: np.random.Generator, size: int) -> Sampling:
    def perhaps(neutral: float, *values: float) -> float:
        return neutral if rng.random() < 0.5 else float(rng.choice(values))

    return Sampling(
        temperature=float(rng.choice([0, 0.01, 0.5, 0.7, 1, 1.5, 100, 1e-300, 5e-324])),
        top_k=int(perhaps(0, rng.integers(0, size + 3), rng.integers(0, 9))),
        top_p=perhaps(1, 0, 0.1, 0.5, 0.9, 0.999, rng.random()),
        min_p=perhaps(0, 0.01, 0.05, 0.5, 1, rng.random(), 5e-324),
        repetition_penalty=perhaps(1, 0.7, 1.1, 2),
        presence_penalty=perhaps(0, rng.normal()),
        frequency_penalty=perhaps(0, rng.normal()),
    )


def check(rng: np.random.Generator, size: int) -> None:
    logits, settings = logits_of(rng, size), settings_of(rng, size)
    previous = rng.integers(0, size, int(rng.integers(0, 20))).tolist()
    prompt, draw = int(rng.integers(0, 22)), float(rng.choice([0, rng.random(), rng.random()]))
    found = sample(logits, settings, previous, prompt, draw)
    assert found == oracle(logits, settings, previous, prompt, draw), (settings, draw)


def test_small_vocabularies(isa: str) -> None:
    rng = np.random.default_rng(0)
    sizes = (1, 2, 3, 7, 61, 127, 128, 129, 300, 1000)
    for _ in range(3000):
        check(rng, int(rng.choice(sizes)))


def test_large_vocabularies(isa: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        check(rng, 32000)


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=0.8, top_k=40),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.2, top_k=3000, top_p=0.95, min_p=0.001),
    Sampling(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: str(SETTINGS.index(s)))
def test_a_whole_reply(isa: str, settings: Sampling) -> None:
    """Peaked rows, as of a model, and the ids that came before."""
    rng = np.random.default_rng(2)
    previous = rng.integers(0, 32000, 50).tolist()
    for _ in range(30):
        logits = (rng.gumbel(size=32000) * 2).astype(np.float32)
        draw = rng.random()
        found = sample(logits, settings, previous, 50, draw)
        assert found == oracle(logits, settings, previous, 50, draw)
        previous.append(found)


@pytest.mark.parametrize("size", [1, 64, 129, 4000])
def test_equal_logits(isa: str, size: int) -> None:
    """All the same: every border falls between ties."""
    logits = np.full(size, 2.5, dtype=np.float32)
    for k, p, draw in ((0, 1, 0.3), (7, 1, 0.99), (0, 0.5, 0.99), (5, 0.25, 0.7), (0, 0, 0.9)):
        s = Sampling(temperature=0.7, top_k=k, top_p=p)
        assert sample(logits, s, draw=draw) == oracle(logits, s, [], 0, draw)
    assert sample(logits, Sampling()) == 0


def test_draws_at_both_ends_have_a_chance(isa: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        logits = logits_of(rng, int(rng.choice([2, 61, 128, 129, 1000])))
        s = replace(settings_of(rng, len(logits)), temperature=float(rng.choice([0.5, 1, 100])))
        with np.errstate(all="ignore"):
            chances = distribution(penalize(logits, [], s), s)
        assert sample(logits, s, draw=0.0) == np.flatnonzero(chances)[0]
        assert chances[sample(logits, s, draw=1 - 2**-53)] > 0


def test_rounding_joins_logits(isa: str) -> None:
    """Logits that differ, but not once the largest is subtracted in float64, are ties of top-k."""
    logits = np.array([1e30, 3, 2, 1, -1e30, -0.0, 0.0], dtype=np.float32)
    for k, draw in ((2, 0.9), (3, 0.4), (6, 0.9)):
        s = Sampling(temperature=100.0, top_k=k)
        assert sample(logits, s, draw=draw) == oracle(logits, s, [], 0, draw)
    logits = np.array([0, -1e-40, -1e-30, -1, -0.0], dtype=np.float32)
    for k, draw in ((1, 0.9), (2, 0.9), (3, 0.9), (4, 0.5)):
        s = Sampling(temperature=1.0, top_k=k)
        assert sample(logits, s, draw=draw) == oracle(logits, s, [], 0, draw)


# Probabilities ------------------------------------------------------------------------------------


def exact_logprobs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    with np.errstate(under="ignore"):
        return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000, 32000])
def test_logprobs(isa: str, size: int) -> None:
    rng = np.random.default_rng(size)
    s = Sampling(temperature=0.7, repetition_penalty=1.5, top_k=50)
    for scale in (0.0, 0.3, 4.0, 300.0):
        logits = np.round(rng.normal(size=size) * scale, 1).astype(np.float32)
        wanted = exact_logprobs(logits)
        for count in {0, 1, min(20, size), min(500, size)}:
            logprob, ids = np.full(1, np.nan, np.float32), np.full(count, -1, np.int32)
            logprobs = np.full(count, np.nan, np.float32)
            id = sample(
                logits, s, [0], draw=float(rng.random()), logprob=logprob.ctypes.data,
                likeliest=count, ids=ids.ctypes.data, logprobs=logprobs.ctypes.data,
            )  # fmt: skip
            assert logprob[0] == pytest.approx(wanted[id], rel=3e-7, abs=3e-7)
            assert ids.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
            np.testing.assert_allclose(logprobs, wanted[ids], rtol=3e-7, atol=3e-7)


def test_forbidden_ids_have_no_chance(isa: str) -> None:
    logits = np.array([1, -np.inf, 1, -np.inf], dtype=np.float32)
    ids, logprobs = np.zeros(4, np.int32), np.zeros(4, np.float32)
    sample(logits, Sampling(), likeliest=4, ids=ids.ctypes.data, logprobs=logprobs.ctypes.data)
    assert ids.tolist() == [0, 2, 1, 3]
    np.testing.assert_allclose(logprobs, [-np.log(2)] * 2 + [-np.inf] * 2, rtol=1e-6)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 16, 128, 300, 32000])
def test_what_is_not_finite_is_no_id(isa: str, size: int) -> None:
    for bad in (np.nan, -np.nan, np.inf):
        for at in {0, size // 2, size - 1}:
            logits = np.zeros(size, dtype=np.float32)
            logits[at] = bad
            for s in SETTINGS:
                assert sample(logits, s, [0]) == NOT_FINITE
    assert sample(np.full(size, -np.inf, np.float32), Sampling()) == NOT_FINITE
    large = np.full(size, 3e38, np.float32)
    assert sample(large, Sampling(repetition_penalty=0.5), [0]) == NOT_FINITE


NONSENSE: dict[str, list[object]] = {
    "temperature": [-1.0, np.nan, np.inf], "top_p": [-0.1, np.nan], "min_p": [-0.1, 1.1, np.nan],
    "repetition": [0.0, -1.0, np.nan], "presence": [np.nan, np.inf], "frequency": [np.nan, -np.inf],
    "top_k": [-1], "draw": [-0.1, 1.0, np.nan], "previous": [None], "count": [-1], "prompt": [-1],
    "likeliest": [-1, 1, 100],
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    logits = np.zeros(10, dtype=np.float32)
    for value in NONSENSE[name]:
        assert sample(logits, SETTINGS[-1], [1, 2], **{name: value}) == BAD_ARGUMENT


def test_ids_and_sizes_out_of_range_are_refused() -> None:
    logits, native = np.zeros(10, dtype=np.float32), cpu.library()
    for id in (-1, 10, 2**31 - 1):
        assert sample(logits, SETTINGS[-1], [1, id]) == BAD_ARGUMENT
    for vocab in (0, -1, 2**31):
        assert native.oc_sample_scratch(vocab) == BAD_ARGUMENT
    buffer, choice = (
        (ctypes.c_char * 4096)(),
        structs.Sampling(temperature=1, top_p=1, repetition=1),
    )
    at = ctypes.addressof(choice)
    assert native.oc_sample(buffer, 10, at, buffer) == 0
    for arguments in (
        (None, 10, at, buffer), (buffer, 0, at, buffer), (buffer, 10, None, buffer),
        (buffer, 10, at, None),
    ):  # fmt: skip
        assert native.oc_sample(*arguments) == BAD_ARGUMENT
