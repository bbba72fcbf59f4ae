"""Incremental decoding against whole decoding, for byte-level and byte-fallback vocabularies."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from onecard.checkpoint import tokenizer as module
from onecard.checkpoint.tokenizer import Stream, Tokenizer
from onecard.core.errors import BadRequest

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")

MIXED = (
    "Once upon a time 从前有一个小女孩，她喜欢🐉和🏳️‍🌈。Ünïcödé, naïve café\n\n\ttabs  two   three"
    " 👩‍👩‍👧‍👦🇨🇳 \u200b𠮷野家 한국어 \ufeff end. "
)
KINDS = ("gpt2", "stories", "bytes", "metaspace")


def trained(kind: str) -> Backend:
    text = (DATA / "tinystories" / "tinystories_sample_2MiB.txt").read_text()[:40_000]
    lines = text.splitlines()
    if kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        known = trainers.WordPieceTrainer(
            vocab_size=1000, special_tokens=["[UNK]"], show_progress=False
        )
        backend.train_from_iterator(lines, known)
        return backend
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        lines, trainers.UnigramTrainer(vocab_size=1000, unk_token="<unk>", special_tokens=["<unk>"],
                                       max_piece_length=8, show_progress=False),
    )  # fmt: skip
    return backend


@functools.lru_cache(None)
def tokenizer(kind: str) -> Tokenizer:
    if kind == "stories":
        return Tokenizer(DATA / "stories260K")
    folder = Path(tempfile.mkdtemp())
    if kind == "gpt2":
        shutil.copy(DATA / "tokenizers" / "gpt2_tokenizer.json", folder / "tokenizer.json")
    else:
        made(kind).save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def made(kind: str) -> Backend:
    """`bytes`: one id per byte; `metaspace`: words of one letter, the first space stripped.

    `unigram` chooses the likeliest division of a word; `wordpiece` makes letters small first.
    """
    if kind in ("unigram", "wordpiece"):
        return trained(kind)
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n"
    vocabulary = {c: i for i, c in enumerate(letters)}
    vocabulary |= {f"<0x{b:02X}>": len(letters) + b for b in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return backend


def streamed(tok: Tokenizer, ids: list[int]) -> list[str]:
    stream = Stream(tok)
    return [*(stream.add(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_text_comes_out_whole_and_in_whole_characters(kind: str) -> None:
    tok = tokenizer(kind)
    ids = tok.encode(MIXED * 4)
    pieces = streamed(tok, ids)
    assert "".join(pieces) == tok.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""
    assert sum(bool(piece) for piece in pieces) > 100


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_streams_as_it_decodes(kind: str, text: str) -> None:
    tok = tokenizer(kind)
    ids = tok.encode(text)
    assert "".join(streamed(tok, ids)) == tok.decode(ids)


@pytest.mark.parametrize("kind", ["gpt2", "bytes"])
@settings(max_examples=60, deadline=None)
@given(seed=st.randoms(use_true_random=False), count=st.integers(0, 80))
def test_any_ids_of_a_byte_level_vocabulary(kind: str, seed, count: int) -> None:  # type: ignore[no-untyped-def]
    """Random ids are mostly broken bytes; nothing is lost while runs of them stay short."""
    tok = tokenizer(kind)
    ids = [seed.randrange(tok.size) for _ in range(count)]
    pieces = streamed(tok, ids)
    if "\ufffd" * (Stream.PATIENCE // 2) not in tok.decode(ids):
        assert "".join(pieces) == tok.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=st.text("一二🐉 ab", max_size=30), data=st.data())
def test_special_ids_change_nothing(kind: str, text: str, data: st.DataObject) -> None:
    tok = tokenizer(kind)
    ids = tok.encode(text)
    noise = [*tok.hidden, tok.size + 7]
    mixed: list[int] = []
    for id in ids:
        mixed += [*data.draw(st.lists(st.sampled_from(noise), max_size=3)), id]
    mixed = [noise[0]] * 30 + mixed
    assert "".join(streamed(tok, mixed)) == tok.decode(ids)


def test_special_ids_in_a_row_keep_the_space_behind_them() -> None:
    tok = tokenizer("stories")
    ids = tok.encode("Hello") + [2] * 20 + tok.encode(" girl")
    assert "".join(streamed(tok, ids)) == tok.decode(ids)


def test_characters_across_many_ids_without_a_pause() -> None:
    """Ids that each end one character and begin the next are released all the same."""
    tok = tokenizer("gpt2")
    ids = tok.encode("🐉🐊🐍🦎🦖" * 40)
    pieces = streamed(tok, ids)
    assert "".join(pieces) == "🐉🐊🐍🦎🦖" * 40
    longest = max(len(piece) for piece in pieces)
    assert longest <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_endless_broken_bytes_cost_no_more_per_id(kind: str) -> None:
    tok = tokenizer(kind)
    name = "<0x80>" if kind in ("stories", "metaspace") else "Ģ"
    broken = tok.backend.token_to_id(name)
    stream = Stream(tok)
    shown = 0
    for _ in range(1000):
        shown += len(stream.add(broken))
        assert len(stream.ids) <= 9 * Stream.WINDOW
    assert shown + len(stream.finish()) == 1000
    after = [stream.add(i) for i in tok.encode("then the rest")]
    assert "the rest" in "".join(after) + stream.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_byte_breaks_itself_alone(kind: str) -> None:
    """Text before and after it stays, as it was already shown."""
    tok = tokenizer(kind)
    name = "<0x80>" if kind in ("stories", "metaspace") else "Ģ"
    ids = [*tok.encode("一二三"), tok.backend.token_to_id(name), *tok.encode("ab")]
    text = "".join(streamed(tok, ids))
    assert text.strip().replace(" ", "") == "一二三\ufffdab"


def test_long_replies_take_linear_time() -> None:
    tok = tokenizer("stories")
    ids = tok.encode(MIXED * 30)
    begin = time.perf_counter()
    streamed(tok, ids)
    assert (time.perf_counter() - begin) / len(ids) < 1e-3


def test_half_a_surrogate_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="Unicode"):
        tokenizer("gpt2").encode("a\ud83d")


def test_templates_and_ids_of_a_folder(stories: Path, tmp_path: Path) -> None:
    tok = Tokenizer(stories)
    assert (tok.bos_id, tok.eos_ids, tok.chat_template) == (1, frozenset({2}), None)
    assert tok.encode("Once", special=True)[0] == 1
    assert tok.encode("Once")[0] != 1
    assert tok.hidden == {0, 1, 2}
    shutil.copy(stories / "tokenizer.json", tmp_path)
    config = {"chat_template": [{"name": "tool", "template": "T"},
                                {"name": "default", "template": "D"}]}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert Tokenizer(tmp_path).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff" + b"x" * (3 << 20))
    assert len(Tokenizer(tmp_path).chat_template or "") <= (1 << 20) + 1


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 9000)
    monkeypatch.setattr(module, "LARGEST_SLICE", 36_000)


def long_text(seed: int) -> str:
    """Stories between pieces of the mixed text and runs of one sign, some longer than an overlap."""
    draw = random.Random(seed)
    stories = (DATA / "tinystories" / "tinystories_sample_2MiB.txt").read_text()
    parts = []
    for _ in range(60):
        begin = draw.randrange(len(stories) - 3000)
        parts += [stories[begin : begin + draw.randrange(3000)], MIXED[draw.randrange(len(MIXED)) :],
                  draw.choice(" \na-哈\u0301\t") * draw.choice((1, 7, 300, 6000))]  # fmt: skip
    return "".join(parts)


@pytest.mark.parametrize("kind", [*KINDS, "unigram", "wordpiece"])
def test_slices_are_the_whole(small_slices: None, kind: str) -> None:
    """Slice by slice a text has the ids, and the places, that it has as a whole."""
    text = long_text(len(kind))
    whole = tokenizer(kind).backend.encode(text, add_special_tokens=False)
    slices = list(tokenizer(kind).slices(text))
    assert [id for ids, _ in slices for id in ids] == whole.ids
    assert [end for _, ends in slices for end in ends] == [end for _, end in whole.offsets]
    assert len(slices) > 10


def test_a_text_that_cannot_be_divided_is_refused(small_slices: None) -> None:
    text = "word after word. " * 100 + "a" * 100_000
    with pytest.raises(BadRequest, match="no place to divide"):
        list(tokenizer("gpt2").slices(text))
    assert len(list(tokenizer("gpt2").slices("a" * 9000))) == 1
