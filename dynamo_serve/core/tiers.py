"""Tiers of KV pages below the device: host memory, then disk. Books only; engines copy."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable
from itertools import islice
from typing import NamedTuple

DEVICE, HOST, DISK = 0, 1, 2
NAMES = ("device", "host", "disk")
MOST_KEPT = 4096


class TierSpec(NamedTuple):
    """A tier as an engine reports it: `page_seconds` is what it takes to restore one page."""

    number: int
    num_slots: int
    page_seconds: float


class Place(NamedTuple):
    """Where a page is: `slot` is a page id on the device."""

    tier: int
    slot: int


class Copy(NamedTuple):
    """A page that an engine is asked to copy; `key` tells what is in it (`prefix_index`)."""

    ticket: int
    key: bytes
    source: Place
    target: Place


class Copied(NamedTuple):
    """A copy has ended: it took so many seconds from its beginning, waiting not counted, and with
    an `error` the target holds nothing of use."""

    ticket: int
    seconds: float
    error: str = ""


class Found(NamedTuple):
    """Pages that a tier holds from an earlier engine, as (key, slot), the oldest first."""

    tier: int
    pages: tuple[tuple[bytes, int], ...]


class Tier:
    """The slots of one tier. A page is *clean* once it is in a tier further down, too: forgetting
    it here loses nothing. Whatever is forgotten is the oldest, clean pages before others.

    A slot is in exactly one of these: free, listed (clean or not), reserved for a copy that is
    under way, or doomed: no longer listed, but still read by a copy.
    """

    def __init__(self, spec: TierSpec) -> None:
        self.number, self.num_slots, self.page_seconds = spec  # the last one is learned
        self.num_lost = 0  # forgotten here, and nowhere below
        self._num_fresh = self.num_slots  # of the highest numbers, never used
        self._free: list[int] = []  # a stack
        self._clean: OrderedDict[bytes, int] = OrderedDict()
        self._others: OrderedDict[bytes, int] = OrderedDict()
        self._reserved: set[int] = set()
        self._holders: Counter[int] = Counter()  # copies that read from a slot, or write to it
        self._doomed: set[int] = set()

    @property
    def name(self) -> str:
        return NAMES[self.number]

    def __contains__(self, key: object) -> bool:
        return key in self._clean or key in self._others

    def __len__(self) -> int:
        return len(self._clean) + len(self._others)

    @property
    def part_ready(self) -> float:
        """How many of the slots can be had without losing a page."""
        ready = self._num_fresh + len(self._free) + len(self._clean)
        return ready / self.num_slots if self.num_slots else 1.0

    def place(self, key: bytes) -> Place:
        slot = self._clean.get(key)
        return Place(self.number, self._others[key] if slot is None else slot)

    def use(self, key: bytes) -> None:
        """It is wanted: of its kind it goes last now."""
        pages = self._clean if key in self._clean else self._others
        pages.move_to_end(key)

    def reserve(self) -> tuple[Place, bytes | None] | None:
        """A slot for a copy, and the key of the page that had to go for it, if one had to; None
        while every page is being read."""
        if self._free:
            slot, gone = self._free.pop(), None
        elif self._num_fresh:
            slot, gone = self.num_slots - self._num_fresh, None
            self._num_fresh -= 1
        else:
            gone = self._oldest()
            if gone is None:
                return None
            self.num_lost += gone in self._others
            slot = self._unlist(gone)
        self._reserved.add(slot)
        return Place(self.number, slot), gone

    def settle(self, key: bytes, slot: int) -> None:
        """The copy into a reserved slot has ended well."""
        self._reserved.remove(slot)
        if key in self:
            self._free.append(slot)
        else:
            self._others[key] = slot

    def give_back(self, slot: int) -> None:
        """It has not."""
        self._reserved.remove(slot)
        self._free.append(slot)

    def adopt(self, pages: Iterable[tuple[bytes, int]]) -> None:
        """List pages that were there before this engine; newer ones in the same slot stand."""
        pages = [(key, slot) for key, slot in pages if slot < self.num_slots]
        first_fresh = self.num_slots - self._num_fresh
        end = max((slot + 1 for _, slot in pages), default=0)
        free = {*self._free, *range(first_fresh, end)}
        self._num_fresh = min(self._num_fresh, self.num_slots - end)
        for key, slot in pages:
            if slot in free and key not in self:
                free.remove(slot)
                self._others[key] = slot
        self._free = sorted(free, reverse=True)

    def clean(self, key: bytes) -> None:
        if key in self._others:
            self._clean[key] = self._others.pop(key)

    def soil(self, key: bytes) -> None:
        """It is nowhere below any more."""
        if key in self._clean:
            self._others[key] = self._clean.pop(key)
            self._others.move_to_end(key, last=False)

    def oldest_not_clean(self, but: Container[bytes]) -> bytes | None:
        """What would be lost next, leaving out what is being copied down."""
        return next((key for key in self._others if key not in but), None)

    @property
    def next_to_go(self) -> bytes | None:
        """The key of the page that `reserve` would forget; None if it need not, or cannot."""
        return None if self._free or self._num_fresh else self._oldest()

    def forget(self, key: bytes) -> None:
        """Its content is of no use."""
        slot = self._unlist(key)
        if slot in self._holders:
            self._doomed.add(slot)
        else:
            self._free.append(slot)

    def hold(self, slot: int) -> None:
        """A copy reads or writes there: until it has ended, the slot is not used again."""
        self._holders[slot] += 1

    def let_go(self, slot: int) -> None:
        self._holders[slot] -= 1
        if not self._holders[slot]:
            del self._holders[slot]
            if slot in self._doomed:
                self._doomed.remove(slot)
                self._free.append(slot)

    def check(self) -> None:
        """Raise AssertionError if a slot is lost or in two states."""
        listed = [*self._clean.values(), *self._others.values()]
        fresh = range(self.num_slots - self._num_fresh, self.num_slots)
        slots = [*fresh, *self._free, *listed, *self._reserved, *self._doomed]
        assert sorted(slots) == list(range(self.num_slots)), f"{self.name}: a slot is lost"
        assert not self._clean.keys() & self._others.keys(), f"{self.name}: clean and not"
        assert self._doomed <= self._holders.keys(), f"{self.name}: doomed, and nobody reads it"
        busy = {*listed, *self._doomed, *self._reserved}
        assert self._holders.keys() <= busy, f"{self.name}: a copy reads what is free"

    def _oldest(self) -> bytes | None:
        for pages in (self._clean, self._others):
            for key, slot in pages.items():
                if slot not in self._holders:
                    return key
        return None

    def _unlist(self, key: bytes) -> int:
        return (self._clean if key in self._clean else self._others).pop(key)


class Kept:
    """Pages that the lowest tier shall have and has not yet, the latest first wish last: one that
    is repeated keeps its place, or what is wanted all the time would never have its turn. A wish
    beyond `MOST_KEPT` takes the place of the oldest."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def add(self, key: bytes) -> None:
        self._keys.setdefault(key)
        if len(self._keys) > MOST_KEPT:
            self._keys.popitem(last=False)

    def remove(self, key: bytes) -> None:
        del self._keys[key]

    def first(self, count: int) -> list[bytes]:
        return list(islice(self._keys, count))
