"""What becomes of pages, told to whoever routes requests: stored, removed, or all to be forgotten.

Told are the pages that a request could use: those with every page before them in some tier. So
whoever follows never hears of a page before its parent, and holds none that nobody can reach.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple


class Stored(NamedTuple):
    """A tier has a page now; `parent` is the key of the page before it, None for a first one."""

    key: bytes
    parent: bytes | None
    token_ids: array[int]
    tier: int


class Removed(NamedTuple):
    """A tier has a page no more."""

    key: bytes
    tier: int


class Cleared(NamedTuple):
    """Forget every page: those that there are follow."""


Event = Stored | Removed | Cleared


class Page(NamedTuple):
    """A page as it was told; as in `Node`."""

    parent: bytes | None
    token_ids: array[int]
    told: int


@dataclass(slots=True)
class Node:
    """A page that is in some tier; `told`: the tiers that were told of, one bit for each."""

    parent: bytes | None
    token_ids: array[int]
    told: int = 0


class PageEvents:
    """Compares where pages are (`levels`: the pool and the tiers below it, by number) with what was
    told.

    The loop writes to it and a publisher takes from it, in another thread. If that does not keep up
    and more than `max_events` wait, they are dropped, and it begins anew: all is `Cleared`, and
    every page is told again, parents first.
    """

    def __init__(
        self, levels: Mapping[int, Container[bytes]], page_size: int, max_events: int = 10_000
    ) -> None:
        self.num_events = 0  # told
        self.num_anew = 0
        self.max_events = max_events
        self._levels = levels
        self._page_size = page_size
        self._nodes: dict[bytes, Node] = {}
        self._children: defaultdict[bytes, set[bytes]] = defaultdict(set)
        self._waiting: list[Event] = []
        self._begins_anew = True  # whoever was told by an earlier engine shall forget that
        self._lock = Lock()

    # ── the loop's side ──────────────────────────────────────────────────────

    def sealed(
        self, keys: Sequence[bytes], token_ids: Sequence[int], places: Iterable[int]
    ) -> None:
        """The pages at these places of a chain have been published, or equal ones were before."""
        size = self._page_size
        with self._lock:
            for i in places:
                key = keys[i]
                if key not in self._nodes:
                    parent = keys[i - 1] if i else None
                    tokens = array("q", token_ids[i * size : (i + 1) * size])
                    self._nodes[key] = Node(parent, tokens)
                    if parent is not None:
                        self._children[parent].add(key)
                self._look(key)

    def changed(self, key: bytes) -> None:
        """A tier has a page now, or has lost it. Of one that was never sealed, such as what an
        earlier engine left on disk, nobody knows the tokens: it is told when they are."""
        with self._lock:
            self._look(key)

    def _look(self, key: bytes) -> None:
        todo = [key]
        while todo:
            key = todo.pop()
            node = self._nodes.get(key)
            if node is None:
                continue
            places = self._places(key)
            before, node.told = node.told, places if self._is_reachable(node) else 0
            if before != node.told:
                for tier in tiers_of(before ^ node.told):
                    self._tell(key, node, tier)
            if not places:
                self._forget(key, node)
            if bool(before) != bool(node.told):  # so it is with everything behind it
                todo += self._children.get(key, ())

    def _places(self, key: bytes) -> int:
        places = 0
        for tier, level in self._levels.items():
            if key in level:
                places |= 1 << tier
        return places

    def _is_reachable(self, node: Node) -> bool:
        if node.parent is None:
            return True
        parent = self._nodes.get(node.parent)
        return parent is not None and parent.told != 0

    def _tell(self, key: bytes, node: Node, tier: int) -> None:
        if len(self._waiting) >= self.max_events:
            self._begins_anew = True
        if self._begins_anew:  # all of it will be told
            self._waiting.clear()
            return
        is_stored = node.told & 1 << tier
        self._waiting.append(
            Stored(key, node.parent, node.token_ids, tier) if is_stored else Removed(key, tier)
        )

    def _forget(self, key: bytes, node: Node) -> None:
        del self._nodes[key]
        if node.parent is not None:
            siblings = self._children[node.parent]
            siblings.remove(key)
            if not siblings:
                del self._children[node.parent]

    # ── the publisher's side ─────────────────────────────────────────────────

    @property
    def begins_anew(self) -> bool:
        """Whether what was taken and not told yet need not be told any more."""
        return self._begins_anew

    def begin_anew(self) -> None:
        """Somebody has missed something, or just come."""
        with self._lock:
            self._begins_anew = True

    def take(self) -> list[Event]:
        """What is to be told, in order; asking twice gives nothing."""
        with self._lock:
            events, self._waiting = self._waiting, []
            begins_anew, self._begins_anew = self._begins_anew, False
            there: dict[bytes, Page] = {}
            if begins_anew:  # put in order later: the loop waits meanwhile
                nodes = self._nodes.items()
                there = {k: Page(n.parent, n.token_ids, n.told) for k, n in nodes if n.told}
        if begins_anew:
            self.num_anew += 1
            events = [Cleared(), *parents_first(there)]
        self.num_events += len(events)
        return events

    def check(self) -> None:
        """Raise AssertionError if what was told is not what is there."""
        with self._lock:
            for key, node in self._nodes.items():
                places = self._places(key)
                assert places, "a page is known and nowhere"
                told = places if self._is_reachable(node) else 0
                assert node.told == told, "what was told of a page is not so"
            children = {(n.parent, key) for key, n in self._nodes.items() if n.parent is not None}
            assert children == {(p, c) for p, found in self._children.items() for c in found}


def parents_first(pages: Mapping[bytes, Page]) -> Iterator[Stored]:
    """Every page in every tier, each behind its parent, which has to be among them."""
    seen: set[bytes] = set()
    for last in pages:
        chain: list[bytes] = []
        key: bytes | None = last
        while key is not None and key not in seen:
            seen.add(key)
            chain.append(key)
            key = pages[key].parent
        for key in reversed(chain):
            parent, token_ids, told = pages[key]
            yield from (Stored(key, parent, token_ids, tier) for tier in tiers_of(told))


def tiers_of(bits: int) -> list[int]:
    return [tier for tier in range(bits.bit_length()) if bits >> tier & 1]
