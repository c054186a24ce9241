"""Which cached page goes when room is needed: first whose it is, then which of them.

Room is lent, not given: a tenant alone may fill the pool. When somebody needs a page, the tenant
loses one whose pages are furthest above what it was guaranteed, measured by its weight. So a flood
of prompts that nobody sends twice costs whoever sends it, and in the end all have what their
weights say. Pages that nobody has used for long go before that, whosesoever they are.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from math import ceil, inf

from dynamo_serve.core.prefix_index import SHARED_SALT
from dynamo_serve.core.ranking import Ranking
from dynamo_serve.core.tenant import Tenant

Who = tuple[str, str]
"""A salt, and a tenant that has it."""

ANYBODY: Who = ("", "")
ALL: Who = (SHARED_SALT, "(shared)")  # of pages that all tenants have in common
LAST = 1e12  # pages, of a guarantee that nobody reaches
GRAIN = 128  # of a pool; so exact are shares, or not every page would be worth looking whose it is


class Cause(Enum):
    """Why a page was evicted: for a page of its owner, of another one, or (several have pages, and)
    nobody had used it for long."""

    OWN = "own"
    OTHERS = "others"
    STALE = "stale"


@dataclass(slots=True, eq=False)
class Owner:
    """Tenants whose prompts have one salt (mostly one tenant), and their cached pages: a page that
    builds on another one has the same owner. Lists are ordered, next to be evicted first; a dict
    would pass over every page gone before."""

    number: int
    tenants: set[str] = field(default_factory=set)
    weight: float = 1.0
    guaranteed: float = 0.0
    held: int = 0  # pages, used and cached
    dirty: OrderedDict[int, None] = field(default_factory=OrderedDict)
    clean: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def loses_at(self) -> float:
        """How far it is above its share; who is highest loses a page."""
        if self.clean or self.dirty:
            return (self.held - self.guaranteed) / self.weight
        return -inf

    def hurt_at(self) -> float:
        """The same once its clean pages are gone: who is highest is the first to lose a page that
        no tier below has."""
        if self.dirty:
            return (self.held - len(self.clean) - self.guaranteed) / self.weight
        return -inf


class Cached:
    """The pages that nobody holds and that can be found. Costs the same for one owner and for a
    thousand, but for the logarithm."""

    def __init__(self, num_pages: int, stale_seconds: float = inf) -> None:
        self.stale_seconds = stale_seconds
        self.now = 0.0  # whoever plans steps says so
        self.num = 0
        self.is_clean = bytearray(num_pages)  # of used ones, too
        self.evicted = dict.fromkeys(Cause, 0)
        self.used_at = [0.0] * num_pages
        self._tenant: Callable[[str], Tenant] = Tenant
        self._owners: list[Owner] = []
        self._by_salt: dict[str, Owner] = {}
        self._by_tenant: dict[str, Owner] = {}
        self._owner_of: list[Owner | None] = [None] * num_pages  # of all that are not blank
        self._changed: set[Owner] = set()  # may have risen since that ranking was read
        self._changed_hurt: set[Owner] = set()
        self._losing = Ranking(Owner.loses_at)
        self._hurt = Ranking(Owner.hurt_at)
        self._begun: set[Owner] = set()  # the same for those of ages
        self._oldest: Ranking[Owner] = Ranking(
            lambda owner: -min(self._age(owner.dirty), self._age(owner.clean))
        )
        self._oldest_dirty: Ranking[Owner] = Ranking(lambda owner: -self._age(owner.dirty))

    # ── whose ────────────────────────────────────────────────────────────────

    def owner(self, who: Who) -> Owner:
        salt, tenant = who
        owner = self._by_salt.get(salt)
        if owner is None:
            owner = self._by_tenant.get(tenant)
            if owner is None:
                owner = self._by_tenant[tenant] = Owner(len(self._owners))
                self._owners.append(owner)
            self._by_salt[salt] = owner
        if tenant not in owner.tenants:
            owner.tenants.add(tenant)
            self._weigh(owner)
        return owner

    def configure(self, tenant: Callable[[str], Tenant]) -> None:
        """Other weights and guarantees from now on."""
        self._tenant = tenant
        for owner in self._owners:
            self._weigh(owner)

    def _weigh(self, owner: Owner) -> None:
        tenants = [self._tenant(name) for name in owner.tenants]
        owner.weight = sum(tenant.weight for tenant in tenants)
        owner.guaranteed = sum(tenant.quota.pages_guaranteed for tenant in tenants)
        if ALL[1] in owner.tenants:  # tails of all tenants build on its pages
            owner.guaranteed = LAST
        self._changed.add(owner)

    # ── used, cached, blank ──────────────────────────────────────────────────

    def take(self, page_ids: Iterable[int], owner: Owner) -> None:
        """Blank pages are somebody's from now on, and used."""
        for page_id in page_ids:
            self._owner_of[page_id] = owner
            owner.held += 1
        self._changed.add(owner)

    def share(self, page_id: int) -> None:
        """A used page is everybody's from now on."""
        before, owner = self._owner_of[page_id], self.owner(ALL)
        assert before is not None, f"page {page_id} is nobody's"
        before.held -= 1
        self.take((page_id,), owner)

    def give_back(self, page_id: int) -> None:
        """A used page is blank again."""
        owner = self._owner_of[page_id]
        assert owner is not None, f"page {page_id} is nobody's"
        owner.held -= 1
        self._owner_of[page_id] = None

    def add(self, page_ids: Sequence[int]) -> None:
        """Nobody holds these used pages any more."""
        owner_of, is_clean, last = self._owner_of, self.is_clean, None
        for page_id in page_ids:
            owner = owner_of[page_id]
            assert owner is not None, f"page {page_id} is nobody's"
            pages = owner.clean if is_clean[page_id] else owner.dirty
            if not pages:
                self._begun.add(owner)
            pages[page_id] = None
            if owner is not last:
                self._changed.add(owner)
                last = owner
        self.num += len(page_ids)

    def remove(self, page_ids: Sequence[int]) -> None:
        """These cached pages are used again."""
        owner_of, is_clean = self._owner_of, self.is_clean
        for page_id in page_ids:
            owner = owner_of[page_id]
            assert owner is not None, f"page {page_id} is nobody's"
            if is_clean[page_id]:
                del owner.clean[page_id]
                self._changed_hurt.add(owner)
            else:
                del owner.dirty[page_id]
        self.num -= len(page_ids)

    def wash(self, page_id: int, *, is_used: bool) -> None:
        """A page is clean now."""
        cached = () if is_used else (page_id,)
        self.remove(cached)
        self.is_clean[page_id] = 1
        self.add(cached)

    def soil(self, page_id: int, *, is_used: bool) -> None:
        """A page is dirty now; a cached one is the next of these to go."""
        cached = () if is_used else (page_id,)
        self.remove(cached)
        self.is_clean[page_id] = 0
        self.add(cached)
        if is_used:
            return
        owner = self._owner_of[page_id]
        assert owner is not None
        owner.dirty.move_to_end(page_id, last=False)
        self._begun.add(owner)

    # ── who goes ─────────────────────────────────────────────────────────────

    def evict(self, count: int, presser: Owner) -> list[int]:
        """Of the cached pages, there are so many, those that go for pages of `presser`. Of one
        owner clean pages go before others, and each kind in the order of their last use."""
        gone: list[int] = []
        presser.held += count  # in the comparison he has them already
        self._changed.add(presser)
        while len(gone) < count:
            left = count - len(gone)
            owner = self._stale(self._oldest)
            if owner is not None:
                pages = owner.clean if self._is_old(owner.clean) else owner.dirty
                left, cause = 1, Cause.STALE
            else:
                owner, most = self._loser()
                pages, left = owner.clean or owner.dirty, min(left, most)
                cause = Cause.OWN if owner is presser else Cause.OTHERS
            some = list(islice(pages, left))
            for page_id in some:
                del pages[page_id]
                self._owner_of[page_id] = None
            owner.held -= len(some)
            self.evicted[cause] += len(some)
            gone += some
        presser.held -= count
        self.num -= count
        return gone

    def _loser(self) -> tuple[Owner, int]:
        """Who loses a page, and how many of his before somebody else may have to."""
        self._list_changed()
        loser = self._losing.top()
        assert loser is not None, "nothing is cached"
        over = loser.held - loser.guaranteed - self._losing.second() * loser.weight
        some = min(len(self.used_at) // GRAIN, loser.held // 4)
        return loser, max(1, some, ceil(min(over, loser.held)))

    def _list_changed(self) -> None:
        """Each change is looked at once, whichever ranking is read: steps read `_hurt` only."""
        for owner in self._changed:
            self._losing.rose(owner)
        self._changed_hurt |= self._changed
        self._changed.clear()

    def dirty_by_loss(self) -> Iterable[int]:
        """The dirty pages of the owner who is the first to lose one, in the order of their loss."""
        owner = self._hurt_first()
        return owner.dirty if owner else ()

    def part_ready(self, num_blank: int) -> float:
        """How much of what that owner has, and of what is blank, can be had without a loss."""
        owner = self._hurt_first()
        return (num_blank + len(owner.clean)) / (num_blank + owner.held) if owner else 1.0

    def _hurt_first(self) -> Owner | None:
        owner = self._stale(self._oldest_dirty)
        if owner is None:
            self._list_changed()
            for owner in self._changed_hurt:
                self._hurt.rose(owner)
            self._changed_hurt.clear()
            owner = self._hurt.top()
        return owner

    def _stale(self, ages: Ranking[Owner]) -> Owner | None:
        """Whose oldest page nobody has used for so long that it goes first; nobody's while there
        is one owner: that is an order by last use anyway, but for clean pages."""
        if len(self._owners) == 1:
            return None
        for owner in self._begun:
            self._oldest.rose(owner)
            self._oldest_dirty.rose(owner)
        self._begun.clear()
        return ages.top(above=self.stale_seconds - self.now)

    def _age(self, pages: OrderedDict[int, None]) -> float:
        """When the first of some pages was used last."""
        return self.used_at[next(iter(pages))] if pages else inf

    def _is_old(self, pages: OrderedDict[int, None]) -> bool:
        return self._age(pages) < self.now - self.stale_seconds

    def check(self, blank: Container[int]) -> set[int]:
        """Raise AssertionError if the books do not balance; the cached pages."""
        held = Counter(owner for owner in self._owner_of if owner is not None)
        listed: set[int] = set()
        for owner in self._owners:
            assert owner.held == held[owner], f"an owner holds {held[owner]}, not {owner.held}"
            assert owner in self._changed or self._losing.knows(owner), "it rose untold"
            told = owner in self._changed or owner in self._changed_hurt
            assert told or self._hurt.knows(owner), "its dirty pages rose untold"
            for clean, pages in enumerate((owner.dirty, owner.clean)):
                for page_id in pages:
                    assert page_id not in listed, f"page {page_id}: in two lists"
                    assert self._owner_of[page_id] is owner, f"page {page_id}: whose is it?"
                    assert self.is_clean[page_id] == clean, f"page {page_id}: wrong list"
                listed.update(pages)
        for page_id, of in enumerate(self._owner_of):
            assert (of is None) == (page_id in blank), f"page {page_id}: lost, or owned and blank"
        assert self.num == len(listed), "cached pages are counted wrongly"
        return listed
