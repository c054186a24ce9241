"""Promises kept and missed are those that clients saw kept and missed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import READER_BACK, Finish, Request, Resumed
from dynamo_serve.core.stats import OUTCOMES
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.playing import Play, ask

TTFT, ITL = 1.0, 0.12
CLASSES = {
    "chat": Class("chat", 0, ttft=TTFT, itl=ITL),
    "strict": Class("strict", 0, ttft=TTFT, strict=True),
    "gaps": Class("gaps", 1, itl=ITL),
    "jobs": Class("jobs", 2),
}
LIMITS = Limits(max_decode_sequences=8, max_queue_delay=0.0, ladder=False)


def tenancy(**classes: str) -> Tenancy:
    return Tenancy({name: Tenant(name, class_name=of) for name, of in classes.items()}, CLASSES)


def counted(play: Play, tenant: str) -> dict[str, dict[str, int]]:
    """By class, outcomes that are not zero, as the page of costs tells them."""
    told = views.costs(play.scheduler)["tenants"][tenant]["promises"]
    return {
        name: {key: count for key, count in counts.items() if count}
        for name, counts in told.items()
    }


def seen(play: Play, requests: list[Request], promise: Class) -> dict[str, int]:
    """The same, from when tokens came."""
    found: Counter[str] = Counter()
    for request in requests:
        if promise.ttft < float("inf"):
            found["ttft_kept" if play.ttft(request.id) <= promise.ttft else "ttft_late"] += 1
        if promise.itl < float("inf"):
            gaps = [b - a for a, b in pairwise(play.tokens_at[request.id])]
            found["itl_late"] += sum(gap > promise.itl for gap in gaps)
            found["itl_kept"] += sum(gap <= promise.itl for gap in gaps)
    return {key: count for key, count in found.items() if count}


@pytest.mark.parametrize("seed", range(4))
def test_what_is_counted_is_what_clients_saw(seed: int) -> None:
    rng, classes = Random(seed), {"web": "chat", "app": "chat", "rag": "gaps", "bulk": "jobs"}
    play = Play(LIMITS, tenancy(**classes))
    requests = [
        ask(
            *(f"{name}{i}", rng.randint(8, 400), rng.randint(1, 40)),
            at=rng.uniform(0.0, 30.0),
            tenant=name,
        )
        for name in classes
        for i in range(12)
    ]
    play.run(requests)
    outcomes: Counter[str] = Counter()
    for name, of in classes.items():
        own = [request for request in requests if request.tenant == name]
        expected = {of: seen(play, own, CLASSES[of])} if of != "jobs" else {}
        assert counted(play, name) == expected
        outcomes.update(expected.get(of, {}))
    assert set(outcomes) == {"ttft_kept", "ttft_late", "itl_kept", "itl_late"}
    web, app = (counted(play, name)["chat"] for name in ("web", "app"))
    places = {f"{promise}_{outcome}": i for i, (promise, outcome) in enumerate(OUTCOMES)}
    for name, count in (Counter(web) + Counter(app)).items():
        assert play.scheduler.life.tally.by_class()["chat"][places[name]] == count


def test_who_is_refused_for_a_target_is_counted_apart_and_as_late() -> None:
    play = Play(LIMITS, tenancy(web="strict"))
    play.run([ask(f"x{i}", 400, 20, at=0.01 * i, tenant="web") for i in range(40)])
    counts = counted(play, "web")["strict"]
    assert play.refusals and counts["ttft_refused"] == len(play.refusals)
    late = play.scheduler.life.tally.by_class()["strict"][1]
    assert late == counts.get("ttft_late", 0) + counts["ttft_refused"]


def test_who_puts_itself_behind_others_and_is_refused_is_not_counted() -> None:
    play = Play(LIMITS, tenancy(web="strict"))
    play.run([ask(f"x{i}", 400, 20, at=0.01 * i, tenant="web", priority=5) for i in range(40)])
    assert play.refusals
    assert counted(play, "web") == {"strict": {}}
    assert play.scheduler.life.tally.by_class()["strict"] == [0, 0, 0, 0]


def test_nobody_was_promised_what_is_pinned() -> None:
    play = Play(LIMITS, tenancy(web="strict", bulk="jobs"))
    play.run([ask(f"job{i}", 2000, 40, tenant="bulk") for i in range(8)], until=2.0)
    prefix = replace(ask("prefix", 400, 1, 0.1, tenant="web"), pinned_until=1e6)
    play.run([prefix])
    assert "prefix" in play.refusals or play.ttft("prefix") > TTFT
    assert counted(play, "web") == {"strict": {}}


@pytest.mark.parametrize(("gone", "expected"), [(0.5 * TTFT, {}), (1.5 * TTFT, {"ttft_never": 1})])
def test_a_first_token_is_missed_once_however_often_its_reader_comes_back(
    gone: float, expected: dict[str, int]
) -> None:
    """It was late when the reader left, or only because the reader had left."""
    play = Play(LIMITS, tenancy(web="chat"))
    request = ask("a", 8, 1, tenant="web")
    play.scheduler.add(request, 0.0)
    play.scheduler.cancel("a", gone)
    play.harness.now = 5 * TTFT
    play.harness.commands.append(Submit(request, Resumed((), gone, READER_BACK, None)))
    play.run([])
    assert play.finish["a"] is Finish.LENGTH
    assert counted(play, "web") == {"chat": expected}


def test_a_first_token_that_never_comes_is_missed_only_after_its_time() -> None:
    play = Play(LIMITS, tenancy(web="chat", bulk="jobs"))
    for name in ("early", "late", "failed"):
        play.scheduler.add(ask(name, 8, 8, tenant="web"), 0.0)
    play.scheduler.add(ask("job", 8, 8, tenant="bulk"), 0.0)
    play.scheduler.cancel("early", 0.9 * TTFT)
    assert "ttft_never" not in counted(play, "web")["chat"]
    play.scheduler.cancel("late", 1.1 * TTFT)
    play.scheduler.cancel("job", 1.1 * TTFT)
    failed = play.scheduler.waiting.get("failed")
    assert failed is not None
    play.scheduler.life.finish(failed, Finish.ERROR, 0.1 * TTFT)
    assert counted(play, "web") == {"chat": {"ttft_never": 2}}
    assert counted(play, "bulk") == {}


def test_what_a_tenant_holds_up_itself_is_neither_kept_nor_missed() -> None:
    quota = Quota(live_sequences=1)
    tenants = {"web": Tenant("web", class_name="chat", quota=quota)}
    play = Play(LIMITS, Tenancy(tenants, CLASSES))
    play.run([ask("a", 8, 200, tenant="web"), ask("b", 8, 1, tenant="web")])
    assert play.ttft("b") > TTFT
    assert "ttft_late" not in counted(play, "web")["chat"]
    play.run([ask("c", 8, 1, play.harness.now, tenant="web", priority=1)])
    assert counted(play, "web")["chat"]["ttft_kept"] == 1


def test_who_puts_itself_behind_others_is_not_counted() -> None:
    play = Play(LIMITS, tenancy(web="chat"))
    play.scheduler.add(ask("a", 8, 8, tenant="web", priority=1), 0.0)
    play.scheduler.cancel("a", 2 * TTFT)
    assert counted(play, "web") == {"chat": {}}


@pytest.mark.parametrize(
    ("away", "reason", "tokens", "expected"),
    [
        (2 * ITL, "engine_lost", 1, 1),
        (2 * ITL, "engine_changed", 1, 1),
        (0.5 * ITL, "engine_lost", 1, 0),
        (2 * ITL, READER_BACK, 1, 0),  # it was the reader who was away
        (2 * ITL, "engine_lost", 0, 0),  # the first token says whether that is late
    ],
)
def test_a_pause_for_another_engine_is_a_gap(
    away: float, reason: str, tokens: int, expected: int
) -> None:
    play = Play(LIMITS, tenancy(web="gaps"))
    first = 1.0 if tokens else None
    done = Resumed((7,) * tokens, 5.0, reason, first)
    play.harness.now = 5.0 + away
    play.harness.commands.append(Submit(ask("a", 8, 8, tenant="web"), done))
    play.run([])
    assert play.finish["a"] is Finish.LENGTH
    assert counted(play, "web")["gaps"].get("itl_paused", 0) == expected
