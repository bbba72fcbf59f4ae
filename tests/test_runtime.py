"""The engine: greedy replies equal transformers', the cache changes nothing, endings are exact."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from onecard.checkpoint.load import load_model
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers
from onecard.kernels.reference import round_to_nearest
from onecard.nn.model import Model
from onecard.runtime.chat import Conversation
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.engine import complete, generate, prompt_ids
from onecard.runtime.reference import TorchExecutor
from onecard.runtime.sample import GREEDY, Sampling
from onecard.runtime.scheduler import Engine, Limits
from onecard.runtime.stop import Stops

PROMPTS = ["Once upon a time", "", "Lily and Tom went to the", "从前", "The cat\n"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Model:

    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    return load_model(DATA / "stories260K")


@pytest.fixture(scope="module")
def hf(model: Model) -> Any:
    return AutoModelForCausalLM.from_pretrained(model.source).eval()


@pytest.fixture(scope="module")
def executor(model: Model) -> TorchExecutor:
    return TorchExecutor(model)


def oracle(hf: Any, ids: Sequence[int], count: int, **more: Any) -> list[int]:
    out = hf.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, **more)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_equals_transformers(
    hf: Any, model: Model, executor: TorchExecutor, text: str
) -> None:
    ids = prompt_ids(model.tokenizer, text)
    result = complete(executor, model.tokenizer, ids, Sampling(max_tokens=50))
    assert list(result.ids) == oracle(hf, ids, 50)
    assert result.prompt_tokens == len(ids)
    assert result.text == model.tokenizer.decode(result.ids)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_equals_transformers(
    hf: Any, model: Model, executor: TorchExecutor, penalty: float
) -> None:
    ids = prompt_ids(model.tokenizer, "Once upon a time")
    s = Sampling(max_tokens=60, repetition_penalty=penalty)
    plain = complete(executor, model.tokenizer, ids, Sampling(max_tokens=60))
    result = complete(executor, model.tokenizer, ids, s)
    assert list(result.ids) == oracle(hf, ids, 60, repetition_penalty=penalty)
    assert result.ids != plain.ids


def test_the_end_token_ends(hf: Any, model: Model, executor: TorchExecutor) -> None:
    """The model's own likeliest next id is declared to be the end."""
    tok = Tokenizer(model.source)  # type: ignore[arg-type]
    ids = prompt_ids(tok, "Once upon a time")
    free = complete(executor, tok, ids, Sampling(max_tokens=40))
    end = free.ids[12]
    first = free.ids.index(end)
    tok.eos_ids = frozenset({end})
    result = complete(executor, tok, ids, Sampling(max_tokens=40))
    assert (result.finish, result.ids) == ("stop", free.ids[: first + 1])
    assert list(result.ids) == oracle(hf, ids, 40, eos_token_id=end, pad_token_id=0)
    assert result.text == tok.decode(free.ids[:first])
    on = complete(executor, tok, ids, Sampling(max_tokens=40, ignore_eos=True))
    assert (on.finish, on.ids) == ("length", free.ids)


def test_cached_equals_uncached(model: Model, executor: TorchExecutor) -> None:
    ids = prompt_ids(model.tokenizer, "Once upon a time, there was a little girl named Lily.")
    with torch.inference_mode():
        whole = model.network(torch.tensor([ids]))[0].numpy()
    for cut in (1, 2, 7, len(ids)):
        session = executor.open(len(ids))
        rows = [session.prefill(ids[:cut])] + [session.step(id) for id in ids[cut:]]
        np.testing.assert_allclose(np.stack(rows), whole[cut - 1 :], atol=2e-5, rtol=1e-4)
    session = executor.open(len(ids))
    session.prefill(ids[:5])
    np.testing.assert_allclose(session.prefill(ids[5:]), whole[-1], atol=2e-5, rtol=1e-4)
    assert rows[0].dtype == np.float32 and rows[0].shape == (executor.vocab_size,)


def test_sessions_do_not_meet(model: Model, executor: TorchExecutor) -> None:
    """Two requests that take turns give what each gives alone."""
    tok = model.tokenizer
    runs = [
        (prompt_ids(tok, text), Sampling(max_tokens=30, temperature=t, seed=3))
        for text, t in (("Once", 1.0), ("The dog", 1.2))
    ]
    alone = [complete(executor, tok, ids, s) for ids, s in runs]
    turns = itertools.zip_longest(*(generate(executor, tok, ids, s) for ids, s in runs))
    last = [[p for p in pieces if p][-1].result for pieces in zip(*turns, strict=True)]
    assert [r.ids for r in last if r] == [r.ids for r in alone]


def test_seeds_reproduce(model: Model, executor: TorchExecutor) -> None:
    ids = prompt_ids(model.tokenizer, "Once")
    s = Sampling(max_tokens=30, temperature=1.0)
    texts = [
        complete(executor, model.tokenizer, ids, Sampling(**{**vars(s), "seed": seed})).text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


# What the reader sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [("girl",), (" little girl",), ("a li",), ("zzz", "named", "na")])
def test_stop_strings_across_tokens(
    model: Model, executor: TorchExecutor, stop: tuple[str, ...]
) -> None:
    ids = prompt_ids(model.tokenizer, "Once upon a time")
    free = complete(executor, model.tokenizer, ids, Sampling(max_tokens=60)).text
    pieces = list(generate(executor, model.tokenizer, ids, Sampling(max_tokens=60, stop=stop)))
    shown = "".join(piece.text for piece in pieces)
    result = pieces[-1].result
    assert result is not None and result.text == shown
    assert (shown, result.finish) == (free[: min(free.index(s) for s in stop if s in free)], "stop")


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stops_do_not_depend_on_cuts(text: str, stop: list[str], cuts: list[int]) -> None:
    def fed(pieces: list[str]) -> tuple[str, bool]:
        stops = Stops(tuple(stop))
        shown = "".join(stops.feed(piece) for piece in pieces)
        return shown + stops.rest(), stops.hit

    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    cut = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert fed(cut) == fed([text]) == fed(list(text))
    shown, hit = fed([text])
    assert hit == any(s in text for s in stop)
    assert not any(s in shown for s in stop)
    assert text.startswith(shown) and (hit or shown == text)


def test_no_more_is_withheld_than_needed() -> None:
    stops = Stops(("</end>",))
    assert [stops.feed(t) for t in ("a <", "b </e", "nd", ".", "</end", ">x", "y")] == [
        "a ", "<b ", "", "</end.", "", "", ""
    ]  # fmt: skip
    assert stops.hit and stops.rest() == ""


class Script:
    """An executor that says given ids; `poison` makes the logits of one step useless."""

    def __init__(self, size: int, ids: list[int], poison: tuple[int, float] | None = None) -> None:
        self.vocab_size, self.max_context = size, 100_000
        self.ids, self.poison, self.closed, self.steps = ids, poison, 0, 0

    def open(self, capacity: int) -> Script:
        return self

    def prefill(self, ids: Sequence[int]) -> Any:
        self.steps = -1
        return self.step(0)

    def step(self, id: int) -> Any:
        self.steps += 1
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[self.ids[self.steps % len(self.ids)]] = 1
        if self.poison and self.poison[0] == self.steps:
            logits[:] = -math.inf
            logits[5] = self.poison[1]
        return logits

    def close(self) -> None:
        self.closed += 1


SPOKEN = "她喜欢🐉和🏳️‍🌈。 Ünï\n done"


def test_pieces_hold_whole_characters(model: Model) -> None:
    tok = model.tokenizer
    ids = tok.encode(SPOKEN)
    pieces = list(generate(Script(tok.size, ids), tok, [1], Sampling(max_tokens=len(ids))))
    assert "".join(piece.text for piece in pieces) == SPOKEN
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert all(piece.text for piece in pieces[:-1])


@pytest.mark.parametrize(("count", "text"), [(10, "她喜欢"), (12, "她喜欢\ufffd\ufffd")])
def test_a_reply_cut_inside_a_character_says_so(model: Model, count: int, text: str) -> None:
    tok = model.tokenizer
    ids = tok.encode(SPOKEN)
    pieces = list(generate(Script(tok.size, ids), tok, [1], Sampling(max_tokens=count)))
    assert "".join(piece.text for piece in pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces[:-1])


@pytest.mark.parametrize("stop", ["🐉", "🌈", "。 Ü", "欢🐉和"])
def test_stop_strings_of_many_bytes(model: Model, stop: str) -> None:
    tok = model.tokenizer
    ids = tok.encode(SPOKEN)
    s = Sampling(max_tokens=len(ids), stop=(stop,))
    assert complete(Script(tok.size, ids), tok, [1], s).text == SPOKEN[: SPOKEN.index(stop)]


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_useless_logits_name_their_step(model: Model, step: int, value: float) -> None:
    script = Script(model.tokenizer.size, [10, 11], (step, value))
    with pytest.raises(FailedWork, match=f"step {step} "):
        complete(script, model.tokenizer, [1], Sampling(max_tokens=20))
    assert script.closed == 1


def test_a_reader_who_leaves_closes_the_session(model: Model) -> None:
    script = Script(model.tokenizer.size, model.tokenizer.encode("some words"))
    pieces = generate(script, model.tokenizer, [1], Sampling(max_tokens=20))
    next(pieces)
    pieces.close()
    assert script.closed == 1 and script.steps < 10


@pytest.mark.parametrize("ids", [[], [-1], [512], [2**70], [True], [1.0], ["1"], [None]])
def test_odd_prompts_are_refused_at_once(
    model: Model, executor: TorchExecutor, ids: list[Any]
) -> None:
    with pytest.raises(BadRequest, match="prompt"):
        generate(executor, model.tokenizer, ids)


def test_the_context_is_never_cut(model: Model, executor: TorchExecutor) -> None:
    tok, most = model.tokenizer, executor.max_context
    with pytest.raises(BadRequest, match="at most 12 new"):
        generate(executor, tok, [1] * (most - 12), Sampling(max_tokens=13))
    with pytest.raises(BadRequest, match="shorten the prompt"):
        generate(executor, tok, [1] * most, Sampling(max_tokens=1))
    full = complete(executor, tok, [1] * (most - 12), Sampling(max_tokens=12, ignore_eos=True))
    assert full.new_tokens == 12
    for capacity in (0, -1, most + 1):
        with pytest.raises(BadRequest, match="context"):
            executor.open(capacity)
    session = executor.open(3)
    session.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="do not fit"):
        session.step(4)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.step(4)


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99", "", "cpu:cpu"])
def test_unknown_devices_are_refused(model: Model, device: str) -> None:
    with pytest.raises(BadRequest):
        TorchExecutor(model, device)


def test_unknown_dtypes_are_refused(model: Model) -> None:
    with pytest.raises(BadRequest, match="dtype"):
        TorchExecutor(model, dtype="int8")


# Formats, dtypes, devices ------------------------------------------------------------------------


@pytest.fixture
def packed(stories: Path) -> Model:
    model = load_model(stories)
    for _, linear in model.linears():
        format = Integers(4, 32, scale="fp32").for_row(linear.shape[1])
        linear.replace(round_to_nearest(linear.matrix(), format))
    return model


def test_expanding_changes_no_logit_and_not_the_model(packed: Model) -> None:
    ids = [1, 403, 407, 261]
    before = {name: linear.format.name for name, linear in packed.linears()}
    fast, slow = TorchExecutor(packed), TorchExecutor(packed, expand=False)
    a, b = (e.open(8).prefill(ids) for e in (fast, slow))
    np.testing.assert_array_equal(a, b)
    assert {name: linear.format.name for name, linear in packed.linears()} == before
    kinds = {type(m).__name__: m for m in fast.network.modules()}
    assert kinds["Linear"].format.dense == "fp32"
    assert slow.network.blocks[0].attention.q.format == packed.network.blocks[0].attention.q.format
    dense = TorchExecutor(load_model(packed.source)).open(8).prefill(ids)  # type: ignore[arg-type]
    assert np.abs(a - dense).max() > 1e-3


def test_weights_are_shared_and_ties_kept(model: Model) -> None:
    executor = TorchExecutor(model)
    old, new = model.network, executor.network
    assert new.stem.embedding.weight.data_ptr() == old.stem.embedding.weight.data_ptr()
    assert new.tail.head.weight is new.stem.embedding.weight
    half = TorchExecutor(model, dtype="bf16")
    assert half.network.tail.head.weight is half.network.stem.embedding.weight
    assert old.stem.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_near(model: Model, executor: TorchExecutor, dtype: str) -> None:
    ids = prompt_ids(model.tokenizer, "Once upon a time there was")
    half = TorchExecutor(model, dtype=dtype).open(32).prefill(ids)
    full = executor.open(32).prefill(ids)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("expand", [True, False])
def test_cuda_gives_the_same_reply(packed: Model, expand: bool) -> None:
    ids = prompt_ids(packed.tokenizer, "Once upon a time")
    there = TorchExecutor(packed, "cuda", expand=expand).open(64).prefill(ids)
    np.testing.assert_allclose(there, TorchExecutor(packed).open(64).prefill(ids), atol=2e-3)


# The native engine -------------------------------------------------------------------------------


def native(folder: Path, limits: Limits | None = None, **settings: Any) -> Engine:
    settings = {"threads": 1, **settings}
    return Engine(CpuStepper(folder, CpuSettings(**settings)), Tokenizer(folder), limits)


@pytest.mark.parametrize("text", PROMPTS)
def test_native_replies_are_torchs(
    model: Model, executor: TorchExecutor, stories: Path, text: str
) -> None:
    """With nothing rounded the ids are the same."""
    engine, tok = native(stories, exact=("all",), head="stored"), model.tokenizer
    ids, s = prompt_ids(tok, text), Sampling(max_tokens=50)
    assert complete(engine, tok, ids, s).ids == complete(executor, tok, ids, s).ids
    engine.audit()


@pytest.mark.parametrize("settings, limits", [
    ({"threads": 2}, Limits()), ({"threads": 3}, Limits(chunk=5)), ({"rows": 7}, Limits(tokens=7)),
    ({"context": 96}, Limits(steps=1, draft=0, reuse=False)),
], ids=str)  # fmt: skip
def test_native_replies_depend_on_nothing_else(
    model: Model, stories: Path, settings: dict[str, Any], limits: Limits
) -> None:
    """Rounded or not: the same ids for any number of threads, any chunks, any memory."""
    tok = model.tokenizer
    ids, s = prompt_ids(tok, "Once upon a time there was"), Sampling(60, 0.8, seed=4)
    usual = complete(native(stories), tok, ids, s)
    assert complete(native(stories, limits, **settings), tok, ids, s).ids == usual.ids


def test_a_conversation_computes_only_what_is_new(model: Model, stories: Path) -> None:
    engine = native(stories)
    talk = Conversation(model.tokenizer)
    said = [list(talk.ask(engine, "Tell me about Lily and Tom.", Sampling(40)))[-1] for _ in "ab"]
    first, second = (piece.result for piece in said)
    assert first is not None and second is not None
    assert first.cached_tokens == 0 and second.cached_tokens >= first.prompt_tokens - 32
    engine.close()
    with pytest.raises(FailedWork, match="closed"):
        complete(engine, model.tokenizer, [1, 2], GREEDY)


@pytest.mark.parametrize("names", [("o",), ("attention.o", "down"), ("all",)])
def test_exact_names_linears(tiny: Path, names: tuple[str, ...]) -> None:
    stepper = CpuStepper(tiny, CpuSettings(context=32, exact=names))
    paths = [path for path in stepper.weights.linears() if stepper.matrix(path).exact]
    assert paths and {path.rpartition(".")[2] for path in paths} == {
        ("o",): {"o"}, ("attention.o", "down"): {"o", "down"},
        ("all",): {"q", "k", "v", "o", "gate", "up", "down", "head"},
    }[names]  # fmt: skip
    for name in ("wn", "feed_forward", "ttention.o", ""):
        with pytest.raises(BadRequest, match="no linear"):
            CpuStepper(tiny, CpuSettings(exact=(name,)))


# Numbers -----------------------------------------------------------------------------------------


def test_the_result_adds_up(model: Model, executor: TorchExecutor) -> None:
    ids = prompt_ids(model.tokenizer, "Once upon a time")
    result = complete(executor, model.tokenizer, ids, Sampling(max_tokens=20, ignore_eos=True))
    assert (result.new_tokens, result.finish) == (20, "length")
    assert result.decode_tokens_per_second is not None and result.decode_tokens_per_second > 0
    assert result.time_to_first_token >= result.prompt_tokens / result.prompt_tokens_per_second
    rows = {row.what: row for row in result.rows() if row.what != "tokens"}
    assert rows["decode_tokens_per_second"].unit == "1/s" and rows["finish"].value == "length"
    one = complete(executor, model.tokenizer, ids, Sampling(max_tokens=1))
    assert one.decode_tokens_per_second is None and one.new_tokens == 1


def test_clocks_do_not_run_while_the_reader_dawdles(model: Model) -> None:
    script = Script(model.tokenizer.size, model.tokenizer.encode("a b c d e f g h"))
    result = None
    for piece in generate(script, model.tokenizer, [1], Sampling(max_tokens=8)):
        result = piece.result
        time.sleep(0.05)
    assert result is not None and result.decode_tokens_per_second is not None
    assert 7 / result.decode_tokens_per_second < 0.1
