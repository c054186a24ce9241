"""Readers that stop, read on and come back while engines die: in every order, nobody stays unheard.

An engine that is only a table, moved on by hand; so each seed is another order of the same things.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import Random
from typing import Any, ClassVar, cast

import pytest

from dynamo_serve.core.loop import Cancel, Command, Submit
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.deliveries import Deliveries
from dynamo_serve.delivery import nobody
from dynamo_serve.inbox import TOKEN_BYTES
from dynamo_serve.link import Loss
from dynamo_serve.observer import NoObserver

LENGTH, NUM_REQUESTS = 60, 4
MOST_TURNS, CALM_FROM = 20_000, 400


class Engine:
    """Token `i` of every answer is `i`. It dies and comes back when told to, and then knows only
    what is submitted again; what it has said is heard later, or never."""

    def __init__(self) -> None:
        self.is_up, self.is_safe = True, False
        self.tenancy = Tenancy()
        self.live: dict[str, int] = {}  # how many tokens each has
        self.said: list[TokenEvent] = []

    def send(self, command: Command) -> None:
        assert self.is_up, "there is no engine"
        if isinstance(command, Submit):
            assert command.request.id not in self.live, "it has it already"
            self.live[command.request.id] = len(command.done.token_ids) if command.done else 0
        elif isinstance(command, Cancel) and self.live.pop(command.request_id, None) is not None:
            self.said.append(TokenEvent(command.request_id, finish=Finish.CANCELLED))

    def step(self, count: int) -> None:
        for name, begin in list(self.live.items()):
            end = min(LENGTH, begin + count)
            finish = Finish.LENGTH if end == LENGTH else None
            self.said.append(TokenEvent(name, tuple(range(begin, end)), finish=finish))
            self.live[name] = end
            if finish:
                del self.live[name]

    def die(self) -> None:
        self.is_up = False
        self.live.clear()
        self.said.clear()


class Reader:
    """Reads, stands still, hangs up and comes back, as the dice fall; calm, it reads to the end."""

    def __init__(self, deliveries: Deliveries, name: str, rng: Random) -> None:
        self.deliveries, self.name, self.rng = deliveries, name, rng
        self.got: list[int] = []
        self.is_calm = False

    async def read(self) -> None:
        request = Request(self.name, (1, 2), LENGTH)
        delivery, inbox = self.deliveries.accept(request, 1000.0, nobody)
        while True:
            event = await self.deliveries.next(delivery, inbox)
            self.got += event.token_ids
            if event.finish:
                assert event.finish is Finish.LENGTH
                self.deliveries.leave(delivery, inbox)
                return
            while not self.is_calm and self.rng.random() < 0.8:
                await asyncio.sleep(0)
            if not self.is_calm and self.rng.random() < 0.2:
                self.deliveries.leave(delivery, inbox)
                for _ in range(self.rng.randrange(30)):
                    await asyncio.sleep(0)
                delivery, inbox = self.deliveries.rejoin(self.name, len(self.got), nobody)


class Witness(NoObserver):
    """Counts what happened to streams, with all seeds together."""

    seen: ClassVar[Counter[str]] = Counter()

    def on_stream(self, what: str) -> None:
        self.seen[what] += 1


async def disturbed(rng: Random) -> AsyncGenerator[tuple[Deliveries, Engine]]:
    """One move of the engine after the other, for ever."""
    engine = Engine()
    deliveries = Deliveries(cast(Any, engine), Witness(), credit=4 * TOKEN_BYTES, patience=1000.0)
    while True:
        yield deliveries, engine
        now = time.monotonic()
        move = rng.choice(["step", "step", "hear", "hear", "die", "up", "wait"])
        if move == "step" and engine.is_up:
            engine.step(rng.randint(1, 6))
        elif move == "hear":
            count = rng.randint(1, 4)
            heard, engine.said = engine.said[:count], engine.said[count:]
            deliveries.on_events(heard, now)
        elif move == "die" and engine.is_up and not engine.is_safe and rng.random() < 0.3:
            Witness.seen["died while parked"] += bool(deliveries.kept)
            engine.die()
            deliveries.on_lost(Loss("killed", is_own=False), now)
        elif move == "up" and not engine.is_up:
            engine.is_up = True
            deliveries.on_up(lambda request: None)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_serve.deliveries.SLOW_SECONDS", -1.0)


def test_every_order_of_parking_reading_on_and_dying_ends_with_the_whole_answer() -> None:
    Witness.seen.clear()
    for seed in range(60):
        play(Random(seed))
    kinds = ("reader_slow", "reader_gone", "resumed", "died while parked")
    assert min(Witness.seen[kind] for kind in kinds) >= 60, f"too quiet: {Witness.seen}"


def play(rng: Random) -> None:
    async def main() -> None:
        safe_from = rng.randrange(200)  # from then on no restart mends what was forgotten
        async with aclosing(disturbed(rng)) as moves:
            deliveries, engine = await anext(moves)
            readers = [Reader(deliveries, f"r{i}", rng) for i in range(NUM_REQUESTS)]
            tasks = [asyncio.create_task(reader.read()) for reader in readers]
            for turn in range(MOST_TURNS):
                engine.is_safe = turn >= safe_from
                for reader in readers:
                    reader.is_calm = turn >= CALM_FROM
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
                await anext(moves)
                if all(task.done() for task in tasks):
                    break
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for reader, end in zip(readers, ends, strict=True):
            assert reader.got == list(range(LENGTH)), f"{reader.name} is not told the rest: {end}"
        assert not deliveries.live and not engine.live

    asyncio.run(main())
