"""Everything at once: tiers, pins, parking, suspects, deadlines, quotas, drafts, rungs, events."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from math import inf

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Inspect, Submit, Unpin
from dynamo_serve.core.request import Finish, Request, Resumed, TokenEvent
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.test_page_events import follow
from tests.core.tiers import RoughEngine
from tests.core.traffic import VOCAB_SIZE, Harness, random_requests, reference

CLASSES = {
    "quick": Class("quick", 0, ttft=0.02, itl=0.5),
    "chat": Class("chat", 1, ttft=0.05, itl=0.02),
    "batch": Class("batch", 2),
}
LONGEST = 36
MAX_TURNS = 30_000
NEVER_FALL = ("prefix_asked_tokens_total", "prefix_hit_tokens_total", "prompt_tokens_total")


def harness_of(rng: random.Random) -> Harness:
    page_size = rng.choice([1, 2, 4])
    host, disk = rng.choice([(12, 0), (0, 20), (6, 30), (3, 4), (40, 80)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0, 0, 0.1, 0.5]),
        slowest=rng.choice([0, 2, 10, 100]),
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=page_size,
        num_pages=-(-LONGEST // page_size) + rng.randint(0, 24),
        host_pages=host,
        disk_pages=disk,
    )
    quotas = {
        "a": ("quick", Quota(pages_guaranteed=rng.choice([0, 3]))),
        "b": ("chat", Quota(pages_burst=rng.choice([None, None, 40]))),
        "c": ("batch", Quota(live_sequences=rng.choice([None, 2]))),
    }
    tenants = {name: Tenant(name, 1.0, *promised) for name, promised in quotas.items()}
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        mix_phases=rng.random() < 0.7,
        max_draft_tokens=rng.choice([0, 4]),
        hold_steps=rng.random() < 0.5,
        ladder=True,
        ladder_max_tokens=4,
        min_copied_tokens=1,
    )
    engine.harness = harness = Harness(
        engine, limits, tenancy=Tenancy(tenants, CLASSES), pinned_fraction=rng.choice([0.3, 1.0])
    )
    follow(harness.scheduler)
    return harness


class Clients:
    """Sends requests, leaves and comes back, and keeps what was told."""

    def __init__(self, rng: random.Random, harness: Harness) -> None:
        self.rng, self.harness = rng, harness
        self.todo = [self._dressed(r) for r in random_requests(rng, 24, LONGEST)]
        self.requests = {request.id: request for request in self.todo}
        self.live: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {id: [] for id in self.requests}
        self.first: dict[str, tuple[float, int]] = {}
        self.ends: dict[str, str] = {}
        self.parked: dict[str, bool] = {}  # and whether the engine has let go of it
        self.leaving: set[str] = set()
        harness.arrive, harness.see = self.arrive, self.see

    def _dressed(self, request: Request) -> Request:
        rng, tenant = self.rng, self.rng.choice("abc")
        salt = (tenant if rng.random() < 0.3 else "") + request.salt
        request = replace(request, tenant=tenant, salt=salt, is_open_ended=rng.random() < 0.3)
        is_long = len(request.prompt_ids) >= self.harness.scheduler.pool.page_size
        if rng.random() < 0.25 and is_long:
            return replace(request, max_tokens=1, min_tokens=0, stop_ids=frozenset(),
                           pinned_until=0.0, is_open_ended=False)  # fmt: skip
        return request

    def arrive(self) -> None:
        if not self.todo or self.rng.random() > 0.15:
            return
        request, now, rng = self.todo.pop(), self.harness.now, self.rng
        deadline = now + rng.choice([0.01, 0.05, 1.0]) if rng.random() < 0.15 else inf
        request = replace(request, arrival=now, deadline=deadline)
        if request.pinned_until is not None:
            request = replace(request, pinned_until=now + rng.choice([0.05, 0.5, 50]))
        self.live[request.id] = request
        self.harness.commands.append(Submit(request))

    def see(self, events: list[TokenEvent]) -> None:
        for event in events:
            id = event.request_id
            self.tokens[id] += event.token_ids
            if event.token_ids:
                self.first.setdefault(id, (self.harness.now, event.cached_tokens or 0))
            if event.max_tokens is not None:
                self.live[id] = self.requests[id] = replace(
                    self.live[id], max_tokens=event.max_tokens, is_open_ended=False
                )
            if event.finish is Finish.CANCELLED and id in self.parked:
                self.parked[id] = True
            elif event.finish or event.refusal:
                assert id not in self.ends, f"{id} ends twice"
                self.ends[id] = event.finish.value if event.finish else "refused"
                self.live.pop(id, None)
                self.parked.pop(id, None)

    def act(self) -> None:
        """One of the things that clients and operators do, or none."""
        rng, commands, dice = self.rng, self.harness.commands, self.rng.random()
        here = sorted(self.live.keys() - self.parked.keys() - self.leaving)
        if dice < 0.09 and here:
            id = rng.choice(here)
            if dice < 0.03:
                self.leaving.add(id)
            else:
                self.parked[id] = False
            commands.append(Cancel(id))
        elif 0.09 <= dice < 0.2 and (away := [id for id, gone in self.parked.items() if gone]):
            id = away[0]
            del self.parked[id]
            first, cached = self.first.get(id, (None, 0))
            done = Resumed(tuple(self.tokens[id]), self.harness.now - 0.01, "reader_back", first,
                           cached, rng.random() < 0.3)  # fmt: skip
            commands.append(Submit(self.live[id], done))
        elif 0.2 <= dice < 0.22 and (pins := sorted(self.harness.scheduler.pins.by_id)):
            commands.append(Unpin(rng.choice(pins)))
        elif 0.22 <= dice < 0.225:
            commands.append(Inspect(1, rng.choice(["cache", "pins", "state"])))

    @property
    def is_through(self) -> bool:
        return not (self.todo or self.parked or self.harness.num_commands)


def check_seed(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    harness = harness_of(rng)
    clients, scheduler = Clients(rng, harness), harness.scheduler
    for _ in range(MAX_TURNS):
        before = scheduler.stats()
        clients.act()
        harness.turn()
        after = scheduler.stats()
        for name in NEVER_FALL:  # whoever counts takes a fall for another engine
            assert getattr(after, name) >= getattr(before, name), name
        if clients.is_through and scheduler.is_idle:
            break
    else:
        raise AssertionError("a request never finished")
    harness.now += 100.0  # pins end
    for _ in range(MAX_TURNS):
        harness.turn()
        if not scheduler.spill.flights.is_busy:
            break
    judge(clients, harness)
    counts = {"restored": scheduler.spill.num_restored, "copied": scheduler.life.parts.num_copied}
    return Counter(clients.ends.values()) + Counter(counts)


def judge(clients: Clients, harness: Harness) -> None:
    pool, pins = harness.scheduler.pool, harness.scheduler.pins
    assert not pool.num_used and not pins.pages and not pins.by_id, "a page leaked"
    for id, request in clients.requests.items():
        expected, finish = reference(request)
        if clients.ends[id] in ("stop", "length"):
            assert (clients.tokens[id], clients.ends[id]) == (expected, finish.value), id
        else:
            assert clients.tokens[id] == expected[: len(clients.tokens[id])], id


@pytest.mark.parametrize("first", range(1000, 1060, 10))
def test_everything_at_once_ends_exactly(first: int) -> None:
    ends = sum((check_seed(seed) for seed in range(first, first + 10)), Counter[str]())
    assert (
        ends["restored"] > 0 and ends["copied"] > 0 and ends["cancelled"] > 0 and ends["length"] > 0
    )
