"""Text to ids and back, from a folder's tokenizer.json (the `tokenizers` library does the work).

Incremental decoding never shows half a character: text is released when the ids that make it are
complete, which matters for byte-level vocabularies and for Chinese.

Tokenizing takes a hundred times a text's size in memory, so `slices` tokenizes a large text in slices
that overlap. Near its ends a slice may be wrong: a word is cut, a marker of the beginning is put where
nothing begins. So two neighbours are joined where both say the same: in the middle half of the
overlap all their tokens must be equal and stand in the same places. That gives the ids of the whole for
every tokenizer that looks less than a quarter of the overlap (1,024 characters) around a token, which
words, bytes and merges within words do. (Unigram without words does not quite: between divisions that
are equally likely it chooses by the rounding of a sum over all the text before.) The overlap must also
be varied, because a run of one character is divided by its length, and a slice does not know the
length. Where neighbours do not agree the slice ends earlier, and where they never do it is made
larger, up to a bound.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from onecard.checkpoint.shards import read_json
from onecard.core.errors import BadRequest

LARGEST_TEXT = 64 << 20
LARGEST_TEMPLATE = 1 << 20
"""Characters of a chat template that are read; what renders it refuses far shorter ones."""

SLICE, OVERLAP, LARGEST_SLICE, VARIED, TRIES = 1 << 18, 1 << 12, 1 << 22, 8, 16
"""Characters of a slice, of its overlap with the next, and the most that a slice may grow to; the
different ids that an overlap must hold; places where a slice is tried to end before it grows."""


class Tokenizer:
    """A folder's tokenizer with its special ids and chat template."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            other = "tokenizer.model is there" if (folder / "tokenizer.model").is_file() else ""
            raise BadRequest(
                f"{folder} has no tokenizer.json", other,
                "save it once with transformers: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )  # fmt: skip
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BadRequest(f"{path} cannot be read", seen=str(error)[:200]) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.hidden = frozenset(id for id, token in added.items() if token.special)
        config = _optional(folder / "tokenizer_config.json")
        generation = _optional(folder / "generation_config.json")
        model = _optional(folder / "config.json")
        self.bos_id = self._special(config, "bos_token", generation, model)
        self.eos_ids = self._stops(config, generation, model)
        self.chat_template = _template(folder, config)
        self.special = {
            key: _content(config.get(key)) or ""
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        self.adds_bos = self.bos_id is not None and self.bos_id in self.backend.encode("a").ids[:1]

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; `special` adds what the post-processor adds (a begin token ...)."""
        if len(text) > LARGEST_TEXT:
            raise BadRequest(f"a text of {len(text)} characters is too long to tokenize at once")
        return list(self._encoding(text, special).ids)

    def unknown(self, ids: Sequence[int]) -> float:
        """The share of ids that stand for whatever the vocabulary does not have."""
        unknown = self.backend.token_to_id(self.special["unk_token"])
        return 0.0 if unknown is None else sum(id == unknown for id in ids) / max(1, len(ids))

    def slices(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Ids of a text and the character where each ends, slice by slice; memory is a slice's.

        BadRequest where a text gives no place to divide it within LARGEST_SLICE characters.
        """
        here, first = self._slice(text, 0, SLICE), 0
        while here.end < len(text):  # `first` is the first id of `here` that was not given yet
            found = self._next(text, here)
            if found is not None:
                there, (last, after) = found
                yield here.part(first, last)
                here, first = there, after
            elif 2 * (here.end - here.start) <= LARGEST_SLICE:
                here = self._slice(text, here.start, 2 * (here.end - here.start))
            else:
                raise BadRequest(
                    f"the text gives no place to divide it in {LARGEST_SLICE} characters",
                    f"from character {here.start} on", "give a text without such long runs",
                )  # fmt: skip
        yield here.part(first, None)

    def _next(self, text: str, here: Slice) -> tuple[Slice, tuple[int, int]] | None:
        """The slice behind one, and the ids at which it takes over; near the end if that can be."""
        step = max(OVERLAP, (here.end - here.start) // TRIES)
        for end in range(here.end, here.start + 2 * OVERLAP, -step):
            low, high = end - OVERLAP + OVERLAP // 4, end - OVERLAP // 4
            i, mine = here.within(low, high)
            if len({id for id, _, _ in mine}) >= VARIED:
                there = self._slice(text, end - OVERLAP, SLICE)
                j, theirs = there.within(low, high)
                if mine == theirs:
                    return there, (i + len(mine) // 2, j + len(mine) // 2)
        return None

    def _slice(self, text: str, start: int, length: int) -> Slice:
        end = min(start + length, len(text))
        encoding = self._encoding(text[start:end])
        return Slice(start, end, encoding.ids, encoding.offsets)

    def _encoding(self, text: str, special: bool = False) -> Encoding:
        try:
            return self.backend.encode(text, add_special_tokens=special)
        except TypeError as error:
            raise BadRequest(
                "the text is not valid Unicode",
                do="it holds bytes that are not UTF-8, or half of a surrogate pair",
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens and ids beyond the vocabulary left out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def visible(self, token: int) -> bool:
        """Whether an id stands for text."""
        return token not in self.hidden and self.backend.id_to_token(token) is not None

    def _special(self, config: dict[str, Any], key: str, *others: dict[str, Any]) -> int | None:
        content = _content(config.get(key))
        found = self._id(content) if content else None
        if found is not None:
            return found
        ids = (i for other in others for i in _ids(other, f"{key}_id")[:1])
        return next((i for i in ids if 0 <= i < self.size), None)

    def _id(self, content: str) -> int | None:
        try:
            return self.backend.token_to_id(content)
        except (TypeError, UnicodeError):  # half of a surrogate pair: no token is that
            return None

    def _stops(self, config: dict[str, Any], *others: dict[str, Any]) -> frozenset[int]:
        found = {self._special(config, "eos_token", *others)}
        for other in others:
            found |= set(_ids(other, "eos_token_id"))
        return frozenset(i for i in found if i is not None)


@dataclass(frozen=True)
class Slice:
    """Ids of the part of a text from `start` to `end`, and the characters of the part each stands for."""

    start: int
    end: int
    ids: list[int]
    spans: list[tuple[int, int]]

    def part(self, first: int, last: int | None) -> tuple[list[int], list[int]]:
        """Some ids, and the characters of the whole text where they end."""
        return self.ids[first:last], [self.start + end for _, end in self.spans[first:last]]

    def within(self, low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Which is the first id that lies from `low` to `high`; all of them, with their places."""
        first = bisect_left(self.spans, low - self.start, key=lambda span: span[0])
        last = bisect_right(self.spans, high - self.start, key=lambda span: span[1])
        return first, [
            (id, begin + self.start, end + self.start)
            for id, (begin, end) in zip(self.ids[first:last], self.spans[first:last], strict=True)
        ]


class Stream:
    """Incremental decoding: `add(id)` returns the text that became certain.

    The newest ids are decoded together with a few before them, because what an id means depends on
    its neighbours (bytes of one character, the space in front of a word). Replacement characters at
    the end may be the first bytes of a character and are withheld; all before them is certain. What
    is still broken `PATIENCE` ids later never was a character: no character has so many bytes.
    """

    WINDOW, PATIENCE = 6, 8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""  # what of decode(ids) is already released
        self.broken = 0  # ids since the text last ended in a whole character

    def add(self, token: int) -> str:
        if not self.tokenizer.visible(token):
            return ""
        self.ids.append(token)
        self.broken += 1
        text = self._decoded()
        whole = text.rstrip("\ufffd")
        if whole != text and self.broken <= self.PATIENCE:
            return self._release(whole) if len(whole) > len(self.shown) else ""
        self.broken = 0
        piece = self._release(text)
        self._settle()
        return piece

    def finish(self) -> str:
        """What is left, broken bytes included."""
        return self._release(self._decoded())

    def _decoded(self) -> str:
        """decode(ids), with `shown` at its front.

        Byte-fallback decoders break a whole run of bytes when its last character is incomplete;
        then what was shown stands, and the run is decoded from its broken end on.
        """
        text = self.tokenizer.decode(self.ids)
        if not text.startswith(self.shown):
            self.ids, self.shown = self.ids[len(self.ids) - self.broken :], ""
            text = self.tokenizer.decode(self.ids)
        return text

    def _release(self, text: str) -> str:
        piece, self.shown = text[len(self.shown) :], text
        return piece

    def _settle(self) -> None:
        """Drop old ids, so that decoding stays cheap; all of decode(ids) is released."""
        if len(self.ids) <= 2 * self.WINDOW:
            return
        for start in range(len(self.ids) - self.WINDOW, 0, -1):
            tail = self.tokenizer.decode(self.ids[start:])
            if tail and not tail.startswith("\ufffd") and self.shown.endswith(tail):
                self.ids, self.shown = self.ids[start:], tail
                return
        if len(self.ids) > 8 * self.WINDOW:
            self.ids = self.ids[-self.WINDOW :]
            self.shown = self.tokenizer.decode(self.ids)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _ids(config: dict[str, Any], key: str) -> list[int]:
    """The token ids under a key that holds one, several or none. Raises BadRequest for others."""
    value = config.get(key)
    given: list[Any] = value if isinstance(value, list) else [value]
    ids = [i for i in given if i is not None]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise BadRequest(
            f"{key} is {str(value)[:80]}", do="a token id, or a list of token ids, is needed"
        )
    return ids


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(LARGEST_TEMPLATE + 1)
    template = config.get("chat_template")
    if isinstance(template, list):
        rows = [row for row in template if isinstance(row, dict)]
        template = next((row.get("template") for row in rows if row.get("name") == "default"), None)
    return template if isinstance(template, str) else None
