"""Who holds which page of keys and values: reference counts, and prefixes shared between requests.

The memory lies in the executor; here are only numbers. A page is in one of three states:

    free    nobody holds it and nothing is known of its content
    held    by one or more requests
    idle    held by nobody, its content still known: it may be matched, or evicted, longest idle first

A page's content is known once all its positions are computed (`keep`). It is found again by a chain of
keyed hashes, key = h(key of the page before, own ids), with a salt of the pool's own; and it is shared
only if its ids, and the page before it, are really those asked for: a collision shares nothing. Only
whole pages are shared, so nobody ever writes to a shared page.

What a page takes is told by `position_bytes`: both of a key and a value of each head are held in

    fp16, bf16   2 bytes per number, the head padded to 16 numbers (keys: to 2)
    int8, fp8    1 byte per number, and a float32 scale
    int4         half a byte per number, and a bf16 scale for each 32 of them

Whoever holds a known page holds the pages before it. So idle pages leave leaves first, and a known page
never outlives the one that it continues.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onecard.core.errors import FailedWork

Hash = Callable[[bytes], bytes]
CACHES = ("fp16", "bf16", "int8", "fp8", "int4")


def position_bytes(kv_heads: int, head_dim: int, cache: str) -> int:
    """Exact bytes of one position of one layer, as the native engine holds it."""
    keys, values = -(-head_dim // 2) * 2, -(-head_dim // 16) * 16
    if cache == "int4":
        groups = -(-head_dim // 32)
        return kv_heads * (keys // 2 + 16 * groups + 2 * 2 * groups)
    return kv_heads * (keys + values + 2 * 4 if cache in ("int8", "fp8") else 2 * (keys + values))


class Exhausted(FailedWork):
    """More pages were asked for than are free or idle."""


class Leak(Exception):
    """The books do not add up: a bug, and what it is."""


@dataclass(eq=False)
class Known:
    """What a page holds."""

    page: int
    before: Known | None
    ids: bytes
    key: bytes
    after: list[Known] = field(default_factory=list)


class Pool:
    """The books of `pages` pages of `page_tokens` positions. Lists of pages are in their sequence's order."""

    def __init__(self, pages: int, page_tokens: int, digest: Hash | None = None) -> None:
        self.pages, self.page_tokens = pages, page_tokens
        self.digest = digest or _keyed(secrets.token_bytes(32))
        self.free = list(range(pages))[::-1]
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.held = [0] * pages
        self.known: list[Known | None] = [None] * pages
        self.found: dict[bytes, list[Known]] = {}
        self.releases = 0  # pages that became available, ever

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def span(self, positions: int) -> int:
        """Pages for so many positions."""
        return -(-positions // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """Pages for the caller alone, content unknown. Raises Exhausted, and takes none then."""
        if count > self.available:
            raise Exhausted(
                f"{count} pages of {self.page_tokens} tokens were asked for",
                f"{self.available} of {self.pages} are free",
            )
        taken = []
        for _ in range(count):
            if not self.free:
                self._forget(self._known(next(iter(self.idle))))
            page = self.free.pop()
            self.held[page] = 1
            taken.append(page)
        return taken

    def match(self, ids: NDArray[np.int32]) -> list[int]:
        """The known pages that hold the beginning of `ids`, now held by the caller too.

        They end before the last id: its logits have to be computed.
        """
        before: Known | None = None
        matched: list[int] = []
        for index in range((len(ids) - 1) // self.page_tokens):
            own = self._slice(ids, index)
            before = self._find(self._key(before, own), before, own)
            if before is None:
                break
            self._hold(before.page)
            matched.append(before.page)
        return matched

    def keep(self, ids: NDArray[np.int32], pages: Sequence[int], index: int) -> int:
        """Page `index` of a sequence is computed, its pages before are known: make it known too.

        Returns the page to hold from now on: one with the same content, where there was one already.
        """
        own = self._slice(ids, index)
        before = self._known(pages[index - 1]) if index else None
        key = self._key(before, own)
        same = self._find(key, before, own)
        if same is not None and same.page != pages[index]:
            self._hold(same.page)
            self.release([pages[index]])
            return same.page
        if same is None:
            self._add(Known(pages[index], before, own, key))
        return pages[index]

    def release(self, pages: Sequence[int], forget: bool = False) -> None:
        """Hold these no longer; `forget`: their content is not to be trusted, where no other holds it."""
        for page in reversed(pages):  # so that what comes later in a sequence is evicted earlier
            if self.held[page] < 1:
                raise Leak(f"page {page} is released and nobody holds it")
            self.held[page] -= 1
            if self.held[page]:
                continue
            self.releases += 1
            known = self.known[page]
            if known is None:
                self.free.append(page)
                continue
            self.idle[page] = None
            if forget:
                self._forget(known)

    def audit(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises Leak unless every page is free, idle, or held by as many of `holders` as it should be."""
        counted = Counter(page for pages in holders for page in pages)
        states = Counter([*self.free, *self.idle, *(p for p, n in enumerate(self.held) if n)])
        wrong = [f"page {p} is in {states[p]} states" for p in range(self.pages) if states[p] != 1]
        wrong += [f"page {p} is no page" for p in {*counted, *states} if not 0 <= p < self.pages]
        wrong += [
            f"page {p} is counted {n} times and held by {counted[p]}"
            for p, n in enumerate(self.held) if n != counted[p]
        ]  # fmt: skip
        wrong += [f"page {p} is free and known" for p in self.free if self.known[p]]
        wrong += [f"page {p} is idle and unknown" for p in self.idle if not self.known[p]]
        chained = [known for bucket in self.found.values() for known in bucket]
        if {id(k) for k in chained} != {id(k) for k in self.known if k}:
            wrong.append("what is known and what is found differ")
        wrong += [line for known in chained for line in self._broken(known)]
        if wrong:
            raise Leak("; ".join(wrong[:8]))

    def _broken(self, known: Known) -> list[str]:
        page, before = known.page, known.before
        wrong = [] if self.known[page] is known else [f"page {page} is known as another"]
        if before is None:
            return wrong
        if self.known[before.page] is not before or known not in before.after:
            wrong.append(f"page {page} continues page {before.page}, which is forgotten")
        if self.held[before.page] < self.held[page]:
            wrong.append(f"page {page} is held more often than {before.page}, which it continues")
        return wrong

    def _slice(self, ids: NDArray[np.int32], index: int) -> bytes:
        return ids[index * self.page_tokens : (index + 1) * self.page_tokens].tobytes()

    def _known(self, page: int) -> Known:
        known = self.known[page]
        if known is None:
            raise Leak(f"page {page} is continued and unknown")
        return known

    def _key(self, before: Known | None, own: bytes) -> bytes:
        return self.digest((before.key if before else b"") + own)

    def _find(self, key: bytes, before: Known | None, own: bytes) -> Known | None:
        bucket = self.found.get(key, ())
        return next((k for k in bucket if k.before is before and k.ids == own), None)

    def _hold(self, page: int) -> None:
        self.held[page] += 1
        self.idle.pop(page, None)

    def _add(self, known: Known) -> None:
        self.known[known.page] = known
        self.found.setdefault(known.key, []).append(known)
        if known.before is not None:
            known.before.after.append(known)

    def _forget(self, known: Known) -> None:
        """An idle page becomes free, and with it those that continue it (idle too: see above)."""
        doomed = [known]
        for each in doomed:
            doomed += each.after
        if known.before is not None:
            known.before.after.remove(known)
        for each in doomed:
            bucket = self.found[each.key]
            bucket.remove(each)
            if not bucket:
                del self.found[each.key]
            self.known[each.page] = None
            del self.idle[each.page]
            self.free.append(each.page)


def _keyed(salt: bytes) -> Hash:
    return lambda data: hashlib.blake2b(data, key=salt, digest_size=16).digest()
