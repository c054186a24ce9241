"""Where promises pull against each other: what a review found, and what must not come back."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import pytest

from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Configure
from dynamo_serve.core.request import Finish, Grammar, Refusal, Request
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Shares
from dynamo_serve.core.tenant import CLASSES, Class, Quota, Tenancy, Tenant
from tests.core.playing import Play, ask

HASTY = Class("hasty", 0, ttft=0.3)
STRICT = Class("strict", 0, ttft=2.0, itl=0.25, strict=True)


def tenancy(**tenants: Tenant) -> Tenancy:
    named = {name: replace(tenant, name=name) for name, tenant in tenants.items()}
    return Tenancy(named, {**CLASSES, "hasty": HASTY, "strict": STRICT})


def limits(sequences: int = 16, waiting: int = 10_000) -> Limits:
    return Limits(512, sequences, 0.003, waiting, mix_phases=True)


def batch(quota: Quota | None = None) -> Tenant:
    return Tenant("", 1.0, "batch", quota or Quota())


def test_a_request_without_room_does_not_hold_up_what_runs() -> None:
    play = Play(limits(), tenancy(a=batch(), b=batch()), num_pages=100)
    play.run([ask("b", 1100, 10, tenant="b"), ask("a", 900, 10, 0.2, tenant="a")])
    assert play.finish == dict.fromkeys("ab", Finish.LENGTH)


def test_using_an_empty_server_is_not_held_against_anybody() -> None:
    play = Play(limits(), tenancy(a=batch(), b=Tenant("", 1.0, "hasty")))
    play.run([ask(f"b{i}", 100, 60, tenant="b") for i in range(200)])
    now = play.harness.now
    flood = [ask(f"a{i}", 100, 60, now + 1.0, tenant="a") for i in range(200)]
    play.run([*flood, ask("question", 40, 5, now + 2.0, tenant="b")])
    assert play.ttft("question") < 1.0


def test_guarantees_and_shares_do_not_take_turns_at_preempting() -> None:
    own = batch(Quota(pages_guaranteed=60))
    play = Play(limits(), tenancy(a=own, b=Tenant("", 9.0, "hasty")), num_pages=100)
    long = [ask(f"a{i}", 180, 200, tenant="a") for i in range(8)]
    play.run([*long, *(ask(f"b{i}", 300, 100, 5.0, tenant="b") for i in range(6))])
    assert len(play.finish) == 14
    assert play.scheduler.life.totals["preemptions"] < 30


def test_what_is_guaranteed_is_not_taken_to_let_others_grow() -> None:
    own = batch(Quota(pages_guaranteed=60))
    play = Play(limits(), tenancy(a=own, b=Tenant("", 9.0, "hasty")), num_pages=100)
    mine = [ask(f"a{i}", 100, 180, tenant="a") for i in range(3)]
    play.run([*mine, *(ask(f"b{i}", 100, 180, 0.5 + 0.1 * i, tenant="b") for i in range(12))])
    assert len(play.finish) == 15
    lost = [e for e in play.scheduler.journal.entries if e.kind.value == "preempt"]
    assert lost and all(entry.tenant == "b" for entry in lost)


def test_the_smallest_weight_is_served_within_a_minute() -> None:
    play = Play(limits(), tenancy(a=Tenant("", 1000.0, "batch"), b=batch()))
    heavy = [ask(f"a{i}", 100, 60, tenant="a") for i in range(500)]
    light = [ask(f"b{i}", 100, 60, 2.0 + 10 * i, tenant="b") for i in range(5)]
    play.run([*heavy, *light], until=120.0)
    assert max(play.ttft(f"b{i}") for i in range(5)) < 75.0


def test_a_removed_tenant_keeps_its_quotas() -> None:
    play = Play(limits(), tenancy(a=batch(Quota(live_sequences=1)), b=batch()))
    play.run([ask(f"a{i}", 50, 30, tenant="a") for i in range(6)], until=0.5)
    play.harness.commands.append(Configure(tenancy(b=batch())))
    play.run([], until=1.5)
    assert sum(seq.request.tenant == "a" for seq in play.scheduler.running.values()) == 1


def test_a_strict_tenant_gets_in_beside_long_answers_of_another() -> None:
    play = Play(limits(64), tenancy(a=Tenant("", 1.0, "strict"), b=batch()))
    play.run([ask(f"w{i}", 60, 20, 0.1 * i, tenant="a") for i in range(10)])
    play.run([ask(f"v{i}", 60, 20, play.harness.now, tenant="b") for i in range(64)])
    now = play.harness.now
    long = [ask(f"b{i}", 100, 800, now, tenant="b") for i in range(64)]
    questions = [ask(f"q{i}", 48, 30, now + 5 + 2 * i, tenant="a") for i in range(30)]
    play.run([*long, *questions], until=now + 70)
    served = [q.id for q in questions if q.id in play.tokens_at]
    assert len(served) >= 28
    assert max(map(play.ttft, served)) <= 2.0


def test_clients_that_never_come_back_do_not_close_the_server() -> None:
    play = Play(limits(), tenancy(default=Tenant("", 1.0, "strict")))
    play.run([ask(f"w{i}", 100, 30, 0.4 * i) for i in range(20)])
    now = play.harness.now
    load = [ask(f"r{i}", 100, 30, now + i / 7.6) for i in range(400)]
    play.run(load)
    served = sum(request.id in play.tokens_at for request in load)
    assert served / (play.harness.now - now) > 0.7 * 3.8, "it can do 3.8 a second"


def test_a_smaller_quota_lets_what_already_waits_run_alone() -> None:
    play = Play(limits(1), tenancy(a=batch(Quota(pages_burst=50)), b=batch()))
    play.run([ask("b", 100, 20, tenant="b"), ask("a", 400, 20, 0.05, tenant="a")], until=0.5)
    play.harness.commands.append(Configure(tenancy(a=batch(Quota(pages_burst=10)), b=batch())))
    play.run([])
    assert play.finish == dict.fromkeys("ab", Finish.LENGTH)


def test_a_full_queue_is_full_for_those_who_fill_it() -> None:
    play = Play(limits(waiting=50), tenancy(a=Tenant("", 9.0, "standard"), b=batch()))
    flood = [ask(f"b{i}", 100, 60, i / 20, tenant="b") for i in range(800)]
    questions = [ask(f"q{i}", 48, 5, 10.0 + i, tenant="a") for i in range(25)]
    play.run([*flood, *questions], until=40.0)
    refused = play.refusals
    assert refused and all(name.startswith("b") for name in refused)
    assert any(refusal.is_own for refusal in refused.values())


@pytest.mark.parametrize("count", [1, 4, 8])
def test_long_prompts_never_keep_out_a_short_one(count: int) -> None:
    play = Play(limits())
    long = [ask(f"long{i}", 3500, 4, 0.01 * i) for i in range(count)]
    play.run([*long, ask("short", 40, 4, 0.8)])
    assert play.ttft("short") < 1.2


def test_a_cached_prompt_is_not_refused_for_its_length() -> None:
    play = Play(limits(), tenancy(default=Tenant("", 1.0, "strict")))
    first = replace(ask("first", 3000, 20), salt="chat")
    play.run([first])
    now = play.harness.now
    turns = [
        replace(first, id=f"t{i}", arrival=now + 2 + i, prompt_ids=(*first.prompt_ids, i, i))
        for i in range(5)
    ]
    play.run([ask("other", 50, 100, now), *turns])
    assert not play.refusals
    assert max(play.ttft(turn.id) for turn in turns) < 0.5


def test_a_long_limit_is_not_a_long_answer() -> None:
    """Clients rarely say how long an answer may be: then it may be as long as the context."""
    play = Play(limits())
    stop = frozenset(range(0, 50_000, 20))
    chats = [
        replace(ask(f"c{i}", 40, 3900, 5.0 * i, deadline=5.0 * i + 20), stop_ids=stop)
        for i in range(30)
    ]
    play.run(chats)
    assert not play.refusals
    assert list(play.finish.values()).count(Finish.STOP) >= 28


def test_all_choices_of_a_call_are_counted_at_once() -> None:
    play = Play(limits(), tenancy(a=batch(Quota(requests_per_minute=6))))

    def call(name: str, at: float, count: int) -> list[Request]:
        return [
            replace(ask(f"{name}-{i}", 20, 4, at, tenant="a"), num_choices=count if i == 0 else 0)
            for i in range(count)
        ]

    play.run([*call("one", 0.0, 4), *call("two", 1.0, 4)])
    assert set(play.finish) == {f"one-{i}" for i in range(4)}
    assert set(play.refusals) == {f"two-{i}" for i in range(4)}
    wait = play.refusals["two-0"].retry_after
    assert wait == pytest.approx(20.0, abs=2.0), "two more at six a minute"
    play.run(call("two", 1.0 + wait, 4))
    assert {f"two-{i}" for i in range(4)} <= play.finish.keys()


def test_everybody_who_is_told_to_come_again_is_told_another_time() -> None:
    play = Play(limits(), tenancy(a=batch(Quota(requests_per_minute=60))))
    tries: dict[str, int] = {}

    def obey(request: Request, refusal: Refusal, now: float) -> Request | None:
        tries[request.id] = tries.get(request.id, 0) + 1
        return (
            replace(request, arrival=now + refusal.retry_after) if tries[request.id] < 2 else None
        )

    same = [replace(ask("p", 20, 4, 0.05 * i, tenant="a"), id=f"r{i}") for i in range(110)]
    play.run(same, on_refusal=obey)
    assert len(tries) >= 45
    got_in = sum(count == 1 for count in tries.values())
    assert got_in >= 0.8 * len(tries)


def test_waits_behind_a_quota_are_foreseen() -> None:
    play = Play(limits(), tenancy(a=batch(Quota(live_sequences=1)), b=batch()))
    play.run([ask(f"w{i}", 100, 40, tenant="a") for i in range(4)])
    load = [ask(f"a{i}", 100, 40, play.harness.now, tenant="a") for i in range(20)]
    play.run(load, until=play.harness.now + 0.3)
    now, scheduler = play.harness.now, play.scheduler
    seen = {
        seq.id: forecast(seq, scheduler.life, scheduler.intake).first_token
        for seq in scheduler.waiting
    }
    play.run([])
    real = {name: play.tokens_at[name][0] - now for name in seen}
    assert median(abs(seen[name] - real[name]) / real[name] for name in seen) < 0.15


@pytest.mark.parametrize("length", [{}, {"stop_ids": frozenset([1]), "min_tokens": 600}])
def test_an_answer_that_nothing_ends_is_foreseen_to_its_end(length: dict[str, Any]) -> None:
    """However short those were that came before: 600 tokens will be 600."""
    play = Play(limits(), tenancy(a=batch(Quota(live_sequences=1))))
    stop = frozenset(range(0, 50_000, 20))
    chats = [replace(ask(f"c{i}", 40, 600, tenant="a"), stop_ids=stop) for i in range(30)]
    play.run(chats)
    assert list(play.finish.values()).count(Finish.STOP) >= 28
    now = play.harness.now
    long = replace(ask("long", 40, 600, now, tenant="a"), **length)
    play.run([long, ask("next", 40, 5, now + 0.01, tenant="a")], until=now + 5.0)
    (waits,) = play.scheduler.waiting
    now = play.harness.now
    seen = forecast(waits, play.scheduler.life, play.scheduler.intake).first_token
    play.run([])
    assert seen == pytest.approx(play.tokens_at["next"][0] - now, rel=0.1)


def test_a_grammar_may_end_an_answer_that_no_token_ends() -> None:
    shares, promise = Shares(Tenancy()), Tenancy().class_of("default")
    told = ask("told", 40, 2000)
    grammar = replace(told, grammar=Grammar("regex", "[ab]"))
    assert shares.outputs(Sequence.of(told, promise, 1)) == 2000
    assert shares.outputs(Sequence.of(grammar, promise, 2)) < 2000


def test_the_waits_of_a_request_tell_what_it_waited_for() -> None:
    play = Play(limits(1))
    play.run(
        [ask("first", 20, 30), ask("second", 20, 30, 0.01), ask("third", 20, 3, 0.02)], until=5.0
    )
    third = play.scheduler.waiting.get("third")
    assert third is not None
    play.run([])
    assert third.waits["order"] == pytest.approx(2.5, abs=0.3), "while second was before it"
    assert third.waits["slots"] == pytest.approx(2.5, abs=0.3), "while second was running"
    assert sum(third.waits.values()) == pytest.approx(play.ttft("third"), abs=0.2)


def test_shared_pages_are_paid_for_by_those_who_hold_them() -> None:
    play = Play(limits(), tenancy(a=batch(), b=batch()))
    head = ask("head", 1600, 1).prompt_ids
    shared = [
        replace(ask(f"a{i}", 16, 100, tenant="a"), prompt_ids=(*head, i), salt="a")
        for i in range(8)
    ]
    own = [ask(f"b{i}", 800, 100, tenant="b") for i in range(2)]
    play.run([*shared, *own])
    accounts = play.scheduler.shares.accounts
    ratio = accounts["a"].page_seconds / accounts["b"].page_seconds
    assert ratio == pytest.approx(1.4, rel=0.3), "about 100 + 8 x 7 pages against 2 x 57"
