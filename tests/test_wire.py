"""What goes in one end of the socket comes out of the other."""

from __future__ import annotations

import random

from dynamo_serve import wire
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.loop import Cancel, Command, Steer, Stop, Submit, Unpin
from dynamo_serve.core.request import (
    Finish,
    Grammar,
    Pooling,
    Request,
    Sampling,
    Summary,
    TokenEvent,
    TokenLogprob,
)
from dynamo_serve.core.stats import Stats, StepStats

COMMANDS: list[Command] = [
    Submit(Request("a", (1, 2, 300_000), 7)),
    Submit(
        Request(
            id="b",
            prompt_ids=tuple(range(5000)),
            max_tokens=7,
            sampling=Sampling(0.5, 3, 0.9, 0.1, 1.1, 0.2, 0.3, ((5, -100.0),), 2**63 - 1, 5),
            stop_ids=frozenset({3, 4}),
            min_tokens=2,
            tenant="acme",
            salt="pepper",
            arrival=12.5,
            call_tokens=7,
            is_open_ended=True,
        )
    ),
    Cancel("a"),
    Unpin("a"),
    Submit(Request("p", (1, 2), 1, pinned_until=7.5)),
    Submit(Request("h", (1, 2), 1, grammar=Grammar("regex", "a|ü"))),
    Submit(Request("g", (1, 2), 1, is_stream=False, group="a key")),
    Submit(Request("v", (1, 2), 0, pooling=Pooling("mean"))),
    Submit(Request("w", (1, 2), 0, group="a key", pooling=Pooling("score", 1))),
    Steer({"cap_batch": "pin"}),
    Stop(),
]
EVENTS = [
    TokenEvent("a", (1,)),
    TokenEvent("a", (1,), cached_tokens=16),
    TokenEvent("a", (1,), cached_tokens=16, max_tokens=512),
    TokenEvent("a", (1, 2), (TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.0))), TokenLogprob(2, -2.0))),
    TokenEvent("a", (9,), finish=Finish.STOP, stop_id=9, summary=Summary(0.1, 0.2, 0.3, 16, 1)),
    TokenEvent("b", finish=Finish.ERROR, error="broken", artifact=b"PNG"),
    TokenEvent("a", (-1, -1), texts=("one", "")),
    TokenEvent("b", finish=Finish.ERROR, error="away", fault="unavailable"),
]


def test_commands_survive_the_wire_cut_anywhere() -> None:
    rng = random.Random(0)
    stream = b"".join(map(wire.pack_command, COMMANDS))
    for _ in range(20):
        frames, received, rest = wire.Frames(), [], stream
        while rest:
            cut = rng.choice([1, 3, 100, 100_000])
            received += frames.feed(rest[:cut])
            rest = rest[cut:]
        assert [wire.command_of(message) for message in received] == COMMANDS


def test_a_step_survives_the_wire() -> None:
    for step in (None, StepStats("decode", 0.25, 3, 3)):
        counts = ((1, 0), (2, 2))
        stats = Stats(1, output_tokens_total=5, step=step, rungs=(1, 0), rung_changes=counts)
        [message] = wire.Frames().feed(wire.pack_step(EVENTS, stats))
        assert wire.step_of(message) == (EVENTS, stats)


def test_a_spec_survives_the_wire() -> None:
    facts: dict[str, str | int | float | bool] = {"device": "cpu", "threads": 2, "graphs": False}
    refused = {"logprobs": "nobody tells"}
    spec = EngineSpec(128, 16, 9, 1000, facts, refused=refused, infers=("usage",))
    [message] = wire.Frames().feed(wire.pack_spec(spec))
    assert wire.spec_of(message) == spec
