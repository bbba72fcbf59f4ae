"""Text to calibrate and evaluate with, as files hold it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onecard.checkpoint.tokenizer import LARGEST_TEXT
from onecard.core.errors import BadRequest

SHIPPED = Path(__file__).parent.parent / "shipped"


def read_text(path: Path | None, shipped: str = "calibration.txt") -> str:
    """The text of a file, or the shipped one. BadRequest when it is missing or not text."""
    path = path or SHIPPED / shipped
    if not path.is_file():
        raise BadRequest(f"there is no text file {path}", do="check the path")
    if path.stat().st_size > 4 * LARGEST_TEXT:
        raise BadRequest(
            f"{path} is too large ({path.stat().st_size} bytes)", do="give a part of it"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", str(error), "save it as UTF-8") from error


def check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    """The tokenizer belongs to the model: no id lies beyond its embedding."""
    if ids and max(ids) >= vocab_size:
        raise BadRequest(
            f"the tokenizer gives the id {max(ids)}, the model knows {vocab_size} tokens",
            do="is this the model's own tokenizer?",
        )
