"""Calibration and evaluation text as token ids.

A text is one stream cut into windows, or documents (split at a separator, each its own context). A
`.json` file holds ids already: a list of lists. Calibration takes `samples` windows of `length` tokens
spread evenly over the text, so that the same file and settings always give the same ids.

Tokenizing takes a hundred times a text's size in memory, so only small files are tokenized whole. Of
a larger one a slice is read and tokenized for each window: time and memory do not grow with the file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from onecard.checkpoint.text import check_vocabulary, read_text
from onecard.checkpoint.tokenizer import LARGEST_TEXT, Tokenizer
from onecard.core.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

SMALL, LARGEST = 1 << 20, 1 << 30
"""Bytes of a calibration text up to which it is tokenized whole; beyond which it is refused."""

FEWEST = 32
"""Ids that are given as such, in all, with fewer of which nothing can be learned."""

IDS = "write it as [[1, 52, ...], [1, 17, ...]]: a list for each window"

ROOM, MOST_ROOM, SPARE = 8, 512, 16
"""Bytes per token wanted that a slice has at first, and that it may grow to; the ids at its end that
are not used, as the word there may be cut."""


@dataclass(frozen=True)
class Calibration:
    """How much text passes see: `samples` windows of `length` tokens."""

    samples: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 1 << 20 or not 2 <= self.length <= 1 << 20:
            raise BadRequest(f"{self.samples} samples of {self.length} tokens were asked for",
                             do=f"1 to {1 << 20} samples of 2 to {1 << 20} tokens are possible")  # fmt: skip


def calibration_ids(
    tokenizer: Tokenizer | None, path: Path | None, settings: Calibration, vocab_size: int
) -> Tensor:
    """Token ids int64 [samples, length]. BadRequest when the text is too short for one sample.

    A text too short for all samples gives fewer, none of which overlap: callers show the number of
    rows they got, not the number asked for. A `.json` file decides both numbers itself.
    """
    if path is not None and path.suffix == ".json":
        return _given(path, vocab_size)
    assert tokenizer is not None
    if path is not None and path.is_file() and path.stat().st_size > SMALL:
        rows = _sliced(tokenizer, path, settings)
    else:
        rows = _windows(tokenizer.encode(read_text(path)), settings)
    return _tensor(rows, vocab_size)


def _tensor(rows: list[list[int]], vocab_size: int) -> Tensor:
    import torch

    for row in rows:
        check_vocabulary(row, vocab_size)
    return torch.tensor(rows, dtype=torch.int64)


def _windows(ids: list[int], settings: Calibration) -> list[list[int]]:
    """Windows spread evenly over all ids of a text."""
    samples, length = min(settings.samples, len(ids) // settings.length), settings.length
    if not samples:
        raise _too_short(len(ids), length)
    step = (len(ids) - length) / max(samples - 1, 1)
    return [ids[s : s + length] for s in (round(i * step) for i in range(samples))]


def _sliced(tokenizer: Tokenizer, path: Path, settings: Calibration) -> list[list[int]]:
    """Windows from slices spread evenly over the bytes of a file, in order, without overlap."""
    size = path.stat().st_size
    if size > LARGEST:
        raise BadRequest(f"{path} is too large ({size} bytes)", do="give a part of it, up to 1 GiB")
    step = max(size - ROOM * settings.length, 0) / max(settings.samples - 1, 1)
    rows, end, longest = [], 0, 0
    with path.open("rb") as file:
        for number in range(settings.samples):
            if end >= size:
                break
            start = round(number * step)
            ids, end = _slice(tokenizer, file, size, end, max(start, end), settings.length)
            longest = max(longest, len(ids))
            if len(ids) == settings.length:
                rows.append(ids)
    if not rows:
        raise _too_short(longest, settings.length)
    return rows


def _slice(
    tokenizer: Tokenizer, file: BinaryIO, size: int, low: int, start: int, length: int
) -> tuple[list[int], int]:
    """`length` ids of the text from byte `start` on, and the byte where they end.

    The slice grows until it gives enough, at the end of the file backwards, but not before `low`. It
    gives fewer ids where the file ends (the byte is its size) or holds next to nothing.
    """
    room = ROOM * length
    while True:
        begin = max(low, min(start, size - room))
        text, begin, longer = _read(file, begin, room, size)
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        spare = 0 if begin + room >= size else SPARE
        if len(encoding.ids) >= length + spare:
            until = text[: encoding.offsets[length - 1][1]]
            end = begin + len(until.encode()) + (until.count("\n") if longer else 0)
            return list(encoding.ids[:length]), max(end, low + 1)
        if low + room >= size:
            return list(encoding.ids), size
        if room >= MOST_ROOM * length:
            return list(encoding.ids), begin + room
        room *= 2


def _read(file: BinaryIO, begin: int, room: int, size: int) -> tuple[str, int, bool]:
    """At most `room` bytes as text from the first word at or after `begin` on; where it begins; and
    whether its line ends were two bytes long. Halves of characters at its ends are left out.
    """
    file.seek(max(begin - 1, 0))
    before, data = file.read(min(begin, 1)), file.read(room)
    half = 0
    while begin and half < min(3, len(data)) and data[half] & 0xC0 == 0x80:
        half += 1
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[half:], begin + room >= size)
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{file.name} is not UTF-8 text", str(error), "save it as UTF-8"
        ) from error
    skipped = ""
    if begin and not before.isspace():  # in the middle of a word; some scripts have no spaces
        word = re.match(r"\S{0,64}\s+", text)
        skipped = word[0] if word else ""
    text = text[len(skipped) :]
    plain = text.replace("\r\n", "\n")
    return plain, begin + half + len(skipped.encode()), plain != text


def _too_short(count: int, length: int) -> BadRequest:
    return BadRequest(
        f"the calibration text gives {count} tokens, one sample needs {length}",
        do="give a longer text (compress: or a smaller --length)",
    )


def _given(path: Path, vocab_size: int) -> Tensor:
    wrong = f"{path} is not a list of equally long lists of ids"
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise ValueError(f"it is too large ({path.stat().st_size} bytes)")
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(wrong, str(error), IDS) from error
    if not isinstance(rows, list) or not all(isinstance(row, list) and row for row in rows):
        raise BadRequest(wrong, do=IDS)
    if not rows or len({len(row) for row in rows}) > 1:
        raise BadRequest(wrong, "its lists differ in length" if rows else "it is empty", IDS)
    for row in rows:
        if not all(type(id) is int and id >= 0 for id in row):  # a bool is an int to isinstance
            raise BadRequest(wrong, "an id is not a whole number from 0 on", IDS)
    largest = max(max(row) for row in rows)
    if largest >= vocab_size:
        raise BadRequest(
            f"{path} holds the id {largest}, the model knows {vocab_size} tokens",
            do="give ids of the model's own tokenizer",
        )
    if (count := sum(map(len, rows))) < FEWEST:
        raise BadRequest(f"{path} gives {count} tokens, at least {FEWEST} are needed",
                         do="give more or longer lists of ids")  # fmt: skip
    return _tensor(rows, vocab_size)


def digest(ids: Tensor | None) -> str:
    """A short name for a set of ids."""
    data = b"" if ids is None else ids.numpy().tobytes() + str(tuple(ids.shape)).encode()
    return hashlib.sha256(data).hexdigest()[:16]
