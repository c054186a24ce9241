"""Heads that tenants have in common by declaration: those pages, and none after them."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.eviction import ALL, Cause
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Declare, Submit
from dynamo_serve.core.prefix_index import extend_keys, parent_of, shared_keys
from dynamo_serve.core.request import Finish, Request, Sampling
from dynamo_serve.core.tenant import Tenancy, Tenant
from dynamo_serve.engines.fake import FakeEngine
from tests.core.tiers import RoughEngine
from tests.core.traffic import VOCAB_SIZE, Harness, play, reference

SIZE = 4
HEAD = tuple(range(3, 15))  # three full pages
OTHER = (*HEAD[:8], 1, 2, 1, 2, 1)  # begins as the first one, and ends within a page
SHARED = frozenset([*shared_keys(HEAD, SIZE), *shared_keys(OTHER, SIZE)])
TENANTS = ("acme", "beta", "gamma")


def keys_of(tokens: tuple[int, ...], salt: str) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, salt, SIZE, len(tokens), SHARED)
    return keys


# ── keys ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "common"),
    [
        ((*HEAD, *range(8)), 3),
        ((*OTHER, 7, 7, 7, 5, 5, 5, 5), 3),
        ((*HEAD[:8], 9, 9, 9, 9, *HEAD[:4]), 2),
        ((*HEAD[:7], 9, *HEAD[8:], *HEAD), 1),
        ((1, *HEAD[1:], *HEAD), 0),
        (tuple(range(16)), 0),
    ],
)
def test_tenants_have_the_pages_of_a_head_in_common_and_none_after_it(
    prompt: tuple[int, ...], common: int
) -> None:
    chains = {name: keys_of(prompt, name) for name in TENANTS}
    for one, other in combinations(TENANTS, 2):
        same = [a == b for a, b in zip(chains[one], chains[other], strict=True)]
        assert same == [place < common for place in range(len(same))]
        parents = [
            {parent_of(chains[name], place, name, SHARED) for place in range(common, len(same))}
            for name in (one, other)
        ]
        assert parents[0].isdisjoint(parents[1]), "tails hang together"


def test_keys_are_the_same_in_however_many_steps_they_are_made() -> None:
    prompt: tuple[int, ...] = (*HEAD, *range(10))
    keys: list[bytes] = []
    for end in range(len(prompt) + 1):
        extend_keys(keys, prompt, "acme", SIZE, end, SHARED)
    assert keys == keys_of(prompt, "acme")


def test_without_a_declaration_keys_are_what_they_were() -> None:
    prompt = (*range(40, 60),)
    plain: list[bytes] = []
    extend_keys(plain, prompt, "acme", SIZE, len(prompt))
    assert keys_of(prompt, "acme") == plain


# ── requests ─────────────────────────────────────────────────────────────────


def serve(*, pages: int = 60, weight: float = 1.0) -> Harness:
    """With a tenant gamma of this weight."""
    engine = FakeEngine(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=SIZE, num_pages=pages)
    tenants = {name: Tenant(name) for name in TENANTS[:2]} | {"gamma": Tenant("gamma", weight)}
    harness = Harness(engine, Limits(), tenancy=Tenancy(tenants), pinned_fraction=0.5)
    harness.commands.append(Declare(sorted(SHARED)))
    harness.turn()
    return harness


def pin(harness: Harness) -> None:
    """What the server does at the start."""
    salt, tenant = ALL
    for i, head in enumerate((HEAD, OTHER)):
        request = Request(
            *(f"shared-{i}", head, 1, Sampling(temperature=0.0)),
            tenant=tenant,
            salt=salt,
            pinned_until=float("inf"),
        )
        harness.generate(request)


def ask(harness: Harness, tenant: str, prompt: tuple[int, ...]) -> int:
    """How much of a prompt is found."""
    request = Request(f"{tenant}{harness.now}", prompt, 2, tenant=tenant, salt=tenant)
    assert harness.generate(request)[request.id] == reference(request)[0]
    return next(e.cached_tokens for e in harness.events if e.cached_tokens is not None)


def explain(harness: Harness, tenant: str, prompt: tuple[int, ...]) -> dict[str, Any]:
    about = (tenant, tenant, keys_of(prompt, tenant), prompt)
    told: dict[str, Any] = views.answer(harness.scheduler, "prompt", "", harness.now, about)
    return told


def test_tenants_find_the_head_and_nothing_of_one_another() -> None:
    harness = serve()
    pin(harness)
    prompt = (*HEAD, *range(9))
    assert ask(harness, "acme", prompt) == len(HEAD)
    assert ask(harness, "beta", prompt) == len(HEAD)
    assert ask(harness, "acme", prompt) == len(HEAD) + 2 * SIZE
    assert ask(harness, "gamma", (*HEAD[:11], 22, *range(9))) == 2 * SIZE
    assert ask(harness, "gamma", (22, *HEAD[1:], *range(9))) == 0


def test_explain_names_what_is_shared_and_tells_no_text_of_others() -> None:
    harness = serve()
    pin(harness)
    prompt = (*HEAD, *range(9))
    ask(harness, "acme", prompt)
    told = explain(harness, "beta", prompt)
    assert (told["matched_tokens"], told["shared_tokens"]) == (12, 12)
    assert told["miss"]["reason"] == "first_time"
    assert explain(harness, "beta", (*HEAD, 0, 1, 9, 9, 9))["miss"]["stored_ids"] == []
    told = explain(harness, "acme", (*HEAD, 0, 1, 9, 9, 9))
    assert (told["miss"]["reason"], told["miss"]["position"]) == ("differs", 14)
    told = explain(harness, "beta", (*HEAD[:9], 22, *range(9)))
    assert (told["shared_tokens"], told["miss"]["reason"]) == (8, "first_time")
    assert told["miss"]["stored_ids"] == [], "nor text of the head that it has not sent"


def test_a_head_stays_whatever_tenants_send_and_they_pay_nothing_for_it() -> None:
    harness = serve(pages=30)
    pin(harness)
    for i in range(20):
        ask(harness, TENANTS[i % 3], tuple((i + 7 * j) % VOCAB_SIZE for j in range(40)))
    assert harness.scheduler.pool.num_evicted
    assert ask(harness, "beta", (*HEAD, 1)) == len(HEAD)
    assert harness.scheduler.stats().pages_pinned == 4
    assert harness.scheduler.pins.pages_of("beta") == set()


def test_a_head_that_is_not_pinned_yet_goes_after_every_tail() -> None:
    """Its pages are nobody's of those who found them: tails of all tenants build on them."""
    harness = serve(pages=30, weight=1000.0)  # which takes everything
    ask(harness, "acme", (*HEAD, *range(9)))
    ask(harness, "beta", (*HEAD, *range(9)))
    pool = harness.scheduler.pool
    for i in range(60):
        ask(harness, "gamma", (i % VOCAB_SIZE, 20 + i // VOCAB_SIZE, *range(7)))
        for tenant in ("acme", "beta"):
            there = [key in pool for key in keys_of((*HEAD, *range(8)), tenant)]
            assert there == sorted(there, reverse=True)
    assert not any(there[3:]), "but nothing is kept from who has more weight"


def test_a_tenant_s_own_pin_of_a_head_does_not_tell_when_others_use_it() -> None:
    harness = serve()
    pin(harness)
    own = Request("own", HEAD, 1, tenant="acme", salt="acme", pinned_until=float("inf"))
    harness.generate(own)
    ask(harness, "beta", (*HEAD, *range(9)))
    told = views.answer(harness.scheduler, "pins", "", harness.now)
    assert (told["own"]["hits"], told["shared-0"]["hits"]) == (0, 1)
    ask(harness, "acme", (*HEAD, *range(9)))
    told = views.answer(harness.scheduler, "pins", "", harness.now)
    assert (told["own"]["hits"], told["shared-0"]["hits"]) == (1, 2)


def test_requests_that_come_together_compute_a_head_once() -> None:
    harness = serve()
    requests = [Request(name, (*HEAD, *range(9)), 2, tenant=name, salt=name) for name in TENANTS]
    harness.commands += [Submit(request) for request in requests]
    harness.generate()
    stats = harness.scheduler.stats()
    assert stats.prefix_hit_tokens_total == 2 * len(HEAD)


# ── all of it together ───────────────────────────────────────────────────────


def play_seed(seed: int) -> RoughEngine:
    """Tenants with shared heads over a tiny pool and tiny tiers, driven to their end; the books
    are read after every turn."""
    rng = random.Random(seed)
    tiers = rng.choice([(0, 0), (12, 0), (0, 20), (6, 30)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0.0, 0.1]),
        slowest=rng.choice([0, 2, 10]),
        vocab_size=VOCAB_SIZE,
        max_model_len=36,
        page_size=SIZE,
        num_pages=9 + rng.randint(6, 14),
        host_pages=tiers[0],
        disk_pages=tiers[1],
    )
    tenancy = Tenancy({name: Tenant(name, rng.choice([0.3, 1.0, 4.0])) for name in TENANTS})
    engine.harness = harness = Harness(engine, Limits(), tenancy=tenancy, pinned_fraction=0.5)
    harness.scheduler.pool.cached.stale_seconds = rng.choice([1e9, 0.05])
    harness.commands.append(Declare(sorted(SHARED)))
    harness.turn()
    if rng.random() < 0.7:
        pin(harness)
    requests = []
    for i in range(24):
        head = rng.choice([HEAD, OTHER, HEAD[: rng.randrange(12)], ()])
        tail = tuple(rng.randrange(4) for _ in range(rng.randint(1, 14)))
        tenant = rng.choice(TENANTS)
        salt = rng.choice([tenant, tenant, "common"])
        most = rng.randint(1, 8)
        requests.append(Request(f"r{i}", (*head, *tail), most, tenant=tenant, salt=salt))
    cancelled = {request.id for request in requests if rng.random() < 0.2}
    harness.events.clear()
    play(harness, rng, requests, cancelled)
    for request in requests:
        events = [e for e in harness.events if e.request_id == request.id]
        tokens, finish = harness.tokens_of(request.id), events[-1].finish
        expected, reason = reference(request)
        assert tokens == expected[: len(tokens)], request.id
        assert finish is Finish.CANCELLED or (tokens, finish) == (expected, reason), request.id
    return engine


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_random_traffic_with_shared_heads_ends_exactly(first: int) -> None:
    ends = [play_seed(seed) for seed in range(first, first + 40)]
    schedulers = [engine.harness.scheduler for engine in ends]
    assert sum(scheduler.spill.num_restored for scheduler in schedulers), "nothing came back"
    causes = [scheduler.pool.cached.evicted for scheduler in schedulers]
    assert all(sum(evicted[cause] for evicted in causes) for cause in Cause)
