"""Errors are small reports: what was asked, what was seen, what to do.

`BadRequest` is the user's to mend and is raised before any expensive work (exit code 2);
`FailedWork` is work that was begun and could not be finished (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Problem(Exception):
    """An error for people: up to three short lines, no traceback unless asked for.

    Names in files are hostile until shown otherwise: what is no printable character becomes U+FFFD.
    """

    exit_code = 1

    def __init__(self, what: str, seen: str = "", do: str = "") -> None:
        self.what, self.seen, self.do = map(_line, (what, seen, do))
        super().__init__("\n".join(line for line in (self.what, self.seen, self.do) if line))


class BadRequest(Problem):
    """The request cannot be carried out as stated; nothing was touched."""

    exit_code = 2


class FailedWork(Problem):
    """The work began and could not be finished; what was finished is kept."""

    exit_code = 1


LONGEST = 500
"""Characters of a line; what is longer was long where it came from, and is cut in its middle."""


def _line(text: str) -> str:
    """A text as one printable line."""
    words = " ".join(text.split())
    if len(words) > LONGEST:
        words = f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in words)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for what begins so or is closest, or the list of known words."""
    words = sorted(known)
    if word and (longer := [known for known in words if known.startswith(word)]):
        return f"did you mean {' or '.join(map(repr, longer[:4]))}?"
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    between = "; " if any("," in word for word in words) else ", "
    return f"did you mean {close[0]!r}?" if close else "known: " + between.join(words)
