"""Numbers against known answers, against transformers, and against each other."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT
from hypothesis import given
from hypothesis import strategies as st

from onecard.checkpoint.load import load_model
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest
from onecard.evaluate import (
    Question,
    Reading,
    choose,
    cut,
    evaluate,
    log_likelihood,
    log_likelihoods,
    read_questions,
    split,
)
from onecard.kernels.reference import round_cache
from onecard.nn.model import Model
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.pages import CACHES
from onecard.runtime.reference import TorchExecutor, TorchScorer
from onecard.runtime.score import NativeScorer, judged, steps


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return load_model(tiny, "fp32")


@pytest.fixture(scope="module")
def scorer(model: Model) -> TorchScorer:
    return TorchScorer(model)


def test_stories_on_tinystories(stories: Path, data: Path) -> None:
    """1.296 nats per token on the first 60 documents: the published figure of the checkpoint."""
    text = (data / "tinystories" / "tinystories_sample_2MiB.txt").read_text()
    found = evaluate(
        TorchScorer(load_model(stories)), text, Reading(documents="<|endoftext|>", limit=60)
    )
    assert found.value("nats_per_token") == pytest.approx(1.296, abs=0.0005)
    assert found.value("perplexity") == pytest.approx(math.exp(1.296), rel=1e-3)


@pytest.mark.parametrize("window, stride", [(64, 64), (64, 16), (50, 33), (256, 256)])
def test_windows_equal_a_plain_loop(
    model: Model, tiny: Path, text_file: Path, window: int, stride: int
) -> None:
    """The usual sliding-window loop over transformers' own model gives the same mean."""
    text = text_file.read_text()[:2500]
    found = evaluate(TorchScorer(model), text, Reading(window, stride))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.tensor(model.tokenizer.encode(text))
    nats, count, start = 0.0, 0, 0
    while start + window <= len(ids):
        part = ids[start : start + window]
        first = 1 if start == 0 else window - stride
        with torch.no_grad():
            logp = torch.log_softmax(peer(part[None]).logits[0, :-1], -1)
        nats -= float(logp.gather(-1, part[1:, None])[max(first, 1) - 1 :].double().sum())
        count += window - max(first, 1)
        start += stride
    assert found.value("predicted_tokens") == count
    assert found.value("nats_per_token") == pytest.approx(nats / count, rel=1e-5)


def test_kl_and_agreement(model: Model, tiny: Path, text_file: Path) -> None:
    text = text_file.read_text()[:1500]
    scorer = TorchScorer(model)
    itself = evaluate(scorer, text, Reading(), scorer)
    assert itself.value("kl") == pytest.approx(0, abs=1e-9) and itself.value("top1_agreement") == 1
    other = load_model(tiny, "fp32")
    with torch.no_grad():
        other.network.stem.embedding.weight.mul_(1.5)
    found = evaluate(TorchScorer(other), text, Reading(), scorer)
    ids = torch.tensor([model.tokenizer.encode(text)])[:, :200]
    text = model.tokenizer.decode(ids[0].tolist())
    assert model.tokenizer.encode(text) == ids[0].tolist()
    with torch.no_grad():
        p = torch.log_softmax(model.network(ids)[0, :-1], -1)
        q = torch.log_softmax(other.network(ids)[0, :-1], -1)
    single = evaluate(TorchScorer(other), text, Reading(), scorer)
    assert single.value("kl") == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    agreed = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert single.value("top1_agreement") == pytest.approx(agreed)
    assert found.value("kl") > 0


def test_a_reference_of_a_shorter_context(model: Model, text_file: Path) -> None:
    text, scorer, short = text_file.read_text()[:3000], TorchScorer(model), TorchScorer(model)
    short.max_context = 32
    found = evaluate(scorer, text, Reading(limit=1), short)
    assert found.value("predicted_tokens") == 31 and "windows of 32 " in found.notes[0][1]
    assert "only the first window;" in found.notes[0][1]
    with pytest.raises(BadRequest, match="the reference's context is 32"):
        evaluate(scorer, text, Reading(64), short)


def test_uniform_model_counts_bits(model: Model, tiny: Path) -> None:
    """A model that knows nothing: log of the vocabulary per token, and bytes counted in UTF-8."""
    blank = load_model(tiny, "fp32")
    with torch.no_grad():
        blank.network.stem.embedding.weight.zero_()
    text = "naïve 中文 text, 🙂 and more of it. " * 4
    for reading in (Reading(bos="each"), Reading(documents="🙃")):
        found = evaluate(TorchScorer(blank), text, reading)
        assert found.value("nats_per_token") == pytest.approx(math.log(300), rel=1e-5)
        body = text.strip() if reading.documents else text
        bits = found.value("predicted_tokens") * math.log2(300) / len(body.encode())
        assert found.value("bits_per_byte") == pytest.approx(bits, rel=1e-4)


def test_pieces_cover_the_text_once(model: Model, text_file: Path) -> None:
    """Strided windows predict every token but the first exactly once."""
    text = text_file.read_text()[:2000]
    total = len(model.tokenizer.encode(text))
    pieces, said = cut(model.tokenizer, text, Reading(40, 10), 256)
    predicted = sum(len(p.ids) - p.first for p in pieces)
    assert total - 40 <= predicted <= total - 1
    assert "windows of 40" in said and "stride 10" in said


@pytest.mark.parametrize("stride", [0, 39, 10])
def test_bos_in_every_window_loses_no_token(model: Model, stride: int) -> None:
    """Each window predicts what the one before did not; with the tail all tokens are predicted."""
    ids = model.tokenizer.encode(TEXT[:2000])
    pieces, said = cut(
        model.tokenizer, TEXT[:2000], Reading(40, stride, "each", keep_tail=True), 256
    )
    assert [i for p in pieces for i in p.ids[p.first :]] == ids
    assert sum(p.nbytes for p in pieces) == len(TEXT[:2000].encode())
    assert all(p.ids[0] == 0 and len(p.ids) <= 40 for p in pieces)
    assert "last partial window kept" in said
    dropped, said = cut(model.tokenizer, TEXT[:2000], Reading(40, stride, "each"), 256)
    assert dropped == pieces[: len(dropped)] and len(dropped) >= len(pieces) - 1


def test_limit_takes_the_first_windows(model: Model) -> None:
    every, whole = cut(model.tokenizer, TEXT[:2000], Reading(40), 256)
    pieces, said = cut(model.tokenizer, TEXT[:2000], Reading(40, limit=3), 256)
    assert pieces == every[:3] and "only the first 3 windows" in said
    for limit in (len(every), 999):
        assert cut(model.tokenizer, TEXT[:2000], Reading(40, limit=limit), 256) == (every, whole)


@pytest.mark.parametrize("documents", [None, "\n\n"])
def test_no_more_tokens_are_made_than_a_limit_needs(
    model: Model, monkeypatch: pytest.MonkeyPatch, documents: str | None
) -> None:
    """A text of 3 MB, of which a few windows or documents are read."""
    made = []
    whole = Tokenizer.slices

    def counted(self: Tokenizer, text: str):  # type: ignore[no-untyped-def]
        for ids, ends in whole(self, text):
            made.append(len(ids))
            yield ids, ends

    monkeypatch.setattr(Tokenizer, "slices", counted)
    text = (TEXT + "\n\n") * 300
    pieces, _ = cut(model.tokenizer, text, Reading(64, documents=documents, limit=3), 256)
    assert len(pieces) == 3 and len(made) == (3 if documents else 1)
    assert sum(made) < 200_000 < len(text) // 10


def test_choices(scorer: TorchScorer, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    rows = [{"question": "The quick brown", "choices": [" fox", " zzqqxj"], "gold": 0}] * 3
    questions.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = choose(scorer, read_questions(questions))
    assert found.value("questions") == 3
    assert found.value("accuracy") in (0.0, 1.0)
    scores = [
        log_likelihood(scorer, "Question: The quick brown\nAnswer:", c)[0]
        for c in (" fox", " zzqqxj")
    ]
    assert found.value("accuracy") == float(scores[0] > scores[1])
    assert "BOS none" in found.notes[0][1] and "lost their beginnings" not in found.notes[0][1]
    long = Question("word " * 2000, ("a", "b"), 0)
    found = choose(scorer, [*read_questions(questions), long])
    assert "1 longer than the context lost their beginnings" in found.notes[0][1]


@pytest.mark.parametrize("bad", [
    b'{"question": "\xff", "choices": ["a"], "gold": 0}', b"[" * 100_000, b"[]", b"1", b"",
    b'{"question": 1, "choices": ["a"], "gold": 0}', b'{"question": "", "choices": "ab", "gold": 0}',
    b'{"question": "", "choices": ["a", 1], "gold": 0}', b'{"question": "", "choices": [], "gold": 0}',
    b'{"question": "", "choices": ["a", " "], "gold": 0}', b'{"question": "", "choices": ["a"]}',
    b'{"question": "", "choices": ["a", "b"], "gold": true}',
    b'{"question": "", "choices": ["a", "b"], "gold": 1.0}',
    b'{"question": "", "choices": ["a", "b"], "gold": "1"}',
    b'{"question": "", "choices": ["a", "b"], "gold": 2}',
    b'{"question": "", "choices": ["a"], "gold": 0}', b'{"goal": "a", "sol1": "b", "sol2": "c"}',
])  # fmt: skip
def test_bad_questions(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "q.jsonl").write_bytes(bad)
    with pytest.raises(BadRequest, match=r"q\.jsonl") as error:
        read_questions(tmp_path / "q.jsonl")
    assert "list indices" not in error.value.seen and error.value.seen != "'question'"


def test_a_question_may_hold_other_line_separators(tmp_path: Path) -> None:
    row = '\ufeff{"question": "a\u2028b", "choices": ["c", "d"], "gold": 0}\r\n'
    (tmp_path / "q.jsonl").write_bytes(row.encode())
    assert read_questions(tmp_path / "q.jsonl")[0].question == "a\u2028b"


@pytest.mark.parametrize("name", ["piqa_valid", "arc_easy_test", "openbookqa_test"])
def test_choice_files_are_read(data: Path, stories: Path, name: str) -> None:
    questions = read_questions(data / "zeroshot" / f"{name}.jsonl")
    assert len(questions) > 400
    found = choose(TorchScorer(load_model(stories)), questions[:6])
    assert 0 <= found.value("accuracy") <= 1


def test_log_likelihood_is_the_sum_over_the_answer(model: Model) -> None:
    total, greedy = log_likelihood(TorchScorer(model), "The quick", " brown fox")
    ids = model.tokenizer.encode("The quick brown fox")
    split = len(model.tokenizer.encode("The quick"))
    with torch.no_grad():
        logp = torch.log_softmax(model.network(torch.tensor([ids]))[0], -1)
    wanted = sum(float(logp[i - 1, ids[i]]) for i in range(split, len(ids)))
    assert total == pytest.approx(wanted, rel=1e-5)
    assert greedy == all(int(logp[i - 1].argmax()) == ids[i] for i in range(split, len(ids)))


def test_bos_is_where_the_tokenizer_puts_it(model: Model, stories: Path) -> None:
    """In front of a prompt only if the tokenizer adds it; in front of an empty prompt always."""
    own, llama = model.tokenizer, Tokenizer(stories)
    assert llama.adds_bos and not own.adds_bos
    seen = [split(t, prompt, " quick")[0] for t in (own, llama) for prompt in ("The", "")]
    assert seen == [own.encode("The"), [own.bos_id], [1, *llama.encode("The")], [1]]


def test_bad_readings(scorer: TorchScorer) -> None:
    for reading in (Reading(1000), Reading(1000, documents="text"), Reading(20, 30), Reading(1)):
        with pytest.raises(BadRequest):
            evaluate(scorer, "some text " * 50, reading)
    with pytest.raises(BadRequest):
        Reading(window=-1)
    for separator, said in (
        ("zzz", "1 document (the separator is not"),
        ("text", "50 documents, "),
    ):
        found = evaluate(scorer, "some more text " * 50, Reading(documents=separator))
        assert found.notes[0][1].startswith(said)
    with pytest.raises(BadRequest):
        evaluate(scorer, "", Reading())


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize(("ids", "first", "said"), [
    ([3, 4, -1], 1, "holds the id -1"), ([3, 9999, 4], 1, "holds the id 9999"),
    ([3, 4, 2**70], 1, "holds the id 11805"), ([3] * 258, 1, "258 ids do not fit a context of 256"),
    ([3, 4, 5], 0, "from id 0"),
])  # fmt: skip
def test_what_cannot_be_scored(
    kind: str, ids: list[int], first: int, said: str, tiny: Path, scorer: TorchScorer
) -> None:
    """The last id too, which is looked up and not read; nothing is computed."""
    if kind == "native":
        stepper = CpuStepper(tiny, CpuSettings(threads=1))
        reader: Any = NativeScorer(stepper, scorer.tokenizer)
    else:
        reader = scorer
    with pytest.raises(BadRequest, match=said):
        list(reader.scores([[3, 4], ids], [1, first]))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The adapter, with the real lm-eval where it is installed, else with its two names."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = object  # type: ignore[attr-defined]
        sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, "onecard.harness", raising=False)
    import onecard.harness

    return onecard.harness


@pytest.mark.parametrize("engine, near", [("reference", 1e-5), ("native", 2e-3)])
def test_harness_adapter(harness, tiny: Path, model: Model, engine: str, near: float) -> None:  # type: ignore[no-untyped-def]
    lm = harness.OnecardLM(tiny, engine, "fp32" if engine == "reference" else None)
    scorer = TorchScorer(model)
    request = lambda *args: SimpleNamespace(args=args)  # noqa: E731
    one = log_likelihood(scorer, "The quick", " brown")
    ((found, greedy),) = lm.loglikelihood([request("The quick", " brown")])
    assert found == pytest.approx(one[0], rel=near) and greedy == one[1]
    text = "The quick brown fox jumps"
    (rolling,) = lm.loglikelihood_rolling([request(text)])
    assert rolling == pytest.approx(log_likelihood(scorer, "", text)[0], rel=near)
    long = "The quick brown fox jumps over the lazy dog. " * 60
    (rolling,) = lm.loglikelihood_rolling([request(long)])
    ids = model.tokenizer.encode(long)
    wanted, body = 0.0, model.spec.max_context - 1
    for start in range(0, len(ids), body):
        part = torch.tensor([[0, *ids[start : start + body]]])
        with torch.no_grad():
            logp = torch.log_softmax(model.network(part)[0, :-1], -1)
        wanted += float(logp.gather(-1, part[0, 1:, None]).double().sum())
    assert len(ids) > 2 * body and rolling == pytest.approx(wanted, rel=near)
    (out,) = lm.generate_until([request("The quick", {"until": ["."], "max_gen_toks": 8})])
    assert isinstance(out, str) and "." not in out


# The native engine reads as torch does ------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 90), max_size=12),
    rows=st.integers(1, 70), pages=st.integers(3, 9),
)  # fmt: skip
def test_steps_hold_every_id_once(lengths: list[int], rows: int, pages: int) -> None:
    """In order, no more than fits into a step, and no page in two hands."""
    done = [0] * len(lengths)
    for parts in steps(lengths, rows, pages, 32):
        assert 0 < sum(part.end - part.begin for part in parts) <= rows
        tables = {part.context: part.table for part in parts}
        assert len(tables) == len(parts)
        held = np.concatenate(list(tables.values()))
        assert len(set(held.tolist())) == len(held) and held.max() < pages
        for part in parts:
            assert part.begin == done[part.context] and len(part.table) * 32 >= part.end
            done[part.context] = part.end
    assert done == lengths


def test_contexts_keep_their_pages() -> None:
    tables: dict[int, list[int]] = {}
    for parts in steps([70, 5, 90, 33], 40, 4, 32):
        for part in parts:
            assert tables.setdefault(part.context, part.table.tolist()) == part.table.tolist()
    with pytest.raises(BadRequest, match="129"):
        list(steps([129], 40, 4, 32))


def test_judged_is_log_softmax() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(70, 5003) * 4, torch.randn(70, 5003) * 4
    targets = torch.randint(0, 5003, (70,))
    targets[3] = mine[3].argmax()
    p, q = torch.log_softmax(theirs.double(), -1), torch.log_softmax(mine.double(), -1)
    kl, agreed = (p.exp() * (p - q)).sum(-1), mine.argmax(-1) == theirs.argmax(-1)
    found = judged(mine.numpy(), targets.int().numpy(), theirs.numpy())
    np.testing.assert_allclose(found.nats, -q.gather(-1, targets[:, None])[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4)
    assert found.best[3] and found.best.sum() < 5 and found.agreed.tolist() == agreed.tolist()


def test_native_perplexity_is_torchs(stories: Path, data: Path) -> None:
    """Through int8 inputs within 0.2 %; with exact inputs and the head as stored, nearly the same."""
    text = (data / "tinystories" / "tinystories_sample_2MiB.txt").read_text()
    reading, model = Reading(documents="<|endoftext|>", limit=60), load_model(stories)
    whole = evaluate(TorchScorer(model), text, reading)
    for settings, near in (
        (CpuSettings(), 2e-3),
        (CpuSettings(cache="fp16", head="stored", exact=("all",)), 1e-5),
    ):
        native = NativeScorer(CpuStepper(stories, settings), model.tokenizer)
        found = evaluate(native, text, reading)
        assert found.value("predicted_tokens") == whole.value("predicted_tokens")
        assert found.value("perplexity") == pytest.approx(whole.value("perplexity"), rel=near)


def test_native_kl(tiny: Path, text_file: Path) -> None:
    text = text_file.read_text()[:3000]
    tokenizer = Tokenizer(tiny)
    first, second = (NativeScorer(CpuStepper(tiny), tokenizer, rows) for rows in (100, 512))
    same = evaluate(first, text, Reading(64, 32), second)
    assert same.value("kl") == 0 and same.value("top1_agreement") == 1
    exact = NativeScorer(CpuStepper(tiny, CpuSettings(cache="fp16", exact=("all",))), tokenizer)
    other = evaluate(first, text, Reading(64, 32), exact)
    assert 0 < other.value("kl") < 1e-2
    assert other.value("perplexity") == same.value("perplexity")


def test_native_choices(tiny: Path, model: Model) -> None:
    pairs = [("The quick", " brown"), ("The quick", " zebra and more"), ("", "x"), ("abc", "")]
    native = NativeScorer(
        CpuStepper(tiny, CpuSettings(cache="fp16", exact=("all",), head="stored")), model.tokenizer
    )
    found = log_likelihoods(native, pairs)
    for (nats, greedy), wanted in zip(
        found, log_likelihoods(TorchScorer(model), pairs), strict=True
    ):
        assert nats == pytest.approx(wanted[0], rel=1e-3) and greedy == wanted[1]


# Keys and values held smaller -----------------------------------------------------------------------


def test_caches_keep_what_their_grids_can() -> None:
    x = torch.randn(3, 4, 72, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 2, 5] = 0, -30.0
    lost = {c: (round_cache(x, c) - x).square().mean().item() for c in CACHES}
    assert lost["fp16"] < lost["bf16"] < lost["int8"] < lost["int4"]
    for cache in CACHES:
        y = round_cache(x, cache)
        assert y.shape == x.shape and not y[0, 0].any()
        assert torch.equal(round_cache(x[1:2], cache), y[1:2])
        if cache != "int4":
            torch.testing.assert_close(round_cache(y, cache), y)
    y = round_cache(x, "int4")[1, 2, :32]  # a group with its own scale, that of its largest number
    assert y[5] == -30.0 and (y / 3.75 % 1 == 0).all()
    other = round_cache(x, "int4")[1, 2, 64:]
    assert (other - x[1, 2, 64:]).abs().max() <= x[1, 2, 64:].abs().max() / 8 * 1.01


def test_a_scorer_and_a_session_hold_them_alike(model: Model) -> None:
    """A scorer reads whole texts, a session id after id: the same numbers from the same cache."""
    ids = torch.randint(3, 300, (1, 30), generator=torch.Generator().manual_seed(0))
    for cache in ("int8", "int4"):
        session = TorchExecutor(model, cache=cache).open(30)
        step = [
            session.prefill(ids[0, :20].tolist()),
            *(session.step(int(i)) for i in ids[0, 20:29]),
        ]
        wanted = [-math.log(np.exp(x - x.max())[i] / np.exp(x - x.max()).sum())
                  for x, i in zip(step, ids[0, 20:].tolist(), strict=True)]  # fmt: skip
        scores = TorchScorer(model, cache).scores([ids[0].tolist()], [20])
        found = np.concatenate([s.nats for _, s in scores])
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        plain = TorchScorer(model).scores([ids[0].tolist()], [20])
        assert np.abs(found - np.concatenate([s.nats for _, s in plain])).max() > 1e-3
