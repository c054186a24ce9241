"""Rungs that change answers or engines: lengths nobody stated, lighter weights, a new start."""

from __future__ import annotations

from dataclasses import replace

from dynamo_serve.core import views
from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.loop import Steer, Submit
from dynamo_serve.core.request import Finish, Request, Resumed
from tests.core.playing import Play, ask
from tests.core.test_controller import LIMITS, tenancy

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
    assert scheduler.intake._most_pages(seq) == scheduler.pool.pages_for(20 + CUT)
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
