"""Readers that are slow, stand still, or go: their requests are parked, and wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.config import Config, EngineSection, ServerSection
from dynamo_serve.core.request import Finish, Request, Summary, TokenEvent
from dynamo_serve.core.tenant import Class, Tenancy, Tenant
from dynamo_serve.delivery import together
from dynamo_serve.errors import RequestNotFound, Unavailable
from dynamo_serve.inbox import TOKEN_BYTES
from dynamo_serve.service import Service, State
from tests.core.traffic import reference
from tests.patience import PATIENCE_S
from tests.test_service import Witness, config_of, kill_engine, run, running, until
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

CREDIT = 1024
LONG = 3000
UNHURRIED_MS = 20.0  # nobody is slow by being held up for a moment


def impatient(process: bool = True, step_ms: float = 0.0, **server: Any) -> Config:
    settings = {"stream_credit_bytes": CREDIT, "reader_patience_s": 30.0, **server}
    return replace(
        config_of(process),
        server=ServerSection(**settings),
        engine=EngineSection(kind="fake", process=process, fake_step_ms=step_ms),
    )


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_serve.deliveries.SLOW_SECONDS", 0.0)


async def the_rest(events: AsyncGenerator[TokenEvent, None]) -> list[int]:
    return [token async for event in events for token in event.token_ids]


async def parked(service: Service, request_id: str) -> None:
    """Taken from its engine, which has told its end."""
    await until(lambda: request_id in service.deliveries.kept)
    await until(lambda: not service.deliveries.kept[request_id].is_submitted)


def test_a_reader_that_stops_is_waited_for_without_a_place_in_the_batch(folder: str) -> None:
    """As often as it likes; the answer is whole."""

    async def main() -> None:
        witness = Witness()
        async with running(impatient(step_ms=1.0), folder, witness) as service:
            request = Request("a", (1, 2), 1500)
            tokens: list[int] = []
            async with aclosing(service.generate(request)) as events:
                for _ in range(4):
                    tokens += (await anext(events)).token_ids
                    await parked(service, "a")
                    assert service.num_live == 0
                    assert service.stats.num_running == service.stats.pages_used == 0
                    waiting = len(service.deliveries.kept["a"].tokens) - len(tokens)
                    assert CREDIT < TOKEN_BYTES * waiting < 5 * CREDIT
                tokens += await the_rest(events)
            assert tokens == reference(request)[0]
        assert witness.streams[:4] == ["reader_slow"] * 4
        assert [e.finish for e in witness.events if e.finish] == [Finish.LENGTH]

    run(main)


def test_a_reader_that_stands_still_for_too_long_is_given_up(folder: str) -> None:
    async def main() -> None:
        witness = Witness()
        stuck = asyncio.Event()
        config = impatient(reader_patience_s=0.1)
        async with running(config, folder, witness) as service:
            request = Request("a", (1, 2), LONG)
            async with aclosing(service.generate(request, on_stuck=stuck.set)) as events:
                await anext(events)
                await stuck.wait()
                with pytest.raises(Unavailable, match=r"nothing was read for 0\.1 s"):
                    await the_rest(events)
            assert not service.deliveries.kept and not service.num_live
        assert witness.streams == ["reader_slow", "given_up"]
        assert [e.finish for e in witness.events if e.finish] == [Finish.CANCELLED]

    run(main)


def test_a_class_has_a_patience_of_its_own(folder: str) -> None:
    async def main() -> None:
        quick = Class("quick", 1, reader_patience=0.1)
        tenancy = Tenancy({"default": Tenant("default", class_name="quick")}, {"quick": quick})
        async with running(impatient(), folder) as service:
            service.configure(tenancy)
            stuck = asyncio.Event()
            request = Request("a", (1, 2), LONG)
            async with aclosing(service.generate(request, on_stuck=stuck.set)) as events:
                await anext(events)
                await stuck.wait()
                with pytest.raises(Unavailable, match=r"nothing was read for 0\.1 s"):
                    await the_rest(events)

    run(main)


def test_a_reader_that_comes_back_finds_all_of_it_also_after_a_crash(folder: str) -> None:
    async def main() -> None:
        witness = Witness()
        async with running(impatient(step_ms=0.2), folder, witness) as service:
            request = Request("a", (1, 2), LONG)
            tokens: list[int] = []
            async with aclosing(service.generate(request, keep_seconds=PATIENCE_S)) as events:
                tokens += (await anext(events)).token_ids
            await parked(service, "a")
            kill_engine(service)
            await until(lambda: service.engine.num_restarts == 1)
            for _ in range(3):
                async with aclosing(service.rejoin("a", len(tokens))) as events:
                    tokens += (await anext(events)).token_ids
            async with aclosing(service.rejoin("a", len(tokens))) as events:
                tokens += await the_rest(events)
            assert tokens == reference(request)[0]
            assert service.tokens_of("a", 7).token_ids == tuple(tokens[:7])
        finishes = [e.finish for e in witness.events if e.finish]
        assert finishes == [Finish.LENGTH]

    run(main)


def test_whoever_does_not_come_back_is_forgotten(folder: str) -> None:
    async def main() -> None:
        witness = Witness()
        async with running(impatient(step_ms=UNHURRIED_MS), folder, witness) as service:
            request = Request("a", (1, 2), LONG)
            async with aclosing(service.generate(request, keep_seconds=0.05)) as events:
                await anext(events)
            await until(lambda: not service.is_known("a"))
            with pytest.raises(RequestNotFound):
                await anext(service.rejoin("a", 0))
        assert witness.streams == ["reader_gone", "forgotten"]
        ends = [event for event in witness.events if event.finish]
        assert [event.finish for event in ends] == [Finish.CANCELLED]
        assert ends[0].summary and ends[0].summary.device_seconds > 0

    run(main)


def test_what_is_kept_has_a_limit_and_the_oldest_goes_first(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.deliveries.MAX_KEPT", 2)

    async def main() -> None:
        async with running(impatient(step_ms=UNHURRIED_MS), folder) as service:
            for name in "abcd":
                request = Request(name, (1, 2), LONG)
                async with aclosing(service.generate(request, keep_seconds=PATIENCE_S)) as events:
                    await anext(events)
                await parked(service, name)
            await until(lambda: list(service.deliveries.kept) == ["c", "d"])

    run(main)


def test_choices_of_one_call_are_forgotten_together(folder: str) -> None:
    async def main() -> None:
        async with running(impatient(step_ms=UNHURRIED_MS), folder) as service:
            for choice, count in ((0, 2), (1, 0)):
                request = Request(f"call-{choice}", (1, 2), LONG, num_choices=count)
                async with aclosing(service.generate(request, keep_seconds=0.05)) as events:
                    await anext(events)
            await until(lambda: not service.is_known("call-0") and not service.is_known("call-1"))

    run(main)


def test_a_cancelled_request_is_not_parked(folder: str) -> None:
    """A stop string was found: the end of the stream, not of a reader."""

    async def main() -> None:
        witness = Witness()
        async with running(impatient(step_ms=UNHURRIED_MS), folder, witness) as service:
            request = Request("a", (1, 2), LONG)
            async with aclosing(service.generate(request, keep_seconds=PATIENCE_S)) as events:
                await anext(events)
                service.cancel("a")
            await until(lambda: service.num_live == 0)
            assert [e.finish async for e in service.rejoin("a", 0)] == [Finish.CANCELLED]
        assert witness.streams == ["resumed"]

    run(main)


def test_the_parts_of_a_bill_add_up() -> None:
    first = Summary(0.1, 0.2, 0.3, 4, 1, 0.5, 0.6, 0.7, 8, 9)
    second = Summary(0.1, 0.2, 0.9, 4, 2, 0.1, 0.2, 0.3, 1, 1)
    whole = together(first, second)
    assert whole.decode_seconds == 0.9  # from the first token on, whoever had it
    assert (whole.num_preemptions, whole.draft_tokens, whole.draft_accepted) == (3, 9, 10)
    assert whole.stall_seconds == pytest.approx(0.6)
    assert whole.device_seconds == pytest.approx(0.8)
    assert whole.page_seconds == pytest.approx(1.0)
    assert together(None, second) == second


def test_a_drain_waits_for_a_slow_reader_who_is_still_there(folder: str) -> None:
    async def main() -> None:
        async with running(impatient(), folder) as service:
            request = Request("a", (1, 2), LONG)
            async with aclosing(service.generate(request)) as events:
                tokens = list((await anext(events)).token_ids)
                await parked(service, "a")
                draining = asyncio.create_task(service.drain(30))
                await until(lambda: service.state is State.DRAINING)
                tokens += await the_rest(events)
            await draining
            assert tokens == reference(request)[0]

    run(main)
