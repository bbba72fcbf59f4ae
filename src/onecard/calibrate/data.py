"""Calibration and evaluation text as token ids.

A text is one stream cut into windows, or documents (split at a separator, each its own context). A
`.json` file holds ids already: a list of lists. Calibration takes `samples` windows of `length` tokens
spread evenly over the text, so that the same file and settings always give the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onecard.checkpoint.tokenizer import LARGEST_TEXT, Tokenizer
from onecard.core.errors import BadRequest

SHIPPED = Path(__file__).parent.parent / "shipped"


@dataclass(frozen=True)
class Calibration:
    """How much text passes see: `samples` windows of `length` tokens."""

    samples: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 1 << 20 or not 2 <= self.length <= 1 << 20:
            raise BadRequest(f"{self.samples} samples of {self.length} tokens were asked for")


def read_text(path: Path | None, shipped: str = "calibration.txt") -> str:
    """The text of a file, or the shipped one. BadRequest when it is missing or not text."""
    path = path or SHIPPED / shipped
    if not path.is_file():
        raise BadRequest(f"there is no text file {path}")
    if path.stat().st_size > 4 * LARGEST_TEXT:
        raise BadRequest(
            f"{path} is too large ({path.stat().st_size} bytes)", do="give a part of it"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", seen=str(error)) from error


def calibration_ids(
    tokenizer: Tokenizer | None, path: Path | None, settings: Calibration, vocab_size: int
) -> Tensor:
    """Token ids int64 [samples, length]. BadRequest when the text is too short."""
    if path is not None and path.suffix == ".json":
        return _given(path, vocab_size)
    assert tokenizer is not None
    ids = tokenizer.encode(read_text(path))
    check_vocabulary(ids, vocab_size)
    need = settings.samples * settings.length
    if len(ids) < settings.length:
        raise BadRequest(
            f"the calibration text gives {len(ids)} tokens, one sample needs {settings.length}",
            do="give a longer text, or a smaller --length",
        )
    samples = settings.samples if len(ids) >= need else len(ids) // settings.length
    step = (len(ids) - settings.length) / max(samples - 1, 1)
    starts = [round(i * step) for i in range(samples)]
    return torch.tensor([ids[s : s + settings.length] for s in starts])


def _given(path: Path, vocab_size: int) -> Tensor:
    try:
        rows = json.loads(path.read_bytes())
        ids = torch.tensor(rows, dtype=torch.int64)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise BadRequest(
            f"{path} is not a list of equally long lists of ids", seen=str(error)
        ) from error
    if ids.ndim != 2 or ids.numel() == 0 or int(ids.min()) < 0:
        raise BadRequest(f"{path} is not a list of equally long lists of ids")
    check_vocabulary(ids.flatten().tolist(), vocab_size)
    return ids


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """The tokenizer belongs to the model: no id lies beyond its embedding."""
    if ids and max(ids) >= vocab_size:
        raise BadRequest(
            f"the tokenizer gives the id {max(ids)}, the model knows {vocab_size} tokens",
            do="is this the model's own tokenizer?",
        )


def digest(ids: Tensor | None) -> str:
    """A short name for a set of ids."""
    data = b"" if ids is None else ids.numpy().tobytes() + str(tuple(ids.shape)).encode()
    return hashlib.sha256(data).hexdigest()[:16]
