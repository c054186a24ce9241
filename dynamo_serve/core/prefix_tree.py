"""What is in stored pages and how their chains branch, who used them, and what became of others.

Told to people who ask why a prompt was not found; nothing is decided by it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from struct import Struct
from typing import NamedTuple

from dynamo_serve.core.prefix_index import APART, NOTHING, page_key, parent_of, plain_salt

MOST_LOST = 65_536  # pages that are stored nowhere any more, and still remembered
MOST_BRANCHES = 1024  # looked at, the latest first, for the one that is most like a prompt
MOST_ALIKE = 32  # looked at for one that begins as a prompt goes on
TOKEN = "I"
TOKEN_BYTES = array(TOKEN).itemsize


@dataclass(slots=True, eq=False)
class Node:
    """A page that is stored somewhere. `hits` and `hit_at` are of requests that found a head which
    ends with it; they found those before it, too. `tenants` used it or a page after it. `plain` is
    the key that it would have if its tenant set none of its requests apart."""

    key: bytes
    plain: bytes
    parent: bytes
    depth: int  # pages before it
    token_ids: bytes  # an array would take as much again
    tenants: frozenset[str]
    born: float
    hits: int = 0
    hit_at: float | None = None

    @property
    def tokens(self) -> list[int]:
        return array(TOKEN, self.token_ids).tolist()


class Lost(NamedTuple):
    """When a page was forgotten, for whose pages (nobody's: it was damaged), and who used it."""

    at: float
    pressed_by: frozenset[str]
    tenants: frozenset[str]


class Chain(NamedTuple):
    """Who has the pages of `keys`, and what is in them: `token_ids`, or more than that."""

    tenant: str
    salt: str
    keys: Sequence[bytes]
    token_ids: Sequence[int]


class PrefixTree:
    """Has a node for every stored page that a request made or found; none for what was found on
    disk at the start and nobody has asked for since. Its memory is bounded by what is stored."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.shared: Container[bytes] = NOTHING  # as in `PrefixIndex`
        self._pack = Struct(f"{page_size}{TOKEN}").pack
        self.nodes: dict[bytes, Node] = {}  # the latest used last
        self.lost: OrderedDict[bytes, Lost] = OrderedDict()
        self.salted: dict[bytes, dict[bytes, None]] = {}  # what requests set apart, by its `plain`
        self._children: dict[bytes, dict[bytes, None]] = {}
        # The same, by their tokens, where that has been of use: most pages have one after them.
        self._sorted: dict[bytes, list[Node]] = {}
        self._going: list[Node] = []  # forgotten, and nobody has been blamed for it yet
        self._alone: dict[str, frozenset[str]] = {}  # one set for each tenant, not for each page

    def learn(self, chain: Chain, places: Iterable[int], now: float) -> None:
        """Pages of a chain, the first ones first, are stored or used."""
        nodes, keys, tenant = self.nodes, chain.keys, chain.tenant
        for place in places:
            node = nodes.get(keys[place])
            if node is None:
                self._add(chain, place, now)
            elif tenant not in node.tenants:
                self._mark(node, tenant)

    def found(self, chain: Chain, now: float) -> None:
        """A request has found all pages of a chain. Costs no more for a long one."""
        known = len(chain.keys)
        while known and chain.keys[known - 1] not in self.nodes:
            known -= 1
        self.learn(chain, range(max(0, known - 1), len(chain.keys)), now)
        node = self.nodes.pop(chain.keys[-1])
        node.hits += 1
        node.hit_at = now
        self.nodes[node.key] = node

    def lose(self, key: bytes) -> None:
        """A page is stored nowhere any more; `blame` says for whom."""
        node = self.nodes.pop(key, None)
        if node is None:
            return
        if node.plain != key:
            del self.salted[node.plain][key]
            if not self.salted[node.plain]:
                del self.salted[node.plain]
        siblings, by_tokens = self._children[node.parent], self._sorted.get(node.parent)
        del siblings[key]
        if by_tokens:
            del by_tokens[bisect_left(by_tokens, node.token_ids, key=_TOKEN_IDS)]
        if not siblings:
            del self._children[node.parent]
            self._sorted.pop(node.parent, None)
        parent = self.nodes.get(node.parent)
        if parent and node.hits:
            parent.hits += node.hits
            parent.hit_at = max(filter(None, (parent.hit_at, node.hit_at)))
        self._going.append(node)

    def blame(self, tenants: frozenset[str], now: float) -> None:
        """What has been lost since the last time was lost to pages of these."""
        for node in self._going:
            self.lost[node.key] = Lost(now, tenants, node.tenants)
        self._going.clear()
        while len(self.lost) > MOST_LOST:
            self.lost.popitem(last=False)

    def lose_to(self, key: bytes, now: float) -> None:
        """`blame` those who used the page that takes the place of what has been lost."""
        node = self.nodes.get(key)
        self.blame(node.tenants if node else frozenset(), now)

    def parent(self, chain: Chain, place: int) -> bytes:
        """The page before the one at a place, whose children are all of one salt: after a shared
        head it is none that is stored."""
        return parent_of(chain.keys, place, chain.salt, self.shared)

    def plain_parent(self, chain: Chain, place: int) -> bytes:
        """The page before the one at a place if the chain were not set apart."""
        before = self.nodes.get(chain.keys[place - 1]) if place else None
        if before is None or before.key in self.shared:
            return parent_of(chain.keys, place, plain_salt(chain.salt), self.shared)
        return before.plain

    def alone(self, tenant: str) -> frozenset[str]:
        alone = self._alone.get(tenant)
        if alone is None:
            alone = self._alone[tenant] = frozenset((tenant,))
        return alone

    def alike(self, parent: bytes, tokens: Sequence[int], least: int) -> Iterator[tuple[Node, int]]:
        """Pages after `parent` that begin with at least so many of `tokens`, those with most of
        them first, and how many each has; not all of them where there are many."""
        nodes = self._sorted.get(parent)
        if nodes is None:
            children = self._children.get(parent)
            if not children:
                return
            nodes = sorted((self.nodes[key] for key in children), key=_TOKEN_IDS)
            self._sorted[parent] = nodes
        wanted = array(TOKEN, tokens).tobytes()
        # In this order whatever begins alike is in one place: the more alike, the nearer.
        right = bisect_left(nodes, wanted, key=_TOKEN_IDS)
        left = right - 1
        before, after = _same(nodes, left, wanted), _same(nodes, right, wanted)
        for _ in range(MOST_ALIKE):
            if max(before, after) < least:
                return
            if before > after:
                yield nodes[left], before
                left -= 1
                before = _same(nodes, left, wanted)
            else:
                yield nodes[right], after
                right += 1
                after = _same(nodes, right, wanted)

    # ── for who asks ─────────────────────────────────────────────────────────

    def branch(self, parent: bytes, tokens: Sequence[int], tenant: str) -> tuple[Node | None, int]:
        """Of the pages after `parent` that a tenant used the one that begins most like `tokens`,
        and how many of these it has; of equal ones the latest."""
        alike = self.alike(parent, tokens, 1)
        near = next((found for found in alike if tenant in found[0].tenants), None)
        best, most = None, -1
        for node in islice(self.children(parent), MOST_BRANCHES):
            if tenant in node.tenants:
                same = _common(node.tokens, tokens)
                if same > most:
                    best, most = node, same
        return near if near and near[1] > most else (best, max(0, most))

    def has_apart(self, plain: bytes, tenant: str) -> bool:
        """Whether a tenant used a page that it has set apart, or not, and that is else this one."""
        alike = (plain, *islice(reversed(self.salted.get(plain, {})), MOST_BRANCHES))
        nodes = (self.nodes.get(key) for key in alike)
        return any(tenant in node.tenants for node in nodes if node is not None)

    def children(self, key: bytes) -> Iterator[Node]:
        """The pages after one, the latest first."""
        return (self.nodes[child] for child in reversed(self._children.get(key, {})))

    def latest(self, most: int) -> dict[bytes, Node]:
        """About so many nodes, the latest used, and all those before them in their chains."""
        chosen: dict[bytes, Node] = {}
        for last in reversed(self.nodes.values()):
            if len(chosen) >= most:
                break
            node: Node | None = last
            while node is not None and node.key not in chosen:
                chosen[node.key] = node
                node = self.nodes.get(node.parent)
        return chosen

    def check(self, places: Sequence[Container[object]]) -> None:
        """Raise AssertionError unless every node is in one of `places`, and listed once."""
        assert self._sorted.keys() <= self._children.keys(), "in order, and not there"
        count = 0
        for parent, keys in self._children.items():
            if by_tokens := self._sorted.get(parent):
                assert sorted(keys) == sorted(node.key for node in by_tokens), "not the same"
                assert by_tokens == sorted(by_tokens, key=_TOKEN_IDS), "not in order"
            count += len(keys)
            for key in keys:
                assert self.nodes[key].parent == parent, "a page is listed after another one"
        assert count == len(self.nodes), "a page is not listed after the one before it"
        apart = {key: node.plain for key, node in self.nodes.items() if node.plain != key}
        assert apart == {key: plain for plain, keys in self.salted.items() for key in keys}, "apart"
        for key in self.nodes:
            assert any(key in place for place in places), "a page is known and not stored"
        assert not self.lost.keys() & self.nodes.keys(), "a page is stored and forgotten"

    def _add(self, chain: Chain, place: int, now: float) -> None:
        key, parent, size = chain.keys[place], self.parent(chain, place), self.page_size
        ids = chain.token_ids[place * size : (place + 1) * size]
        plain = key
        if APART in chain.salt:
            plain = page_key(self.plain_parent(chain, place), ids)
        if plain != key:  # not one that is shared, nor after one that nobody knows
            self.salted.setdefault(plain, {})[key] = None
        owners = self.alone(chain.tenant)
        self.nodes[key] = Node(key, plain, parent, place, self._pack(*ids), owners, now)
        self._children.setdefault(parent, {})[key] = None
        if (by_tokens := self._sorted.get(parent)) is not None:
            insort(by_tokens, self.nodes[key], key=_TOKEN_IDS)
        self.lost.pop(key, None)

    def _mark(self, node: Node | None, tenant: str) -> None:
        """A tenant has used it, and so all before it."""
        while node is not None and tenant not in node.tenants:
            node.tenants |= {tenant}
            node = self.nodes.get(node.parent)


_TOKEN_IDS = attrgetter("token_ids")


def _same(nodes: Sequence[Node], place: int, wanted: bytes) -> int:
    """How many tokens the page at a place begins with that are those of `wanted`."""
    if not 0 <= place < len(nodes):
        return 0
    size = len(wanted)
    differs = int.from_bytes(wanted) ^ int.from_bytes(nodes[place].token_ids[:size])
    return (size - (differs.bit_length() + 7) // 8) // TOKEN_BYTES


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with that are the same."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
