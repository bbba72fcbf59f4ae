"""Text to ids and back, from a folder's tokenizer.json (the `tokenizers` library does the work).

Incremental decoding never shows half a character: a piece of text is released when the ids that make
it are complete, which matters for byte-level vocabularies and for Chinese.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from onecard.checkpoint.shards import read_json
from onecard.core.errors import BadRequest

LARGEST_TEXT = 64 << 20


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
        """Ids of a text; `special` adds what the tokenizer's own post-processor adds (a BOS ...)."""
        if len(text) > LARGEST_TEXT:
            raise BadRequest(f"a text of {len(text)} characters is too long to tokenize at once")
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def _special(self, config: dict, key: str, *others: dict) -> int | None:
        content = _content(config.get(key))
        found = self.backend.token_to_id(content) if content else None
        if found is not None:
            return found
        ids = (other.get(f"{key}_id") for other in others)
        ids = (i[0] if isinstance(i, list) and i else i for i in ids)
        return next((i for i in ids if isinstance(i, int) and 0 <= i < self.size), None)

    def _stops(self, config: dict, *others: dict) -> frozenset[int]:
        found = {self._special(config, "eos_token", *others)}
        for other in others:
            ids = other.get("eos_token_id")
            found |= set(ids if isinstance(ids, list) else [ids])
        return frozenset(i for i in found if isinstance(i, int))


class Stream:
    """Incremental decoding: `add(id)` returns the text that became certain."""

    WINDOW = 6

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # ids before `start` are settled and only give context
        self.shown = 0  # characters of decode(ids[start:]) already released

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :])
        if text.endswith("\ufffd") and len(self.ids) - self.start < 4 * self.WINDOW:
            return ""
        piece, self.shown = text[self.shown :], len(text)
        if len(self.ids) - self.start > 2 * self.WINDOW and not text.endswith("\ufffd"):
            self._settle()
        return piece

    def _settle(self) -> None:
        """Drop old ids, keeping a window whose decoding is a suffix of what was shown."""
        start = len(self.ids) - self.WINDOW
        whole = self.tokenizer.decode(self.ids[self.start :])
        while start > self.start:
            tail = self.tokenizer.decode(self.ids[start:])
            if not tail.startswith("\ufffd") and whole.endswith(tail):
                self.start, self.shown = start, len(tail)
                return
            start -= 1

    def finish(self) -> str:
        """What is left, broken bytes included."""
        text = self.tokenizer.decode(self.ids[self.start :])
        piece, self.shown = text[self.shown :], len(text)
        return piece


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template(folder: Path, config: dict) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size < 1 << 20:
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
