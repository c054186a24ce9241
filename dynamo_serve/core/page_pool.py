"""Pages, ref-counts, free list, eviction: pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import inf
from typing import Protocol

from dynamo_serve.core.eviction import ANYBODY, Cached, Who
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

    A cached page is *clean* if a tier below has it, too. Which one is evicted is in `eviction`.

    `prefix_sharing=False` gives no page a key, so that nothing is ever cached.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        prefix_sharing: bool = True,
        stale_seconds: float = inf,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self.index = PrefixIndex()
        self.tree = PrefixTree(page_size)
        self.below: Below = NoTiers()
        self.events: PageEvents | None = None  # if anybody wants to know what becomes of pages
        self.num_evicted = 0
        self.cached = Cached(num_pages, stale_seconds)
        self._ref_counts = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack

    @property
    def num_free(self) -> int:
        return len(self._blank)

    @property
    def num_cached(self) -> int:
        return self.cached.num

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_idle

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + self.num_cached

    @property
    def part_ready(self) -> float:
        """How much can be had without losing what is in it: of the blank pages and those of the
        owner who would be the first to lose something."""
        return self.cached.part_ready(len(self._blank))

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
            shared = self.index.shared
            extend_keys(keys, token_ids, salt, self.page_size, num_tokens, shared)

    def declare(self, keys: Iterable[bytes]) -> None:
        """Tenants share pages with these keys. To be said before there are any pages."""
        assert not self.index.pages, "too late"
        self.index.shared = self.tree.shared = frozenset(keys)

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

    def attach(self, keys: Sequence[bytes], who: Who = ANYBODY) -> tuple[list[int], list[int]]:
        """A new page table: the longest head of the chain that can be had, each page now held once
        more; and the places in it of pages that are still to be restored: new ones, for `who`.
        There must be room for these."""
        found = self.match(keys)
        here = [page_id for page_id in found if page_id is not None]
        self.cached.remove([page_id for page_id in here if self._ref_counts[page_id] == 0])
        for page_id in here:
            self._ref_counts[page_id] += 1
        missing = [i for i, page_id in enumerate(found) if page_id is None]
        if not missing:
            return here, missing
        new = self._new(len(missing), who)
        return [new.pop() if page_id is None else page_id for page_id in found], missing

    def grow(self, page_table: list[int], num_tokens: int, who: Who = ANYBODY) -> bool:
        """Extend `page_table` to cover `num_tokens`; False, and nothing done, without room."""
        missing = self.pages_for(num_tokens) - len(page_table)
        if missing > self.num_idle:
            return False
        if missing > 0:
            page_table += self._new(missing, who)
        return True

    def seal(self, page_id: int, key: bytes) -> None:
        """Publish a full page for later requests to share, unless an equal one is published."""
        assert self._ref_counts[page_id] > 0, f"page {page_id}: sealed but not held"
        if key not in self.index.pages and self._keys[page_id] is None:
            self._keys[page_id] = key
            if key in self.index.shared:
                self.cached.share(page_id)
            self.cached.is_clean[page_id] = key in self.below
            self.index.add(key, page_id)

    def release(self, page_table: list[int]) -> None:
        """Give every page of the table back and empty it."""
        # Tail first: a page is always evicted before the page it builds on, because whoever
        # holds it holds that one too and gives it back later.
        now, used_at = self.cached.now, self.cached.used_at
        for page_id in page_table:
            used_at[page_id] = now
        self._let_go(page_table[::-1])
        page_table.clear()

    def hold(self, page_id: int) -> None:
        """Hold a page once more."""
        if self._ref_counts[page_id] == 0:
            self.cached.remove((page_id,))
        self._ref_counts[page_id] += 1

    def let_go(self, page_id: int) -> None:
        """Hold it once less. It does not count as used by that."""
        self._let_go((page_id,))

    def _let_go(self, page_ids: Sequence[int]) -> None:
        counts, keys = self._ref_counts, self._keys
        cached = []
        for page_id in page_ids:
            counts[page_id] -= 1
            if counts[page_id] == 0:
                if keys[page_id] is None:
                    self.cached.give_back(page_id)
                    self._blank.append(page_id)
                else:
                    cached.append(page_id)
        self.cached.add(cached)

    # ── for the tiers below ──────────────────────────────────────────────────

    def __contains__(self, key: object) -> bool:
        return key in self.index.pages

    def place(self, key: bytes) -> Place:
        return Place(DEVICE, self.index.pages[key])

    def oldest_not_clean(self, but: Container[bytes]) -> bytes | None:
        """The key of the cached page that would be lost next, leaving out some."""
        keys = (self._keys[page_id] for page_id in self.cached.dirty_by_loss())
        return next((key for key in keys if key is not None and key not in but), None)

    def clean(self, key: bytes) -> None:
        """A tier below has it now."""
        page_id = self.index.pages.get(key)
        if page_id is not None and not self.cached.is_clean[page_id]:
            self.cached.wash(page_id, is_used=self._ref_counts[page_id] > 0)

    def soil(self, key: bytes) -> None:
        """No tier below has it any more."""
        page_id = self.index.pages.get(key)
        if page_id is not None and self.cached.is_clean[page_id]:
            self.cached.soil(page_id, is_used=self._ref_counts[page_id] > 0)

    def check(self, page_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError if the books do not balance; O(pages + table entries)."""
        held = [0] * self.num_pages
        for table in page_tables:
            assert len(set(table)) == len(table), f"a page twice in one table: {table}"
            for page_id in table:
                held[page_id] += 1
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a page is free twice"
        all_cached = self.cached.check(blank)
        for page_id, count in enumerate(self._ref_counts):
            assert count == held[page_id], f"page {page_id}: ref_count {count}, held {held}"
            cached = page_id in all_cached
            states = (count > 0) + (page_id in blank) + cached
            assert states == 1, f"page {page_id}: lost or in two states"
            key = self._keys[page_id]
            assert key is None or self.index.pages.get(key) == page_id, f"page {page_id}: stale key"
            assert page_id not in blank or key is None, f"page {page_id}: blank with a key"
            assert not cached or key, f"page {page_id}: cached without a key"
            clean = bool(self.cached.is_clean[page_id])
            assert clean == (key is not None and key in self.below), f"page {page_id}: clean?"
        assert len(self.index.pages) == sum(key is not None for key in self._keys), "stale index"

    def _new(self, count: int, who: Who) -> list[int]:
        """So many pages, each held once; there is room for them."""
        owner, blank = self.cached.owner(who), self._blank
        new = [blank.pop() for _ in range(min(count, len(blank)))]
        if len(new) < count:
            evicted = self.cached.evict(count - len(new), owner)
            for page_id in evicted:
                self._forget(page_id)
            new += evicted
        for page_id in new:
            self._ref_counts[page_id] = 1
        self.cached.take(new, owner)
        return new

    def _forget(self, page_id: int) -> None:
        """It is evicted."""
        key = self._keys[page_id]
        assert key is not None
        del self.index.pages[key]
        self._keys[page_id] = None
        self.num_evicted += 1
        was_clean = bool(self.cached.is_clean[page_id])
        self.below.evicted(key, was_clean=was_clean)
        if not was_clean:
            self.tree.lose(key)
        self.cached.is_clean[page_id] = 0
        if self.events is not None:
            self.events.changed(key)
