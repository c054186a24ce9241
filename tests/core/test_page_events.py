"""What is told of pages: whoever follows knows at any time what the pool and the tiers hold."""

from __future__ import annotations

import random
from collections.abc import Container, Iterable

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_events import Cleared, Event, PageEvents, Removed, Stored
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.prefix_index import APART, page_key, root_key
from dynamo_serve.core.request import Request
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.tiers import DEVICE, DISK, HOST, Found
from tests.core.tiers import RoughEngine, serve
from tests.core.traffic import VOCAB_SIZE, Harness, judge, play, random_requests, reference

LONGEST = 36
NUM_OPERATIONS = 10_000
SALTS = ("", APART + "own")


class Follower:
    """Folds events, and takes nothing that whoever routes could not use."""

    def __init__(self) -> None:
        self.pages: set[tuple[bytes, int]] = set()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Stored(key, parent, token_ids, tier):
                    roots = [root_key(salt) for salt in SALTS] if parent is None else [parent]
                    assert key in {page_key(root, token_ids) for root in roots}, "other tokens"
                    assert parent is None or parent in {k for k, _ in self.pages}, "an orphan"
                    assert (key, tier) not in self.pages, "stored twice"
                    self.pages.add((key, tier))
                case Removed(key, tier):
                    self.pages.remove((key, tier))
                case Cleared():
                    self.pages.clear()


def levels_of(scheduler: Scheduler) -> dict[int, Container[bytes]]:
    return {DEVICE: scheduler.pool, **{tier.number: tier for tier in scheduler.spill.tiers}}


def follow(scheduler: Scheduler, max_events: int = 10_000) -> PageEvents:
    pool = scheduler.pool
    pool.events = PageEvents(levels_of(scheduler), pool.page_size, max_events)
    return pool.events


def usable(scheduler: Scheduler, chains: Iterable[list[bytes]]) -> set[tuple[bytes, int]]:
    """By the books: pages of these chains that are somewhere, as is every page before them."""
    levels = levels_of(scheduler)
    found: set[tuple[bytes, int]] = set()
    for chain in chains:
        for key in chain:
            tiers = {(key, tier) for tier, level in levels.items() if key in level}
            if not tiers:
                break
            found |= tiers
    return found


class Watched(Harness):
    """Some of the time, looks after a turn whether what was told is so."""

    def watch(self, rng: random.Random, requests: list[Request]) -> None:
        self.rng = rng
        self.told = follow(self.scheduler, max_events=rng.choice([1, 4, 30, 10_000]))
        self.patience = rng.choice([0.0, 0.5, 0.9])
        self.follower = Follower()
        self.num_turns = 0
        pool = self.scheduler.pool
        self.chains: list[list[bytes]] = []
        for request in requests:
            tokens = [*request.prompt_ids, *reference(request)[0]]
            keys: list[bytes] = []
            pool.extend_keys(keys, tokens, request.salt, len(tokens))
            self.chains.append(keys)

    def turn(self) -> None:
        super().turn()
        self.num_turns += 1
        if self.rng.random() < 0.02:
            self.told.begin_anew()
        if self.rng.random() >= self.patience:
            self.follower.take(self.told.take())
            assert self.follower.pages == usable(self.scheduler, self.chains)


def check_seed(seed: int) -> Watched:
    """A random mix over a tiny pool with tiny tiers below it, driven to its end."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    host, disk = rng.choice([(0, 0), (12, 0), (0, 20), (6, 30), (3, 4), (40, 80)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0.0, 0.0, 0.1, 0.5]),
        slowest=rng.choice([0, 2, 10, 600]),
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=page_size,
        num_pages=-(-LONGEST // page_size) + rng.randint(0, 12),
        host_pages=host,
        disk_pages=disk,
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        mix_phases=rng.random() < 0.5,
    )
    engine.harness = harness = Watched(engine, limits)
    requests = random_requests(rng, 20, LONGEST)
    harness.watch(rng, requests)
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    play(harness, rng, requests, cancelled)
    for _ in range(20_000):
        if not harness.scheduler.spill.flights.is_busy:
            break
        harness.turn()
    judge(harness, requests, cancelled)
    return harness


def test_the_events_give_what_is_there_after_any_operation() -> None:
    num_turns = num_anew = num_events = 0
    for seed in range(500):
        harness = check_seed(seed)
        num_turns += harness.num_turns
        num_anew += harness.told.num_anew - 1
        num_events += harness.told.num_events
        if num_turns >= NUM_OPERATIONS:
            break
    assert num_turns >= NUM_OPERATIONS
    assert num_anew > NUM_OPERATIONS / 100, "nothing overflowed"
    assert num_events > NUM_OPERATIONS


# ── one thing at a time ──────────────────────────────────────────────────────


def pool_of(num_pages: int, max_events: int = 10_000) -> tuple[PagePool, PageEvents]:
    scheduler = Scheduler(PagePool(num_pages, 4), Limits())
    return scheduler.pool, follow(scheduler, max_events)


def store(pool: PagePool, tokens: list[int]) -> list[int]:
    """Hold and publish the full pages of `tokens`; the page table."""
    assert pool.events
    table: list[int] = []
    keys: list[bytes] = []
    assert pool.grow(table, len(tokens))
    pool.extend_keys(keys, tokens, "", len(tokens))
    for page_id, key in zip(table, keys, strict=True):
        pool.seal(page_id, key)
    pool.events.sealed(keys, tokens, range(len(keys)))
    return table


def test_an_engine_begins_with_nothing() -> None:
    _, events = pool_of(4)
    assert events.take() == [Cleared()]
    assert events.take() == []


def test_more_than_may_wait_is_told_anew() -> None:
    pool, events = pool_of(8, max_events=3)
    events.take()
    store(pool, list(range(12)))
    assert len(events.take()) == 3 and events.num_anew == 1
    store(pool, list(range(100, 116)))
    assert events.begins_anew
    told = events.take()
    assert told[0] == Cleared() and len(told) == 1 + 7
    follower = Follower()
    follower.take(told)
    assert len(follower.pages) == 7 and events.num_anew == 2


def test_a_page_without_its_parent_is_not_told_until_that_is_back() -> None:
    """One of two equal heads was published; it is evicted while the tail behind the other stays."""
    pool, events = pool_of(4)
    follower = Follower()
    tokens = list(range(8))
    first = store(pool, tokens[:4])
    second = store(pool, tokens)  # its head is a copy that nobody is told of
    pool.release(first)
    other: list[int] = []
    assert pool.grow(other, 8)
    follower.take(events.take())
    assert not follower.pages and len(pool.index.pages) == 1, "the tail has lost its head"
    pool.release(other)
    store(pool, tokens[:4])
    follower.take(events.take())
    assert len(follower.pages) == 2, "the tail can be used again"
    events.check()
    assert second


def test_pages_of_an_earlier_engine_are_told_once_somebody_knows_their_tokens() -> None:
    prompt = tuple(range(3, 20))
    harness = serve(host=0, disk=16)
    events, follower = follow(harness.scheduler), Follower()
    keys: list[bytes] = []
    harness.scheduler.pool.extend_keys(keys, prompt, "", len(prompt))
    harness.scheduler.spill.settle([Found(DISK, ((keys[0], 3), (keys[1], 5)))], harness.now)
    follower.take(events.take())
    assert not follower.pages
    harness.scheduler.spill.tiers[0].page_seconds = 10.0  # sooner computed than restored
    harness.generate(Request("a", prompt, 1, arrival=harness.now))
    follower.take(events.take())
    assert {page for page in follower.pages if page[1] == DISK} == {(k, DISK) for k in keys[:2]}
    assert {key for key, tier in follower.pages if tier == DEVICE} == set(keys)


@pytest.mark.parametrize("tier", [HOST, DISK])
def test_a_page_that_goes_down_and_comes_back_is_told_of_both_tiers(tier: int) -> None:
    sizes = {"host": 64} if tier == HOST else {"host": 0, "disk": 64}
    harness = serve(**sizes)
    events, follower = follow(harness.scheduler), Follower()
    prompt = tuple(range(3, 20))
    keys: list[bytes] = []
    harness.scheduler.pool.extend_keys(keys, prompt, "", len(prompt))

    def ask(name: str, prompt: tuple[int, ...]) -> set[int]:
        """The tiers that are said to have the head of the first prompt after this one."""
        harness.generate(Request(name, prompt, 2, arrival=harness.now))
        for _ in range(200):
            harness.turn()
        follower.take(events.take())
        return {tier for key, tier in follower.pages if key == keys[0]}

    assert DEVICE in ask("a", prompt)
    for i in range(12):
        where = ask(f"flood{i}", tuple((i + j * 7) % VOCAB_SIZE for j in range(21)))
    assert where == {tier}
    assert ask("b", prompt) == {DEVICE, tier}
    assert harness.scheduler.spill.num_restored
