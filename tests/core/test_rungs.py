"""Rungs that change answers or engines: lengths nobody stated, lighter weights, a new start."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from dynamo_serve.core import views
from dynamo_serve.core.controller import RESTART_SECONDS, Controller
from dynamo_serve.core.evidence import Evidence
from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.ladder import ENGINE_SECONDS, NAMES, SETTLE_SECONDS, Mode, Restraint
from dynamo_serve.core.loop import Steer, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Finish, Request, Resumed
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.tiers import HOST
from dynamo_serve.core.wear import FIRST, LEAST, RECENT, Wear
from tests.core.playing import Play, ask
from tests.core.test_controller import (
    BAD,
    LIMITS,
    batches,
    chats,
    moves,
    new_life,
    tenancy,
    told,
)

CUT = 40
CUTTING = replace(LIMITS, ladder_max_tokens=CUT)


# ── lengths that nobody stated ───────────────────────────────────────────────


def unbounded(name: str, at: float = 0.0, tenant: str = "bulk") -> Request:
    return replace(ask(name, 20, 300, at, tenant=tenant), is_open_ended=True)


def capped(**facts: object) -> Play:
    play = Play(replace(CUTTING, **facts), tenancy())  # type: ignore[arg-type]
    play.harness.commands.append(Steer({"cap_batch": "pin"}))
    return play


def lengths(play: Play) -> dict[str, int]:
    return {name: len(play.harness.tokens_of(name)) for name in play.arrived}


def test_only_answers_that_nobody_gave_a_length_are_cut_and_only_while_the_rung_is_taken() -> None:
    play = capped()
    asked = ask("asked", 20, 300, tenant="bulk")
    long = replace(unbounded("long"), min_tokens=60)
    play.run([unbounded("open"), asked, long, unbounded("chat", tenant="web")])
    assert lengths(play) == {"open": CUT, "asked": 300, "long": 60, "chat": 300}
    assert set(play.finish.values()) == {Finish.LENGTH}
    play.harness.commands.append(Steer({"cap_batch": "forbid"}))
    play.run([unbounded("later", play.harness.now)])
    assert lengths(play)["later"] == 300


def test_what_runs_already_stays_as_it_is_also_when_it_is_preempted() -> None:
    play = Play(CUTTING, tenancy(), num_pages=30)
    play.run([unbounded("a"), unbounded("b")], until=4.0)
    assert len(play.scheduler.running) == 2
    play.harness.commands.append(Steer({"cap_batch": "pin"}))
    play.run([unbounded("late", 4.0)])
    assert play.scheduler.life.totals["preemptions"] > 0
    assert lengths(play) == {"a": 300, "b": 300, "late": CUT}


def test_a_cut_is_told_and_forecasts_and_room_go_by_it() -> None:
    play = capped()
    scheduler = play.scheduler
    play.run([unbounded("open")], until=1.0)
    [facts] = views.answer(scheduler, "request", "open", play.harness.now)
    assert facts["max_tokens"] == CUT
    told = {"decision": "degrade", "reason": "cap_batch", "max_tokens": CUT}
    assert any(told.items() <= entry.items() for entry in facts["timeline"])
    assert [e.max_tokens for e in play.harness.events if e.token_ids][:2] == [CUT, None]
    seq = scheduler.running["open"]
    pages = scheduler.pool.pages_for(20 + CUT)
    held = [replace(seq, page_table=[0] * count) for count in (pages - 1, pages)]
    assert list(map(scheduler.intake._can_grow, held)) == [True, False]
    one, other = unbounded("one"), replace(unbounded("other"), is_open_ended=False)
    ends = [
        forecast(scheduler._sequence(request), scheduler.life, scheduler.intake).finish
        for request in (one, other)
    ]
    assert ends[0] < 0.5 * ends[1]
    play.run([])
    assert not scheduler.shares.account("bulk").num_finished, "it tells nothing about lengths"


def test_a_cut_answer_is_as_long_on_the_next_engine_and_not_cut_twice() -> None:
    """What the API process does with it: the first token says how long it may get."""
    first = capped()
    request = unbounded("open")
    first.run([request], until=1.0)
    [told] = [e.max_tokens for e in first.harness.events if e.max_tokens]
    had = tuple(first.harness.tokens_of("open"))
    assert 0 < len(had) < CUT
    for limit in (10, 500):
        second = capped(ladder_max_tokens=limit)
        known = replace(request, max_tokens=told, is_open_ended=False)
        done = Resumed(had, 1.0, "engine_lost", first_token_at=0.1)
        second.harness.commands.append(Submit(known, done))
        second.run([])
        assert len(had) + len(second.harness.tokens_of("open")) == CUT


def test_nothing_is_cut_of_what_has_begun_on_an_engine_without_the_rung() -> None:
    play = capped()
    done = Resumed((1, 2, 3), 0.0, "engine_lost", first_token_at=0.0)
    play.harness.commands.append(Submit(unbounded("open"), done))
    play.run([])
    assert 3 + len(play.harness.tokens_of("open")) == 300
    assert not [e for e in play.scheduler.journal.entries if e.kind is Kind.DEGRADE]


# ── another engine ───────────────────────────────────────────────────────────

LIGHTER, RESTART = "lighter_weights", "restart_engine"
LIGHT = replace(LIMITS, lighter=True)
SLOW = {**BAD, "slowdown": 2.5}


def engine(
    begin: float = 0.0, standing: Standing | None = None, lighter: bool = True
) -> Controller:
    """The ladder of an engine that starts at `begin`."""
    life = new_life(PagePool(100, 16))
    controller = Controller(life, Restraint(), Wear(), replace(LIGHT, lighter=lighter))
    controller.recall(standing or Standing(), begin)
    return controller


def test_lighter_weights_come_last_and_an_engine_runs_for_a_while_before_it_is_changed() -> None:
    controller = engine()
    told(controller, 0.0, ENGINE_SECONDS - 0.2, **BAD)
    assert controller.levels == (2, 1, 2, 0, 1, 0, 0), (
        "it could not be seen yet what the others bring"
    )
    told(controller, ENGINE_SECONDS, ENGINE_SECONDS + 0.3, **BAD)
    assert controller.levels == (2, 1, 2, 0, 1, 1, 0)
    told(controller, ENGINE_SECONDS + 0.3, 10 * ENGINE_SECONDS, **BAD)
    assert controller.levels == (2, 1, 2, 0, 1, 1, 0), "nothing has become slow"


def test_where_there_are_no_lighter_weights_the_rung_is_passed_over() -> None:
    controller = engine(lighter=False)
    told(controller, 0.0, 300.0, **BAD)
    assert controller.levels == (2, 1, 2, 0, 1, 0, 0)
    assert not controller.states[LIGHTER].is_possible


def test_the_next_engine_undoes_what_this_one_took() -> None:
    first = engine()
    told(first, 0.0, ENGINE_SECONDS + 1.0, **BAD)
    standing, at = first.take_news(), ENGINE_SECONDS + 5.0
    assert standing and first.take_news() is None, "it is told once"
    second = engine(at, standing)
    assert second.levels == first.levels and second.restraint.sheds_batch
    assert second.states[LIGHTER].since == first.states[LIGHTER].since
    assert list(second.history) == list(first.history)
    assert second.take_news(), "whoever watches sees it stand so"
    told(second, at, at + ENGINE_SECONDS - 1.0, itl=1.0)
    assert second.levels[5] == 1, "the lighter weights have their time, too"
    assert second.restraint.sheds_until >= at + ENGINE_SECONDS + 10.0, "undone after them"
    told(second, at + ENGINE_SECONDS - 1.0, at + ENGINE_SECONDS + 1.0, itl=1.0)
    assert second.levels == (2, 1, 2, 0, 1, 0, 0)
    assert second.states[LIGHTER].has_helped
    third = engine(at + 70.0, second.take_news())
    told(third, at + 70.0, at + 200.0, itl=1.0)
    assert third.levels == (0,) * len(NAMES)
    assert third.changes[4] == (1, 1), "it is counted on"
    told(third, at + 200.0, at + 300.0, **BAD)
    assert third.states[LIGHTER].calm == 2 * ENGINE_SECONDS, "it was undone too soon"


def test_other_rungs_go_on_where_an_engine_was_lost() -> None:
    first = engine()
    first.steer({"cap_batch": Mode.PIN}, 1.0)
    told(first, 4.0, 4.2, **BAD)
    second = engine(10.0, first.take_news())
    assert second.levels == first.levels == (1, 0, 2, 0, 0, 0, 0)
    assert second.states["cap_batch"].mode is Mode.AUTO, "modes are told anew"
    assert (second.restraint.chunk_part, second.restraint.batch_part) == (0.5, 0.0625)
    told(second, 10.0, 10.0 + SETTLE_SECONDS - 0.2, **BAD)
    assert second.levels == (1, 0, 2, 0, 0, 0, 0), "it gets time to settle, too"
    told(second, 20.0, 60.0, itl=1.0)
    assert second.levels == (0,) * len(NAMES)


def test_an_engine_that_became_slow_is_started_again_once_an_hour_and_that_is_not_undone() -> None:
    at, controller = 0.0, engine(lighter=False)
    told(controller, at, 2 * ENGINE_SECONDS, **SLOW)
    assert controller.levels == (2, 1, 2, 0, 1, 0, 1)
    told(controller, 2 * ENGINE_SECONDS, 3 * ENGINE_SECONDS, itl=1.0)
    assert controller.levels[6] == 1, "there is nothing to undo"
    taken = next(c.at for c in controller.history if c.rung == RESTART)
    for step in (200.0, 1000.0, RESTART_SECONDS - 100.0):
        controller = engine(step, controller.standing, lighter=False)
        assert controller.levels[6] == 0, "that is done"
        told(controller, step, min(step + 200.0, taken + RESTART_SECONDS), **SLOW)
        assert controller.levels[6] == 0
    told(controller, taken + RESTART_SECONDS, taken + RESTART_SECONDS + 1.0, **SLOW)
    assert controller.levels[6] == 1


def test_operators_can_forbid_a_new_start() -> None:
    controller = engine()
    controller.steer({RESTART: Mode.FORBID}, 0.0)
    told(controller, 0.0, 300.0, **SLOW)
    assert controller.levels == (2, 1, 2, 0, 1, 1, 0)


# ── steps that have become slow ──────────────────────────────────────────────


def usual(shape: StepShape) -> float:
    return 0.05 + 0.01 * shape.decode_sequences + 0.001 * shape.prefill_tokens


def worn(begin: float = 0.0) -> tuple[Wear, float]:
    """One that knows steps of up to 8 sequences, and up to 64 prompt tokens beside them."""
    wear, rng, now = Wear(), Random(0), begin
    for i in range(4 * FIRST):
        shape = StepShape(
            prefill_tokens=rng.randint(1, 64) if i % 2 else 0,
            decode_sequences=rng.randint(1, 8),
            decode_context=1000,
        )
        now += 0.05
        wear.observe(shape, usual(shape), now)
    return wear, now


def run(wear: Wear, now: float, steps: int, sequences: int, factor: float) -> float:
    for _ in range(steps):
        now += 0.5
        shape = StepShape(decode_sequences=sequences, decode_context=1000)
        wear.observe(shape, factor * usual(shape), now)
    return now


def test_steps_are_compared_with_what_there_was_at_least_as_much_of() -> None:
    wear, now = worn()
    assert wear.factor(now) == pytest.approx(1.0, abs=0.1)
    later = run(wear, now + RECENT, LEAST - 1, 6, 2.5)
    assert wear.factor(later) is None, "too few"
    assert wear.factor(run(wear, later, 1, 6, 2.5)) == pytest.approx(2.5, rel=0.1)
    wear, now = worn()
    now = run(wear, now + RECENT, 2 * LEAST, 40, 3.0)
    assert wear.factor(now) is None, "of so large a batch nobody knows, nor is it taken for usual"
    now = run(wear, now, 1, 9, 1.0)
    now = run(wear, now, 2 * LEAST, 9, 1.0)
    assert wear.factor(now) == pytest.approx(1.0, abs=0.1), "more work is no slower"


def test_a_process_that_becomes_slow_by_and_by_is_seen_and_a_bad_moment_is_not() -> None:
    wear, now = worn()
    now = run(wear, now, 1, 6, 50.0)
    for i in range(2000):
        now = run(wear, now, 1, 6, 1.0005**i)
        if i == 300:
            assert wear.factor(now) < 1.3  # type: ignore[operator]
    assert wear.factor(now) == pytest.approx(1.0005 ** (2000 - RECENT), rel=0.1)


def test_what_comes_first_while_all_is_slow_is_not_taken_for_usual() -> None:
    """Neither larger batches nor steps of another kind."""
    wear, now = worn()
    now = run(wear, now, 10, 6, 4.0)
    for _ in range(200):
        now = run(wear, now, 1, 12, 4.0)
        wear.observe(StepShape(decode_sequences=4, draft_tokens=9), 9.0, now)
    now = run(wear, now, 2 * LEAST, 6, 4.0)
    assert wear.factor(now) == pytest.approx(4.0, rel=0.1)


def test_a_healthy_server_is_never_given_another_engine() -> None:
    play = Play(LIGHT, tenancy())
    play.run([*chats(2.0, 0.0, 120.0), *batches(0.5, 0.0, 120.0, 120)])
    assert moves(play) == []
    assert (play.scheduler.bill.wear.factor(play.harness.now) or 1.0) < 1.3


def test_an_overload_of_an_engine_that_is_as_fast_as_ever_does_not_start_it_again() -> None:
    play = Play(LIGHT, tenancy())
    play.run([*chats(5.0, 0.0, 150.0), *batches(1.2, 0.0, 150.0)], until=150.0)
    up = [name for name, way in moves(play) if way == "up"]
    assert LIGHTER in up and RESTART not in up
    assert up.index("shed_batch") < up.index(LIGHTER)
    assert play.scheduler.controller.evidence.slowdown == pytest.approx(1.0, abs=0.2)


def test_an_engine_that_becomes_slow_under_load_is_started_again_in_the_end() -> None:
    play = Play(replace(LIGHT, lighter=False), tenancy())
    todo = [*chats(2.0, 0.0, 240.0), *batches(0.5, 0.0, 240.0, 120)]
    play.run([r for r in todo if r.arrival < 100.0], until=100.0)
    assert moves(play) == []
    timed = play.harness.engine
    timed.fixed, timed.per_sequence = 0.32, 0.012  # type: ignore[attr-defined]
    play.run([r for r in todo if r.arrival >= 100.0], until=240.0)
    assert moves(play)[-1] == (RESTART, "up")
    seen: Evidence = play.scheduler.controller.history[-1].evidence
    assert (seen.slowdown or 0.0) >= 2.0


# ── pages that go below ──────────────────────────────────────────────────────


def test_running_batch_work_goes_below_while_somebody_needs_the_room() -> None:
    play = Play(replace(LIMITS, max_decode_sequences=16), tenancy(), below={HOST: 512})
    batch = [ask(f"b{i}", 64, 120, 0.0, tenant="bulk") for i in range(10)]
    play.run(batch, until=2.0)
    play.harness.commands.append(Steer({"spill": "pin"}))
    play.run([], until=3.0)
    assert len(play.scheduler.running) == 10, "nobody is there for whom they would have to go"
    play.run([ask("chat", 32, 40, 3.0, tenant="web")])
    counts = play.scheduler.journal.counts
    assert counts["preempt", "spill"] >= 6
    assert {len(play.tokens_at[request.id]) for request in batch} == {120}
    assert play.scheduler.stats().prefix_hit_tokens_total == 0, "a way back is no hit"


def test_a_spill_without_a_tier_is_passed_over() -> None:
    for below, expected in (({}, False), ({HOST: 64}, True)):
        play = Play(LIMITS, tenancy(), below=below)
        assert play.scheduler.controller.states["spill"].is_possible is expected
