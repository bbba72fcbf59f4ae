"""How a text is read: as windows of one stream, or as documents each with a context of its own.

Tokens are made as they are needed and forgotten when they were given, so memory grows neither with the
text nor with what lies behind `limit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest

SCANNED, KEPT = 1 << 20, 1 << 14
"""Characters looked at at once where only their bytes are counted; used tokens kept at the most."""


@dataclass(frozen=True)
class Reading:
    """How a text is read. `window` 0 is the model's context, at most 2048; `stride` 0 is the window.

    `bos`: `start` puts it once in front of the text as the tokenizer itself does, `each` in front of
    every window, `none` nowhere. Documents have it in front where the tokenizer knows one. `limit`
    takes the first documents, or without `documents` the first windows. `keep_tail` keeps the last
    window although it is shorter: log likelihoods of whole texts need it, means gain little.
    """

    window: int = 0
    stride: int = 0
    bos: Literal["start", "each", "none"] = "start"
    documents: str | None = None
    limit: int = 0
    keep_tail: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "stride", "limit"):
            if not 0 <= getattr(self, name) <= 1 << 24:
                raise BadRequest(
                    f"{name} is {getattr(self, name)}", do=f"0 to {1 << 24} is possible"
                )
        if self.documents == "":
            raise BadRequest(
                "the separator of documents is empty", do="--documents '<|endoftext|>'"
            )


@dataclass(frozen=True)
class Piece:
    """Ids of one context; tokens from `first` on are predicted; `nbytes` is their text's size."""

    ids: tuple[int, ...]
    first: int
    nbytes: int


class Pieces:
    """The pieces that a text is read in, one after the other; behind the last, `convention` is known."""

    def __init__(self, tokenizer: Tokenizer, text: str, reading: Reading, context: int) -> None:
        self.tokenizer, self.text, self.reading, self.context = tokenizer, text, reading, context
        self.convention = ""
        if reading.window > context:
            raise BadRequest(
                f"windows of {reading.window} tokens, the model's context is {context}",
                do=f"--window {context}",
            )
        if reading.documents is None:
            self._check_windows()

    def __iter__(self) -> Iterator[Piece]:
        if self.reading.documents is None:
            return self._windows()
        return self._documents(self.reading.documents)

    def extent(self) -> tuple[int, str]:
        """How much there is to read, about, and of what."""
        separator = self.reading.documents
        if separator is None and not self.reading.limit:
            parts = (self.text[i : i + SCANNED] for i in range(0, len(self.text), SCANNED))
            return sum(len(part.encode("utf-8", "replace")) for part in parts), "bytes"
        count = self.reading.limit or self.text.count(separator or "") + 1
        return count, "windows" if separator is None else "documents"

    def _check_windows(self) -> None:
        reading = self.reading
        window = min(reading.window or 2048, self.context)
        if window < 2:
            raise BadRequest("windows of one token predict nothing", do="--window 2 or more")
        if reading.stride > window:
            raise BadRequest(
                f"a stride of {reading.stride} skips text between windows of {window}",
                do=f"--stride {window} or less",
            )

    def _windows(self) -> Iterator[Piece]:
        reading, tokenizer = self.reading, self.tokenizer
        window = min(reading.window or 2048, self.context)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        each = bos if reading.bos == "each" else []
        begin = bos if reading.bos == "start" and tokenizer.adds_bos else []
        body = window - len(each)
        stride = min(reading.stride or window, body)  # a BOS in each leaves room for one token less
        tokens = _Tokens(tokenizer, self.text, begin)
        start = count = given = 0
        limited = False
        while tokens.reach(start + body) or not start or self._is_tail(tokens, start, body, stride):
            limited = 0 < reading.limit <= count
            if limited:
                break
            ids, ends = tokens.between(start, start + body)
            seen = body - stride if start else 0  # how much of it the window before had
            first = max(1, len(each) + seen)
            if len(each) + len(ids) > first:
                before = tokens.end(start + first - len(each) - 1)
                yield Piece(tuple(each + ids), first, ends[-1] - before)
                given += 1
            count += 1
            start += stride
            tokens.forget(start - 1)
        if not given:
            raise BadRequest(f"the text gives {tokens.count} tokens, too few to predict any")
        policy = {"start": "as the tokenizer sets it, once" if tokenizer.adds_bos else "none set by the "
                  "tokenizer", "each": "in front of every window", "none": "none"}[reading.bos]  # fmt: skip
        kept = "kept" if reading.keep_tail else "dropped"
        tail = f"last partial window {kept}" if count > 1 else "one window"
        these = "window" if count == 1 else f"{count} windows"
        tail = f"only the first {these}" if limited else tail
        self.convention = (
            f"one stream, windows of {window} tokens, stride {stride}, BOS {policy}, {tail}; mean "
            "over all predicted tokens"
        )

    def _is_tail(self, tokens: _Tokens, start: int, body: int, stride: int) -> bool:
        """Whether a window from `start` on, shorter than `body`, is to be kept: the one before it
        was whole, and did not reach the end."""
        end = start - stride + body
        return self.reading.keep_tail and tokens.reach(end) and end < tokens.count

    def _documents(self, separator: str) -> Iterator[Piece]:
        reading, tokenizer = self.reading, self.tokenizer
        length = min(reading.window or self.context, self.context)
        bos = [] if tokenizer.bos_id is None or reading.bos == "none" else [tokenizer.bos_id]
        given = 0
        for number, part in enumerate(_parts(self.text, separator)):
            if 0 < reading.limit <= number:
                break
            tokens = _Tokens(tokenizer, part)
            tokens.reach(length - len(bos))
            ids, ends = tokens.between(0, length - len(bos))
            if len(bos) + len(ids) > 1:
                given += 1
                yield Piece(tuple(bos + ids), 1, ends[-1] - (0 if bos else ends[0]))
        if not given:
            raise BadRequest("the text holds no document of two tokens or more")
        alone = " (the separator is not in the text)" if separator not in self.text else ""
        self.convention = (
            f"{given} document{'s' * (given > 1)}{alone}, each stripped, in a context of its own, BOS "
            f"{'in front' if bos else 'none'}, cut at {length} tokens; mean over all predicted tokens"
        )


class _Tokens:
    """The tokens of a text, made when they are asked for by number. `begin` stands before the text."""

    def __init__(self, tokenizer: Tokenizer, text: str, begin: Sequence[int] = ()) -> None:
        self.slices = _encoded(tokenizer, text)
        self.ids, self.ends = list(begin), [0] * len(begin)  # of those not forgotten
        self.forgotten = 0

    @property
    def count(self) -> int:
        """How many are made so far."""
        return self.forgotten + len(self.ids)

    def reach(self, number: int) -> bool:
        """Whether there are so many."""
        while self.count < number:
            found = next(self.slices, None)
            if found is None:
                return False
            self.ids += found[0]
            self.ends += found[1]
        return True

    def between(self, first: int, last: int) -> tuple[list[int], list[int]]:
        """Ids, and for each the bytes of text up to its end."""
        part = slice(first - self.forgotten, last - self.forgotten)
        return self.ids[part], self.ends[part]

    def end(self, number: int) -> int:
        """The bytes of text up to the end of one; 0 in front of the first."""
        return self.ends[number - self.forgotten] if number >= 0 else 0

    def forget(self, number: int) -> None:
        """What is in front of one will not be asked for; done seldom, as it moves all others."""
        if number - self.forgotten > KEPT:
            del self.ids[: number - self.forgotten], self.ends[: number - self.forgotten]
            self.forgotten = number


def _parts(text: str, separator: str) -> Iterator[str]:
    """The documents of a text, stripped, without the empty ones."""
    start = 0
    while start <= len(text):
        end = text.find(separator, start)
        end = len(text) if end < 0 else end
        if part := text[start:end].strip():
            yield part
        start = end + len(separator)


def _encoded(tokenizer: Tokenizer, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Ids, and for each the number of UTF-8 bytes of text up to its end; slice by slice."""
    start = nbytes = 0
    for ids, ends in tokenizer.slices(text):
        if ids:
            last = max(start, *ends)
            sizes = nbytes + _sizes(text[start:last])
            yield ids, [int(sizes[max(end - start, 0)]) for end in ends]
            start, nbytes = last, int(sizes[-1])


def _sizes(text: str) -> NDArray[np.int64]:
    """How many bytes the first 0, 1, 2 ... characters of a text are in UTF-8."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.cumsum([0, *(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))])
