"""Random traffic with tenants, quotas, priorities and deadlines, in mixed and separate steps:
nothing lost, no page leaked, every token right, no quota broken, and the bill adds up."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.request import Finish, Request
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.traffic import (
    MAX_TURNS,
    VOCAB_SIZE,
    Drafting,
    Harness,
    QuickEngine,
    random_requests,
    reference,
)

LONGEST = 36


def random_tenancy(rng: random.Random, num_pages: int) -> Tenancy:
    tenants = {}
    for name in ("a", "b", "c"):
        quota = Quota(
            live_sequences=rng.choice([None, 1, 3]),
            pages_guaranteed=rng.choice([0, num_pages // 3]),
            pages_burst=rng.choice([None, num_pages // 2]),
            requests_per_minute=rng.choice([None, None, 3.0]),
            tokens_per_minute=rng.choice([None, None, 60.0]),
            queue_length=rng.choice([None, None, 2]),
        )
        weight = rng.choice([1.0, 3.0, 0.1])
        tenants[name] = Tenant(name, weight, rng.choice(["strict", "loose"]), quota)
    classes = {
        "strict": Class("strict", 0, ttft=0.02, itl=0.005, strict=rng.random() < 0.5),
        "loose": Class("loose", 2),
    }
    return Tenancy(tenants, classes)


def harness_of(rng: random.Random, drafting: Drafting) -> Harness:
    page_size = rng.choice([1, 2, 4, 16])
    num_pages = -(-LONGEST // page_size) + rng.randint(0, 12)
    engine = QuickEngine(
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=page_size,
        num_pages=num_pages,
        copying=drafting.copying,
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        max_queue_delay=rng.choice([0.0, 0.003]),
        max_waiting=rng.choice([4, 100]),
        mix_phases=rng.random() < 0.6,
        fit_chunks=rng.random() < 0.8,
        max_draft_tokens=drafting.most,
        ladder=True,
        hold_steps=rng.random() < 0.5,
        min_copied_tokens=1,
    )
    tenancy = random_tenancy(rng, num_pages)
    if limits.hold_steps:  # for prompts that are short beside the step
        engine.per_sequence *= 100
        strict = replace(tenancy.classes["strict"], itl=1.0)
        tenancy = replace(tenancy, classes={**tenancy.classes, "strict": strict})
    engine.harness = harness = Harness(engine, limits, rng.random() < 0.8, tenancy)
    return harness


def watch(harness: Harness) -> None:
    """What must hold after every turn."""
    scheduler = harness.scheduler
    for name, tenant in harness.tenancy.tenants.items():
        own = [seq for seq in scheduler.running.values() if seq.request.tenant == name]
        if tenant.quota.live_sequences is not None:
            assert len(own) <= tenant.quota.live_sequences, name
        if tenant.quota.pages_burst is not None:
            pages = {page_id for seq in own for page_id in seq.page_table}
            assert len(pages) <= tenant.quota.pages_burst or len(own) == 1, name


def play(harness: Harness, rng: random.Random, requests: list[Request]) -> dict[str, Request]:
    """Send everything at random times; what was sent, with its arrival and deadline."""
    sent: dict[str, Request] = {}
    todo = list(requests)
    often = 0.1 if harness.limits.hold_steps else 0.4

    def arrive() -> None:  # also while a step runs, where steps can be held
        if todo and rng.random() < often:
            given = todo.pop()
            deadline = harness.now + rng.choice([0.005, 0.05]) if rng.random() < 0.2 else inf
            request = replace(
                given,
                arrival=harness.now,
                deadline=deadline,
                tenant=rng.choice("abc"),
                priority=rng.choice([0, 0, 2]),
            )
            sent[request.id] = request
            harness.commands.append(Submit(request))
        if rng.random() < 0.05 and sent:
            harness.commands.append(Cancel(rng.choice(sorted(sent))))

    harness.arrive = arrive
    for _ in range(MAX_TURNS):
        harness.turn()
        watch(harness)
        if not todo and not harness.num_commands and harness.scheduler.is_idle:
            return sent
    raise AssertionError("a request never finished")


def judge(harness: Harness, request: Request, copying: float) -> str:
    """How the request ended, having made sure that it was right."""
    events = [e for e in harness.events if e.request_id == request.id]
    if events[0].refusal is not None:
        assert len(events) == 1, "something came after a refusal"
        assert events[0].refusal.retry_after > 0
        return "refused"
    tokens, finish = harness.tokens_of(request.id), harness.finish_of(request.id)
    assert len(finish) == 1, f"{request.id} has {len(finish)} finishes"
    assert events[-1].finish, f"{request.id}: an event after the last event"
    expected, reason = reference(request, copying=copying)
    if events[-1].finish in (Finish.CANCELLED, Finish.DEADLINE):
        assert tokens == expected[: len(tokens)], request.id
        if events[-1].finish is Finish.DEADLINE:
            assert harness.now >= request.deadline
    else:
        assert (tokens, events[-1].finish) == (expected, reason), request.id
    return events[-1].finish.value


def check_books(harness: Harness) -> None:
    """What the tenants are charged adds up to what was measured."""
    shares, pool = harness.scheduler.shares, harness.scheduler.pool
    accounts = shares.accounts.values()
    for whole, name in (
        (shares.device_seconds, "device_seconds"),
        (shares.page_seconds, "page_seconds"),
    ):
        assert sum(getattr(a, name) for a in accounts) == pytest.approx(whole), name
    cost = shares.device_seconds + shares.page_seconds / pool.num_pages
    assert sum(account.cost for account in accounts) == pytest.approx(cost)
    pool.check([])
    assert pool.num_free + pool.num_cached == pool.num_pages, "a page leaked"


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_promises_lose_nothing(first: int) -> None:
    ends: dict[str, int] = {}
    accepted = 0
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        drafting = Drafting(0.9, 4) if seed % 2 else Drafting()
        harness = harness_of(rng, drafting)
        sent = play(harness, rng, random_requests(rng, 24, LONGEST))
        check_books(harness)
        accepted += harness.published[-1].draft_accepted_tokens_total
        for request in sent.values():
            end = judge(harness, request, drafting.copying)
            ends[end] = ends.get(end, 0) + 1
    assert {"refused", "stop", "length", "cancelled"} <= ends.keys(), ends
    assert accepted
