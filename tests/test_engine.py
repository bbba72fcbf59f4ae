"""The native engine under the scheduler: a request's ids are those that it gives alone, to the bit, and what
goes wrong for one request ends that one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from test_engine_families import GO, fed_logits, packed_folder, scattered, some_ids
from test_families import random_model

from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.kernels import cpu, structs
from onecard.runtime.cpu import PAGE, CpuSettings, CpuStepper
from onecard.runtime.engine import Request
from onecard.runtime.fake import Letters
from onecard.runtime.pages import Pool
from onecard.runtime.reply import Result
from onecard.runtime.sample import Sampling
from onecard.runtime.scheduler import Engine, Limits
from onecard.runtime.steps import Draw, Feed

CLASSES = cpu.isas() if cpu.available() else ()
FUSED = tuple(isa for isa in CLASSES if isa not in ("plain", "amx"))
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

BAD_ARGUMENT, NO_MEMORY = -1, -2
MODELS = ("shipped", "shipped int4", "experts int4")
ROWS = 48
ALONE = Limits(tokens=ROWS, chunk=ROWS, running=1, steps=1, draft=0, reuse=False, latency=100)


@pytest.fixture(autouse=True, scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The folder of each model, and a cache of this file's own."""
    base = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "xdg"))
        random_model("qwen2-moe-mixed", max_position_embeddings=512).save_pretrained(
            base / "experts"
        )
        yield {
            "shipped": SHIPPED,
            "shipped int4": packed_folder(SHIPPED, base / "int4", 4, 128, False),
            "experts int4": packed_folder(base / "experts", base / "moe4", 4, None, True),
        }


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


def opened(folder: Path, threads: int = 1, context: int | None = None, **more) -> CpuStepper:
    return CpuStepper(folder, CpuSettings(threads, context, ROWS, **more))


@cache
def tokenizer_of(folder: Path) -> Tokenizer | Letters:
    return Tokenizer(folder) if (folder / "tokenizer.json").is_file() else Letters(101)


def some_requests(vocab: int, count: int, seed: int = 0, most: int = 24) -> list[Request]:
    """Prompts that share beginnings, repeat themselves, or are long; settings of all kinds."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, vocab, 40).tolist()
    requests = []
    for i in range(count):
        own = rng.integers(3, vocab, rng.integers(1, 12)).tolist()
        prompt = [
            own,
            shared[: rng.integers(1, 41)] + own,
            own * 8,
            [*own, *shared, *own, *shared],
        ][i % 4]
        greedy = i % 3 == 0
        sampling = Sampling(
            max_tokens=int(rng.integers(1, most + 1)),
            temperature=0.0 if greedy else float(rng.choice([0.7, 1.3])),
            top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            presence_penalty=float(rng.choice([0.0, 0.4])), frequency_penalty=float(rng.choice([0.0, 0.3])),
            seed=i, ignore_eos=bool(rng.random() < 0.7), logprobs=[None, 0, 3][i % 3],
        )  # fmt: skip
        requests.append(Request(tuple(prompt), sampling))
    return requests


def run(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    results = engine.generate([r.prompt for r in requests], [r.sampling for r in requests])
    engine.audit()
    for result in results:
        assert isinstance(result, Result), result
    return results  # type: ignore[return-value]


def alone(folder: Path, requests: Sequence[Request]) -> list[Result]:
    """One request after the other, one id per call, on one thread."""
    engine = Engine(opened(folder), tokenizer_of(folder), ALONE)
    results = [run(engine, [request])[0] for request in requests]
    engine.close()
    return results


def check_same(found: Sequence[Result], expected: Sequence[Result]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.ids, mine.text, mine.finish) == (theirs.ids, theirs.text, theirs.finish)
        assert mine.logprobs == theirs.logprobs


# The promise --------------------------------------------------------------------------------------


def test_any_company_any_threads(folders: dict[str, Path], model: str) -> None:
    """Random limits: batches, chunks, ids per call, drafts, sharing; and 1, 2, 3 threads."""
    folder = folders[model]
    requests = some_requests(opened(folder).vocab_size, 9)
    expected = alone(folder, requests)
    rng = np.random.default_rng(3)
    for threads in (1, 2, 3, 2):
        limits = Limits(
            tokens=int(rng.choice([3, 8, 20, ROWS])), chunk=int(rng.choice([1, 7, 33, ROWS])),
            running=int(rng.choice([2, 5, 16])), steps=int(rng.integers(1, 17)),
            draft=int(rng.choice([0, 4, 8])), reuse=bool(rng.random() < 0.7), latency=100,
        )  # fmt: skip
        engine = Engine(opened(folder, threads), tokenizer_of(folder), limits)
        order = rng.permutation(len(requests))
        check_same(run(engine, [requests[i] for i in order]), [expected[i] for i in order])
        engine.close()


def test_speculation(folders: dict[str, Path], model: str) -> None:
    """Small models turn in circles, which is guessed; drafts that come true and drafts that do not."""
    folder = folders[model]
    circle = some_ids(6, 101) * 5
    requests = [
        Request(tuple(circle[i:]), Sampling(max_tokens=60, temperature=t, seed=i, ignore_eos=True))
        for i, t in enumerate((0.0, 0.3, 0.0))
    ]
    expected = alone(folder, requests)
    for threads, draft in ((2, 8), (1, 3)):
        limits = Limits(tokens=ROWS, chunk=ROWS, draft=draft, latency=100)
        engine = Engine(opened(folder, threads), tokenizer_of(folder), limits)
        check_same(run(engine, requests), expected)
        assert engine.counts.drafted > engine.counts.accepted > 0
        engine.close()


@pytest.mark.parametrize("steps", range(1, 17))
def test_ids_per_call(folders: dict[str, Path], steps: int) -> None:
    folder = folders["experts int4"]
    requests = [
        replace(r, sampling=replace(r.sampling, max_tokens=20)) for r in some_requests(101, 4, 5)
    ]
    limits = Limits(tokens=ROWS, chunk=ROWS, steps=steps, draft=0, latency=100)
    engine = Engine(opened(folder, 2), tokenizer_of(folder), limits)
    check_same(run(engine, requests), expected_of_four(folder, tuple(requests)))


@cache
def expected_of_four(folder: Path, requests: tuple[Request, ...]) -> list[Result]:
    return alone(folder, requests)


def test_preemption(folders: dict[str, Path], model: str) -> None:
    """Pages for two or three requests and eight who want them."""
    folder = folders[model]
    requests = [
        Request(
            tuple(some_ids(25 + 5 * i, 101, i)),
            Sampling(max_tokens=50, temperature=0.8 * (i % 2), seed=i, ignore_eos=True),
        )
        for i in range(6)
    ]
    expected = alone(folder, requests)
    limits = Limits(tokens=ROWS, chunk=20, running=8, draft=4, latency=100)
    engine = Engine(opened(folder, 2, context=9 * PAGE), tokenizer_of(folder), limits)
    check_same(run(engine, requests), expected)
    assert engine.counts.preempted > 0


def test_every_class(isa: str, folders: dict[str, Path], model: str) -> None:
    folder = folders[model]
    requests = some_requests(101, 6, seed=8)
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=8)) for r in requests]
    expected = alone(folder, requests)
    limits = Limits(tokens=ROWS, chunk=21, steps=5, draft=4, latency=100)
    check_same(run(Engine(opened(folder, 2), tokenizer_of(folder), limits), requests), expected)


def test_classes_are_near(folders: dict[str, Path], model: str) -> None:
    """Their sums in attention have other orders, and a code on an edge may flip."""
    ids = some_ids(40, 101)
    found = {}
    for isa in CLASSES:
        cpu.force_isa(isa)
        try:
            found[isa] = fed_logits(opened(folders[model]), ids, [33, 1, 6])
        finally:
            cpu.force_isa(None)
    first = found[CLASSES[-1]]
    for logits in found.values():
        assert np.sqrt(np.square(logits - first).mean()) < 1e-2 * np.abs(first).max()


def test_logits_of_any_cut_and_any_threads(folders: dict[str, Path], model: str) -> None:
    """Past a segment of attention, in chunks that begin and end anywhere."""
    ids = some_ids(300, 101)
    rng = np.random.default_rng(0)
    first = None
    for threads in (1, 2, 3):
        stepper = opened(folders[model], threads)
        for _ in range(2):
            pieces: list[int] = []
            while sum(pieces) < len(ids):
                room = min(ROWS, len(ids) - sum(pieces))
                pieces.append(int(rng.choice([1, 1, rng.integers(1, room + 1), room])))
            found = fed_logits(stepper, ids, pieces)
            first = found if first is None else first
            np.testing.assert_array_equal(found.view(np.uint32), first.view(np.uint32))


def test_rows_of_many_requests_are_those_of_one(folders: dict[str, Path], model: str) -> None:
    """One call with prompts and replies of eight requests, in two orders."""
    stepper = opened(folders[model], 2)
    rng = np.random.default_rng(1)
    prompts = [some_ids(int(n), 101, i) for i, n in enumerate([1, 7, 2, 12, 1, 9, 1, 3])]
    single = [fed_logits(stepper, ids, [len(ids)]) for ids in prompts]
    for _ in range(3):
        order = rng.permutation(len(prompts))
        feeds = [
            Feed(np.array(prompts[i], np.int32), 0, scattered(stepper, PAGE, int(i)), "all")
            for i in order
        ]
        for i, fed in zip(order, stepper.step(feeds, 1, GO), strict=True):
            np.testing.assert_array_equal(fed.logits, single[i])


# Calls --------------------------------------------------------------------------------------------


def drawing(stepper: CpuStepper, ids: Sequence[int], most: int, **more) -> Feed:
    sampling = Sampling(**{"temperature": 0.0, **more})
    new = np.array(ids, np.int32)
    uniforms = np.linspace(0.05, 0.95, most) if sampling.temperature else np.empty(0)
    draw = Draw(sampling, new, len(new), uniforms, np.empty(0, np.int32), most)
    return Feed(new, 0, scattered(stepper, len(ids) + most), draw=draw)


def test_all_logits_and_an_id_in_one_call(folders: dict[str, Path], model: str) -> None:
    """Whichever thread is faster: the last row's may choose before the others have told their logits."""
    stepper = opened(folders[model], 3)
    feed = drawing(stepper, some_ids(7, 101), 3)
    (expected,) = stepper.step([replace(feed, draw=None, want="all")], 1, GO)
    first = None
    for _ in range(30):
        (fed,) = stepper.step([replace(feed, want="all")], 3, GO)
        np.testing.assert_array_equal(fed.logits, expected.logits)
        first = first or fed.ids
        assert fed.ids == first and len(first) == 3


@pytest.mark.skipif(len(FUSED) < 2, reason="one class alone")
def test_fused_classes_agree(folders: dict[str, Path], model: str) -> None:
    """Bit for bit, in the whole network: which of them a machine takes is a matter of speed."""
    found = []
    for isa in FUSED:
        cpu.force_isa(isa)
        stepper = opened(folders[model], 2)
        feed = drawing(stepper, some_ids(20, stepper.vocab_size), 3)
        (fed,) = stepper.step([replace(feed, want="all")], 3, GO)
        found.append(fed)
        stepper.close()
    cpu.force_isa(None)
    for other in found[1:]:
        np.testing.assert_array_equal(other.logits.view(np.uint32), found[0].logits.view(np.uint32))
        assert other.ids == found[0].ids


def test_cancel_is_read_between_ids(folders: dict[str, Path]) -> None:
    stepper = opened(folders["shipped int4"], 2)
    feed = drawing(stepper, some_ids(5, 4096), 400)
    begin = time.perf_counter()
    (whole,) = stepper.step([feed], 400, GO)
    taken = time.perf_counter() - begin
    assert len(whole.ids) == 400
    (one,) = stepper.step([feed], 400, np.ones(1, np.int32))
    assert one.ids == whole.ids[:1]
    flag = np.zeros(1, np.int32)
    timer = threading.Timer(taken / 4, flag.fill, [1])
    timer.start()
    begin = time.perf_counter()
    (some,) = stepper.step([feed], 400, flag)
    timer.join()
    assert 1 <= len(some.ids) < 400 and some.ids == whole.ids[: len(some.ids)]
    assert time.perf_counter() - begin < 5


def test_steps_end_at_most_and_at_ends(folders: dict[str, Path]) -> None:
    """Requests of one call stop by themselves: at `most`, at an end, at `steps`."""
    stepper = opened(folders["shipped"], 2)
    (long,) = stepper.step([drawing(stepper, [5, 6, 7], 12)], 12, GO)
    assert len(long.ids) == 12
    end = long.ids[4]
    cut = long.ids.index(end) + 1
    feeds = [drawing(stepper, [5, 6, 7], most) for most in (1, 7, 12)]
    feeds.append(
        replace(
            feeds[2],
            draw=replace(feeds[2].draw, ends=np.array(sorted({end, 4095}), np.int32)),
        )
    )
    feeds.append(Feed(np.array([9], np.int32), 0, scattered(stepper, PAGE, 12)))
    for i, feed in enumerate(feeds):
        feeds[i] = replace(feed, table=scattered(stepper, 2 * PAGE, 2 * i))
    found = stepper.step(feeds, 9, GO)
    assert [fed.ids for fed in found] == [
        long.ids[:1], long.ids[:7], long.ids[:9], long.ids[: min(9, cut)], ()
    ]  # fmt: skip


def test_told_chances_are_the_logits(folders: dict[str, Path]) -> None:
    stepper = opened(folders["shipped"])
    feed = drawing(stepper, [5, 6, 7], 5, logprobs=4, temperature=1.0)
    (fed,) = stepper.step([replace(feed, want="last")], 5, GO)
    assert fed.logits is not None and fed.logits.shape == (1, 4096) and len(fed.logprobs) == 5
    logits = fed.logits[0].astype(np.float64)
    chances = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    told = fed.logprobs[0]
    assert told.logprob == pytest.approx(chances[told.id], abs=1e-5)
    assert [id for id, _ in told.top] == np.argsort(-chances, kind="stable")[:4].tolist()


# What goes wrong ----------------------------------------------------------------------------------


def test_requests_that_cannot_be_run(folders: dict[str, Path]) -> None:
    folder = folders["shipped"]
    engine = Engine(opened(folder, context=4 * PAGE), tokenizer_of(folder), Limits(tokens=ROWS))
    for prompt in ([4096], [-1], [5, 1 << 40], [2**31]):
        with pytest.raises(BadRequest, match="0 to 4095"):
            engine.add(Request(tuple(prompt)))
    with pytest.raises(BadRequest, match="empty"):
        engine.add(Request(()))
    with pytest.raises(BadRequest, match=r"100 prompt tokens and 29 new ones .* 128"):
        engine.add(Request((5,) * 100, Sampling(max_tokens=29)))
    small = Engine(
        opened(folder, context=4 * PAGE), tokenizer_of(folder), Limits(tokens=ROWS), Pool(3, PAGE)
    )
    with pytest.raises(BadRequest, match=r"80 prompt tokens and 20 new ones .* 96"):
        small.add(Request((5,) * 80, Sampling(max_tokens=20)))
    assert not engine.busy
    (result,) = run(engine, [Request((5,) * 100, Sampling(max_tokens=28, ignore_eos=True))])
    assert len(result.ids) == 28
    engine.close()
    engine.close()
    with pytest.raises(FailedWork, match="closed"):
        engine.add(Request((5,), Sampling(max_tokens=1)))


@pytest.mark.parametrize("name, most", [("threads", 1024), ("context", 1 << 20), ("rows", 1 << 20)])
def test_settings_that_the_library_refuses_are_refused_before(name: str, most: int) -> None:
    CpuSettings(**{name: most})
    for value in (0, -1, most + 1):
        with pytest.raises(BadRequest, match=f"{name} is {value}"):
            CpuSettings(**{name: value})


def test_feeds_that_make_no_sense(folders: dict[str, Path]) -> None:
    """Each is refused, with nothing done; a good one in the same batch as well."""
    stepper = opened(folders["shipped"], context=4 * PAGE)
    good = Feed(np.array([5, 6], np.int32), 0, np.array([2], np.int32), "all")
    (before,) = stepper.step([good], 1, GO)
    ids, table = good.ids, np.arange(4, dtype=np.int32)
    for bad in (
        replace(good, ids=np.array([5, 4096], np.int32)), replace(good, ids=np.array([-1], np.int32)),
        replace(good, ids=ids[:0]), replace(good, past=-1), replace(good, past=1 << 40),
        replace(good, past=4 * PAGE - 1, table=table), replace(good, table=np.array([4], np.int32)),
        replace(good, table=np.array([-1], np.int32)),
        replace(good, ids=np.full(ROWS + 1, 5, np.int32), table=table),
    ):  # fmt: skip
        for batch in ([bad], [good, bad], [bad, good]):
            with pytest.raises(BadRequest, match="no sense"):
                stepper.step(batch, 1, GO)
    (after,) = stepper.step([good], 1, GO)
    np.testing.assert_array_equal(after.logits, before.logits)
    stepper.close()
    stepper.close()
    with pytest.raises(ValueError, match="closed"):
        stepper.step([good], 1, GO)


def poisoned(folder: Path, ids: Sequence[int], value: float, monkeypatch, **more) -> CpuStepper:
    """A model whose embeddings of some ids hold `value`."""
    described = CpuStepper._described

    def with_poison(stepper: CpuStepper) -> structs.Model:
        model = described(stepper)
        raw = stepper.weights.data("stem.embedding")
        wide = stepper.weights.embedding_dtype == "fp32"
        table = raw.view(np.uint32 if wide else np.uint16).copy().reshape(stepper.vocab_size, -1)
        for id in ids:
            bits = np.array([value], np.float32).view(np.uint32)[0]
            table[id, 3] = bits if wide else bits >> 16
        stepper._kept.append(table)
        model.embedding = table.ctypes.data
        return model

    with monkeypatch.context() as patch:
        patch.setattr(CpuStepper, "_described", with_poison)
        return opened(folder, 2, **more)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_request_without_numbers_fails_alone(
    folders: dict[str, Path], model: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it harm those that get its pages after it."""
    folder = folders[model]
    requests = some_requests(30, 6, seed=2, most=10)
    expected = alone(folder, requests)
    said = {id for r, e in zip(requests, expected, strict=True) for id in (*r.prompt, *e.ids)}
    never = next(id for id in range(3, 101) if id not in said)
    stepper = poisoned(folder, [never], value, monkeypatch, context=10 * PAGE)
    limits = Limits(tokens=ROWS, chunk=17, steps=4, draft=4, latency=100)
    engine = Engine(stepper, tokenizer_of(folder), limits)
    bad = Request((5, never, *some_ids(40, 100)), Sampling(max_tokens=9))
    for turn in range(2):
        mixed = [*requests[:3], bad, *requests[3:6], bad, *requests[6:]]
        results = engine.generate([r.prompt for r in mixed], [r.sampling for r in mixed])
        for place in (3, 7):
            if value == 3e38 and isinstance(results[place], Result):
                continue  # a norm made numbers of it
            assert isinstance(results[place], FailedWork), turn
            assert "not numbers" in str(results[place])
        check_same([r for i, r in enumerate(results) if i not in (3, 7)], expected)  # type: ignore[misc]
        engine.audit()


def test_a_context_without_memory(folders: dict[str, Path]) -> None:
    """The system refuses, and the error says what to do."""
    code = f"""
import resource, sys
from onecard.core.errors import FailedWork
from onecard.runtime.cpu import CpuSettings, CpuStepper
stepper = CpuStepper({str(folders["shipped"])!r}, CpuSettings(1, 512))
stepper.close()
have = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (have + (1 << 28),) * 2)
try:
    CpuStepper({str(folders["shipped"])!r}, CpuSettings(1, 1 << 20))
except FailedWork as error:
    print(error, error.do)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "1048576 positions" in told.stdout and "smaller --context" in told.stdout, told


# Nonsense -----------------------------------------------------------------------------------------


NUMBERS = (
    -(2**31),
    -65536,
    -1,
    0,
    1,
    2,
    3,
    5,
    7,
    16,
    33,
    63,
    65,
    100,
    4097,
    65536,
    2**30,
    2**31 - 1,
)
SIZES = (*NUMBERS, -(2**63), -(2**40), 2**31, 2**40, 2**62, 2**63 - 1)
REALS = (0.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
EXTENTS = {"layers", "ropes", "learned", "shared", "head_dim"}
"""Sizes of arrays that the engine must believe: only smaller ones, or ones out of range, are nonsense."""


def native_open(model: structs.Model, **settings: int) -> tuple[int, ctypes.c_void_p]:
    asked = structs.EngineSettings(
        **{"threads": 1, "kv_dtype": cpu.CODES["fp16"], "pages": 8, "rows": ROWS, **settings}
    )
    engine = ctypes.c_void_p()
    native = cpu.library()
    code = native.oc_engine_open(ctypes.byref(model), ctypes.byref(asked), ctypes.byref(engine))
    return code, engine


def copied(model: structs.Model) -> structs.Model:
    """A copy whose structs may be changed; what they point to is shared."""
    new = structs.Model.from_buffer_copy(model)
    layers = (structs.Layer * model.layers)()
    for i in range(model.layers):
        layers[i] = structs.Layer.from_buffer_copy(model.layer[i])
        count = layers[i].experts + layers[i].shared if layers[i].experts else 1
        mlps = (structs.Mlp * count)()
        for j in range(count):
            mlps[j] = structs.Mlp.from_buffer_copy(model.layer[i].mlps[j])
        layers[i].mlps = mlps
    ropes = (structs.Rope * max(1, model.ropes))()
    for i in range(model.ropes):
        ropes[i] = structs.Rope.from_buffer_copy(model.rope[i])
    new.layer, new.rope = layers, ropes
    return new


def places(
    struct: ctypes.Structure, path: str = ""
) -> Iterator[tuple[ctypes.Structure, str, type]]:
    """Every number and pointer of a struct and of those inside it."""
    for name, kind, *_ in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, ctypes.Structure):
            yield from places(value, f"{path}{name}.")
        else:
            yield struct, name, kind


def parts_of(model: structs.Model) -> list[ctypes.Structure]:
    found: list[ctypes.Structure] = [model]
    for i in range(model.layers):
        layer = model.layer[i]
        found.append(layer)
        count = layer.experts + layer.shared if layer.experts else 1
        found += [layer.mlps[j] for j in range(count)]
    return found + [model.rope[i] for i in range(model.ropes)]


@pytest.mark.parametrize("model", ["shipped int4", "experts int4"])
def test_nonsense_models(folders: dict[str, Path], model: str) -> None:
    """Every field of every struct, with numbers out of the question and pointers to nothing."""
    stepper = opened(folders[model])
    code, engine = native_open(stepper._model)
    assert code == 0
    cpu.library().oc_engine_close(engine)
    refused = taken = 0
    rng = np.random.default_rng(0)
    for part in range(len(parts_of(stepper._model))):
        for field in range(len(list(places(parts_of(stepper._model)[part])))):
            new = copied(stepper._model)
            struct, name, kind = list(places(parts_of(new)[part]))[field]
            before = getattr(struct, name)
            if kind in (ctypes.c_int32, ctypes.c_int64):
                values: Sequence = SIZES if kind is ctypes.c_int64 else NUMBERS
                if name in EXTENTS:
                    values = [v for v in values if v < before]
                values = rng.choice(np.array(values, object), min(6, len(values)), replace=False)
            elif kind in (ctypes.c_float, ctypes.c_double):
                values = REALS[:3]
            else:
                values = [None]
            for value in values:
                setattr(struct, name, value)
                code, engine = native_open(new)
                assert code in (0, BAD_ARGUMENT, NO_MEMORY), (name, value)
                refused, taken = refused + (code != 0), taken + (code == 0)
                if code == 0:
                    cpu.library().oc_engine_close(engine)
            setattr(struct, name, before)
    assert refused > 200 and taken > 100


def test_nonsense_settings(folders: dict[str, Path]) -> None:
    stepper = opened(folders["shipped"])
    for field in ("threads", "kv_dtype", "pages", "rows"):
        for value in SIZES if field in ("pages", "rows") else NUMBERS:
            if field == "threads" and 100 < value < 5000:
                continue
            code, engine = native_open(stepper._model, **{field: value})
            assert code in (0, BAD_ARGUMENT, NO_MEMORY), (field, value)
            if value <= 0 and not (field == "kv_dtype" and value == 1):
                assert code == BAD_ARGUMENT
            if code == 0:
                assert cpu.library().oc_engine_bytes(engine) > 0
                cpu.library().oc_engine_close(engine)
    native = cpu.library()
    engine = ctypes.c_void_p()
    asked = structs.EngineSettings(1, 1, 8, 8)
    at = ctypes.byref
    assert native.oc_engine_open(None, at(asked), at(engine)) == BAD_ARGUMENT
    assert native.oc_engine_open(at(stepper._model), None, at(engine)) == BAD_ARGUMENT
    assert native.oc_engine_open(at(stepper._model), at(asked), None) == BAD_ARGUMENT
    assert native.oc_engine_bytes(None) == 0
    native.oc_engine_close(None)


def test_nonsense_feeds(folders: dict[str, Path], model: str) -> None:
    """Whatever a feed says, there is an error or an answer, and the next call is as good as before."""
    stepper = opened(folders[model], 2, context=8 * PAGE)
    vocab, room = stepper.vocab_size, 8 * PAGE
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, 4096).astype(np.int32)
    table = np.arange(8, dtype=np.int32)
    logits = np.empty((room, vocab), np.float32)
    chosen, likely = np.empty(4096, np.int32), np.empty((4096, 20), np.float32)
    said = rng.integers(0, vocab, 8192).astype(np.int32)
    previous = said.copy()
    draws, ends = rng.random(4096), np.arange(vocab, dtype=np.int32)

    def a_feed() -> structs.Feed:
        previous[:] = said
        sampling = structs.Sampling(
            temperature=0.8, top_p=0.9, min_p=0.0, repetition=1.1, presence=0.0, frequency=0.0, top_k=20,
            previous=previous.ctypes.data, count=10, prompt=5, likeliest=0,
        )  # fmt: skip
        return structs.Feed(
            ids=ids.ctypes.data, count=3, past=0, table=table.ctypes.data, want=2, most=4,
            logits=logits.ctypes.data, sampling=sampling, draws=draws.ctypes.data,
            ends=ends.ctypes.data, ends_count=1, chosen=chosen.ctypes.data,
            logprobs=likely.ctypes.data, likeliest_ids=likely.ctypes.data,
            likeliest_logprobs=likely.ctypes.data,
        )  # fmt: skip

    def step(*feeds: structs.Feed, count: int | None = None, steps: int = 4) -> int:
        array = (structs.Feed * max(1, len(feeds)))(*feeds)
        count = len(feeds) if count is None else count
        code = cpu.library().oc_engine_step(stepper._engine, array, count, steps, GO.ctypes.data)
        for mine, theirs in zip(feeds, array, strict=False):
            ctypes.memmove(ctypes.byref(mine), ctypes.byref(theirs), ctypes.sizeof(mine))
        return int(code)

    def answer() -> tuple[list[int], np.ndarray]:
        feed = a_feed()
        assert step(feed) == 0 and feed.status == 0 and feed.chosen_count >= 1
        return chosen[: feed.chosen_count].tolist(), logits[:3].copy()

    good = answer()
    codes: dict[int, int] = {}
    bounds = {"count": 4096, "sampling.count": 4096, "likeliest": 20, "ends_count": vocab}
    for turn in range(600):
        feed = a_feed()
        every = list(places(feed))
        for i in rng.choice(len(every), 1 + turn % 3, replace=False):
            struct, name, kind = every[i]
            if kind in (ctypes.c_int32, ctypes.c_int64):
                value = rng.choice(np.array(SIZES if kind is ctypes.c_int64 else NUMBERS, object))
                most = bounds.get(f"sampling.{name}" if struct is not feed else name)
                if most is not None and most < value < 2**31:
                    continue
                if struct is not feed and name == "count" and value >= 2**31:
                    continue
                setattr(struct, name, value)
            elif kind in (ctypes.c_float, ctypes.c_double):
                setattr(struct, name, float(rng.choice(REALS)))
            else:
                setattr(struct, name, None)
        code = step(feed)
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, BAD_ARGUMENT)
        assert 0 <= feed.chosen_count <= 4 or code
    assert codes[0] > 50 and codes[BAD_ARGUMENT] > 200, codes
    for count, steps in ((0, 1), (-1, 1), (1, 0), (1, -5), (1 << 62, 1)):
        many = [a_feed()] if count < 2 else [a_feed() for _ in range(ROWS + 1)]
        assert step(*many, count=count, steps=steps) == BAD_ARGUMENT
    assert cpu.library().oc_engine_step(None, None, 1, 1, None) == BAD_ARGUMENT
    again = answer()
    assert again[0] == good[0]
    np.testing.assert_array_equal(again[1], good[1])


def test_closing_while_nothing_runs_and_again(folders: dict[str, Path]) -> None:
    """Many engines come and go, and leave no thread behind."""
    before = threads_of_process()
    for threads in (1, 2, 5, 3):
        stepper = opened(folders["experts int4"], threads)
        fed_logits(stepper, some_ids(10, 101), [10])
        stepper.close()
    assert threads_of_process() <= before


def threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_two_engines_at_once(folders: dict[str, Path]) -> None:
    """Each has its own threads and pages; calls for different engines may overlap."""
    steppers = [opened(folders[name], 2) for name in ("shipped int4", "experts int4")]
    ids = some_ids(30, 101)
    expected = [fed_logits(s, ids, [30]) for s in steppers]
    found: list[list[np.ndarray]] = [[], []]

    def work(place: int) -> None:
        for _ in range(10):
            found[place].append(fed_logits(steppers[place], ids, [11, 1, 18]))

    both = [threading.Thread(target=work, args=[i]) for i in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        for logits in mine:
            np.testing.assert_array_equal(logits, theirs)
