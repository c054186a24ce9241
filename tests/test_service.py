"""The service over a real engine process and over a thread, with the fake engine behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.config import CacheSection, Config, EngineSection, SchedulerSection
from dynamo_serve.core.batch import Batch, Phase, SequenceOutput
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Refusal, Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Quota, Tenancy, Tenant
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import (
    ContextTooLong,
    EngineFailure,
    EngineStartError,
    Overloaded,
    QuotaExceeded,
    Unavailable,
)
from dynamo_serve.link import Hooks, Loss, ProcessLink
from dynamo_serve.service import Service, State
from tests.core.traffic import VOCAB_SIZE, reference
from tests.patience import PATIENCE_S


class Witness:
    """Keeps what an observer is told."""

    def __init__(self) -> None:
        self.stats: list[Stats] = []
        self.events: list[TokenEvent] = []
        self.streams: list[str] = []

    def on_stats(self, stats: Stats) -> None:
        self.stats.append(stats)

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        assert previous is None or previous <= now
        self.events.append(event)

    def on_end(self, delivery: object, now: float) -> None:
        pass

    def on_turned_away(self, request: Request, error: object) -> None:
        pass

    def on_stream(self, what: str) -> None:
        self.streams.append(what)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    facts = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return str(tmp_path)


def config_of(process: bool, **scheduler: Any) -> Config:
    return Config(
        engine=EngineSection(kind="fake", process=process),
        cache=CacheSection(page_size=4, num_pages=2048),
        scheduler=SchedulerSection(**scheduler),
    )


def unhurried(process: bool) -> Config:
    """Of an engine that has not said everything before anybody looks."""
    engine = EngineSection(kind="fake", process=process, fake_step_ms=5.0)
    return replace(config_of(process), engine=engine)


@asynccontextmanager
async def running(
    config: Config, folder: str, witness: Witness | None = None
) -> AsyncIterator[Service]:
    service = Service(config, model_path=folder, observer=witness)
    try:
        await service.start()
        yield service
    finally:
        await service.close()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await main()

    asyncio.run(bounded())


async def collect(service: Service, request: Request) -> list[int]:
    async with aclosing(service.generate(request)) as events:
        return [token async for event in events for token in event.token_ids]


def pid_of(service: Service) -> int:
    assert isinstance(service.engine._link, ProcessLink) and service.engine._link.process
    return service.engine._link.process.pid


def kill_engine(service: Service) -> None:
    os.kill(pid_of(service), signal.SIGKILL)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("process", [True, False])
def test_many_requests_get_their_own_tokens(process: bool, folder: str) -> None:
    async def main() -> None:
        requests = [Request(f"r{i}", (i % VOCAB_SIZE, 2, 3), 5 + i) for i in range(20)]
        witness = Witness()
        async with running(config_of(process), folder, witness) as service:
            answers = await asyncio.gather(*(collect(service, r) for r in requests))
            assert service.num_live == 0
            assert service.stats.pages_used == 0
        assert answers == [reference(r)[0] for r in requests]
        assert sum(e.finish is Finish.LENGTH for e in witness.events) == 20
        assert sum(len(e.token_ids) for e in witness.events) == sum(map(len, answers))

    run(main)


@pytest.mark.parametrize("process", [True, False])
def test_closing_the_stream_frees_the_pages(process: bool, folder: str) -> None:
    async def main() -> None:
        async with running(config_of(process), folder) as service:
            async with aclosing(service.generate(Request("a", (1, 2), 4000))) as events:
                await anext(events)
                assert service.stats.pages_used > 0
            await until(lambda: service.num_live == 0)
            assert service.stats.pages_used == service.stats.num_running == 0

    run(main)


def test_the_next_engine_is_told_what_operators_want_of_the_ladder(folder: str) -> None:
    async def modes(service: Service) -> dict[str, tuple[str, int]]:
        told = await service.inspect("controller")
        return {rung["rung"]: (rung["mode"], rung["level"]) for rung in told["rungs"]}

    async def main() -> None:
        wanted = {"ladder_pin": ("shed_batch",), "ladder_forbid": ("widen_window",)}
        async with running(config_of(True, **wanted), folder) as service:
            service.steer("cap_batch", "pin")
            service.steer("shed_batch", "auto")
            before = await modes(service)
            assert before["widen_window"] == ("forbid", 0)
            assert (before["cap_batch"], before["shed_batch"]) == (("pin", 2), ("auto", 1))
            await until(lambda: sum(service.stats.rungs) == 3)  # it is told of changes only
            kill_engine(service)
            await until(lambda: service.engine.num_restarts == 1)
            assert await modes(service) == before

    run(main)


class Witless(Witness):
    """Cannot take in what it is told."""

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        raise RuntimeError("cannot count")


def test_an_observer_that_fails_takes_nobody_down(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(config_of(True), folder, Witless()) as service:
            request = Request("a", (1, 2), 4)
            assert await collect(service, request) == reference(request)[0]
            assert service.num_live == 0
            assert "the observer failed" in caplog.text

    run(main)


class LostAtOnce:
    """A link whose engine is gone before anybody knows that it was ready."""

    def __init__(self, config: Config, model_path: str, hooks: Hooks, *rest: object) -> None:
        self.hooks = hooks

    async def start(self) -> EngineSpec:
        self.hooks.on_lost(Loss("it fell over"))
        return EngineSpec(64, 4, 64, VOCAB_SIZE)

    async def close(self) -> None:
        pass


def test_an_engine_lost_as_soon_as_it_is_ready_has_not_started(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.supervisor.ThreadLink", LostAtOnce)

    async def main() -> None:
        with pytest.raises(EngineStartError, match="it fell over"):
            async with running(config_of(False), folder):
                pass

    run(main)


def test_a_pause_before_a_restart_has_a_limit_however_many_failed(folder: str) -> None:
    service = Service(config_of(False), model_path=folder)
    service.engine._num_quick_deaths = 5000
    assert service.engine.restart_seconds <= 60


def test_closing_while_the_engine_restarts_ends_the_new_one_too(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            kill_engine(service)
            await until(lambda: service.engine.num_restarts == 1)
        assert isinstance(service.engine._link, ProcessLink)
        assert (
            service.engine._link.process is None
            or service.engine._link.process.returncode is not None
        )

    run(main)


def test_a_request_that_cannot_be_sent_is_not_live(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            with pytest.raises(OverflowError):
                await collect(service, Request("a", (2**63,), 4))
            assert service.num_live == 0

    run(main)


class Broken(FakeEngine):
    def step(self, batch):  # type: ignore[no-untyped-def]
        raise RuntimeError("no device")


def test_a_failed_step_is_an_engine_failure(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Broken)

    async def main() -> None:
        async with running(config_of(False), folder) as service:
            with pytest.raises(EngineFailure, match="no device"):
                await collect(service, Request("a", (1, 2), 4))
            assert service.num_live == 0

    run(main)


@pytest.mark.parametrize("process", [True, False])
def test_an_engine_that_cannot_start_says_why(process: bool) -> None:
    async def main() -> None:
        with pytest.raises(EngineStartError, match="needs nowhere/config"):
            async with running(config_of(process), "nowhere"):
                pass

    run(main)


def test_what_cannot_fit_is_refused(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(False), folder) as service:
            with pytest.raises(ContextTooLong, match="limit of 4096"):
                await collect(service, Request("a", (1,) * 4090, 7))
            assert service.num_live == 0

    run(main)


class Held(FakeEngine):
    """Answers prompts; the tokens after the first wait for the gate."""

    gate: threading.Event

    def step(self, batch: Batch) -> list[SequenceOutput]:
        if batch.phase is Phase.DECODE:
            self.gate.wait(PATIENCE_S)
        return super().step(batch)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The gate of every engine in a thread."""
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Held)
    monkeypatch.setattr(Held, "gate", gate := threading.Event(), raising=False)
    return gate


def test_a_full_queue_refuses_with_numbers(folder: str, held: threading.Event) -> None:
    async def main() -> None:
        config = config_of(False, max_waiting=1, max_decode_sequences=1)
        async with running(config, folder) as service:
            first = service.generate(Request("a", (1, 2), 50))
            await anext(first)
            others = [
                asyncio.create_task(collect(service, Request(name, (1, 3), 4))) for name in "bc"
            ]
            # Both are on their way, or the second has been refused between two steps already.
            await until(lambda: service.num_live == 3 or others[1].done())
            held.set()
            with pytest.raises(Overloaded, match="queue is full") as caught:
                await others[1]
            assert caught.value.facts["limit"] == 1
            assert len(await others[0]) == 4
            await first.aclose()
            await until(lambda: service.num_live == 0)

    run(main)


def test_what_the_scheduler_has_not_refused_yet_is_bounded(folder: str) -> None:
    """An engine that is stopped refuses nobody, and this process must not grow for ever."""

    async def main() -> None:
        config = config_of(True, max_waiting=2, max_decode_sequences=1)
        async with running(config, folder) as service:
            os.kill(pid_of(service), signal.SIGSTOP)
            requests = [Request(f"r{i}", (1, i), 4) for i in range(5)]
            tasks = [asyncio.create_task(collect(service, request)) for request in requests]
            await until(lambda: service.num_live == 5)
            with pytest.raises(Unavailable, match="holds 5 requests, its limit"):
                service.check_ready()
            os.kill(pid_of(service), signal.SIGCONT)
            await asyncio.gather(*tasks, return_exceptions=True)
            service.check_ready()

    run(main)


def test_more_guaranteed_pages_than_there_are_is_worth_a_warning(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def tenancy(*pages: int) -> Tenancy:
        quotas = [Quota(pages_guaranteed=count) for count in pages]
        return Tenancy({f"t{i}": Tenant(f"t{i}", quota=q) for i, q in enumerate(quotas)})

    async def main() -> None:
        service = Service(config_of(False), model_path=folder)
        service.configure(tenancy(2000, 48))  # the pool has 2048
        try:
            await service.start()
            assert not caplog.messages
            service.configure(tenancy(2000, 49))
            assert "add up to 2049, the pool has 2048 pages" in caplog.messages.pop()
            caplog.clear()
            service.engine._on_lost(Loss("it fell over"))
            await until(lambda: service.state is State.READY)
            assert any("add up to 2049" in message for message in caplog.messages)
        finally:
            await service.close()

    run(main)


def test_draining_lets_the_running_finish_and_refuses_the_new(folder: str) -> None:
    async def main() -> None:
        async with running(unhurried(True), folder) as service:
            request = Request("a", (1, 2), 100)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.num_live == 1)
            drained = asyncio.create_task(service.drain(PATIENCE_S))
            await until(lambda: service.state is State.DRAINING)
            with pytest.raises(Unavailable, match="shutting down"):
                await collect(service, Request("b", (1,), 4))
            part = Request("c", (1,), 2)  # of a call that was accepted before
            async with aclosing(service.generate(part, is_begun=True)) as events:
                told = [token_id async for event in events for token_id in event.token_ids]
            assert told == reference(part)[0]
            await drained
            assert await task == reference(request)[0]

    run(main)


def test_a_drain_that_takes_too_long_is_given_up(folder: str, held: threading.Event) -> None:
    async def main() -> None:
        async with (
            running(config_of(False), folder) as service,
            aclosing(service.generate(Request("a", (1, 2), 4000))) as events,
        ):
            await anext(events)
            await service.drain(0.01)
            assert service.num_live == 1
            held.set()

    run(main)


def test_a_slow_reader_gets_its_tokens_merged(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            request = Request("a", (1, 2), 300)
            async with aclosing(service.generate(request)) as stream:
                events = [await anext(stream)]
                await until(lambda: service.num_live == 0)
                events += [event async for event in stream]
            assert len(events) <= 3
            assert [t for e in events for t in e.token_ids] == reference(request)[0]

    run(main)


@pytest.mark.parametrize("process", [True, False])
def test_the_scheduler_can_be_asked(process: bool, folder: str) -> None:
    async def main() -> None:
        async with (
            running(unhurried(process), folder) as service,
            aclosing(service.generate(Request("a-0", (1, 2), 4000))) as events,
        ):
            await anext(events)
            (answer,) = await service.inspect("request", "a")
            assert (answer["id"], answer["tenant"]) == ("a-0", "default")
            assert not await service.inspect("request", "b")
            costs, state = await asyncio.gather(service.inspect("costs"), service.inspect("state"))
            assert "whole" in costs and "tenants" in costs
            assert "waiting" in state

    run(main)


def test_questions_fail_with_the_engine_and_while_there_is_none(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            os.kill(pid_of(service), signal.SIGSTOP)
            asking = asyncio.create_task(service.inspect("costs", timeout=PATIENCE_S))
            with pytest.raises(Unavailable, match="did not answer within"):
                await service.inspect("costs", timeout=0.01)
            kill_engine(service)
            with pytest.raises(Unavailable, match="SIGKILL"):
                await asking
            with pytest.raises(Unavailable, match="not up"):
                await service.inspect("costs")

    run(main)


class Telling(Scheduler):
    """Refuses everybody, in words that show which tenants it knows."""

    is_own = True

    def add(self, request: Request, now: float) -> list[TokenEvent]:
        names = " ".join(sorted(self.tenancy.tenants))
        refusal = Refusal("queue_length", names, self.is_own, 2.5, 3.0, 1.5, 4)
        return [TokenEvent(request.id, refusal=refusal)]


async def told(service: Service) -> str:
    with pytest.raises(QuotaExceeded) as caught:
        await collect(service, Request("a", (1, 2), 4))
    return caught.value.message


@pytest.mark.parametrize(("is_own", "kind"), [(True, QuotaExceeded), (False, Overloaded)])
def test_a_refusal_ends_the_request_with_its_numbers(
    is_own: bool,
    kind: type[QuotaExceeded | Overloaded],
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamo_serve.scheduling.Scheduler", Telling)
    monkeypatch.setattr(Telling, "is_own", is_own)

    async def main() -> None:
        witness = Witness()
        async with running(config_of(False), folder, witness) as service:
            with pytest.raises(kind, match="default") as caught:
                await collect(service, Request("a", (1, 2), 4))
            assert caught.value.retry_after_header == "3"
            assert caught.value.body()["error"] == {
                "message": "default",
                "type": kind.type,
                "param": None,
                "code": kind.code,
                "reason": "queue_length",
                "limit": 3.0,
                "predicted_wait_s": 1.5,
                "queue_position": 4,
                "retry_after_s": 2.5,
            }
            assert service.num_live == 0
            assert [event.refusal is not None for event in witness.events] == [True]

    run(main)


def test_the_tenants_reach_the_engine_at_start_while_it_runs_and_after_a_loss(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.scheduling.Scheduler", Telling)

    def tenancy(*names: str) -> Tenancy:
        return Tenancy({name: Tenant(name) for name in names})

    async def main() -> None:
        service = Service(config_of(False), model_path=folder)
        service.configure(tenancy("acme"))
        try:
            await service.start()
            assert await told(service) == "acme"
            service.configure(tenancy("acme", "beta"))
            assert await told(service) == "acme beta"
            service.engine._on_lost(Loss("it fell over"))
            await until(lambda: service.state is State.READY)
            assert await told(service) == "acme beta"
        finally:
            await service.close()

    run(main)


def test_a_reload_while_the_engine_starts_is_not_lost(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Slow(FakeEngine):
        def start(self) -> EngineSpec:
            gate.wait(PATIENCE_S)
            return super().start()

    monkeypatch.setattr("dynamo_serve.scheduling.Scheduler", Telling)
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Slow)

    async def main() -> None:
        service = Service(config_of(False), model_path=folder)
        try:
            starting = asyncio.create_task(service.start())
            await until(lambda: service.engine._link is not None)
            service.configure(Tenancy({"late": Tenant("late")}))
            gate.set()
            await starting
            assert await told(service) == "late"
        finally:
            gate.set()
            await service.close()

    run(main)
