"""Pages that go down to lower tiers and come back: nothing wrong, nothing lost, nobody stalled."""

from __future__ import annotations

import random

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Command, Submit
from dynamo_serve.core.request import Request, Resumed
from dynamo_serve.core.tiers import DISK, HOST, MOST_KEPT, Found, Kept, Place, Tier, TierSpec
from tests.core.tiers import RoughEngine, serve
from tests.core.traffic import VOCAB_SIZE, Harness, judge, play, random_requests, reference


def check_seed(seed: int) -> RoughEngine:
    """A random mix over a tiny pool with tiny tiers below it, driven to its end."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    longest = 36
    tiers = rng.choice([(12, 0), (0, 20), (6, 30), (3, 4), (40, 80)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0.0, 0.0, 0.1, 0.5]),
        slowest=rng.choice([0, 2, 10, 600]),
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        page_size=page_size,
        num_pages=-(-longest // page_size) + rng.randint(0, 12),
        host_pages=tiers[0],
        disk_pages=tiers[1],
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        mix_phases=rng.random() < 0.5,
        min_copied_tokens=1,
    )
    engine.harness = harness = Harness(engine, limits)
    requests = random_requests(rng, 20, longest)
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    play(harness, rng, requests, cancelled)
    for _ in range(20_000):
        if not harness.scheduler.spill.flights.is_busy:
            break
        harness.turn()
    judge(harness, requests, cancelled)
    assert not engine.under_way
    return engine


@pytest.mark.parametrize("first", range(0, 400, 20))
def test_random_traffic_over_tiers_ends_exactly(first: int) -> None:
    ends = [check_seed(seed) for seed in range(first, first + 20)]
    assert sum(e.harness.scheduler.spill.num_restored for e in ends) > 0, "nothing came back"
    assert sum(e.num_failed for e in ends) > 0, "nothing failed"
    assert sum(e.num_copied for e in ends) > 0, "no part of a page was copied"


# ── one thing at a time ──────────────────────────────────────────────────────

LONGEST = 64
PROMPT = tuple(range(3, 20))  # four full pages and a token
FLOOD = 12  # requests that between them take every page


def rough(harness: Harness) -> RoughEngine:
    assert isinstance(harness.engine, RoughEngine)
    return harness.engine


def ask(harness: Harness, name: str, prompt: tuple[int, ...] = PROMPT) -> int:
    """Run one request to its right end; how many of its tokens were cached."""
    request = Request(name, prompt, 2, arrival=harness.now)
    assert harness.generate(request)[name] == reference(request)[0]
    return next(e.cached_tokens for e in harness.events if e.cached_tokens is not None)


def settle(harness: Harness) -> None:
    """Turn until no copy is under way."""
    for _ in range(2000):
        harness.turn()
        if not harness.scheduler.spill.flights.is_busy:
            return
    raise AssertionError("copies never end")


def flood(harness: Harness) -> None:
    """Others take every page there is."""
    settle(harness)
    for i in range(FLOOD):
        ask(harness, f"flood{harness.now}", tuple((i + j * 7) % VOCAB_SIZE for j in range(21)))
        settle(harness)


def test_a_head_that_was_evicted_comes_back() -> None:
    harness = serve()
    assert ask(harness, "a") == 0
    flood(harness)
    assert ask(harness, "b") == 16
    stats = harness.scheduler.stats()
    assert stats.restored_tokens_total == 16
    assert stats.lost_pages_total == 0 < stats.evicted_pages_total
    assert stats.saved_seconds_total > 0
    history = harness.scheduler.journal.gone["b"]
    (entry,) = [entry for entry in history if entry.kind.value == "restore"]
    assert (
        entry.numbers["pages"] == 4 and entry.numbers["predicted_s"] < entry.numbers["computing_s"]
    )


def test_what_is_sooner_computed_is_not_restored() -> None:
    harness = serve()
    ask(harness, "a")
    flood(harness)
    harness.scheduler.spill.tiers[0].page_seconds = 10.0
    assert ask(harness, "b") == 0
    assert harness.scheduler.stats().restored_tokens_total == 0


def test_a_copy_that_never_ends_holds_nobody_up() -> None:
    harness = serve()
    ask(harness, "a")
    flood(harness)
    rough(harness).slowest = 10**9
    began = harness.now
    assert ask(harness, "b") == 0
    assert harness.now - began < 1.0
    assert harness.scheduler.stats().prefix_hit_tokens_total == 0
    assert harness.scheduler.journal.counts["preempt", "not_restored"] == 1
    assert ask(harness, "c") == 16, "what was computed is not found again"


def test_others_run_while_one_waits_for_its_pages() -> None:
    harness = serve(pages=30)
    ask(harness, "a")
    flood(harness)
    flood(harness)
    rough(harness).slowest = 100
    waits = Request("waits", PROMPT, 2, arrival=harness.now)
    runs = Request("runs", (1, 2, 3), 2, arrival=harness.now)
    harness.generate(waits, runs)
    order = [event.request_id for event in harness.events if event.finish]
    assert order == ["runs", "waits"]


def test_two_that_need_the_same_head_restore_it_once() -> None:
    harness = serve()
    ask(harness, "a")
    flood(harness)
    before = harness.scheduler.spill.num_copied[HOST, 0]
    twins = [Request(f"t{i}", (*PROMPT, i), 2, arrival=harness.now) for i in range(2)]
    harness.generate(*twins)
    assert harness.scheduler.spill.num_copied[HOST, 0] == before + 4
    told = [e.cached_tokens for e in harness.events if e.cached_tokens is not None]
    assert told == [16, 16]


def test_a_cancelled_request_leaves_its_copies_nothing_to_spoil() -> None:
    harness = serve()
    ask(harness, "a")
    flood(harness)
    rough(harness).slowest = 50
    harness.commands.append(Submit(Request("b", PROMPT, 2, arrival=harness.now)))
    for _ in range(20):
        harness.turn()
        if harness.scheduler.running:
            break
    assert harness.scheduler.running["b"].restoring
    harness.commands.append(Cancel("b"))
    harness.turn()
    assert not harness.scheduler.running and harness.scheduler.pool.num_used
    settle(harness)
    assert not harness.scheduler.pool.num_used
    assert ask(harness, "c") == 16


def test_a_suspect_waits_for_the_pages_that_copies_hold() -> None:
    """Everybody else makes way at once; a page that is being restored cannot."""
    harness = serve(pages=18)
    ask(harness, "a")
    flood(harness)
    rough(harness).slowest = 50
    harness.commands.append(Submit(Request("b", PROMPT, 2, arrival=harness.now)))
    for _ in range(20):
        harness.turn()
        if harness.scheduler.running:
            break
    assert harness.scheduler.running["b"].restoring
    large = tuple(i % VOCAB_SIZE for i in range(rough(harness).spec.max_model_len - 2))
    suspect = Request("suspect", large, 2, arrival=harness.now)
    goes_on = Resumed((), harness.now, "engine_lost", None, 0, is_suspect=True)
    harness.commands.append(Submit(suspect, goes_on))
    harness.turn()
    assert not harness.scheduler.running, "nobody runs before the suspect"
    assert {seq.id for seq in harness.scheduler.waiting} == {"b", "suspect"}
    for _ in range(2000):
        harness.turn()
        if harness.scheduler.is_idle:
            break
    assert [e.request_id for e in harness.events if e.finish][-2:] == ["suspect", "b"]


def test_nothing_goes_down_while_there_is_room_and_something_to_do() -> None:
    harness = serve(pages=200)
    requests = [Request(f"r{i}", (*PROMPT, i), 20, arrival=0.0) for i in range(3)]
    harness.commands += [Submit(request) for request in requests]
    for _ in range(200):
        harness.turn()
        if harness.scheduler.is_idle:
            break
        assert not harness.scheduler.spill.num_copied
    assert harness.scheduler.is_idle


def test_what_is_used_twice_goes_to_the_lowest_tier() -> None:
    harness = serve(pages=200, disk=64)
    ask(harness, "a")
    settle(harness)
    assert len(harness.scheduler.spill.tiers[1]) == 0, "once is not enough"
    ask(harness, "b")
    settle(harness)
    assert len(harness.scheduler.spill.tiers[1]) == 4


def test_pages_from_an_earlier_engine_are_listed_once() -> None:
    tier = Tier(TierSpec(DISK, 4, 0.001))
    place, _ = tier.reserve() or (Place(DISK, -1), None)
    tier.settle(b"new", place.slot)
    tier.adopt([(b"old", 3), (b"new", 2), (b"late", place.slot)])
    tier.check()
    assert tier.place(b"old") == (DISK, 3) and tier.place(b"new") == place
    assert b"late" not in tier, "its slot has been written since"


def test_a_tier_where_copies_fail_is_left_alone_for_a_while() -> None:
    harness = serve()
    rough(harness).failing = 1.0
    ask(harness, "a")
    for _ in range(1000):
        harness.turn()
    assert rough(harness).num_failed < 100
    rough(harness).failing = 0.0
    harness.now += 100.0
    flood(harness)
    assert ask(harness, "b") == 16


def test_found_pages_are_clean_where_they_are_above() -> None:
    harness = serve(host=0, disk=16)
    ask(harness, "a")
    settle(harness)
    keys: list[bytes] = []
    pool = harness.scheduler.pool
    pool.extend_keys(keys, PROMPT, "", len(PROMPT))
    assert not any(pool.cached.is_clean)
    found = Found(DISK, tuple((key, slot) for slot, key in enumerate(keys)))
    assert harness.scheduler.spill.settle([found], harness.now) == []
    assert sum(pool.cached.is_clean) == len(keys)
    harness.scheduler.check()


def test_prices_of_restoring_are_learned() -> None:
    harness = serve()
    (tier,) = harness.scheduler.spill.tiers
    tier.page_seconds = believed = 1e-4
    ask(harness, "a")
    flood(harness)
    assert tier.page_seconds < believed, "copies downwards tell that a tier is not slow any more"
    believed = tier.page_seconds
    ask(harness, "b")
    assert tier.page_seconds < believed


def test_a_tier_that_stood_still_once_is_used_again() -> None:
    harness = serve(pages=60, host=400)
    rng = random.Random(5)
    heads = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(17)) for _ in range(8)]
    for i, head in enumerate(heads):
        ask(harness, f"a{i}", head)
    for _ in range(3):
        flood(harness)
    rough(harness).slowest = 10**9
    harness.generate(*(Request(f"b{i}", h, 2, arrival=harness.now) for i, h in enumerate(heads)))
    assert harness.scheduler.journal.counts["preempt", "not_restored"] > 4
    engine = rough(harness)
    engine.under_way = {ticket: (copy, 0) for ticket, (copy, _) in engine.under_way.items()}
    engine.slowest = 0
    for _ in range(12):
        harness.now += 1.0
        flood(harness)
    assert harness.scheduler.spill.tiers[0].page_seconds < 1e-4
    ask(harness, "c", heads[0])
    flood(harness)
    assert ask(harness, "d", heads[0]) == 16


def test_what_is_to_be_kept_waits_for_a_tier_that_fails() -> None:
    harness = serve(pages=200, host=0, disk=64)
    rough(harness).failing = 1.0
    ask(harness, "a")
    ask(harness, "b")
    for _ in range(50):
        harness.turn()
    rough(harness).failing = 0.0
    for i in range(10):
        harness.now += 100.0
        ask(harness, f"c{i}", (1, 2, i))
        settle(harness)
    assert len(harness.scheduler.spill.tiers[0]) == 4


def test_nobody_spins_while_a_copy_hangs() -> None:
    long = tuple((i * 5) % VOCAB_SIZE for i in range(50))
    harness = serve(pages=16)
    ask(harness, "a", long)
    flood(harness)
    flood(harness)
    rough(harness).slowest = 10**9
    waited: list[float | None] = []
    inbox = harness.loop.inbox

    def watched(patience: float | None) -> list[Command]:
        waited.append(patience)
        return inbox(patience)

    harness.loop.inbox = watched
    harness.commands.append(Submit(Request("b", long, 4, arrival=harness.now)))
    for _ in range(1000):
        harness.turn()
    assert not harness.scheduler.running and len(harness.scheduler.waiting) == 1
    assert 0.0 not in waited[-500:]


def test_what_goes_down_while_nothing_runs_is_told() -> None:
    harness = serve()
    ask(harness, "a")
    settle(harness)
    (told,) = harness.published[-1].tiers
    assert told.num_pages == told.stored == 4


def test_a_wish_that_is_repeated_pushes_no_other_out() -> None:
    kept = Kept()
    for key in (b"a", b"b"):
        kept.add(key)
    for _ in range(2 * MOST_KEPT):
        kept.add(b"hot")
    assert kept.first(9) == [b"a", b"b", b"hot"]
    for i in range(MOST_KEPT - 1):
        kept.add(i.to_bytes(4))
    assert kept.first(2) == [b"hot", (0).to_bytes(4)]


def test_a_wish_that_is_repeated_has_its_turn() -> None:
    """More wishes come than go down, and one page is wanted by all."""
    kept = Kept()
    for i in range(100):
        kept.add(b"hot")
        kept.add(i.to_bytes(4))
    assert kept.first(2) == [b"hot", (0).to_bytes(4)]
