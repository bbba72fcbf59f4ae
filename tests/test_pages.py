"""The books of the page pool: conservation, sharing by content alone, eviction, what a leak looks like."""

from __future__ import annotations

import numpy as np
import pytest

from onecard.runtime.pages import Exhausted, Leak, Pool

TOKENS = 4


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def filled(pool: Pool, row: np.ndarray) -> list[int]:
    """Pages that hold a row of ids, shared where they can be, known where they are full."""
    pages = pool.match(row)
    pages += pool.take(pool.span(len(row)) - len(pages))
    for index in range(len(row) // pool.page_tokens):
        pages[index] = pool.keep(row, pages, index)
    return pages


def test_pages_are_taken_once_and_come_back() -> None:
    pool = Pool(5, TOKENS)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4] and pool.available == 0
    pool.audit([first, second])
    with pytest.raises(Exhausted, match=r"1 pages of 4 tokens(.|\n)*0 of 5"):
        pool.take(1)
    assert pool.take(0) == []
    pool.release(first)
    pool.audit([second])
    with pytest.raises(Leak, match="nobody holds"):
        pool.release(first)


@pytest.mark.parametrize(("count", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_span(count: int, pages: int) -> None:
    assert Pool(1, TOKENS).span(count) == pages


def test_taking_is_all_or_nothing() -> None:
    pool = Pool(3, TOKENS)
    with pytest.raises(Exhausted):
        pool.take(4)
    assert pool.available == 3
    pool.audit([])


def test_whole_pages_of_a_common_beginning_are_shared() -> None:
    pool = Pool(16, TOKENS)
    row = np.arange(14, dtype=np.int32)
    a = filled(pool, row)
    assert pool.match(row) == a[:3]
    assert pool.match(np.append(row[:9], ids(99, 99, 99))) == a[:2]
    assert pool.match(row[1:]) == []
    pool.audit([a, a[:3], a[:2]])


@pytest.mark.parametrize(("length", "shared"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_one_id_is_always_left_to_compute(length: int, shared: int) -> None:
    pool = Pool(16, TOKENS)
    row = np.arange(12, dtype=np.int32)
    filled(pool, row)
    assert len(pool.match(row[:length])) == shared


def test_the_same_page_behind_another_beginning_is_another() -> None:
    pool = Pool(16, TOKENS)
    same = ids(7, 7, 7, 7)
    a = filled(pool, np.concatenate([ids(1, 1, 1, 1), same]))
    b = filled(pool, np.concatenate([ids(2, 2, 2, 2), same]))
    assert not set(a) & set(b)
    assert pool.match(np.concatenate([same, ids(0)])) == []


def test_twice_the_same_becomes_one() -> None:
    """Two requests computed the same beginning side by side."""
    pool = Pool(16, TOKENS)
    row = np.arange(8, dtype=np.int32)
    a, b = pool.take(2), pool.take(2)
    for pages in (a, b):
        for index in range(2):
            pages[index] = pool.keep(row, pages, index)
    assert a == b and pool.available == 14
    assert pool.keep(row, a, 0) == a[0]
    pool.audit([a, b])


def test_idle_pages_are_found_again_and_evicted_when_needed() -> None:
    pool = Pool(4, TOKENS)
    old, new = np.arange(8, dtype=np.int32), np.arange(50, 58, dtype=np.int32)
    a = filled(pool, old)
    pool.release(a)
    b = filled(pool, new)
    pool.release(b)
    assert pool.available == 4 and len(pool.free) == 0
    assert pool.match(np.append(old, ids(0))) == a
    pool.release(a)  # now the old ones were used last
    taken = pool.take(1)
    pool.audit([taken])
    assert pool.match(np.append(new, ids(0))) == b[:1], "the end of a chain goes first"
    assert taken == b[1:]
    assert pool.match(np.append(old, ids(0))) == a
    pool.audit([taken, a, b[:1]])


def test_a_page_in_use_is_never_evicted() -> None:
    pool = Pool(4, TOKENS)
    row = np.arange(9, dtype=np.int32)
    a = filled(pool, row)
    pool.release(a)
    shared = pool.match(row)
    assert sorted(pool.take(2) + shared) == [0, 1, 2, 3]
    with pytest.raises(Exhausted):
        pool.take(1)


def test_what_failed_is_forgotten_with_all_that_continues_it() -> None:
    pool = Pool(16, TOKENS)
    row = np.arange(17, dtype=np.int32)
    a = filled(pool, row)
    longer = filled(pool, np.append(row, np.arange(8, dtype=np.int32)))
    assert longer[:4] == a[:4]
    pool.release(longer)
    pool.release(a[2:], forget=True)
    pool.audit([a[:2]])
    assert pool.match(row) == a[:2]
    pool.release(a[:2])
    pool.release(a[:2])
    assert pool.available == 16 and len(pool.idle) == 2


def test_what_failed_stays_known_while_another_holds_it() -> None:
    pool = Pool(16, TOKENS)
    row = np.arange(9, dtype=np.int32)
    a, b = filled(pool, row), filled(pool, row)
    pool.release(a, forget=True)
    pool.audit([b])
    assert pool.match(row) == b[:2]


@pytest.mark.parametrize("keys", [1, 3])
def test_collisions_share_nothing(keys: int) -> None:
    """A hash with one value, or three: what is found is still what was asked for."""
    pool = Pool(64, TOKENS, digest=lambda data: bytes([sum(data) % keys]))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, 13).astype(np.int32) for _ in range(12)]
    held = [filled(pool, row) for row in rows]
    owner = {page: row[: 4 * at + 4].tobytes()
             for row, pages in zip(rows, held, strict=True) for at, page in enumerate(pages[:3])}  # fmt: skip
    for row, pages in zip(rows, held, strict=True):
        assert [owner[page] for page in pages[:3]] == [row[:n].tobytes() for n in (4, 8, 12)]
        assert pool.match(row) == pages[:3]
    assert len(pool.found) <= keys
    pool.audit([*held, *(pages[:3] for pages in held)])


def test_a_colliding_page_that_continues_another_is_not_shared() -> None:
    """Equal ids, equal key, another beginning: what an attacker would want."""
    pool = Pool(8, TOKENS, digest=lambda data: b"")
    secret = filled(pool, ids(1, 2, 3, 4, 9, 9, 9, 9))
    assert pool.match(ids(9, 9, 9, 9, 0)) == []
    mine = filled(pool, ids(5, 6, 7, 8, 9, 9, 9, 9))
    assert not set(mine) & set(secret)


def test_every_pool_has_its_own_salt() -> None:
    keys = {next(iter(_one(Pool(2, TOKENS)).found)) for _ in range(4)}
    assert len(keys) == 4 and all(len(key) == 16 for key in keys)


def _one(pool: Pool) -> Pool:
    filled(pool, ids(1, 2, 3, 4))
    return pool


def test_long_chains_are_no_deeper_than_the_stack() -> None:
    pool = Pool(5000, 1)
    row = np.zeros(5000, dtype=np.int32)
    pages = filled(pool, row)
    pool.release(pages[1:])
    pool.release(pages[:1], forget=True)
    assert len(pool.free) == 5000
    pool.audit([])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda pool, a: pool.free.append(a[0]), "in 2 states"),
        (lambda pool, a: pool.free.pop(), "in 0 states"),
        (lambda pool, a: a.pop(), "counted 1 times and held by 0"),
        (lambda pool, a: a.append(a[0]), "counted 1 times and held by 2"),
        (lambda pool, a: pool.held.__setitem__(a[0], 2), "counted 2 times and held by 1"),
        (lambda pool, a: pool.known.__setitem__(a[0], None), "known and what is found differ"),
        (lambda pool, a: pool.found.clear(), "known and what is found differ"),
        (lambda pool, a: a.append(77), "page 77 is no page"),
    ],
)
def test_the_audit_finds(damage: object, said: str) -> None:
    pool = Pool(6, TOKENS)
    a = filled(pool, np.arange(9, dtype=np.int32))
    pool.audit([a])
    damage(pool, a)  # type: ignore[operator]
    with pytest.raises(Leak, match=said):
        pool.audit([a])


@pytest.mark.parametrize("seed", range(200))
def test_random_books_add_up(seed: int) -> None:
    """Holders come, grow and go, with few ids so that much is shared; contents are followed on the side."""
    rng = np.random.default_rng(seed)
    keys = int(rng.integers(1, 4))
    digest = None if seed % 2 else lambda data: bytes([sum(data) % keys])
    pool = Pool(int(rng.integers(4, 24)), TOKENS, digest)
    held: list[tuple[np.ndarray, list[int]]] = []
    content: dict[int, bytes] = {}  # page: everything up to its end
    for _ in range(60):
        if held and rng.random() < 0.5:
            _, pages = held.pop(int(rng.integers(len(held))))
            pool.release(pages, forget=bool(rng.random() < 0.2))
        else:
            row = rng.integers(0, 2, int(rng.integers(1, 30))).astype(np.int32)
            shared = pool.match(row)
            for at, page in enumerate(shared):
                assert content[page] == row[: 4 * at + 4].tobytes()
            try:
                pages = shared + pool.take(pool.span(len(row)) - len(shared))
            except Exhausted:
                pool.release(shared)
                continue
            for at in range(len(shared), len(row) // TOKENS):
                content[pages[at]] = row[: 4 * at + 4].tobytes()
                pages[at] = pool.keep(row, pages, at)
                assert content[pages[at]] == row[: 4 * at + 4].tobytes()
            held.append((row, pages))
        pool.audit([pages for _, pages in held])
    for _, pages in held:
        pool.release(pages)
    pool.audit([])
    assert pool.available == pool.pages
    assert sorted(pool.take(pool.pages)) == list(range(pool.pages)) and not pool.found
