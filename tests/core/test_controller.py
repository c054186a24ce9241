"""The healing ladder under a virtual clock: when it acts, what that brings, how it comes back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from random import Random

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.controller import Controller
from dynamo_serve.core.evidence import Evidence, Window
from dynamo_serve.core.journal import Journal, Kind, Reason
from dynamo_serve.core.ladder import (
    CALM_SECONDS,
    CHUNK_FLOOR,
    NAMES,
    RUNGS,
    SETTLE_SECONDS,
    Mode,
    Restraint,
    modes_of,
)
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Inspect, Steer
from dynamo_serve.core.page_parts import PageParts
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.pins import Pinning, Pins
from dynamo_serve.core.request import Finish, Refusal, Request
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Shares
from dynamo_serve.core.spill import Spill
from dynamo_serve.core.stats import OUTCOMES
from dynamo_serve.core.step_cost import StepCost
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from dynamo_serve.core.wear import Wear
from tests.core.playing import Play, ask

TTFT, ITL = 1.0, 0.25
CLASSES = {
    "chat": Class("chat", 0, ttft=TTFT, itl=ITL),
    "strict": Class("strict", 0, ttft=TTFT, itl=ITL, strict=True),
    "batch": Class("batch", 2),
}
LIMITS = Limits(512, 64, max_mixed_tokens=256, mix_phases=True, ladder=True)
CALM_S, OVERLOAD_S = 60.0, 300.0
CHATS, BATCHES = 4 / 3, 0.4  # a second, while all is calm
FACTOR = 3.0
BACK_S = 120.0  # in which everything is undone,
LOOKING_S = 30.0  # and looks ahead, where a backlog stands


def tenancy(name: str = "chat", **quota: int) -> Tenancy:
    web = Tenant("web", 1.0, name, Quota(**quota))
    tenants = {"web": web, "bulk": Tenant("bulk", 1.0, "batch")}
    return Tenancy(tenants, CLASSES)


def new_life(pool: PagePool) -> Lifecycle:
    shares = Shares(tenancy())
    pins = Pins(pool, shares, Pinning())
    spill = Spill(pool, [], StepCost())
    return Lifecycle(pool, shares, Journal(), spill, pins, PageParts(pool, spill, None, 1))


def chats(rate: float, begin: float, end: float) -> list[Request]:
    count = round(rate * (end - begin))
    return [ask(f"chat{begin + i / rate:.3f}", 64, 16, begin + i / rate, tenant="web")
            for i in range(count)]  # fmt: skip


def batches(rate: float, begin: float, end: float, outputs: int = 250) -> list[Request]:
    count = round(rate * (end - begin))
    return [ask(f"batch{begin + i / rate:.3f}", 200, outputs, begin + i / rate, tenant="bulk")
            for i in range(count)]  # fmt: skip


def attained(play: Play, requests: Iterable[Request]) -> tuple[float, float]:
    """The shares of TTFT and ITL targets that were kept."""
    mine = list(requests)
    in_time = [r.id in play.tokens_at and play.ttft(r.id) <= TTFT for r in mine]
    gaps = [b - a for r in mine for a, b in pairwise(play.tokens_at.get(r.id, ()))]
    return sum(in_time) / len(mine), sum(gap <= ITL for gap in gaps) / max(1, len(gaps))


def moves(play: Play) -> list[tuple[str, str]]:
    return [(change.rung, change.direction) for change in play.scheduler.controller.history]


@cache
def overloaded(ladder: bool) -> tuple[Play, list[Request]]:
    """Calm, three times as much of everything for five minutes, and calm again."""
    play = Play(replace(LIMITS, ladder=ladder), tenancy())
    end = CALM_S + OVERLOAD_S
    flood = [
        *chats(FACTOR * CHATS, CALM_S, end),
        *batches(FACTOR * BATCHES, CALM_S, end),
    ]
    calm = [
        *(r for at in ((0.0, CALM_S), (end, end + BACK_S)) for r in chats(CHATS, *at)),
        *(r for at in ((0.0, CALM_S), (end, end + BACK_S)) for r in batches(BATCHES, *at, 64)),
    ]
    play.run([*flood, *calm])
    return play, flood


# ── what it is for ───────────────────────────────────────────────────────────


def test_promises_are_kept_in_an_overload_that_breaks_them_without() -> None:
    kept = {}
    for ladder in (True, False):
        play, flood = overloaded(ladder)
        kept[ladder] = attained(play, [r for r in flood if r.tenant == "web"])
    assert kept[False][0] < 0.5, "that was no overload"
    assert kept[True][0] > kept[False][0] + 0.4
    assert kept[True][1] > kept[False][1] - 0.01 and kept[False][1] >= 0.95


def test_rungs_are_taken_in_their_order_and_all_undone() -> None:
    play, _ = overloaded(True)
    controller = play.scheduler.controller
    up = [name for name, way in moves(play) if way == "up"]
    first = list(dict.fromkeys(up))
    assert first == [name for name in NAMES if name in first] and len(first) >= 2
    assert up[0] == "widen_window", "nothing was wrong with the gaps"
    assert controller.levels == (0,) * len(RUNGS)
    assert controller.restraint == replace(
        Restraint(), sheds_until=controller.restraint.sheds_until
    )
    last = controller.history[-1]
    assert last.at < CALM_S + OVERLOAD_S + BACK_S + LOOKING_S
    assert last.at < max(play.finished_at.values()), "while others still wait"


def test_one_rung_at_a_time_with_time_to_settle_and_longer_to_come_back() -> None:
    play, _ = overloaded(True)
    for before, after in pairwise(play.scheduler.controller.history):
        least = SETTLE_SECONDS if after.direction == "up" else CALM_SECONDS
        if before.direction == "up":
            assert after.at - before.at >= least


def test_an_overload_loses_nothing() -> None:
    play, _ = overloaded(True)
    assert play.finish.keys() | play.refusals.keys() == play.arrived.keys()
    assert not play.finish.keys() & play.refusals.keys()
    assert set(play.finish.values()) == {Finish.LENGTH}
    play.scheduler.check()
    pool = play.scheduler.pool
    assert pool.num_free + pool.num_cached == pool.num_pages


def test_what_is_shed_is_told_when_to_come_again() -> None:
    play, _ = overloaded(True)
    assert play.refusals, "nothing was shed"
    for name, refusal in play.refusals.items():
        assert name.startswith("batch")
        assert (refusal.reason, refusal.is_own) == ("shed_batch", False)
        assert refusal.retry_after >= 1.0 and refusal.predicted_wait is not None


def test_whoever_comes_when_told_gets_in_at_last() -> None:
    play = Play(LIMITS, tenancy())

    def obey(request: Request, refusal: Refusal, now: float) -> Request:
        return replace(request, arrival=now + refusal.retry_after)

    play.harness.commands.append(Steer({"shed_batch": "pin"}))
    play.run(chats(1.0, 0.0, 20.0), until=10.0)
    play.harness.commands.append(Steer({"shed_batch": "auto"}))
    some = [ask(f"b{i}", 50, 5, 10.0, tenant="bulk") for i in range(5)]
    play.run([*some, *chats(1.0, 20.0, 60.0)], on_refusal=obey)
    assert {r.id for r in some} <= play.finish.keys()
    assert len({play.returned_at[r.id] for r in some}) == 5, "not all at once"


def test_refusals_of_a_strict_class_are_missed_promises() -> None:
    """Whoever is refused for a target gets no late token; the server is in trouble all the same."""
    play = Play(LIMITS, tenancy("strict"))
    play.run([*chats(6.0, 0.0, 60.0), *batches(2.0, 0.0, 60.0)], until=60.0)
    assert ("cap_batch", "up") in moves(play)


def test_smaller_chunks_save_the_gaps_and_say_so() -> None:
    """Without chunks that are fitted to the targets, long prompts make everybody wait."""
    kept = {}
    for ladder in (False, True):
        play = Play(replace(LIMITS, fit_chunks=False, ladder=ladder), tenancy())
        asked = chats(2.0, 0.0, 60.0)
        prompts = [ask(f"p{i}", 1000, 4, i / 1.2, tenant="bulk") for i in range(72)]
        play.run([*asked, *prompts], until=60.0)
        kept[ladder] = attained(play, asked[40:100])[1]
    assert kept[False] < 0.5 and kept[True] > 0.85
    history = play.scheduler.controller.history
    assert (history[0].rung, history[0].trigger) == ("shrink_chunks", "itl")
    assert play.scheduler.controller.states["shrink_chunks"].has_helped


# ── when it must not act ─────────────────────────────────────────────────────


def test_a_healthy_server_at_capacity_is_left_alone() -> None:
    play = Play(LIMITS, tenancy())
    play.run([*chats(2.0, 0.0, 120.0), *batches(0.5, 0.0, 120.0, 120)])
    assert len(play.scheduler.life.tally.by_class()) == 1
    assert moves(play) == []


@pytest.mark.parametrize("num_pages", [60, 4096])
@pytest.mark.parametrize("name", ["unnamed", "batch"])
def test_where_nobody_has_targets_nothing_is_wrong(name: str, num_pages: int) -> None:
    """Also with a full pool, preemptions all the time, and steps that take a second."""
    tenants = None if name == "unnamed" else tenancy("batch")
    play = Play(LIMITS, tenants, num_pages=num_pages)
    play.harness.engine.fixed = 1.0  # type: ignore[attr-defined]
    tenant = "default" if name == "unnamed" else "web"
    play.run([ask(f"r{i}", 60, 150, 0.1 * i, tenant=tenant) for i in range(60)])
    if num_pages < 100:
        assert play.scheduler.life.totals["preemptions"] > 10
    assert moves(play) == []


def test_cached_pages_are_no_pressure() -> None:
    play = Play(LIMITS, tenancy(), num_pages=200)
    play.run([*chats(1.0, 0.0, 60.0), *batches(0.2, 0.0, 60.0, 20)])
    assert play.scheduler.pool.num_cached > 190
    assert moves(play) == []


def test_a_bad_second_is_no_trouble() -> None:
    play = Play(LIMITS, tenancy())
    engine = play.harness.engine
    todo = [*chats(1.0, 0.0, 60.0), *batches(0.4, 0.0, 60.0, 64)]
    play.run([r for r in todo if r.arrival < 29.0], until=29.0)
    unlucky = [ask(f"unlucky{i}", 64, 4, play.harness.now, tenant="web") for i in range(4)]
    engine.fixed = 1.3  # type: ignore[attr-defined]
    play.run(unlucky, until=29.1)
    del engine.fixed  # type: ignore[attr-defined]
    worst = []
    for at in range(30, 60):
        play.run([r for r in todo if at - 1 <= r.arrival < at], until=at)
        worst.append(play.scheduler.controller.evidence.ttft or 1.0)
    assert min(worst) < 0.8, "nobody noticed"
    assert moves(play) == []


def test_waiting_for_one_s_own_quota_is_no_trouble() -> None:
    play = Play(LIMITS, tenancy(live_sequences=2))
    play.run([*chats(4.0, 0.0, 60.0), *batches(0.4, 0.0, 60.0, 64)], until=90.0)
    assert attained(play, chats(4.0, 20.0, 40.0))[0] < 0.5
    assert moves(play) == []


def test_switched_off_it_never_acts() -> None:
    play, _ = overloaded(False)
    assert moves(play) == []


def test_a_load_at_the_threshold_does_not_make_it_flap() -> None:
    play = Play(LIMITS, tenancy())
    play.run([*chats(4.0, 0.0, 900.0), *batches(1.2, 0.0, 900.0)], until=900.0)
    changes = [change.at for change in play.scheduler.controller.history]
    assert len(changes) > 3, "it had nothing to do"
    assert len(changes) <= 40
    assert sum(at > 600.0 for at in changes) <= len(changes) / 3, "it does not calm down"


# ── one part at a time ───────────────────────────────────────────────────────


def controller_of(**modes: Mode) -> Controller:
    pool = PagePool(100, 16)
    controller = Controller(new_life(pool), Restraint(), Wear(), LIMITS)
    controller.steer(modes, 0.0)
    return controller


class Told(Window):
    """Says what the test tells it to."""

    seen = Evidence()

    def look(self, now: float) -> Evidence:
        return self.seen


def told(controller: Controller, begin: float, end: float, **facts: object) -> None:
    """Look at this evidence from `begin` to `end`."""
    window = Told(controller.life, Wear())
    window.seen = Evidence(**{"has_batch": True, **facts})  # type: ignore[arg-type]
    controller._window = window
    at = begin
    while at < end:
        controller.look(at)
        at += 0.1


BAD: dict[str, object] = {"itl": 0.3, "troubles": ("itl",), "is_good": False}


def test_each_rung_settles_before_the_next_and_waits_while_it_gets_better() -> None:
    controller = controller_of()
    told(controller, 0.0, 2.9, **BAD)
    assert controller.levels == (1, 0, 0, 0, 0, 0, 0)
    told(controller, 3.0, 5.0, **{**BAD, "itl": 0.5})
    assert controller.levels == (1, 0, 0, 0, 0, 0, 0), "it got better, so it may go on doing so"
    told(controller, 6.1, 6.3, **{**BAD, "itl": 0.5})
    assert controller.levels == (2, 0, 0, 0, 0, 0, 0)
    told(controller, 7.0, 60.0, **{**BAD, "itl": 0.5})
    assert controller.levels == (2, 1, 2, 0, 1, 0, 0)
    assert controller.states["shed_batch"].has_helped is False


def test_a_rung_that_cannot_help_is_passed_over() -> None:
    controller = controller_of()
    told(controller, 0.0, 60.0, **{**BAD, "has_batch": False})
    assert controller.levels == (2, 0, 0, 0, 0, 0, 0), "there is no batch-class work to hold back"
    controller = controller_of()
    told(controller, 0.0, 1.0, preemptions=3.0, troubles=("pages",), is_good=False)
    assert controller.levels == (0, 0, 1, 0, 0, 0, 0)


def test_what_is_neither_good_nor_bad_changes_nothing() -> None:
    controller = controller_of()
    told(controller, 0.0, 4.0, **BAD)
    levels = controller.levels
    told(controller, 4.0, 100.0, itl=0.9, is_good=False)
    assert controller.levels == levels
    told(controller, 100.0, 100.0 + CALM_SECONDS + 0.8, itl=1.0)
    assert sum(controller.levels) == sum(levels) - 1


def test_a_rung_needed_again_soon_is_kept_twice_as_long() -> None:
    controller = controller_of(**dict.fromkeys(NAMES[1:], Mode.FORBID))
    at, kept = 0.0, []
    for _ in range(6):
        told(controller, at, at + 0.1, **BAD)
        begin = at
        while controller.levels[0]:
            at += 0.5
            told(controller, at, at + 0.05)
        kept.append(at - begin)
        at += 4.0
    assert kept == pytest.approx([10, 20, 40, 80, 120, 120], abs=2.0)
    told(controller, at + 300.0, at + 300.1, **BAD)
    assert controller.states["shrink_chunks"].calm == CALM_SECONDS, "that was long ago"


def test_operators_pin_forbid_and_release() -> None:
    controller = controller_of(cap_batch=Mode.PIN, widen_window=Mode.FORBID)
    assert controller.levels == (0, 0, 2, 0, 0, 0, 0)
    told(controller, 1.0, 60.0, **BAD)
    assert controller.levels == (2, 0, 2, 0, 1, 0, 0)
    told(controller, 60.0, 200.0)
    assert controller.levels == (0, 0, 2, 0, 0, 0, 0), "pinned is pinned"
    controller.steer({"cap_batch": Mode.AUTO}, 200.0)
    assert controller.levels == (0, 0, 2, 0, 0, 0, 0)
    told(controller, 200.0, 240.0)
    assert controller.levels == (0, 0, 0, 0, 0, 0, 0)
    controller.steer({"shed_batch": Mode.PIN}, 240.0)
    controller.steer({"shed_batch": Mode.FORBID}, 241.0)
    assert controller.levels == (0, 0, 0, 0, 0, 0, 0)
    assert {change.trigger for change in list(controller.history)[-2:]} == {"operator"}
    assert modes_of(["cap_batch"], ["cap_batch"]) == {"cap_batch": Mode.FORBID}


def test_chunks_have_a_floor() -> None:
    restraint = Restraint()
    caps = []
    for level in (0, 1, 2):
        RUNGS[0].apply(restraint, level)
        caps.append([restraint.chunk_cap(cap) for cap in (512, 100, 20)])
    assert caps == [[512, 100, 20], [256, 50, 20], [128, CHUNK_FLOOR, 20]]


def test_thrashing_is_trouble_and_a_full_pool_is_not() -> None:
    life = new_life(PagePool(100, 16))
    life.tally.counts["web"] = {"chat": [0] * len(OUTCOMES)}
    window, at = Window(life, Wear()), 0.0
    life.pool.grow([], 99 * 16)
    for _ in range(60):
        at += 0.25
        assert window.look(at).troubles == ()
    for _ in range(60):
        at += 0.25
        life.journal.note(at, Kind.PREEMPT, Reason.OUT_OF_PAGES.value)
        seen = window.look(at)
    assert seen.troubles == ("pages",)


def test_prompts_with_a_lower_priority_tell_nothing() -> None:
    tally = new_life(PagePool(4, 16)).tally
    account = Shares(tenancy()).account("web")
    for priority in (0, 1):
        request = ask("x", 4, 4, 0.0, tenant="web", priority=priority)
        seq = Sequence.of(request, CLASSES["chat"])
        seq.account = account
        tally.token(seq, 5.0)
    assert tally.by_class() == {"chat": [0, 1, 0, 0]}


# ── what rungs do ────────────────────────────────────────────────────────────


def pinned(*names: str, until: float = 30.0) -> Play:
    play = Play(LIMITS, tenancy())
    play.harness.commands.append(Steer(dict.fromkeys(names, "pin")))
    return play.run([*chats(2.0, 0.0, 30.0), *batches(2.0, 0.0, 30.0)], until=until)


def entries(play: Play, kind: Kind, reason: str) -> list[float]:
    journal = play.scheduler.journal.entries
    return [entry.at for entry in journal if (entry.kind, entry.reason) == (kind, reason)]


def test_smaller_chunks_beside_decoding() -> None:
    def largest(play: Play) -> float:
        journal = play.scheduler.journal.entries
        return max(e.numbers["tokens"] for e in journal if e.kind is Kind.CHUNK and e.at > 1.0)

    free, held = Play(LIMITS, tenancy()), Play(LIMITS, tenancy())
    held.harness.commands.append(Steer({"shrink_chunks": "pin"}))
    for play in (free, held):
        play.run([ask("s", 10, 200, tenant="bulk"), ask("long", 2000, 4, 2.0, tenant="bulk")])
    assert largest(free) == 256 and largest(held) == 64
    assert entries(held, Kind.CHUNK, "shrink_chunks")


def test_batch_prompts_come_in_groups_while_others_are_live() -> None:
    play = pinned("widen_window")
    journal = play.scheduler.journal.entries
    admitted = sorted(
        {e.at for e in journal if e.kind is Kind.ADMIT and e.tenant == "bulk" and e.at > 3.0}
    )
    assert len(admitted) >= 4
    assert min(b - a for a, b in pairwise(admitted)) >= 2.0
    assert entries(play, Kind.DEFER, "widen_window")
    play.run([], until=100.0)
    play.run([])
    assert not play.scheduler.running, "they are admitted once nobody else is there"


def test_a_cap_lets_what_runs_run_on() -> None:
    play = Play(LIMITS, tenancy())
    play.run([ask(f"b{i}", 20, 400, tenant="bulk") for i in range(40)], until=10.0)
    assert len(play.scheduler.running) > 30
    play.harness.commands.append(Steer({"cap_batch": "pin"}))
    late = [ask(f"late{i}", 20, 4, play.harness.now, tenant="bulk") for i in range(3)]
    play.run(late)
    ended = sorted(play.finished_at[f"b{i}"] for i in range(40))
    assert all(play.tokens_at[r.id][0] >= ended[-4] for r in late)
    assert play.scheduler.life.totals["preemptions"] == 0


def test_a_request_says_which_rung_it_waits_for() -> None:
    play = pinned("cap_batch", until=20.0)
    last = play.scheduler.waiting.first("bulk", 8)[-1]
    [facts] = views.answer(play.scheduler, "request", last.id, play.harness.now)
    assert facts["waits_for"] == "cap_batch" and facts["waits"]["cap_batch"] > 0
    assert {"decision": "defer", "reason": "cap_batch"}.items() <= {
        k: v for k, v in facts["timeline"][-1].items() if k in ("decision", "reason")
    }.items()
    assert facts["predicted_first_token_in_s"] > 10.0, "the forecast knows of the cap"


def test_whoever_is_behind_a_request_that_is_kept_back_goes_past_it() -> None:
    """Requests of both kinds in the queue of one tenant."""
    play = Play(LIMITS, tenancy())
    play.harness.commands.append(Steer({"cap_batch": "pin"}))
    old = [replace(ask(f"b{i}", 20, 600, tenant="web"), class_name="batch") for i in range(8)]
    late = ask("late", 20, 4, 50.0, tenant="web")
    play.run([*old, late], until=55.0)
    assert play.scheduler.waiting.first("web", 1)[0].id.startswith("b")
    assert play.ttft("late") < 1.0


def test_no_backlog_is_so_long_that_it_hides_who_is_behind_it() -> None:
    """A team's nightly jobs, all overdue, in the queue of its chat."""
    play = Play(LIMITS, tenancy())
    play.harness.commands.append(Steer({"cap_batch": "pin"}))
    old = [replace(ask(f"b{i}", 20, 600, tenant="web"), class_name="batch") for i in range(200)]
    late = chats(CHATS, 50.0, 80.0)
    play.run([*old, *late], until=85.0)
    waiting = play.scheduler.waiting
    assert waiting.count("web") == len(waiting.first("web", 200)) > 100
    assert attained(play, late)[0] == 1.0
    [last] = play.scheduler.waiting.first("web", 200)[-1:]
    assert waiting.ahead_of(last) == waiting.count("web") - 1


def test_who_waits_too_long_behind_a_backlog_is_seen() -> None:
    """Requests with targets count, however many without them are before them."""
    play = Play(replace(LIMITS, max_decode_sequences=4), tenancy())
    old = [replace(ask(f"b{i}", 20, 2000, tenant="web"), class_name="batch") for i in range(40)]
    play.run([*old, ask("late", 20, 4, 50.0, tenant="web")], until=60.0)
    assert "late" not in play.tokens_at
    assert Window(play.scheduler.life, Wear()).look(60.0).longest_wait == pytest.approx(
        10.0, rel=0.05
    )


def test_what_was_missed_while_kept_back_is_not_made_up_for() -> None:
    """Else the undo of a rung would be worse for the others than what it was taken for."""
    play = pinned("cap_batch", until=29.0)
    accounts = play.scheduler.shares.accounts
    assert accounts["bulk"].virtual_time > 0.9 * accounts["web"].virtual_time
    assert accounts["bulk"].cost < 0.8 * accounts["web"].cost


# ── being told ───────────────────────────────────────────────────────────────


def test_the_ladder_tells_what_it_did_and_why() -> None:
    play, _ = overloaded(True)
    answer = views.answer(play.scheduler, "controller", "", play.harness.now)
    assert [rung["rung"] for rung in answer["rungs"]] == list(NAMES)
    window = answer["rungs"][1]
    assert (window["level"], window["mode"], window["trigger"]) == (0, "auto", "ttft")
    assert window["before"]["ttft_kept"] < 0.85 and window["undone_for"] == "calm"
    assert [(c["rung"], c["direction"]) for c in answer["history"]] == moves(play)
    journal = play.scheduler.journal.counts
    taken = sum(rung["num_taken"] for rung in answer["rungs"])
    assert sum(n for (kind, _), n in journal.items() if kind == "take_rung") == taken


def test_changes_are_published_and_undone_also_while_nothing_runs() -> None:
    play = Play(LIMITS, tenancy())
    harness = play.harness
    harness.commands.append(Steer({"shed_batch": "pin"}))
    harness.loop.turn()
    assert harness.published[-1].rungs == (0, 0, 0, 0, 1, 0, 0)
    harness.commands.append(Steer({"shed_batch": "auto"}))
    for _ in range(200):
        harness.loop.turn()
    assert harness.published[-1].rungs == (0, 0, 0, 0, 0, 0, 0)
    assert harness.published[-1].rung_changes[4] == (1, 1)
    assert 10.0 <= harness.now < 11.0, "woken for it, and left in peace then"


def test_the_loop_answers_about_the_ladder() -> None:
    play, answers = Play(LIMITS, tenancy()), []
    play.harness.loop.reply = lambda ticket, answer: answers.append((ticket, answer))
    play.harness.commands.append(Inspect(7, "controller"))
    play.harness.loop.turn()
    [(ticket, answer)] = answers
    assert ticket == 7 and answer["is_on"] and answer["history"] == []


@pytest.mark.parametrize("seed", range(5))
def test_any_steering_loses_nothing(seed: int) -> None:
    rng = Random(seed)
    play = Play(LIMITS, tenancy(rng.choice(["chat", "strict"])), num_pages=rng.choice([80, 400]))
    todo = [*chats(3.0, 0.0, 30.0), *batches(1.0, 0.0, 30.0, 60)]
    for at in range(30):
        rung, mode = rng.choice(NAMES), rng.choice(["auto", "pin", "forbid"])
        play.harness.commands.append(Steer({rung: mode}))
        play.run([r for r in todo if at <= r.arrival < at + 1], until=at + 1)
        play.scheduler.check()
    play.run([])
    assert play.finish.keys() | play.refusals.keys() == {r.id for r in todo}
    assert play.scheduler.pool.num_used == 0
