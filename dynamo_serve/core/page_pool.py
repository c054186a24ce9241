"""Pages, ref-counts, free list, eviction: pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from dynamo_serve.core.page_events import PageEvents
from dynamo_serve.core.prefix_index import PrefixIndex, extend_keys
from dynamo_serve.core.prefix_tree import PrefixTree
from dynamo_serve.core.tiers import DEVICE, Place


class Below(Protocol):
    """What the pool knows of the tiers below it."""

    def __contains__(self, key: object) -> bool: ...

    def pays(self, keys: Sequence[bytes], found: Sequence[int | None]) -> bool:
        """Whether to restore the pages of `keys` where `found` has none, rather than to compute
        everything from the first of them on."""
        ...

    def evicted(self, key: bytes, *, was_clean: bool) -> None:
        """A page has been forgotten on the device."""
        ...


class NoTiers:
    def __contains__(self, key: object) -> bool:
        return False

    def pays(self, keys: Sequence[bytes], found: Sequence[int | None]) -> bool:
        return False

    def evicted(self, key: bytes, *, was_clean: bool) -> None:
        pass


class PagePool:
    """Hands out page ids. Knows nothing of tensors, devices, models or sequences.

    A page is in exactly one of three states:

        used     ref_count > 0; some page table holds it, or a copy that is under way
        cached   ref_count = 0, has a key; kept for reuse until somebody needs the room
        blank    ref_count = 0, no key

    A cached page is *clean* if a tier below has it, too: clean ones are evicted first.

    `prefix_sharing=False` gives no page a key, so that nothing is ever cached.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_sharing: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self.index = PrefixIndex()
        self.tree = PrefixTree(page_size)
        self.below: Below = NoTiers()
        self.events: PageEvents | None = None  # if anybody wants to know what becomes of pages
        self.num_evicted = 0
        self._ref_counts = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack
        # An ordered set, next to be evicted first; a dict would pass over every one gone before.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._clean: OrderedDict[int, None] = OrderedDict()  # the same for clean ones
        self._is_clean = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._blank)

    @property
    def num_cached(self) -> int:
        return len(self._cached) + len(self._clean)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_idle

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + self.num_cached

    @property
    def num_ready(self) -> int:
        """Pages that can be had without losing what is in them."""
        return len(self._blank) + len(self._clean)

    def part_of(self, page_table: Iterable[int]) -> float:
        """How many pages a table is worth if each is divided among its holders."""
        return sum([1 / self._ref_counts[page_id] for page_id in page_table])

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def extend_keys(
        self, keys: list[bytes], token_ids: Sequence[int], salt: str, num_tokens: int
    ) -> None:
        """Append the keys of the pages that the first `num_tokens` of `token_ids` fill."""
        if self.prefix_sharing:
            extend_keys(keys, token_ids, salt, self.page_size, num_tokens)

    def has_room(self, keys: Sequence[bytes], num_tokens: int, reserve: int) -> bool:
        """Whether `attach(keys)` and `grow` to `num_tokens` would leave `reserve` pages."""
        here = [page_id for page_id in self.match(keys) if page_id is not None]
        idle = sum(self._ref_counts[page_id] == 0 for page_id in here)
        return self.pages_for(num_tokens) - len(here) + reserve <= self.num_idle - idle

    def new_pages(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """How many pages more would be in use after `attach(keys)` and `grow` to `num_tokens`."""
        found = self.match(keys)
        in_use = sum(page is not None and self._ref_counts[page] > 0 for page in found)
        return self.pages_for(num_tokens) - in_use

    def match(self, keys: Sequence[bytes]) -> list[int | None]:
        """The longest head of the chain that can be had without computing it: ids of pages, or None
        for one that is in a tier below. Such pages are left out, with all that follow, where it
        would not pay to restore them."""
        found: list[int | None] = []
        for key in keys:
            page_id = self.index.pages.get(key)
            if page_id is None and key not in self.below:
                break
            found.append(page_id)
        if None in found and not self.below.pays(keys, found):
            del found[found.index(None) :]
        return found

    def attach(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """A new page table: the longest head of the chain that can be had, each page now held once
        more; and the places in it of pages that are still to be restored. There must be room for
        these."""
        found = self.match(keys)
        for page_id in found:
            if page_id is not None:
                self.hold(page_id)
        missing = [i for i, page_id in enumerate(found) if page_id is None]
        return [self._new() if page_id is None else page_id for page_id in found], missing

    def grow(self, page_table: list[int], num_tokens: int) -> bool:
        """Extend `page_table` to cover `num_tokens`; False, and nothing done, without room."""
        missing = self.pages_for(num_tokens) - len(page_table)
        if missing > self.num_idle:
            return False
        page_table += [self._new() for _ in range(missing)]
        return True

    def seal(self, page_id: int, key: bytes) -> None:
        """Publish a full page for later requests to share, unless an equal one is published."""
        assert self._ref_counts[page_id] > 0, f"page {page_id}: sealed but not held"
        if key not in self.index.pages and self._keys[page_id] is None:
            self._keys[page_id] = key
            self._is_clean[page_id] = key in self.below
            self.index.add(key, page_id)

    def release(self, page_table: list[int]) -> None:
        """Give every page of the table back and empty it."""
        # Tail first: a page is always evicted before the page it builds on, because whoever
        # holds it holds that one too and gives it back later.
        for page_id in reversed(page_table):
            self.let_go(page_id)
        page_table.clear()

    def hold(self, page_id: int) -> None:
        """Hold a page once more."""
        self._cached.pop(page_id, None)
        self._clean.pop(page_id, None)
        self._ref_counts[page_id] += 1

    def let_go(self, page_id: int) -> None:
        """Hold it once less."""
        self._ref_counts[page_id] -= 1
        if self._ref_counts[page_id] == 0:
            if self._keys[page_id] is None:
                self._blank.append(page_id)
            else:
                (self._clean if self._is_clean[page_id] else self._cached)[page_id] = None

    # ── for the tiers below ──────────────────────────────────────────────────

    def __contains__(self, key: object) -> bool:
        return key in self.index.pages

    def place(self, key: bytes) -> Place:
        return Place(DEVICE, self.index.pages[key])

    def oldest_not_clean(self, but: Container[bytes]) -> bytes | None:
        """The key of the cached page that would be lost next, leaving out some."""
        keys = (self._keys[page_id] for page_id in self._cached)
        return next((key for key in keys if key is not None and key not in but), None)

    def clean(self, key: bytes) -> None:
        """A tier below has it now."""
        page_id = self.index.pages.get(key)
        if page_id is not None and not self._is_clean[page_id]:
            self._is_clean[page_id] = 1
            if page_id in self._cached:
                del self._cached[page_id]
                self._clean[page_id] = None

    def soil(self, key: bytes) -> None:
        """No tier below has it any more."""
        page_id = self.index.pages.get(key)
        if page_id is not None and self._is_clean[page_id]:
            self._is_clean[page_id] = 0
            if page_id in self._clean:
                del self._clean[page_id]
                self._cached[page_id] = None
                self._cached.move_to_end(page_id, last=False)

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
            cached = (page_id in self._cached) + (page_id in self._clean)
            states = (count > 0) + (page_id in blank) + cached
            assert states == 1, f"page {page_id}: lost or in two states"
            key = self._keys[page_id]
            assert key is None or self.index.pages.get(key) == page_id, f"page {page_id}: stale key"
            assert page_id not in blank or key is None, f"page {page_id}: blank with a key"
            assert not cached or key, f"page {page_id}: cached without a key"
            clean = bool(self._is_clean[page_id])
            assert clean == (key is not None and key in self.below), f"page {page_id}: clean?"
            assert not cached or clean == (page_id in self._clean), f"page {page_id}: wrong list"
        assert len(self.index.pages) == sum(key is not None for key in self._keys), "stale index"

    def _new(self) -> int:
        page_id = self._blank.pop() if self._blank else self._evict()
        self._ref_counts[page_id] = 1
        return page_id

    def _evict(self) -> int:
        page_id, _ = (self._clean or self._cached).popitem(last=False)
        key = self._keys[page_id]
        assert key is not None
        del self.index.pages[key]
        self._keys[page_id] = None
        self.num_evicted += 1
        was_clean = bool(self._is_clean[page_id])
        self.below.evicted(key, was_clean=was_clean)
        if not was_clean:
            self.tree.lose(key)
        self._is_clean[page_id] = 0
        if self.events is not None:
            self.events.changed(key)
        return page_id
