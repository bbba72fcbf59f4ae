"""Calibration ids: the same for the same text, in bounded memory, and from nothing but ids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TEXT

from onecard.calibrate import data as calibrate
from onecard.calibrate.data import SMALL, Calibration, calibration_ids
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny)


def numbered(size: int, end: str = "\n") -> str:
    """Text in which every line is another."""
    line = "line {:08d}, and naïve 中文 words behind it" + end
    return "".join(map(line.format, range(size // len(line.format(0).encode()) + 1)))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_a_small_text_is_tokenized_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "small.txt", TEXT)
    ids = tokenizer.encode(TEXT)
    found = calibration_ids(tokenizer, path, Calibration(5, 64), 300)
    step = (len(ids) - 64) / 4
    assert found.tolist() == [ids[s : s + 64] for s in (round(i * step) for i in range(5))]
    fewer = calibration_ids(tokenizer, path, Calibration(10_000, 64), 300)
    assert fewer.shape == (len(ids) // 64, 64)


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", ""])
def test_a_large_text_is_read_in_slices(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Windows are runs of the text, in order, from its beginning to its end."""
    path, read = write(tmp_path / "large.txt", numbered(3 * SMALL, end)), []
    original = calibrate._read
    monkeypatch.setattr(
        calibrate, "_read", lambda *given: read.append(given[2]) or original(*given)
    )
    found = calibration_ids(tokenizer, path, Calibration(16, 128), 300)
    assert found.shape == (16, 128) and found.dtype == torch.int64
    assert sum(read) < SMALL / 4
    text, place, places = numbered(3 * SMALL, end).replace("\r\n", "\n"), 0, []
    for row in found.tolist():
        piece = tokenizer.decode(row).rstrip("\ufffd")
        place = text.index(piece, place)
        places.append(place)
        place += len(piece)
    assert places[0] == 0 and places[-1] > 0.99 * len(text)
    gaps = [b - a for a, b in pairwise(places)]
    assert max(gaps) - min(gaps) < 0.01 * len(text)
    assert torch.equal(found, calibration_ids(tokenizer, path, Calibration(16, 128), 300))


def test_a_large_text_too_short_for_all_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fewer windows that do not overlap, and nearly all of the text."""
    path = write(tmp_path / "large.txt", numbered(SMALL + SMALL // 8))
    found = calibration_ids(tokenizer, path, Calibration(1000, 4096), 300)
    total = len(tokenizer.encode(path.read_text()))
    assert total // 4096 - 2 <= found.shape[0] <= total // 4096
    starts = [tokenizer.decode(row)[:60] for row in found.tolist()]
    assert len(set(starts)) == len(starts)


def test_slices_grow_and_skip_what_holds_nothing(stories: Path, tmp_path: Path) -> None:
    """Text after a megabyte of one character that gives few tokens; a file of nothing else."""
    tokenizer = Tokenizer(stories)
    path = write(tmp_path / "large.txt", numbered(SMALL // 2) + " " * SMALL + numbered(SMALL // 2))
    found = calibration_ids(tokenizer, path, Calibration(8, 64), 512)
    assert 4 <= found.shape[0] <= 8 and found.shape[1] == 64


@pytest.mark.parametrize("at", [0, SMALL, 2 * SMALL - 1])
def test_a_large_file_that_is_not_text(tokenizer: Tokenizer, tmp_path: Path, at: int) -> None:
    raw = bytearray(b"some words here " * (2 * SMALL // 16))
    raw[at : at + 8] = b"\xff" * min(8, len(raw) - at)
    (tmp_path / "large.txt").write_bytes(raw)
    with pytest.raises(BadRequest, match="not UTF-8"):
        calibration_ids(tokenizer, tmp_path / "large.txt", Calibration(3, 64), 300)


def test_texts_of_no_use(tokenizer: Tokenizer, tmp_path: Path) -> None:
    short, huge = write(tmp_path / "short.txt", "a few words"), tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(calibrate.LARGEST + 1)
    for path, said in ((short, "one sample needs 64"), (huge, "too large"), (tmp_path, "no text")):
        with pytest.raises(BadRequest, match=said):
            calibration_ids(tokenizer, path, Calibration(3, 64), 300)


def test_ids_as_given(tmp_path: Path) -> None:
    rows = [list(range(284, 300)), list(range(16))]
    path = write(tmp_path / "ids.json", json.dumps(rows))
    assert calibration_ids(None, path, Calibration(), 300).tolist() == rows
    path = write(tmp_path / "ids.json", json.dumps([row[:-1] for row in rows]))
    with pytest.raises(BadRequest, match="gives 30 tokens, at least 32"):
        calibration_ids(None, path, Calibration(), 300)


@pytest.mark.parametrize("rows", [
    [[1.0, 2.0]], [[1, 2.5]], [[True, False]], [[1, 2], [3]], [], [[]], [[], []], [1, 2], {"a": 1},
    "ab", None, [[1, "2"]], [[-1, 2]], [[1, 300]], [[10**30, 1]], [[[1]]], [[1, None]],
])  # fmt: skip
def test_ids_that_are_none(tmp_path: Path, rows: object) -> None:
    path = write(tmp_path / "ids.json", json.dumps(rows))
    with pytest.raises(BadRequest):
        calibration_ids(None, path, Calibration(), 300)


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b"\xff", b"[[1, 2]"])
def test_ids_that_are_not_json(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "ids.json").write_bytes(raw)
    with pytest.raises(BadRequest, match=r"ids\.json"):
        calibration_ids(None, tmp_path / "ids.json", Calibration(), 300)
    with pytest.raises(BadRequest):
        calibration_ids(None, tmp_path / "none.json", Calibration(), 300)
