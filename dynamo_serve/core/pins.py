"""Prefixes that stay: their pages are held until a time, or until they are given up, whatever
others need. A pin counts from when it is asked for: so there is room for it once it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple, TypeVar

from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.prefix_index import SHARED_SALT
from dynamo_serve.core.request import Request
from dynamo_serve.core.sequence import Sequence as Seq
from dynamo_serve.core.shares import Shares

T = TypeVar("T")
REMEDY = "wait until one ends, DELETE one, or pin a shorter prefix"


class Pinning(NamedTuple):
    """Pages that may be pinned: so many in `common`, beyond what tenants were guaranteed, and
    so many at `most`. Those that are left have to be enough for the longest request there may be:
    it could wait for ever for pages that nobody gives back."""

    common: int = 0
    most: int = 0

    @classmethod
    def of(cls, num_pages: int, longest: int, fraction: float) -> Pinning:
        """For a pool where the longest request takes so many pages."""
        return cls(int(num_pages * fraction), max(0, num_pages - longest))


NOTHING = Pinning()


class Shortage(NamedTuple):
    """Why a prefix cannot be pinned, and until when: `inf` for one that never could."""

    text: str
    limit: int
    until: float


@dataclass(slots=True, eq=False)
class Pinned:
    """One pinned prefix; without pages it is still to be computed. What it holds is charged to its
    tenant, as if it were a sequence."""

    request: Request
    keys: list[bytes]
    page_table: list[int] = field(default_factory=list)
    page_part: float = 0.0
    page_seconds: float = 0.0
    num_hits: int = 0
    last_hit: float | None = None

    @property
    def until(self) -> float:
        return self.request.pinned_until or 0.0


class Pins:
    """All of them, by the id of the request that computes each."""

    def __init__(self, pool: PagePool, shares: Shares, rules: Pinning) -> None:
        self.pool = pool
        self.shares = shares
        self.rules = rules
        self.by_id: dict[str, Pinned] = {}
        self.pages: Counter[int] = Counter()  # with how many pins hold each
        self._keys: dict[str, Counter[bytes]] = {}  # by tenant: pages pinned, and to be pinned
        self._pages: dict[str, Counter[int]] = {}  # by tenant: pages pinned
        self._ends: dict[bytes, list[Pinned]] = {}  # by the key of the last page
        self._next_end = inf

    def pages_of(self, tenant: str) -> Collection[int]:
        """The pages that a tenant's pins hold."""
        return self._pages.get(tenant, {}).keys()

    def count(self, page_table: Iterable[int]) -> int:
        """How many pages of a table stay when nobody else holds them."""
        return sum(page_id in self.pages for page_id in page_table) if self.pages else 0

    def claim(self, request: Request, now: float) -> Shortage | None:
        """Count the pages of a prefix that is going to be computed, or say why they are too many.
        Pages that the tenant has pinned already do not count again."""
        assert request.pinned_until is not None, f"{request.id} is not to be pinned"
        self.expire(now)
        keys: list[bytes] = []
        self.pool.extend_keys(keys, request.prompt_ids, request.salt, len(request.prompt_ids))
        assert keys, "the edge lets nothing shorter than a page through"
        if request.id in self.by_id:  # it goes on after it was taken from this engine
            return None
        shortage = self._shortage(request.tenant, keys)
        if shortage is None:
            self.by_id[request.id] = Pinned(request, keys)
            self._keys.setdefault(request.tenant, Counter()).update(keys)
            self._next_end = min(self._next_end, request.pinned_until)
        return shortage

    def _shortage(self, tenant: str, keys: Sequence[bytes]) -> Shortage | None:
        """What its own quota, what all may have in common, or the size of the pool forbids."""
        own, num_pages = len({*self._keys.get(tenant, ()), *keys}), self.pool.num_pages
        tenants = self.shares.tenancy.tenants
        quota = self.shares.account(tenant).tenant.quota
        burst = num_pages if quota.pages_burst is None else quota.pages_burst
        if own > burst:
            text = f"the tenant would pin {own} KV pages, its quota.pages_burst is {burst}"
            return self._short(text, burst, keys, [tenant])
        held = {name: len(pinned) for name, pinned in self._keys.items()} | {tenant: own}
        guarantees = {name: t.quota.pages_guaranteed for name, t in tenants.items()}
        guarantees[tenant] = quota.pages_guaranteed
        common = max(0, min(self.rules.common, num_pages - sum(guarantees.values())))
        over = sum(max(0, n - guarantees.get(name, 0)) for name, n in held.items())
        if own > quota.pages_guaranteed and over > common:
            text = (
                f"{over} KV pages would be pinned beyond quota.pages_guaranteed, by all tenants "
                f"together; cache.pinned_fraction and guarantees leave {common} for that"
            )
            return self._short(text, common + quota.pages_guaranteed, keys, held)
        if sum(held.values()) > self.rules.most:
            text = (
                f"{sum(held.values())} of {num_pages} KV pages would be pinned, and no more than "
                f"{self.rules.most} may be: the longest request needs the others (cache.num_pages)"
            )
            return self._short(text, self.rules.most, keys, held)
        return None

    def _short(
        self, text: str, limit: int, keys: Sequence[bytes], names: Collection[str]
    ) -> Shortage:
        ends = (p.until for p in self.by_id.values() if p.request.tenant in names)
        until = min(ends, default=inf) if len(keys) <= limit else inf
        help = REMEDY if until < inf else f"{REMEDY}; waiting does not help"
        return Shortage(f"{text}: {help}", limit, until)

    def settle(self, seq: Seq, *, is_computed: bool) -> list[bytes]:
        """A request ends: if it is that of a pin, its pages are held from now on, if they are all
        there. Their keys, for the tier that outlives an engine."""
        pinned = self.by_id.get(seq.id)
        if pinned is None or pinned.page_table:
            return []  # nobody's, given up meanwhile, or computed before
        if not is_computed:
            self.release(seq.id)
            return []
        own = self._pages.setdefault(seq.request.tenant, Counter())
        for key, page_id in zip(pinned.keys, seq.page_table, strict=False):
            self.pool.seal(page_id, key)  # of two equal pages one may have been evicted since
            pinned.page_table.append(self.pool.index.pages[key])
        for page_id in pinned.page_table:
            self.pool.hold(page_id)
        self.pages.update(pinned.page_table)
        own.update(pinned.page_table)
        pinned.page_part = self.pool.part_of(pinned.page_table)
        self._ends.setdefault(pinned.keys[-1], []).append(pinned)
        return pinned.keys

    def release(self, id: str) -> None:
        """Give a pin up; once more is no error."""
        pinned = self.by_id.pop(id, None)
        if pinned is None:
            return
        name, table = pinned.request.tenant, pinned.page_table
        _subtract(self._keys[name], pinned.keys)
        if table:
            _subtract(self.pages, table)
            _subtract(self._pages[name], table)
            self._ends[pinned.keys[-1]].remove(pinned)
            if not self._ends[pinned.keys[-1]]:
                del self._ends[pinned.keys[-1]]
        self.pool.release(table)

    def expire(self, now: float) -> None:
        """Give up every pin whose time is over."""
        if now < self._next_end:
            return
        for id in [id for id, pinned in self.by_id.items() if pinned.until <= now]:
            self.release(id)
        self._next_end = min((pinned.until for pinned in self.by_id.values()), default=inf)

    def hit(self, seq: Seq, keys: Sequence[bytes], now: float) -> None:
        """A sequence begins with the pages of its table; whose prefix it has found whole."""
        if not self._ends or seq.request.pinned_until is not None:
            return
        # Who pins what all share is not told by it when others use that.
        salts = (seq.request.salt, SHARED_SALT)
        for key in keys[: seq.num_sealed]:
            for pinned in self._ends.get(key, ()):
                if pinned.request.salt in salts:
                    pinned.num_hits += 1
                    pinned.last_hit = now

    def divide(self) -> None:
        """Look again at who shares the pages."""
        for pinned in self.by_id.values():
            pinned.page_part = self.pool.part_of(pinned.page_table)

    def take_stock(self) -> None:
        """Add what is pinned to what the accounts say of running sequences."""
        for pinned in self.by_id.values():
            self.shares.account(pinned.request.tenant).pages += pinned.page_part

    def check(self) -> None:
        """Raise AssertionError if the books do not agree with the pins."""
        pages: Counter[int] = Counter()
        for id, pinned in self.by_id.items():
            assert id == pinned.request.id
            assert len(pinned.page_table) in (0, len(pinned.keys)), f"{id} is pinned in part"
            for key, page_id in zip(pinned.keys, pinned.page_table, strict=False):
                assert self.pool.index.pages.get(key) == page_id, f"{id}: not found where it is"
            pages.update(pinned.page_table)
        assert pages == self.pages, "pinned pages are counted wrongly"
        assert sum(map(Counter.total, self._pages.values())) == pages.total(), "by tenant"
        keys = sum(len(pinned.keys) for pinned in self.by_id.values())
        assert sum(map(Counter.total, self._keys.values())) == keys, "claims are counted wrongly"


def _subtract(counter: Counter[T], items: Iterable[T]) -> None:
    """Without leaving zeros."""
    for item in items:
        counter[item] -= 1
        if not counter[item]:
            del counter[item]
