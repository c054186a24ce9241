"""How long prompts may make a step where nobody was promised anything."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Steer
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.tenant import Tenancy, Tenant
from tests.core.playing import Play, ask
from tests.core.traffic import TimedEngine

MOST = 0.25
LIMITS: dict[str, Any] = {"max_prefill_tokens": 2048, "max_mixed_tokens": 2048}
QUICK = (0.002, 0.00002, 0.0001)  # seconds: a step, a prompt token, a sequence
USUAL = (0.02, 0.001, 0.002)
SLOW = (0.4, 0.0175, 0.003)


def served(**changes: Any) -> Play:
    """A server where nobody was promised anything, and that knows what its steps take."""
    limits = Limits(**{**LIMITS, "mix_phases": True, "max_step_seconds": MOST, **changes})
    return Play(limits, Tenancy({"default": Tenant("default", 1, "batch")}))


def set_machine(play: Play, machine: tuple[float, float, float]) -> None:
    engine = play.harness.engine
    assert isinstance(engine, TimedEngine)
    engine.fixed, engine.per_prompt_token, engine.per_sequence = machine


def warm(play: Play) -> float:
    """Let it see steps; the time at which it has."""
    play.run([ask(f"warm{i}", 300, 8) for i in range(4)])
    play.run([ask(f"alone{i}", 200, 20, play.harness.now + i) for i in range(8)])
    play.harness.took.clear()
    return play.harness.now


def streams_beside_prompts(machine: tuple[float, float, float], **changes: Any) -> Play:
    """Two streams, and prompts of 2,000 tokens once both and the machine are known."""
    play = served(**changes)
    set_machine(play, machine)
    now = warm(play)
    streams = [ask(f"s{i}", 64, 200, now) for i in range(2)]
    return play.run([*streams, *[ask(f"long{i}", 2000, 4, now + 0.1 + i) for i in range(3)]])


def gap(play: Play) -> float:
    return max(play.longest_gap(f"s{i}") for i in range(2))


@pytest.mark.parametrize("mix_phases", [True, False])
def test_no_step_with_prompts_takes_longer_than_was_set(mix_phases: bool) -> None:
    play = streams_beside_prompts(USUAL, mix_phases=mix_phases)
    assert max(play.harness.took) <= 1.15 * MOST
    assert gap(play) <= 1.15 * MOST
    free = streams_beside_prompts(USUAL, mix_phases=mix_phases, max_step_seconds=inf)
    assert gap(free) > 3 * MOST, "in steps of 1,000 tokens and more"


def test_a_quick_machine_is_held_by_the_tokens_alone() -> None:
    """The time was never meant for it: a prompt of 2,000 tokens takes 42 ms there."""
    play = streams_beside_prompts(QUICK)
    chunks = [e for e in play.scheduler.journal.gone["long2"] if e.kind is Kind.CHUNK]
    assert [(e.reason, e.numbers["tokens"]) for e in chunks] == [("whole", 2000)]


def test_where_decoding_alone_is_slow_prompts_still_move() -> None:
    """Streams are a quarter as fast beside them, at worst; not a tenth of the prompts' pace."""
    play = streams_beside_prompts(SLOW)
    alone = SLOW[0] + 2 * SLOW[2]
    assert 3.0 * alone < gap(play) <= 4.4 * alone
    sizes = [
        e.numbers["tokens"]
        for e in play.scheduler.journal.gone["long0"]
        if e.kind is Kind.CHUNK and e.reason == "step_time"
    ]
    assert min(sizes[1:]) > 40, "0.0175 s each: 1.2 s for 69"


def test_the_time_holds_prompts_alone_too() -> None:
    """Whoever comes meanwhile waits for no more than that."""
    play = served()
    now = warm(play)
    play.run([ask("long", 3000, 2, now), ask("short", 16, 2, now + 0.3)])
    assert max(play.harness.took) <= 1.35 * MOST, "four times the fixed part of a step is more"
    assert play.ttft("short") < 3 * MOST < play.ttft("long") / 3


@pytest.mark.parametrize("machine", [QUICK, USUAL])
def test_a_machine_that_was_slow_at_first_is_not_taken_for_slow_for_ever(
    monkeypatch: pytest.MonkeyPatch, machine: tuple[float, float, float]
) -> None:
    """In chunks of 16 tokens nobody would learn what the 17th costs by now."""
    run, num_steps = TimedEngine.run, 0

    def starting(self: TimedEngine, batch: Batch) -> list[SequenceOutput]:
        nonlocal num_steps
        num_steps += 1
        self.harness.now += 1.0 if num_steps <= 10 else 0.0
        return run(self, batch)

    monkeypatch.setattr(TimedEngine, "run", starting)
    play = served()
    set_machine(play, machine)
    play.run([ask(f"first{i}", 100, 30) for i in range(8)])
    play.run([ask("second", 2000, 4, play.harness.now)])
    play.harness.took.clear()
    play.run([ask("third", 2000, 4, play.harness.now)])
    chunks = [e for e in play.scheduler.journal.gone["third"] if e.kind is Kind.CHUNK]
    assert max(e.numbers["tokens"] for e in chunks) > 100
    assert max(play.harness.took) <= 1.15 * MOST


def test_the_rung_that_shrinks_chunks_shrinks_the_time() -> None:
    sizes = {}
    for steer in ({}, {"shrink_chunks": "pin"}):
        play = served()
        now = warm(play)
        play.harness.commands.append(Steer(steer))
        play.run([ask("s", 64, 60, now), ask("long", 2000, 2, now + 1.0)])
        chunks = [e for e in play.scheduler.journal.gone["long"] if e.kind is Kind.CHUNK]
        reason = "shrink_chunks" if steer else "step_time"
        sizes[bool(steer)] = max(e.numbers["tokens"] for e in chunks if e.reason == reason)
    assert sizes[True] < 0.7 * sizes[False]


def test_a_wait_behind_prompts_is_foreseen_in_their_steps() -> None:
    play = served()
    now, pace = warm(play), play.scheduler.intake.pace
    for shape in (StepShape(), StepShape(decode_sequences=2, decode_context=500)):
        chunk = pace.usual_chunk(shape, inf)
        assert 16 <= chunk < 512
        seconds = pace.cost.predict(shape.with_chunk(chunk, 0))
        assert seconds <= max(MOST, 4 * pace.cost.predict(shape))
    assert pace.budget([], StepShape(), now).tokens == pace.usual_chunk(StepShape(), inf)
