"""Pinned prefixes stay whatever comes, within what may be pinned, and nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit, Unpin
from dynamo_serve.core.pins import Pinning
from dynamo_serve.core.request import Finish, Refusal, Request, Resumed
from dynamo_serve.core.tenant import Quota, Tenancy, Tenant
from tests.core.tiers import RoughEngine
from tests.core.traffic import (
    MAX_TURNS,
    VOCAB_SIZE,
    Harness,
    QuickEngine,
    random_requests,
    reference,
)

LONGEST = 32
PAGE = 4
HEAD = tuple(range(3, 16))  # three full pages and a token


def serve(pages: int = 20, fraction: float = 0.5, **quotas: Quota) -> Harness:
    """A pool of twenty pages, of which the longest request takes eight."""
    names = ("default", *quotas)
    tenancy = Tenancy({name: Tenant(name, quota=quotas.get(name, Quota())) for name in names})
    engine = QuickEngine(
        vocab_size=VOCAB_SIZE, max_model_len=LONGEST, page_size=PAGE, num_pages=pages
    )
    limits = Limits(mix_phases=True)
    engine.harness = harness = Harness(engine, limits, tenancy=tenancy, pinned_fraction=fraction)
    return harness


def pin(
    harness: Harness,
    name: str,
    prompt: tuple[int, ...] = HEAD,
    *,
    tenant: str = "default",
    salt: str = "",
    seconds: float = 1e6,
) -> Refusal | None:
    request = Request(
        *(name, prompt, 1),
        tenant=tenant,
        salt=salt,
        arrival=harness.now,
        pinned_until=harness.now + seconds,
    )
    harness.generate(request)
    return harness.refusal_of(name)


def ask(harness: Harness, name: str, prompt: tuple[int, ...], tenant: str = "default") -> int:
    """Run one request to its right end; how many of its tokens were cached."""
    request = Request(name, prompt, 2, arrival=harness.now, tenant=tenant)
    assert harness.generate(request)[name] == reference(request)[0]
    return next(e.cached_tokens for e in harness.events if e.cached_tokens is not None)


def other(number: int, length: int = LONGEST - 2) -> tuple[int, ...]:
    """A prompt that shares nothing with any other's."""
    rng = random.Random(number)
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(length))


def flood(harness: Harness, times: int = 10) -> None:
    for i in range(times):
        ask(harness, f"flood{i}-{harness.now}", other(i))


def test_a_pinned_prefix_outlives_what_would_evict_it() -> None:
    harness = serve()
    assert ask(harness, "before", HEAD) == 0
    flood(harness)
    assert ask(harness, "lost", (*HEAD, 1)) == 0, "the pool is too large for this test"
    assert pin(harness, "p") is None
    flood(harness)
    assert harness.scheduler.pool.num_used == harness.scheduler.stats().pages_pinned == 3
    assert ask(harness, "found", (*HEAD, 2)) == 12


def test_pins_end_with_their_time_or_when_they_are_given_up() -> None:
    harness = serve()
    pin(harness, "short", seconds=1.0)
    pin(harness, "long", other(1, 8))
    harness.now += 1.0
    harness.turn()
    assert list(harness.scheduler.pins.by_id) == ["long"]
    for _ in range(2):
        harness.commands.append(Unpin("long"))
        harness.turn()
        assert harness.scheduler.pool.num_used == 0
    assert ask(harness, "a", (*HEAD, 1)) == 12, "what is not pinned any more is cached as before"
    flood(harness)
    assert ask(harness, "b", (*HEAD, 2)) == 0


def test_equal_prefixes_share_their_pages() -> None:
    harness = serve(acme=Quota(), beta=Quota(pages_burst=4))
    pin(harness, "p", tenant="acme")
    pin(harness, "q", tenant="acme")
    pin(harness, "r", tenant="beta")
    assert pin(harness, "s", tenant="beta") is None, "the same pages do not count twice"
    assert harness.scheduler.pool.num_used == 3
    for i, left in (("p", 3), ("r", 3), ("s", 3), ("q", 0)):
        harness.commands.append(Unpin(i))
        harness.turn()
        assert harness.scheduler.pool.num_used == left


def test_with_another_salt_nothing_is_shared() -> None:
    harness = serve(acme=Quota())
    pin(harness, "p", tenant="acme", salt="s")
    assert ask(harness, "a", (*HEAD, 1)) == 0


def test_a_prefix_to_be_pinned_that_does_not_come_to_its_end_leaves_nothing() -> None:
    harness = serve()
    request = Request("p", HEAD, 1, pinned_until=1e6)
    harness.commands.append(Submit(request))
    harness.turn()
    harness.commands.append(Cancel("p"))
    harness.turn()
    assert not harness.scheduler.pins.by_id and harness.scheduler.pool.num_used == 0
    harness.commands += [Submit(replace(request, id="q")), Unpin("q")]
    for _ in range(20):
        harness.turn()
    assert harness.finish_of("q")[0].finish is Finish.LENGTH
    assert harness.scheduler.pool.num_used == 0, "given up while it was computed"


# ── how much may be pinned ───────────────────────────────────────────────────


def test_the_burst_of_a_tenant_holds_for_its_pins_and_what_runs_together() -> None:
    harness = serve(acme=Quota(pages_burst=5))
    assert pin(harness, "p", tenant="acme") is None
    refusal = pin(harness, "q", other(1, 12), tenant="acme")
    assert refusal and refusal.is_own and refusal.reason == "pins"
    assert "quota.pages_burst is 5" in refusal.message and "DELETE" in refusal.message
    assert pin(harness, "r", other(2, 8), tenant="acme") is None
    two = [Request(f"t{i}", other(i, 6), 6, tenant="acme") for i in range(2)]
    harness.commands += [Submit(request) for request in two]
    most = 0
    for _ in range(100):
        harness.turn()
        most = max(most, len(harness.scheduler.running))
        if harness.scheduler.is_idle:
            break
    assert most == 1, "alone a request may always run"
    for request in two:
        assert harness.tokens_of(request.id) == reference(request)[0]


def test_beyond_guarantees_all_tenants_pin_from_one_share() -> None:
    harness = serve(fraction=0.3, acme=Quota(pages_guaranteed=4))  # six pages in common
    assert pin(harness, "a", other(1, 16), tenant="acme") is None
    assert pin(harness, "b", other(2, 16)) is None
    refusal = pin(harness, "c", other(3, 12))
    assert refusal and "cache.pinned_fraction" in refusal.message
    assert pin(harness, "d", other(4, 8), tenant="acme") is None
    assert pin(harness, "e", other(5, 4)) is not None


def test_pins_leave_others_what_was_guaranteed_to_them() -> None:
    harness = serve(fraction=1.0, acme=Quota(pages_guaranteed=17))
    assert pin(harness, "a") is None
    assert pin(harness, "b", other(1, 4)) is not None


def test_who_is_refused_is_told_when_a_pin_ends() -> None:
    harness = serve(fraction=0.15)
    pin(harness, "a", seconds=50.0)
    refusal = pin(harness, "b", other(1, 12))
    assert refusal and 49.0 < refusal.retry_after < 50.0
    never = pin(harness, "c", other(2, 16))
    assert never and never.retry_after == 3600.0
    harness.now += 50.0
    assert pin(harness, "d", other(1, 12)) is None


def test_the_longest_request_always_finds_room() -> None:
    harness = serve(fraction=1.0)
    assert Pinning.of(20, 8, 1.0) == (20, 12)
    for i in range(3):
        assert pin(harness, f"p{i}", other(i, 16)) is None
    refusal = pin(harness, "one-more", other(9, 4))
    assert refusal and "cache.num_pages" in refusal.message
    long = [Request(f"l{i}", other(10 + i, 2), LONGEST - 2) for i in range(4)]
    answers = harness.generate(*long)
    assert answers == {request.id: reference(request)[0] for request in long}


def test_a_pool_that_is_as_large_as_one_request_pins_nothing() -> None:
    harness = serve(pages=8, fraction=1.0)
    assert pin(harness, "p", HEAD[:4]) is not None
    assert ask(harness, "a", other(1)) == 0


def test_a_prefix_that_was_accepted_before_is_refused_where_there_is_no_room_now() -> None:
    harness = serve(fraction=0.15)
    pin(harness, "a")
    again = Request("b", other(1, 12), 1, pinned_until=1e6)
    harness.commands.append(Submit(again, Resumed((), 0.0, "engine_lost")))
    harness.turn()
    refusal = harness.refusal_of("b")
    assert refusal and refusal.reason == "pins"
    assert harness.scheduler.is_idle
    harness.commands.append(Unpin("a"))
    harness.commands.append(Submit(again, Resumed((), 0.0, "engine_lost")))
    for _ in range(20):
        harness.turn()
    assert harness.scheduler.stats().pages_pinned == 3


def test_what_is_pinned_goes_to_the_disk_for_after_a_restart() -> None:
    engine = RoughEngine(
        random.Random(1),
        failing=0.0,
        slowest=0,
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=PAGE,
        num_pages=40,
        host_pages=0,
        disk_pages=8,
    )
    engine.harness = harness = Harness(engine, Limits(mix_phases=True), pinned_fraction=0.5)
    assert pin(harness, "p") is None
    for _ in range(50):
        harness.turn()
    told = views.answer(harness.scheduler, "pins", "", harness.now)
    assert told["p"]["below"] == ["disk"]


# ── what is told, and who pays ───────────────────────────────────────────────


def test_hits_are_counted_for_prefixes_that_are_found_whole() -> None:
    harness = serve()
    pin(harness, "p")
    ask(harness, "a", HEAD[:9])
    pin(harness, "q")
    told = views.answer(harness.scheduler, "pins", "", harness.now)
    assert told["p"] == {"hits": 0, "last_hit_age_s": None, "below": []}
    ask(harness, "b", (*HEAD, 1))
    harness.now += 5.0
    told = views.answer(harness.scheduler, "pins", "", harness.now)
    assert [told[name]["hits"] for name in "pq"] == [1, 1]
    assert 5.0 < told["p"]["last_hit_age_s"] < 6.0
    assert views.answer(harness.scheduler, "state", "", harness.now)["pages"]["pinned"] == 3


def test_a_tenant_pays_for_its_pins_while_others_run() -> None:
    harness = serve(acme=Quota())
    pin(harness, "p", tenant="acme")
    shares = harness.scheduler.shares
    before, own = shares.account("acme").page_seconds, shares.account("default").page_seconds
    ask(harness, "a", other(1, 4))
    paid = shares.account("acme").page_seconds - before
    assert paid > 0 < shares.account("default").page_seconds - own
    total = sum(account.page_seconds for account in shares.accounts.values())
    assert total == pytest.approx(shares.page_seconds)


# ── everything at once ───────────────────────────────────────────────────────


def check_seed(seed: int) -> int:
    """A random mix with pins over tiny tiers, driven to its end; how many were pinned."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    longest = 36
    num_pages = -(-longest // page_size) + rng.randint(0, 24)
    tiers = rng.choice([(0, 0), (12, 0), (6, 30)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0.0, 0.3]),
        slowest=rng.choice([0, 10]),
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        page_size=page_size,
        num_pages=num_pages,
        host_pages=tiers[0],
        disk_pages=tiers[1],
    )
    quotas = {
        name: Quota(
            pages_guaranteed=rng.choice([0, num_pages // 4]),
            pages_burst=rng.choice([None, num_pages // 2]),
        )
        for name in ("a", "b")
    }
    tenancy = Tenancy({name: Tenant(name, quota=quota) for name, quota in quotas.items()})
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        mix_phases=rng.random() < 0.5,
        min_copied_tokens=1,
    )
    harness = Harness(engine, limits, tenancy=tenancy, pinned_fraction=rng.choice([0.3, 1.0]))
    engine.harness = harness
    return play(harness, rng, random_requests(rng, 24, longest))


def play(harness: Harness, rng: random.Random, requests: list[Request]) -> int:
    pins, sent, cancelled, most = harness.scheduler.pins, {}, set(), 0
    while requests or not harness.scheduler.is_idle or harness.commands:
        if requests and rng.random() < 0.4:
            request = replace(requests.pop(), tenant=rng.choice("ab"), arrival=harness.now)
            size = harness.scheduler.pool.page_size
            if rng.random() < 0.4 and len(request.prompt_ids) >= size:
                until = harness.now + rng.choice([0.002, 0.02, 1e6])
                request = Request(
                    *(request.id, request.prompt_ids, 1),
                    salt=request.salt,
                    tenant=request.tenant,
                    arrival=harness.now,
                    pinned_until=until,
                )
            sent[request.id] = request
            harness.commands.append(Submit(request))
        if sent and rng.random() < 0.1:
            cancelled.add(name := rng.choice(sorted(sent)))
            harness.commands.append(Cancel(name) if rng.random() < 0.5 else Unpin(name))
        harness.turn()
        most = max(most, len(pins.pages))
        assert len(pins.pages) <= pins.rules.most
        assert len(sent) < MAX_TURNS and harness.now < 100.0, "a request never finished"
    judge(harness, sent, cancelled)
    for name in list(pins.by_id):
        harness.commands.append(Unpin(name))
    for _ in range(1000):
        harness.turn()
        if not harness.scheduler.pool.num_used:
            return most
    raise AssertionError("a page leaked")


def judge(harness: Harness, sent: dict[str, Request], cancelled: set[str]) -> None:
    for request in sent.values():
        if harness.refusal_of(request.id):
            assert request.pinned_until is not None or request.tenant in "ab"
            continue
        (last,) = harness.finish_of(request.id)
        expected, reason = reference(request)
        tokens = harness.tokens_of(request.id)
        if last.finish is Finish.CANCELLED:
            assert request.id in cancelled and tokens == expected[: len(tokens)]
        else:
            assert (tokens, last.finish) == (expected, reason), request.id


@pytest.mark.parametrize("first", range(0, 300, 20))
def test_random_traffic_with_pins_ends_exactly(first: int) -> None:
    assert sum(check_seed(seed) for seed in range(first, first + 20)) > 0, "nothing was pinned"
