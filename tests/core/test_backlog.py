"""Rungs that are undone while a backlog waits for it: only where that breaks no promise."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import cycle, pairwise

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.controller import (
    CLEAR_LOOKS,
    HOLD_SECONDS,
    MARGIN,
    MOST_HOLD,
    Controller,
)
from dynamo_serve.core.evidence import BACKLOG, WINDOW
from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.ladder import BATCH_WINDOW, CALM_SECONDS, NAMES, Mode, Restraint
from dynamo_serve.core.loop import Steer
from dynamo_serve.core.outlook import LEAST_WINDOW, LONG_SECONDS, Ease, Outlook
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request
from dynamo_serve.core.sequence import AGING_SECONDS
from dynamo_serve.core.tenant import Quota, Tenancy, Tenant
from dynamo_serve.core.wear import Wear
from tests.core.playing import Play, ask
from tests.core.test_controller import (
    BAD,
    BATCHES,
    CHATS,
    CLASSES,
    LIMITS,
    attained,
    batches,
    chats,
    moves,
    new_life,
    told,
)

TEAM = Tenancy({"team": Tenant("team", 1.0, "chat")}, CLASSES)
BEGIN, END, BACK_S = 60.0, 210.0, 700.0  # of an overload of jobs, and the time after it
WAITS = 2 * BACKLOG


def jobs(rate: float, begin: float, end: float) -> list[Request]:
    """Batch work with the key of the chat."""
    asked = batches(rate, begin, end, 64)
    return [replace(request, tenant="team", class_name="batch") for request in asked]


def questions(rate: float, begin: float, end: float) -> list[Request]:
    return [replace(request, tenant="team") for request in chats(rate, begin, end)]


@cache
def overloaded() -> tuple[Play, float]:
    """A team's jobs, three times what the server can do, and later the chat beside what is left of
    them; and when the last job was begun that had become overdue."""
    play = Play(LIMITS, TEAM)
    flood = [*questions(2 * CHATS, BEGIN, END), *jobs(6 * BATCHES, BEGIN, END)]
    calm = [
        *(r for at in ((0.0, BEGIN), (END, END + BACK_S)) for r in questions(CHATS, *at)),
        *(r for at in ((0.0, BEGIN), (END, END + BACK_S)) for r in jobs(BATCHES, *at)),
    ]
    play.run([*flood, *calm], until=END + BACK_S)
    begun = [(play.tokens_at[r.id][0], r) for r in (*flood, *calm) if r.id in play.tokens_at]
    late = (at for at, r in begun if r.class_name and at - r.arrival > AGING_SECONDS)
    return play, max(late)


def test_a_backlog_does_not_make_rungs_flap() -> None:
    play, _ = overloaded()
    assert 2 <= len(moves(play)) <= 6
    assert {name for name, way in moves(play) if way == "up"} >= {"widen_window"}


def test_promises_are_kept_while_the_backlog_is_worked_off() -> None:
    play, drained = overloaded()
    assert drained > END + 200.0, "there was no backlog"
    assert attained(play, questions(2 * CHATS, BEGIN, END))[0] > 0.9
    assert attained(play, questions(CHATS, END, END + BACK_S - 10.0))[0] > 0.98


def test_everything_is_undone_soon_after_the_backlog_has_gone_and_not_before() -> None:
    play, drained = overloaded()
    controller = play.scheduler.controller
    assert controller.levels == (0,) * len(NAMES)
    assert drained - 60.0 < controller.history[-1].at < drained + 60.0
    assert controller.restraint.batch_window == 0.0


def test_the_backlog_is_let_in_bit_by_bit() -> None:
    """As fast as the promises allow, not a group every two seconds."""
    play, drained = overloaded()
    done = [at for name, at in play.finished_at.items() if name.startswith("batch")]
    rate = sum(END < at < drained for at in done) / (drained - END)
    assert rate > 1.5 / BATCH_WINDOW


def test_a_rung_says_that_it_is_held_for_a_backlog() -> None:
    play = Play(LIMITS, TEAM)
    play.harness.commands.append(Steer({"widen_window": "pin"}))
    play.run([*jobs(4.0, 0.0, 60.0), *questions(CHATS, 0.0, 60.0)], until=60.0)
    play.harness.commands.append(Steer({"widen_window": "auto"}))
    play.run(questions(CHATS, 60.0, 90.0), until=90.0)
    rungs = views.answer(play.scheduler, "controller", "", play.harness.now)["rungs"]
    held = {rung["rung"]: rung["held_for_backlog"] for rung in rungs}
    assert held == {name: name == "widen_window" for name in NAMES}


def test_where_nobody_else_is_there_a_backlog_holds_nothing() -> None:
    play = Play(LIMITS, TEAM)
    play.harness.commands.append(Steer({"widen_window": "pin", "cap_batch": "pin"}))
    play.run([*jobs(4.0, 0.0, 60.0), *questions(CHATS, 0.0, 30.0)], until=60.0)
    play.harness.commands.append(Steer({"widen_window": "auto", "cap_batch": "auto"}))
    play.run([], until=60.0 + 4 * CALM_SECONDS)
    assert len(play.scheduler.waiting) > 20
    assert play.scheduler.controller.levels == (0,) * len(NAMES)


# ── one part at a time ───────────────────────────────────────────────────────


def controller_of(foreseen: list[float], *names: str) -> Controller:
    """Only the named rungs may be taken; `foreseen` tells the wait beside a backlog let in."""
    life = new_life(PagePool(100, 16))
    controller = Controller(life, Restraint(), Wear(), LIMITS, lambda now: foreseen[0])
    modes = {name: Mode.AUTO if name in names else Mode.FORBID for name in NAMES}
    controller.steer(modes, 0.0)
    return controller


def test_a_rung_is_undone_once_its_backlog_is_foreseen_to_do_no_harm() -> None:
    foreseen = [MARGIN + 0.1]
    controller = controller_of(foreseen, "widen_window")
    told(controller, 0.0, 0.2, **BAD)
    told(controller, 1.0, 100.0, itl=1.0, batch_wait=WAITS)
    assert controller.levels[1] == 1
    foreseen[0] = MARGIN - 0.1
    told(controller, 100.0, 110.0, itl=1.0, batch_wait=WAITS)
    assert controller.levels[1] == 0


def test_one_good_moment_is_not_enough() -> None:
    """A question that is about to end leaves a place that the backlog would take."""
    controller = controller_of([9.0], "widen_window")
    waits = cycle([0.0, 0.0, 9.0])
    controller._foresee = lambda now: next(waits)
    told(controller, 0.0, 0.2, **BAD)
    told(controller, 1.0, 100.0, itl=1.0, batch_wait=WAITS)
    assert controller.levels[1] == 1


@pytest.mark.parametrize(
    "facts", [{"itl": 1.0}, {"itl": 1.0, "batch_wait": BACKLOG / 2}, {"batch_wait": WAITS}]
)
def test_without_a_backlog_or_anybody_to_miss_a_target_nothing_is_held(
    facts: dict[str, float],
) -> None:
    controller = controller_of([9.0], "widen_window", "cap_batch")
    told(controller, 0.0, 10.0, **BAD)
    taken = sum(controller.levels)
    told(controller, 20.0, 20.5 + taken * (CALM_SECONDS + 1.0), **facts)
    assert taken == 3 and not any(controller.levels)


def test_what_is_foreseen_is_that_of_the_level_below_and_changes_nothing() -> None:
    seen: list[Restraint] = []
    controller = controller_of([9.0], "cap_batch")

    def foresee(now: float) -> float:
        seen.append(replace(controller.restraint))
        return 9.0

    controller._foresee = foresee
    controller.steer({"cap_batch": Mode.PIN}, 0.0)
    controller.steer({"cap_batch": Mode.AUTO}, 0.0)
    before = replace(controller.restraint)
    told(controller, 0.1, 3 * CALM_SECONDS, itl=1.0, batch_wait=WAITS)
    assert len(seen) > CLEAR_LOOKS and {restraint.batch_part for restraint in seen} == {0.25}
    assert replace(controller.restraint, sheds_until=0.0) == replace(before, sheds_until=0.0)
    assert len(seen) < 10, "it takes a while, so it is not done at every look"


def test_a_rung_whose_undo_brought_trouble_comes_first_and_gets_time_and_is_held() -> None:
    controller = controller_of([0.0], "shrink_chunks", "widen_window", "cap_batch")
    controller.steer({"cap_batch": Mode.PIN}, 0.0)
    controller.steer({"cap_batch": Mode.AUTO}, 0.0)
    at, held = 0.1, list[float]()
    for _ in range(5):
        while controller.levels[2] == 2:
            told(controller, at, at + 0.05, itl=1.0, batch_wait=WAITS)
            at += 0.5
        if len(held) < 4:
            told(controller, at, at + WINDOW - 1.0, **BAD, batch_wait=WAITS)
            assert controller.levels == (0, 0, 2, 0, 0, 0, 0), "no other is taken, and it settles"
        held.append(at)
        at += WINDOW
    waits = [b - a for a, b in pairwise(held)]
    assert waits == pytest.approx([HOLD_SECONDS * 2**i for i in range(4)], abs=15.0)
    assert max(waits) <= MOST_HOLD + 15.0


def test_an_undo_long_ago_is_not_blamed() -> None:
    controller = controller_of([0.0], "shrink_chunks", "widen_window")
    controller.steer({"widen_window": Mode.PIN}, 0.0)
    controller.steer({"widen_window": Mode.AUTO}, 0.0)
    told(controller, 0.1, 15.0, itl=1.0)
    assert controller.levels[1] == 0
    told(controller, 60.0, 60.2, **BAD)
    assert controller.levels == (1, 0, 0, 0, 0, 0, 0)
    assert not controller.states["widen_window"].hold


def test_waiting_for_one_s_own_quota_is_no_backlog() -> None:
    tenants = {
        "web": Tenant("web", 1.0, "chat"),
        "bulk": Tenant("bulk", 1.0, "batch", Quota(live_sequences=1)),
    }
    for quota, waits in ((Quota(live_sequences=1), False), (Quota(), True)):
        limits = replace(LIMITS, max_decode_sequences=2)
        tenants["bulk"] = replace(tenants["bulk"], quota=quota)
        play = Play(limits, Tenancy(dict(tenants), CLASSES))
        play.run([*batches(1.0, 0.0, 20.0), *chats(0.5, 0.0, 20.0)], until=20.0)
        assert (play.scheduler.controller.evidence.batch_wait > BACKLOG) is waits


def test_the_outlook_is_the_wait_behind_what_would_be_let_in() -> None:
    """Overdue jobs go before a question of the same team, but not past a window."""
    play = Play(LIMITS, TEAM)
    play.harness.commands.append(Steer({"widen_window": "pin"}))
    play.run([*jobs(6.0, 0.0, 60.0), *questions(CHATS, 0.0, 61.0)], until=60.0)
    scheduler = play.scheduler
    outlook = Outlook(scheduler.life, scheduler.intake)
    assert outlook.worst(play.harness.now) < MARGIN
    scheduler.controller.restraint.batch_window = 0.0
    assert outlook.worst(play.harness.now) > 2.0
    newcomer = scheduler._sequence(replace(ask("new", 64, 16, 60.0), tenant="team"))
    assert forecast(newcomer, scheduler.life, scheduler.intake).position > 50


def test_what_is_let_in_is_foreseen_to_take_the_places() -> None:
    """With few places: who comes then waits until a long job ends."""
    limits = replace(LIMITS, max_decode_sequences=4)
    play = Play(limits, TEAM)
    play.harness.commands.append(Steer({"widen_window": "pin", "cap_batch": "pin"}))
    long = [replace(request, max_tokens=400) for request in jobs(1.0, 0.0, 30.0)]
    play.run([*long, *questions(0.5, 0.0, 30.0)], until=30.0)
    scheduler = play.scheduler
    outlook, restraint = Outlook(scheduler.life, scheduler.intake), scheduler.controller.restraint
    assert outlook.worst(play.harness.now) < MARGIN
    restraint.batch_part = 0.75
    assert outlook.worst(play.harness.now) < MARGIN, "one place is left"
    restraint.batch_part = 1.0
    assert outlook.worst(play.harness.now) > 2 * MARGIN


def test_a_window_that_was_too_narrow_is_not_tried_again_for_long() -> None:
    restraint = Restraint(batch_window=BATCH_WINDOW)
    ease, at, seen = Ease(restraint), 0.0, []
    while at < 4 * LONG_SECONDS:
        ease.look(True, restraint.batch_window >= BATCH_WINDOW / 4, at)
        seen.append(restraint.batch_window)
        at += 0.25
    assert min(seen) == BATCH_WINDOW / 8
    tries = sum(b == min(seen) < a for a, b in pairwise(seen))
    assert 2 <= tries <= 4
    restraint.batch_window = 0.0
    ease.look(False, True, at)
    assert restraint.batch_window == 0.0, "it is undone"


def test_a_window_that_the_engine_before_held_is_not_narrowed_at_once() -> None:
    restraint = Restraint(batch_window=BATCH_WINDOW)
    ease = Ease(restraint)
    for i in range(int(4 * CALM_SECONDS)):
        ease.look(True, True, 1000.0 + 0.25 * i)
        assert restraint.batch_window == BATCH_WINDOW
    ease.look(True, True, 1000.0 + CALM_SECONDS)
    assert restraint.batch_window == BATCH_WINDOW / 2


def test_an_operator_s_rung_is_whole_again() -> None:
    controller = controller_of([9.0], "widen_window")
    told(controller, 0.0, 0.2, **BAD)
    told(controller, 1.0, 100.0, itl=1.0, batch_wait=WAITS)
    assert 0.0 < controller.restraint.batch_window < BATCH_WINDOW
    controller.steer({"widen_window": Mode.PIN}, 100.0)
    told(controller, 100.1, 200.0, itl=1.0, batch_wait=WAITS)
    assert controller.restraint.batch_window == BATCH_WINDOW


def test_a_window_has_a_least() -> None:
    restraint = Restraint(batch_window=BATCH_WINDOW)
    ease = Ease(restraint)
    for i in range(4000):
        ease.look(True, True, 0.25 * i)
    assert restraint.batch_window == LEAST_WINDOW


def test_a_tenant_at_its_own_quota_does_not_end_the_outlook() -> None:
    """What it runs is taken to have gone: there is no end of it to wait for."""
    tenants = {
        "web": Tenant("web", 1.0, "chat", Quota(live_sequences=1)),
        "bulk": Tenant("bulk", 1.0, "batch"),
    }
    play = Play(LIMITS, Tenancy(tenants, CLASSES))
    play.harness.commands.append(Steer({"widen_window": "pin", "cap_batch": "pin"}))
    long = [replace(request, max_tokens=400) for request in chats(1.0, 0.0, 20.0)]
    play.run([*batches(2.0, 0.0, 20.0), *long], until=20.0)
    scheduler = play.scheduler
    assert {seq.request.tenant for seq in scheduler.running.values()} == {"web", "bulk"}
    scheduler.controller.restraint.batch_part = 0.25
    assert 0.0 < Outlook(scheduler.life, scheduler.intake).worst(play.harness.now) < 1e3
