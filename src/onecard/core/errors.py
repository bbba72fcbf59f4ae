"""Errors are small reports: what was asked, what was seen, what to do.

`BadRequest` is the user's to mend and is raised before any expensive work (exit code 2);
`FailedWork` is work that was begun and could not be finished (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """An error for people: up to three short lines, no traceback unless asked for."""

    exit_code = 1

    def __init__(self, what: str, seen: str = "", do: str = "") -> None:
        self.what, self.seen, self.do = (" ".join(text.split()) for text in (what, seen, do))
        super().__init__("\n".join(line for line in (self.what, self.seen, self.do) if line))


class BadRequest(Problem):
    """The request cannot be carried out as stated; nothing was touched."""

    exit_code = 2


class FailedWork(Problem):
    """The work began and could not be finished; what was finished is kept."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known word, or the list of known words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(words)
