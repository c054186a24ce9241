"""Pages, ref-counts, free list, eviction: pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynamo_serve.core.prefix_index import PrefixIndex, page_key, root_key


class PagePool:
    """Hands out page ids. Knows nothing of tensors, devices, models or sequences.

    A page is in exactly one of three states:

        used     ref_count > 0; some page table holds it
        cached   ref_count = 0, has a key; kept for reuse until somebody needs the room
        blank    ref_count = 0, no key

    `prefix_sharing=False` gives no page a key, so that nothing is ever cached.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_sharing: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self.index = PrefixIndex()
        self.num_evicted = 0
        self._ref_counts = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack
        # An ordered set, next to be evicted first; a dict would pass over every one gone before.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._blank) - len(self._cached)

    def part_of(self, page_table: Iterable[int]) -> float:
        """How many pages a table is worth if each is divided among its holders."""
        return sum(1 / self._ref_counts[page_id] for page_id in page_table)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def extend_keys(
        self, keys: list[bytes], token_ids: Sequence[int], salt: str, num_tokens: int
    ) -> None:
        """Append the keys of the pages that the first `num_tokens` of `token_ids` fill."""
        if not self.prefix_sharing:
            return
        size = self.page_size
        for start in range(len(keys) * size, num_tokens - size + 1, size):
            parent = keys[-1] if keys else root_key(salt)
            keys.append(page_key(parent, token_ids[start : start + size]))

    def has_room(self, keys: Sequence[bytes], num_tokens: int, reserve: int) -> bool:
        """Whether `attach(keys)` and `grow` to `num_tokens` would leave `reserve` pages."""
        matched = self.index.match(keys)
        idle = sum(self._ref_counts[page_id] == 0 for page_id in matched)
        available = len(self._blank) + len(self._cached) - idle
        return self.pages_for(num_tokens) - len(matched) + reserve <= available

    def new_pages(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """How many pages more would be in use after `attach(keys)` and `grow` to `num_tokens`."""
        in_use = sum(self._ref_counts[page_id] > 0 for page_id in self.index.match(keys))
        return self.pages_for(num_tokens) - in_use

    def attach(self, keys: Iterable[bytes]) -> list[int]:
        """A new page table: the longest cached head of the chain, now held once more."""
        page_table = self.index.match(keys)
        for page_id in page_table:
            self._cached.pop(page_id, None)
            self._ref_counts[page_id] += 1
        return page_table

    def grow(self, page_table: list[int], num_tokens: int) -> bool:
        """Extend `page_table` to cover `num_tokens`; False, and nothing done, without room."""
        missing = self.pages_for(num_tokens) - len(page_table)
        if missing > len(self._blank) + len(self._cached):
            return False
        for _ in range(missing):
            page_id = self._blank.pop() if self._blank else self._evict()
            self._ref_counts[page_id] = 1
            page_table.append(page_id)
        return True

    def seal(self, page_id: int, key: bytes) -> None:
        """Publish a full page for later requests to share, unless an equal one is published."""
        assert self._ref_counts[page_id] > 0, f"page {page_id}: sealed but not held"
        if key not in self.index.pages and self._keys[page_id] is None:
            self._keys[page_id] = key
            self.index.add(key, page_id)

    def release(self, page_table: list[int]) -> None:
        """Give every page of the table back and empty it."""
        # Tail first: a page is always evicted before the page it builds on, because whoever
        # holds it holds that one too and gives it back later.
        for page_id in reversed(page_table):
            self._ref_counts[page_id] -= 1
            if self._ref_counts[page_id] == 0:
                if self._keys[page_id] is None:
                    self._blank.append(page_id)
                else:
                    self._cached[page_id] = None
        page_table.clear()

    def check(self, page_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError if the books do not balance; O(pages + table entries)."""
        held = [0] * self.num_pages
        for table in page_tables:
            assert len(set(table)) == len(table), f"a page twice in one table: {table}"
            for page_id in table:
                held[page_id] += 1
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a page is free twice"
        for page_id, count in enumerate(self._ref_counts):
            assert count == held[page_id], f"page {page_id}: ref_count {count}, held {held}"
            states = (count > 0) + (page_id in blank) + (page_id in self._cached)
            assert states == 1, f"page {page_id}: lost or in two states"
            key = self._keys[page_id]
            assert key is None or self.index.pages.get(key) == page_id, f"page {page_id}: stale key"
            assert page_id not in blank or key is None, f"page {page_id}: blank with a key"
            assert page_id not in self._cached or key, f"page {page_id}: cached without a key"
        assert len(self.index.pages) == sum(key is not None for key in self._keys), "stale index"

    def _evict(self) -> int:
        page_id, _ = self._cached.popitem(last=False)
        key = self._keys[page_id]
        assert key is not None
        del self.index.pages[key]
        self._keys[page_id] = None
        self.num_evicted += 1
        return page_id
