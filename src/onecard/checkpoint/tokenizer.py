"""Text to ids and back, from a folder's tokenizer.json (the `tokenizers` library does the work).

Incremental decoding never shows half a character: text is released when the ids that make it are
complete, which matters for byte-level vocabularies and for Chinese.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from onecard.checkpoint.shards import read_json
from onecard.core.errors import BadRequest

LARGEST_TEXT = 64 << 20
LARGEST_TEMPLATE = 1 << 20
"""Characters of a chat template that are read; what renders it refuses far shorter ones."""


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
        try:
            return list(self.backend.encode(text, add_special_tokens=special).ids)
        except TypeError as error:
            raise BadRequest(
                "the text is not valid Unicode", do="it holds half of a surrogate pair"
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
