"""Guessing the next ids from the text so far, without loss.

Replies repeat their prompt and themselves: names, code, quotations. So the ids that followed the last
occurrence of the newest few ids are a good guess at what follows now (prompt lookup). A step over the newest
id and a draft of n costs little more than one over the id alone, as both read all weights once, and gives
n + 1 rows of logits. The stepper chooses from them row by row as it does in a step, each with the draw that
its place in the reply has anyway, for as long as the draft said the same: `verify`. So ids and their
probabilities are those without speculation, greedy or sampled, to the bit. Keys and values of what was
guessed wrong lie behind the sequence's end, where the next ids overwrite them.

Guessing that does not come true costs time: `Lookup` counts, adapts how far it guesses, and pauses, longer
each time, when too little comes true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onecard.runtime.sample import Logits, Logprobs
from onecard.runtime.steps import Ids

LONGEST, SHORTEST = 4, 2
"""Newest ids that are looked for, from the most to the fewest."""
ENOUGH = 0.25
"""Share of drafted ids that must come true for guessing to pay, a running mean."""
SHORT_PAUSE, LONG_PAUSE = 16, 256
"""Ids without guessing, after the first failure and at most."""
NOTHING = np.empty(0, dtype=np.int32)

Chosen = tuple[int, Logprobs | None]
Choose = Callable[[Logits], Chosen]


def lookup(ids: Ids, most: int) -> Ids:
    """Up to `most` ids that may follow; none where the newest few never occurred before.

    Where the match reaches into its own continuation the text turns in circles, and so does the draft.
    """
    for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
        tail, starts = ids[len(ids) - size :], len(ids) - size
        same = ids[:starts] == tail[0]
        for place in range(1, size):
            same &= ids[place : starts + place] == tail[place]
        found = np.flatnonzero(same)
        if len(found):
            return np.resize(ids[found[-1] + size :], most)
    return NOTHING


class Lookup:
    """One request's guesses and how they fared."""

    def __init__(self) -> None:
        self.share = 1.0  # of drafted ids that came true, a running mean
        self.far = 4  # how many ids the next draft has at most
        self.pause, self.until = SHORT_PAUSE, 0  # no draft before there are `until` ids

    def tries(self, ids: Ids) -> bool:
        """Whether it does not pause."""
        return len(ids) >= self.until

    def draft(self, ids: Ids, most: int) -> Ids:
        """At most `most` ids that may follow `ids`."""
        if most < 1 or not self.tries(ids):
            return NOTHING
        return lookup(ids, min(most, self.far))

    def fared(self, ids: int, drafted: int, accepted: int) -> None:
        """Of `drafted` ids so many were accepted; there are `ids` now."""
        self.share += 0.25 * (accepted / drafted - self.share)
        self.far = 2 * self.far if accepted == drafted else accepted + 1
        self.far = min(self.far, 64)
        if accepted == drafted:
            self.pause = SHORT_PAUSE
        if self.share < ENOUGH:
            self.until, self.pause = ids + self.pause, min(2 * self.pause, LONG_PAUSE)
            self.share, self.far = 2 * ENOUGH, 1


def verify(draft: Ids, logits: Logits, choose: Choose) -> Iterator[Chosen]:
    """The next ids from logits [len(draft) + 1, vocabulary]; the reader adds each to the reply or leaves."""
    for place, row in enumerate(logits):
        id, told = choose(row)
        yield id, told
        if place == len(draft) or id != draft[place]:
            return
