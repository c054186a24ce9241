"""Whose cached pages go first, and which of them; page size 4."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, islice
from math import inf

import pytest

from dynamo_serve.core.eviction import Cached, Cause, Owner, Who
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.ranking import Ranking
from dynamo_serve.core.request import Request
from dynamo_serve.core.tenant import Quota, Tenancy, Tenant
from tests.core.traffic import Harness, QuickEngine

A: Who = ("a", "a")
B: Who = ("b", "b")


class Below:
    """A tier that has what it is told it has."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.lost: list[bytes] = []

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def pays(self, keys: object, found: object) -> bool:
        return False

    def evicted(self, key: bytes, *, was_clean: bool) -> None:
        if not was_clean:
            self.lost.append(key)


def keys_of(pool: PagePool, first: int, pages: int, who: Who) -> list[bytes]:
    keys: list[bytes] = []
    tokens = [first + i for i in range(4 * pages)]
    pool.extend_keys(keys, tokens, who[0], len(tokens))
    return keys


def store(
    pool: PagePool, first: int, pages: int, who: Who, live: Sequence[list[int]] = ()
) -> list[bytes]:
    """Run a prompt to its end beside live ones: its pages are cached; their keys."""
    keys = keys_of(pool, first, pages, who)
    table, missing = pool.attach(keys, who)
    assert not missing
    assert pool.grow(table, 4 * pages, who)
    for page_id, key in zip(table, keys, strict=True):
        pool.seal(page_id, key)
    pool.release(table)
    pool.check(live)
    return keys


def found(pool: PagePool, keys: list[bytes]) -> int:
    return len(pool.match(keys))


def pool_of(num_pages: int, *tenants: Tenant, stale: float = inf) -> PagePool:
    pool = PagePool(num_pages, 4, stale_seconds=stale)
    known = {tenant.name: tenant for tenant in tenants}
    pool.cached.configure(lambda name: known.get(name) or Tenant(name))
    return pool


# ── whose ────────────────────────────────────────────────────────────────────


def test_a_flood_costs_whoever_sends_it() -> None:
    pool = pool_of(20)
    head = store(pool, 0, 8, A)
    for i in range(50):
        store(pool, 1000 * i, 5, B)
    assert found(pool, head) == 8
    assert pool.cached.evicted[Cause.OTHERS] == 0 < pool.cached.evicted[Cause.OWN]


def test_a_tenant_alone_may_use_everything_and_gives_it_back_to_others() -> None:
    pool = pool_of(20)
    lent = store(pool, 0, 20, A)
    assert found(pool, lent) == 20
    for i in range(10):
        store(pool, 1000 + 1000 * i, 5, B)
    assert found(pool, lent) == 10
    assert pool.cached.evicted[Cause.OTHERS] == 10


@pytest.mark.parametrize(("weight", "kept"), [(1.0, 10), (3.0, 15), (0.25, 4)])
def test_in_the_end_tenants_have_what_their_weights_say(weight: float, kept: int) -> None:
    pool = pool_of(20, Tenant("a", weight))
    lent = store(pool, 0, 20, A)
    for i in range(20):
        store(pool, 1000 + 1000 * i, 2, B)
    assert found(pool, lent) == kept


def test_pages_in_use_count_as_memory_of_their_tenant() -> None:
    pool = pool_of(20)
    running: list[int] = []
    assert pool.grow(running, 4 * 10, A)
    own, others = store(pool, 0, 4, A, [running]), store(pool, 0, 6, B, [running])
    assert pool.grow(running, 4 * 14, A)
    assert (found(pool, own), found(pool, others)) == (0, 6)


def test_what_was_guaranteed_counts_for_nothing() -> None:
    pool = pool_of(20, Tenant("a", quota=Quota(pages_guaranteed=12)))
    lent = store(pool, 0, 20, A)
    for i in range(20):
        store(pool, 1000 + 1000 * i, 2, B)
    assert found(pool, lent) == 16  # the guarantee, and half of the rest
    running: list[int] = []
    assert pool.grow(running, 4 * 18, B), "but it is not kept from who needs it"


def test_whoever_shares_a_salt_is_one_owner() -> None:
    """A chain has one owner: no page outlives the one it builds on."""
    pool = pool_of(20)
    keys = store(pool, 0, 8, ("s", "a"))
    store(pool, 0, 4, ("s", "b"))  # the head of it
    for i in range(30):
        store(pool, 1000 + 1000 * i, 2, ("s", "b"))
        page_ids = [key in pool for key in keys]
        assert page_ids == sorted(page_ids, reverse=True)
    assert pool.cached.owner(("s", "a")) is pool.cached.owner(("s", "b"))


def test_new_weights_count_at_once() -> None:
    pool = pool_of(20)
    a, b = store(pool, 0, 10, A), store(pool, 0, 10, B)
    pool.cached.configure(lambda name: Tenant(name, 9.0 if name == "a" else 1.0))
    for i in range(20):
        store(pool, 1000 + 1000 * i, 2, ("c", "c"))
    assert found(pool, a) == 10 > found(pool, b)


# ── which ────────────────────────────────────────────────────────────────────


def test_what_nobody_has_used_for_long_goes_first_whosesoever_it_is() -> None:
    pool = pool_of(20, stale=100.0)
    old, kept = store(pool, 0, 4, A), store(pool, 500, 4, A)
    pool.cached.now = 90.0
    store(pool, 500, 4, A)
    pool.cached.now = 101.0
    for i in range(3):
        store(pool, 1000 + 1000 * i, 5, B)
    assert (found(pool, old), found(pool, kept)) == (1, 4)
    assert pool.cached.evicted == {Cause.OWN: 0, Cause.OTHERS: 0, Cause.STALE: 3}
    store(pool, 9000, 5, B)
    assert (found(pool, old), found(pool, kept)) == (0, 4)
    assert pool.cached.evicted[Cause.STALE] == 4 < pool.num_evicted


def test_clean_pages_go_before_others_of_their_owner_only() -> None:
    pool = pool_of(20)
    pool.below = below = Below()
    head = store(pool, 0, 4, A)
    one, other = store(pool, 100, 4, B), store(pool, 200, 4, B)
    below.keys.update([*head, *other])
    for key in below.keys:
        pool.clean(key)
    store(pool, 300, 8, B)
    store(pool, 400, 4, B)
    assert (found(pool, head), found(pool, one)) == (4, 4)
    assert not any(key in pool for key in other)
    assert not below.lost


class OldOrder(Cached):
    """The order before there were owners: of all pages clean ones first, each kind by last use."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.all_dirty: OrderedDict[int, None] = OrderedDict()
        self.all_clean: OrderedDict[int, None] = OrderedDict()

    def add(self, page_ids: Sequence[int]) -> None:
        super().add(page_ids)
        for page_id in page_ids:
            (self.all_clean if self.is_clean[page_id] else self.all_dirty)[page_id] = None

    def remove(self, page_ids: Sequence[int]) -> None:
        super().remove(page_ids)
        for page_id in page_ids:
            del (self.all_clean if self.is_clean[page_id] else self.all_dirty)[page_id]

    def soil(self, page_id: int, *, is_used: bool) -> None:
        super().soil(page_id, is_used=is_used)
        if not is_used:
            self.all_dirty.move_to_end(page_id, last=False)

    def oldest(self, count: int) -> list[int]:
        return list(islice(chain(self.all_clean, self.all_dirty), count))

    def evict(self, count: int, presser: Owner) -> list[int]:
        gone = self.oldest(count)
        self.remove(gone)
        for page_id in gone:
            self.give_back(page_id)
        return gone


class Compared(OldOrder):
    """The new order, which has to be the old one."""

    def evict(self, count: int, presser: Owner) -> list[int]:
        foreseen = self.oldest(count)
        assert Cached.evict(self, count, presser) == foreseen
        for page_id in foreseen:
            del (self.all_clean if self.is_clean[page_id] else self.all_dirty)[page_id]
        return foreseen


def random_play(rng: random.Random, pool: PagePool, below: Below, whose: list[Who]) -> None:
    """Prompts with common heads come and end, some pages of theirs go down, some are lost there."""
    live: list[list[int]] = []
    for _ in range(400):
        pool.cached.now += rng.choice([0.0, 1.0, 20.0])
        who, pages = rng.choice(whose), rng.randint(1, 6)
        keys = keys_of(pool, 100 * rng.randrange(8), pages, who)
        if pool.has_room(keys, 4 * pages, 0):
            table, _ = pool.attach(keys, who)
            assert pool.grow(table, 4 * pages, who)
            for page_id, key in zip(table, keys, strict=True):
                pool.seal(page_id, key)
            live.append(table)
        while live and rng.random() < 0.6:
            pool.release(live.pop(rng.randrange(len(live))))
        for key in rng.sample(sorted(pool.index.pages), len(pool.index.pages) // 8):
            if key in below.keys:
                below.keys.discard(key)
                pool.soil(key)
            else:
                below.keys.add(key)
                pool.clean(key)
        pool.check(live)
    for table in live:
        pool.release(table)


@pytest.mark.parametrize("seed", range(10))
def test_one_tenant_sees_the_order_of_last_use(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(24, 4, stale_seconds=rng.choice([inf, 30.0]))
    pool.cached = Compared(24)
    pool.below = below = Below()
    random_play(rng, pool, below, [A])
    assert pool.num_evicted > 50


@pytest.mark.parametrize("seed", range(10))
def test_random_tenants_keep_the_books(seed: int) -> None:
    rng = random.Random(seed)
    whose = [A, B, ("b", "c"), ("d", "d"), ("e", "d")]
    tenants = [Tenant(name, rng.choice([0.1, 1.0, 3.0])) for _, name in whose]
    pool = pool_of(24, *tenants, stale=rng.choice([inf, 60.0]))
    pool.below = below = Below()
    random_play(rng, pool, below, whose)
    assert pool.num_evicted == sum(pool.cached.evicted.values()) > 50


@pytest.mark.parametrize("seed", range(20))
def test_a_page_goes_before_the_page_it_builds_on(seed: int) -> None:
    rng = random.Random(seed)
    whose = [A, B, ("b", "c"), ("d", "d")]
    pool = pool_of(30, Tenant("a", 3.0), stale=rng.choice([inf, 60.0]))
    chains = [keys_of(pool, 100 * i, 6, who) for i in range(8) for who in whose]
    for _ in range(300):
        pool.cached.now += rng.choice([0.0, 1.0, 20.0])
        store(pool, 100 * rng.randrange(8), rng.randint(1, 6), rng.choice(whose))
        for keys in chains:
            there = [key in pool for key in keys]
            assert there == sorted(there, reverse=True), "a tail outlives its head"
    assert pool.num_evicted > 50


# ── what goes down first ─────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(30))
def test_what_is_copied_down_first_is_what_would_be_lost_first(seed: int) -> None:
    rng = random.Random(seed)
    whose = [A, B, ("c", "c")]
    tenants = [Tenant(name, rng.choice([0.5, 1.0, 3.0])) for _, name in whose]
    pool = pool_of(40, *tenants, stale=rng.choice([inf, 5.0]))
    pool.below = below = Below()
    for i in range(12):
        pool.cached.now += rng.choice([0.0, 1.0])
        keys = store(pool, 1000 * i, rng.randint(1, 6), rng.choice(whose))
        for key in keys if rng.random() < 0.4 else []:
            below.keys.add(key)
            pool.clean(key)
    foreseen = pool.oldest_not_clean(())
    ready = pool.part_ready
    assert 0.0 <= ready <= 1.0
    assert (ready == 1.0) == (foreseen is None)
    below.lost.clear()
    pool.grow([], 4 * 40, ("new", "new"))
    assert below.lost[:1] == ([foreseen] if foreseen else [])


def test_for_one_tenant_what_is_ready_is_part_of_the_pool() -> None:
    pool = pool_of(20)
    pool.below = below = Below()
    assert pool.part_ready == 1.0
    keys = store(pool, 0, 15, A)
    assert pool.part_ready == 5 / 20
    below.keys.update(keys[:5])
    for key in keys[:5]:
        pool.clean(key)
    assert pool.part_ready == 10 / 20


# ── cost ─────────────────────────────────────────────────────────────────────


def test_a_ranking_says_who_is_highest_and_stays_small() -> None:
    rng = random.Random(1)
    levels: dict[Owner, float] = {Owner(i): -inf for i in range(20)}
    ranking: Ranking[Owner] = Ranking(lambda owner: levels[owner])
    for _ in range(20_000):
        owner = rng.choice(list(levels))
        old, levels[owner] = levels[owner], rng.choice([-inf, *range(10)])
        if levels[owner] > old:
            ranking.rose(owner)
        if rng.random() < 0.5:
            top = ranking.top()
            highest = max(levels.values())
            assert (levels[top] if top else -inf) == highest
        assert len(ranking._heap) < 150


# ── what it is for ───────────────────────────────────────────────────────────


def hit_share(*, fair: bool) -> tuple[float, float]:
    """A tenant whose prompts begin with one of four heads, beside another one's flood of prompts
    that are sent once: the share of prompt tokens that the first one finds, and the second."""
    engine = QuickEngine(vocab_size=50_000, max_model_len=1024, page_size=16, num_pages=256)
    tenancy = Tenancy({name: Tenant(name) for name in ("rag", "flood")})
    engine.harness = harness = Harness(engine, Limits(max_decode_sequences=4), tenancy=tenancy)
    if not fair:
        harness.scheduler.pool.cached = OldOrder(256)
    rng = random.Random(5)
    heads = [[rng.randrange(50_000) for _ in range(320)] for _ in range(4)]
    for i in range(80):
        head = heads[i % 4] + [rng.randrange(50_000) for _ in range(32)]
        prompts = [Request(f"rag{i}", tuple(head), 4, tenant="rag", salt="rag")]
        for k in range(3):
            once = tuple(rng.randrange(50_000) for _ in range(400))
            prompts.append(Request(f"flood{i}-{k}", once, 4, tenant="flood", salt="flood"))
        harness.generate(*prompts)
    accounts = harness.scheduler.shares.accounts
    return accounts["rag"].saved_tokens / (80 * 352), accounts["flood"].saved_tokens


def test_a_tenant_keeps_its_hits_beside_a_flood() -> None:
    before, _ = hit_share(fair=False)
    after, flood = hit_share(fair=True)
    assert before < 0.05, "the flood evicts every head"
    assert after > 0.85, "of 320 / 352 that can be found, but for the first four"
    assert flood == 0


def test_what_an_absent_tenant_has_is_there_for_others_after_a_while() -> None:
    engine = QuickEngine(vocab_size=50_000, max_model_len=1024, page_size=16, num_pages=64)
    tenancy = Tenancy({name: Tenant(name) for name in ("away", "here")})
    engine.harness = harness = Harness(engine, Limits(), tenancy=tenancy)
    cached = harness.scheduler.pool.cached
    cached.stale_seconds = 60.0
    harness.generate(Request("first", tuple(range(400)), 2, tenant="away", salt="away"))
    for i in range(4):
        harness.now += 10.0
        once = tuple(range(1000 * i, 1000 * i + 400))
        harness.generate(Request(f"early{i}", once, 2, tenant="here", salt="here"))
    assert cached.evicted[Cause.OWN] > 0 == cached.evicted[Cause.STALE]
    harness.now += 30.0
    once = tuple(range(9000, 9400))
    harness.generate(Request("late", once, 2, tenant="here", salt="here"))
    assert cached.evicted[Cause.STALE] == 25 and not cached.evicted[Cause.OTHERS]
    assert harness.scheduler.stats().evicted_stale_total == 25


def test_a_step_looks_at_owners_that_have_changed_and_at_no_others() -> None:
    """Also where tiers below are asked for room, and nothing has to go for long."""
    pool = PagePool(200, 4)
    for i in range(100):
        store(pool, 4 * i, 1, (str(i), str(i)))
    assert pool.part_ready < 1.0
    looked: list[Owner] = []
    level = pool.cached._hurt._level
    pool.cached._hurt._level = lambda owner: looked.append(owner) or level(owner)  # type: ignore[func-returns-value]
    assert pool.part_ready < 1.0
    assert len(looked) <= 1
