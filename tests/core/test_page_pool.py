"""Pages, one rule at a time: page size 4, ten pages."""

from __future__ import annotations

import time

import pytest

from dynamo_serve.core.page_pool import PagePool


def keys_of(pool: PagePool, tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, salt, len(tokens))
    return keys


def store(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Hold and publish the full pages of `tokens`; the page table."""
    table: list[int] = []
    assert pool.grow(table, len(tokens))
    for page_id, key in zip(table, keys_of(pool, tokens, salt), strict=False):
        pool.seal(page_id, key)
    return table


def test_a_released_chain_is_found_again() -> None:
    pool = PagePool(10, 4)
    tokens = list(range(12))
    table = store(pool, tokens)
    stored = list(table)
    pool.release(table)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 3, 7)
    assert pool.attach(keys_of(pool, tokens)) == (stored, [])
    pool.check([stored])


def test_a_page_with_content_is_evicted_only_when_no_blank_one_is_left() -> None:
    pool = PagePool(3, 4)
    table = store(pool, list(range(4)))
    pool.release(table)
    other: list[int] = []
    assert pool.grow(other, 8)
    assert pool.num_cached == 1
    assert pool.grow(other, 12)
    assert pool.num_cached == 0
    pool.check([other])


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = PagePool(3, 4)
    tokens = list(range(12))
    pool.release(store(pool, tokens))
    other: list[int] = []
    assert pool.grow(other, 4)
    assert len(pool.attach(keys_of(pool, tokens))[0]) == 2


def test_the_least_recently_released_chain_goes_first() -> None:
    pool = PagePool(2, 4)
    first, second = store(pool, [1] * 4), store(pool, [2] * 4)
    pool.release(first)
    pool.release(second)
    assert pool.grow([], 4)
    assert pool.attach(keys_of(pool, [1] * 4)) == ([], [])
    assert len(pool.attach(keys_of(pool, [2] * 4))[0]) == 1


def test_growing_without_room_changes_nothing() -> None:
    pool = PagePool(2, 4)
    table: list[int] = []
    assert not pool.grow(table, 9)
    assert table == []
    pool.check([])


def test_has_room_counts_the_idle_pages_it_would_attach_once() -> None:
    pool = PagePool(4, 4)
    tokens = list(range(8))
    pool.release(store(pool, tokens))
    keys = keys_of(pool, tokens)
    assert pool.has_room(keys, 16, reserve=0)
    assert not pool.has_room(keys, 16, reserve=1)
    assert not pool.has_room(keys, 17, reserve=0)


def test_equal_pages_after_different_heads_have_different_keys() -> None:
    pool = PagePool(10, 4)
    assert keys_of(pool, [1] * 4 + [2] * 4)[1] != keys_of(pool, [3] * 4 + [2] * 4)[1]


def test_salted_chains_never_meet() -> None:
    pool = PagePool(10, 4)
    store(pool, list(range(8)), salt="acme")
    assert pool.attach(keys_of(pool, list(range(8)), salt="globex")) == ([], [])


def test_an_equal_page_is_published_once() -> None:
    pool = PagePool(10, 4)
    first, second = store(pool, [1] * 4), store(pool, [1] * 4)
    pool.check([first, second])
    pool.release(second)
    assert pool.num_cached == 0
    pool.release(first)
    assert pool.num_cached == 1
    pool.check([])


def test_without_prefix_sharing_nothing_is_kept() -> None:
    pool = PagePool(10, 4, prefix_sharing=False)
    assert keys_of(pool, list(range(8))) == []
    pool.release(store(pool, list(range(8))))
    assert pool.num_cached == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool, table: pool._ref_counts.__setitem__(table[0], 2),
        lambda pool, table: pool._blank.append(table[0]),
        lambda pool, table: pool._blank.pop(),
        lambda pool, table: pool.index.pages.clear(),
        lambda pool, table: table.append(table[0]),
    ],
)
def test_check_notices_damage(damage) -> None:  # type: ignore[no-untyped-def]
    pool = PagePool(10, 4)
    table = store(pool, list(range(8)))
    pool.check([table])
    damage(pool, table)
    with pytest.raises(AssertionError):
        pool.check([table])


def seconds_to_evict(num_pages: int) -> float:
    """Seconds per page to evict all of a pool that is full of cached pages."""
    pool = PagePool(num_pages, 1)
    pool.release(store(pool, list(range(num_pages))))
    table: list[int] = []
    began = time.thread_time()
    assert pool.grow(table, num_pages)
    return (time.thread_time() - began) / num_pages


def test_evicting_a_page_costs_the_same_in_a_large_pool() -> None:
    small = min(seconds_to_evict(1000) for _ in range(3))
    large = min(seconds_to_evict(32_000) for _ in range(3))
    assert large < 16 * small, "as if it looked at all 32 times as many"
