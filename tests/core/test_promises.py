"""Every promise to tenants and classes, under a virtual clock."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Configure
from dynamo_serve.core.request import Finish, Refusal, Request
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.playing import Play, ask

ITL = 0.25
CLASSES = {
    "chat": Class("chat", 0, ttft=1.0, itl=ITL),
    "steady": Class("steady", 0, itl=ITL, strict=True),
    "quick": Class("quick", 0, ttft=0.5, itl=ITL),
    "shed": Class("shed", 0, ttft=2.0, itl=ITL, strict=True),
    "batch": Class("batch", 2),
}


def tenancy(**tenants: Tenant) -> Tenancy:
    return Tenancy({name: replace(t, name=name) for name, t in tenants.items()}, CLASSES)


def limits(**changes: object) -> Limits:
    return replace(
        Limits(max_prefill_tokens=512, max_decode_sequences=16, mix_phases=True),
        **changes,  # type: ignore[arg-type]
    )


# ── ITL ──────────────────────────────────────────────────────────────────────


def streams_beside_long_prompts(fit_chunks: bool, mix_phases: bool) -> Play:
    play = Play(
        limits(fit_chunks=fit_chunks, mix_phases=mix_phases),
        tenancy(default=Tenant("", class_name="chat")),
    )
    streams = [ask(f"s{i}", 64, 300) for i in range(4)]
    long = [ask(f"long{i}", 2000, 8, 4.0 + 6.0 * i) for i in range(5)]
    return play.run([*streams, *long])


@pytest.mark.parametrize("mix_phases", [True, False])
def test_a_long_prompt_does_not_stop_the_streams(mix_phases: bool) -> None:
    gaps = {}
    for fit_chunks in (True, False):
        play = streams_beside_long_prompts(fit_chunks, mix_phases)
        gaps[fit_chunks] = max(play.longest_gap(f"s{i}") for i in range(4))
    assert gaps[True] <= 1.1 * ITL
    assert gaps[False] > 1.5 * ITL, "without learned chunks they do not stop either"


def test_a_promise_that_cannot_be_kept_does_not_stop_the_prompts() -> None:
    """Where decoding alone takes longer than the target, prefill still goes on."""
    classes = {"chat": Class("chat", itl=0.01)}
    play = Play(limits(), Tenancy({"default": Tenant("default", 1, "chat")}, classes))
    play.run([ask("s", 16, 100), ask("p", 1000, 2, 1.0)])
    assert play.ttft("p") < 1000 / 16 * 0.1, "in the smallest chunks it would take this long"
    assert any(entry.kind.value == "degrade" for entry in play.scheduler.journal.entries)


def test_the_batch_grows_only_as_far_as_the_targets_allow() -> None:
    play = Play(
        limits(max_decode_sequences=100),
        tenancy(default=Tenant("", class_name="steady"), bulk=Tenant("", class_name="batch")),
    )
    flood = [ask(f"f{i}", 32, 60, tenant="bulk") for i in range(150)]
    play.run([ask("s", 32, 200), *flood])
    after = [
        b - a for a, b in zip(play.tokens_at["s"][20:], play.tokens_at["s"][21:], strict=False)
    ]
    assert max(after) <= 1.1 * ITL
    assert max(len(play.tokens_at[f"f{i}"]) for i in range(150)) == 60


# ── prefill is shared ────────────────────────────────────────────────────────


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    play = Play(limits())
    play.run([ask("long", 3500, 4), ask("short", 40, 4, 0.2)])
    assert play.ttft("short") < 1.2, "two steps"
    assert play.ttft("short") < play.ttft("long") / 3


# ── shares ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outputs", [(60, 60), (20, 120)])
def test_saturating_tenants_are_served_by_weight(outputs: tuple[int, int]) -> None:
    play = Play(limits(), tenancy(a=Tenant("", 3.0, "batch"), b=Tenant("", 1.0, "batch")))
    requests = [
        ask(f"{name}{i}", 100, count, tenant=name)
        for name, count in zip("ab", outputs, strict=True)
        for i in range(2000)
    ]
    # What runs is paid for in advance; at the start that is not yet the same part for both.
    play.run(requests, until=50.0)
    accounts = play.scheduler.shares.accounts
    before = {name: accounts[name].cost for name in "ab"}
    play.run([], until=250.0)
    gained = {name: accounts[name].cost - before[name] for name in "ab"}
    assert gained["a"] / gained["b"] == pytest.approx(3.0, rel=0.05)


def test_a_share_that_nobody_uses_is_used_by_others() -> None:
    play = Play(limits(), tenancy(a=Tenant("", 1.0, "batch"), b=Tenant("", 99.0, "batch")))
    play.run([ask(f"a{i}", 32, 40, tenant="a") for i in range(32)], until=1.0)
    assert len(play.scheduler.running) == 16


def test_time_away_is_not_saved_up() -> None:
    """A tenant that was away for long gets its share from now on, not what it missed."""
    play = Play(limits(), tenancy(a=Tenant("", 1.0, "batch"), b=Tenant("", 1.0, "batch")))
    early = [ask(f"a{i}", 32, 40, tenant="a") for i in range(500)]
    late = [ask(f"b{i}", 32, 40, 60.0, tenant="b") for i in range(500)]
    play.run([*early, *late], until=60.0)
    before = play.scheduler.shares.accounts["a"].cost
    play.run(late, until=120.0)
    accounts = play.scheduler.shares.accounts
    assert accounts["b"].cost / (accounts["a"].cost - before) == pytest.approx(1.0, rel=0.15)


def flood_and_questions(with_flood: bool) -> tuple[list[float], float]:
    """TTFT of the questions (late ones, when the model is learned), and when the flood ended."""
    play = Play(
        limits(max_decode_sequences=24),
        tenancy(a=Tenant("", 1.0, "quick"), b=Tenant("", 1.0, "batch")),
    )
    questions = [ask(f"q{i}", 48, 16, 1.0 * i, tenant="a") for i in range(40)]
    flood = [ask(f"f{i}", 200, 64, 3.0, tenant="b") for i in range(100)] if with_flood else []
    play.run([*questions, *flood])
    ended = max((play.finished_at[r.id] for r in flood), default=3.0)
    return [play.ttft(q.id) for q in questions if 4.0 < q.arrival < max(ended, 20.0)], ended - 3.0


def test_a_flood_does_not_drown_questions() -> None:
    calm, _ = flood_and_questions(False)
    stormy, _ = flood_and_questions(True)
    assert median(stormy) <= 2.5 * median(calm)
    assert max(stormy) <= 3.5 * max(calm)


def test_the_smallest_share_is_still_served() -> None:
    play = Play(limits(), tenancy(a=Tenant("", 100.0, "chat"), b=Tenant("", 0.01, "batch")))
    endless = [ask(f"a{i}", 100, 40, tenant="a") for i in range(600)]
    play.run([*endless, ask("b", 50, 5, 5.0, tenant="b")], until=200.0)
    assert "b" in play.finish


def test_lower_priority_waits_but_not_for_ever() -> None:
    play = Play(limits(max_decode_sequences=1))
    rivals = [ask(f"r{i}", 10, 4, 0.3 * i) for i in range(100)]
    play.run([*rivals, ask("low", 10, 4, 0.5, priority=1)])
    first = [name for name, _ in sorted(play.tokens_at.items(), key=lambda at: at[1][0])]
    assert 10 < first.index("low") < 95


def test_other_weights_hold_at_once() -> None:
    play = Play(limits(), tenancy(a=Tenant("", 1.0, "batch"), b=Tenant("", 1.0, "batch")))
    requests = [ask(f"{n}{i}", 50, 40, tenant=n) for n in "ab" for i in range(600)]
    play.run(requests, until=40.0)
    accounts = play.scheduler.shares.accounts
    before = {name: accounts[name].cost for name in "ab"}
    changed = tenancy(a=Tenant("", 4.0, "batch"), b=Tenant("", 1.0, "batch"))
    play.harness.commands.append(Configure(changed))
    play.run([], until=140.0)
    gained = {name: accounts[name].cost - before[name] for name in "ab"}
    assert gained["a"] / gained["b"] == pytest.approx(4.0, rel=0.1)


# ── pages ────────────────────────────────────────────────────────────────────


def test_guaranteed_pages_are_lent_and_given_back() -> None:
    own = Tenant("", 1.0, "batch", Quota(pages_guaranteed=40))
    play = Play(limits(), tenancy(a=own, b=Tenant("", 1.0, "batch")), num_pages=100)
    borrowers = [ask(f"b{i}", 200, 100, tenant="b") for i in range(5)]
    play.run([*borrowers, ask("a", 500, 10, 3.0, tenant="a")])
    assert play.ttft("a") < 1.5
    assert any(entry.reason == "guarantee" for entry in play.scheduler.journal.entries)
    assert set(play.finish.values()) == {Finish.LENGTH}


# ── deadlines and quotas ─────────────────────────────────────────────────────


def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    """Nothing is known of this server yet, so both are taken in; it is slower than it thinks."""
    play = Play(limits(max_decode_sequences=1))
    play.run([ask("runs", 10, 100, deadline=2.5), ask("waits", 10, 5, deadline=2.0)])
    assert play.finish == dict.fromkeys(("runs", "waits"), Finish.DEADLINE)
    assert 2.5 <= play.finished_at["runs"] < 2.7, "within a step"
    assert 2.0 <= play.finished_at["waits"] < 2.2
    assert "waits" not in play.tokens_at
    assert play.scheduler.pool.num_used == 0


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    play = Play(limits())
    learn = [ask(f"learn{i}", 100, 50) for i in range(20)]
    play.run(learn)
    now = play.harness.now
    play.run(
        [
            ask("late", 100, 50, now, deadline=now + 1.0),
            ask("fine", 100, 50, now, deadline=now + 60),
        ]
    )
    refusal = play.refusals["late"]
    assert (refusal.reason, refusal.is_own) == ("deadline", False)
    assert refusal.predicted_wait is not None and refusal.retry_after >= 1.0
    assert play.finish["fine"] is Finish.LENGTH and "late" not in play.finish


@pytest.mark.parametrize(
    ("quota", "reason"),
    [
        (Quota(requests_per_minute=6), "requests_per_minute"),
        (Quota(tokens_per_minute=600), "tokens_per_minute"),
    ],
)
def test_a_rate_is_kept_and_who_comes_when_told_gets_in(quota: Quota, reason: str) -> None:
    play = Play(limits(), tenancy(a=Tenant("", 1.0, "batch", quota)))

    def obey(request: Request, refusal: Refusal, now: float) -> Request:
        assert (refusal.reason, refusal.is_own) == (reason, True)
        return replace(request, arrival=now + refusal.retry_after)

    requests = [ask(f"r{i}", 80, 20, 0.1 * i, tenant="a") for i in range(12)]
    play.run(requests, on_refusal=obey)
    assert len(play.finish) == 12
    assert max(play.finished_at.values()) > 50.0, "a minute's worth at once, the rest at the rate"


def test_a_long_queue_is_refused_with_the_time_it_takes() -> None:
    play = Play(limits(), tenancy(a=Tenant("", 1.0, "batch", Quota(queue_length=4))))
    play.run([ask(f"r{i}", 100, 40, tenant="a") for i in range(40)])
    assert {r.reason for r in play.refusals.values()} == {"queue_length"}
    assert len(play.finish) + len(play.refusals) == 40


# ── overload ─────────────────────────────────────────────────────────────────


def test_overload_is_refused_early_and_whoever_obeys_gets_in() -> None:
    play = Play(limits(), tenancy(default=Tenant("", class_name="shed")))
    warm = [ask(f"w{i}", 100, 30, 0.4 * i) for i in range(20)]
    play.run(warm)
    start = play.harness.now
    # 16 at a time, 30 tokens each at about 0.14 s: 3.8 requests a second are all it can do.
    attempts: dict[str, int] = {}
    outcomes = {True: 0, False: 0}

    def obey(request: Request, refusal: Refusal, now: float) -> Request | None:
        if attempts.get(request.id):
            outcomes[False] += 1
            return None
        attempts[request.id] = 1
        return replace(request, arrival=now + refusal.retry_after)

    load = [ask(f"r{i}", 100, 30, start + i / 7.6) for i in range(280)]
    play.run(load, on_refusal=obey)
    served = [r.id for r in load if r.id in play.tokens_at]
    returned = [name for name in attempts if name in play.tokens_at]
    since = {**play.arrived}
    for name in returned:
        since[name] = play.returned_at[name]
    in_time = [play.tokens_at[name][0] - since[name] <= 2.0 for name in served]
    assert sum(in_time) >= 0.95 * len(served)
    assert len(returned) >= 0.95 * len(attempts)
    assert len(attempts) > 100, "that was no overload"
    assert len(served) > 250


# ── forecasts ────────────────────────────────────────────────────────────────


def test_waits_are_foreseen() -> None:
    from dynamo_serve.core.forecast import forecast

    play = Play(limits(), tenancy(a=Tenant("", 2.0, "batch"), b=Tenant("", 1.0, "batch")))
    load = [
        ask(f"{n}{i}", 50 + 37 * i % 300, 20 + 13 * i % 60, 0.2 * i, tenant=n)
        for n in "ab"
        for i in range(60)
    ]
    play.run(load[:20])
    late = [replace(r, id=f"x{r.id}", arrival=play.harness.now) for r in load]
    play.run(late, until=play.harness.now + 0.5)
    now = play.harness.now
    seen = {
        seq.id: forecast(seq, play.scheduler.life, play.scheduler.intake).first_token
        for seq in play.scheduler.waiting
    }
    play.run([])
    errors = [
        abs(wait - (play.tokens_at[n][0] - now)) / (play.tokens_at[n][0] - now)
        for n, wait in seen.items()
    ]
    assert len(errors) > 80
    assert median(errors) < 0.25
