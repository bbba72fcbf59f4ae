"""Choosing the next id: each filter against the transformers library's, and every numeric edge."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from onecard.core.errors import BadRequest
from onecard.runtime.sample import (
    MOST_STOPS,
    Sampling,
    choose,
    distribution,
    generator,
    penalize,
)

VOCABULARY = 61


def random_logits(seed: int, size: int = VOCABULARY) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


def oracle(logits: np.ndarray, ids: list[int], s: Sampling) -> np.ndarray:
    """Chances by the processors of transformers, in the order its generate puts them."""
    chain = hf.LogitsProcessorList()
    if s.repetition_penalty != 1:
        chain.append(hf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        chain.append(hf.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(hf.TopPLogitsWarper(s.top_p))
    if s.min_p > 0:
        chain.append(hf.MinPLogitsWarper(s.min_p))
    scores = chain(torch.tensor([ids]), torch.from_numpy(logits)[None])
    return torch.softmax(scores[0].double(), -1).numpy()


def ours(logits: np.ndarray, ids: list[int], s: Sampling) -> np.ndarray:
    chances = distribution(penalize(logits, ids, s), s)
    return chances / chances.sum()


CASES = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=0.9, min_p=0.1),
    Sampling(temperature=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, repetition_penalty=0.7),
    Sampling(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda s: str(CASES.index(s)))
def test_filters_equal_those_of_transformers(case: Sampling) -> None:
    for seed in range(20):
        logits, ids = random_logits(seed), [3, 3, 8, 41]
        expected = oracle(logits, ids, case)
        np.testing.assert_allclose(ours(logits, ids, case), expected, rtol=1e-4, atol=1e-9)


def test_the_order_of_filters_shows() -> None:
    """Top-p sees what temperature and top-k left; any other order keeps other ids."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    s = Sampling(temperature=1.0, top_k=2, top_p=0.56)
    assert np.flatnonzero(ours(logits, [], s)).tolist() == [0]
    assert np.flatnonzero(ours(logits, [], replace(s, top_k=0))).tolist() == [0, 1]
    assert np.flatnonzero(ours(logits, [], replace(s, temperature=10.0))).tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 400), p=st.floats(0, 0.999))
def test_top_p_keeps_the_smallest_likely_set(seed: int, size: int, p: float) -> None:
    logits = random_logits(seed, size)
    kept = ours(logits, [], Sampling(temperature=1.0, top_p=p)) > 0
    chances = ours(logits, [], Sampling(temperature=1.0))
    assert kept.any()
    assert chances[kept].min() >= chances[~kept].max(initial=0)
    assert chances[kept].sum() >= p - 1e-9
    assert chances[kept].sum() - chances[kept].min() < p + 1e-9


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing() -> None:
    rng = generator(Sampling(seed=1))
    before = rng.bit_generator.state
    assert choose(np.array([0, 5, 5, 1], dtype=np.float32), [], Sampling(), rng) == 1
    assert rng.bit_generator.state == before


def test_draws_follow_the_chances() -> None:
    chances = np.array([0.5, 0.0, 0.3, 0.2])
    with np.errstate(divide="ignore"):
        logits = np.log(chances).astype(np.float32)
    s = Sampling(temperature=1.0, seed=5)
    rng = generator(s)
    drawn = np.bincount([choose(logits, [], s, rng) for _ in range(8000)], minlength=4) / 8000
    assert drawn[1] == 0
    assert np.abs(drawn - chances).max() < 4 * math.sqrt(0.25 / 8000)


def test_a_seed_decides_whatever_the_neighbours_do() -> None:
    s = Sampling(temperature=1.0, seed=11)

    def alone() -> list[int]:
        rng = generator(s)
        return [choose(random_logits(i), [], s, rng) for i in range(30)]

    first, other, rng = alone(), generator(replace(s, seed=12)), generator(s)
    mixed = []
    for i in range(30):
        choose(random_logits(i), [], s, other)
        mixed.append(choose(random_logits(i), [], s, rng))
    assert mixed == first == alone()
    different = generator(replace(s, seed=12))
    assert first != [choose(random_logits(i), [], s, different) for i in range(30)]
    free = [generator(Sampling(seed=None)).random() for _ in range(2)]
    assert free[0] != free[1]


def test_presence_and_frequency_count_the_reply_alone() -> None:
    s = Sampling(presence_penalty=1.0, frequency_penalty=0.5)
    logits = np.zeros(6, dtype=np.float32)
    after = penalize(logits, [1, 2, 3, 3, 4], s, prompt=2)
    assert after.tolist() == [0, 0, 0, -2.0, -1.5, 0]
    assert logits.tolist() == [0] * 6


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6, 100.0])
def test_extreme_temperatures_give_numbers(temperature: float) -> None:
    s = Sampling(temperature=temperature, seed=0)
    logits = random_logits(0) * 1e4
    chances = ours(logits, [], s)
    assert np.isfinite(chances).all()
    if temperature < 1:
        assert choose(logits, [], s, generator(s)) == int(np.argmax(logits))


EDGES: list[object] = [
    -1, -1e-9, math.nan, math.inf, -math.inf, 1e308, 2**70, 10**5000, True, "1", None, b"1", [1]
]  # fmt: skip
FINE = {("seed", None), ("presence_penalty", -1), ("frequency_penalty", -1),
        ("presence_penalty", -1e-9), ("frequency_penalty", -1e-9)}  # fmt: skip
NUMBERS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
           "presence_penalty", "frequency_penalty", "seed")  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused(name: str) -> None:
    for value in EDGES:
        if not isinstance(value, list) and (name, value) in FINE and value is not True:
            Sampling(**{name: value})
            continue
        with pytest.raises(BadRequest, match=name):
            Sampling(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed"])
def test_whole_numbers_are_whole(name: str) -> None:
    with pytest.raises(BadRequest, match=name):
        Sampling(**{name: 1.5})


def test_edges_that_are_allowed() -> None:
    Sampling(temperature=0, top_p=0, min_p=1, seed=2**64 - 1, top_k=0, max_tokens=1)
    for name in ("max_tokens", "repetition_penalty"):
        with pytest.raises(BadRequest, match=name):
            Sampling(**{name: 0})


@pytest.mark.parametrize(
    "stop", ["abc", ["a"], ("",), ("a", 1), None, ("x" * 300,), tuple("ab" * MOST_STOPS)]
)
def test_odd_stop_strings_are_refused(stop: object) -> None:
    with pytest.raises(BadRequest, match="stop"):
        Sampling(stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, "yes", None])
def test_ignore_eos_is_a_flag(value: object) -> None:
    with pytest.raises(BadRequest, match="ignore_eos"):
        Sampling(ignore_eos=value)  # type: ignore[arg-type]
