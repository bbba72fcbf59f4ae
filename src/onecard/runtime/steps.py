"""What the scheduler and an executor of many requests say to each other: one call per step.

Keys and values lie in pages of `page_tokens` positions. The stepper owns the memory, the scheduler
(scheduler.py) owns the numbering: which page belongs to whom. A `Feed` names a sequence's new ids, how
many positions lie in its pages already, and its page table; position p is in page table[p // page_tokens].
A step runs the whole network over the new ids of all feeds, writes their keys and values, and chooses
the next id of each feed with a `Draw`. With `steps` above 1 the sequences that have a draw go on by
themselves: their chosen id is fed, the next is chosen, until `steps` ids, `most`, or an end id.

The promise that the scheduler builds on: a `Fed` depends on its own feed and pages alone, never on the
rest of the batch, on how a prompt was cut into feeds or on `steps`; to the bit. So a step may be run
again, and a request preempted, computed anew or speculated on gives the ids that it gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from onecard.runtime.sample import Logits, Logprobs, Sampling

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Draw:
    """How ids are chosen from a feed's last logits, as `sample.pick` does it.

    Chosen id i takes uniforms[i]; a temperature of 0 takes none and leaves `uniforms` empty. A chosen
    id joins `previous` for the penalties of the next. Nothing is chosen behind an id of `ends`.
    """

    sampling: Sampling
    previous: Ids  # all ids so far, the feed's own at the end
    prompt: int  # how many of them are the prompt's
    uniforms: NDArray[np.float64]  # [most], or empty
    ends: Ids  # ascending; may be empty
    most: int  # ids at most, 1 or more; the table has pages for those that are fed


@dataclass(frozen=True, eq=False)
class Feed:
    """One sequence's part of a step. The arrays are contiguous views and are not kept."""

    ids: Ids  # new ids, one or more, of positions past, past + 1, ...
    past: int
    table: Ids  # page numbers, enough for past + len(ids) + draw.most - 1 positions
    want: Literal["none", "last", "all"] = "none"  # whose logits of the new ids come back
    draw: Draw | None = None  # None: no id is chosen; takes part in the first pass alone


@dataclass(frozen=True, eq=False)
class Fed:
    """What a feed gave.

    `ids` holds 1 to min(most, steps) ids where there was a draw and all went well; all but the last of
    them have been fed. When the largest of the logits to choose from is not finite, or any is NaN ("not
    numbers"), or anything else fails for this sequence alone ("failed"), the ids chosen before it are
    there, the others are not.
    """

    ids: tuple[int, ...] = ()
    logits: Logits | None = None  # [1 or len(feed.ids), vocabulary] as wanted
    logprobs: tuple[Logprobs, ...] = ()  # of each id, where sampling.logprobs asks for them
    status: Literal["ok", "not numbers", "failed"] = "ok"
    seen: str = ""  # what went wrong, for people


class Stepper(Protocol):
    """An executor of many requests at once. Calls come from one thread at a time."""

    vocab_size: int
    max_context: int
    pages: int  # in the pool, numbered from 0
    page_tokens: int

    def step(self, batch: Sequence[Feed], steps: int, cancel: Ids) -> list[Fed]:
        """One Fed per feed, in their order.

        `cancel` is one word that another thread may set: it is read between tokens, and when it is
        not 0 the call returns with the ids it has (one per draw at least). Raises when the whole call failed:
        then any of its positions may be written or not, and the feeds may be given again.
        """

    def choose(self, logits: Logits, draw: Draw) -> Fed:
        """The one id that a step would choose from these logits [vocabulary], to the bit of its logprobs."""

    def close(self) -> None:
        """Give the memory back. Closing twice does no harm."""
