"""What every peer's script is asked and what it says. Imported in the peers' own environments, so it
needs the standard library only.

    SCRIPT MODEL TOKENS.json OUT --bits 4 --group 128

The last line printed is a JSON object: the peer, the settings it used, and its seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The words that all scripts take."""
    words = argparse.ArgumentParser()
    words.add_argument("model")
    words.add_argument("tokens", type=Path)
    words.add_argument("out")
    words.add_argument("--bits", type=int, required=True)
    words.add_argument("--group", type=int, required=True, help="0 for one group per row")
    words.add_argument("--dtype", default="auto", help="of the loaded weights")
    return words


def samples(tokens: Path) -> list[list[int]]:
    """Lists of token ids."""
    found: list[list[int]] = json.loads(tokens.read_text())
    return found


def say(
    peer: str, used: str, began: float, loaded: float, solved: float, saved: float, **more: int
) -> None:
    """The last line; the four times are when each step ended."""
    seconds = {
        "load_seconds": loaded - began,
        "seconds": solved - loaded,
        "save_seconds": saved - solved,
    }
    print("\n" + json.dumps({"peer": peer, "used": used, **seconds, **more}))
