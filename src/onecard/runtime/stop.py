"""Stop strings in a stream of text, whatever the pieces it comes in.

Text is released once no stop string can begin in it. A hit is the stop string that is complete
first, the longest of those that end together: the text before it is the same however it was cut.
"""

from __future__ import annotations


class Stops:
    """`feed(text)` returns what became certain; after a hit, `hit` is true and nothing follows."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop, self.held, self.hit = stop, "", False

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        self.held += text
        found = [(at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0]
        if found:
            self.hit = True
            certain, self.held = self.held[: min(found)[1]], ""
            return certain
        end = len(self.held) - self._open()
        certain, self.held = self.held[:end], self.held[end:]
        return certain

    def rest(self) -> str:
        """What was withheld, when no more text comes."""
        certain, self.held = self.held, ""
        return certain

    def _open(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            tail = self.held[-size:]
            if any(s.startswith(tail) for s in self.stop):
                return size
        return 0
