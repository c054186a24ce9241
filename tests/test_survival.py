"""Requests outlive engines: killed, stopped, crashed by a request, or failing in a step."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.config import Config, EngineSection
from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.engine import EngineBroken, EngineSpec
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import ContextTooLong, EngineFailure, Unavailable
from dynamo_serve.service import Service, State
from dynamo_serve.supervisor import HOPELESS_DEATHS, Supervisor
from tests.core.traffic import reference
from tests.patience import PATIENCE_S
from tests.test_service import (
    Witness,
    collect,
    config_of,
    kill_engine,
    pid_of,
    run,
    running,
    unhurried,
    until,
)
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

LONG = 250


def engine_of(config: Config, **settings: Any) -> Config:
    return replace(config, engine=EngineSection(kind="fake", **settings))


def far_off(service: Service) -> None:
    """The next engine will not be started soon."""
    service.engine._num_quick_deaths = HOPELESS_DEATHS
    service.engine._backoff = lambda: 30.0  # type: ignore[method-assign]


async def restarted(service: Service, times: int) -> None:
    await until(lambda: service.engine.num_restarts == times)


def give_up_after(service: Service, seconds: float) -> None:
    """How long the engine may stand still; 0 for ever, as it may on a machine that is busy."""
    engine = service.engine
    section = replace(engine._config.engine, stall_timeout_s=seconds)
    engine._config = replace(engine._config, engine=section)


async def stopped_and_replaced(service: Service, times: int) -> None:
    os.kill(pid_of(service), signal.SIGSTOP)
    give_up_after(service, 0.3)
    await restarted(service, times)
    give_up_after(service, 0)


def test_everybody_goes_on_with_the_next_engine(folder: str) -> None:
    """Running and waiting requests alike, each token once."""

    async def main() -> None:
        witness = Witness()
        async with running(config_of(True, max_decode_sequences=4), folder, witness) as service:
            requests = [Request(f"r{i}", (1, i), 300 + i) for i in range(8)]
            tasks = [asyncio.create_task(collect(service, request)) for request in requests]
            for count in range(1, 4):
                until_seen = len(witness.events) + 20
                await until(lambda: len(witness.events) >= until_seen)  # noqa: B023 - awaited at once
                kill_engine(service)
                await restarted(service, count)
            assert await asyncio.gather(*tasks) == [reference(r)[0] for r in requests]
            assert [incident["crashed"] for incident in service.engine.incidents] == [False] * 3
        assert [e.finish for e in witness.events if e.finish] == [Finish.LENGTH] * 8
        firsts = [e.request_id for e in witness.events if e.cached_tokens is not None]
        assert sorted(firsts) == sorted(request.id for request in requests)

    run(main)


def test_an_engine_that_stands_still_is_red_soon_and_then_replaced(folder: str) -> None:
    async def main() -> None:
        config = engine_of(config_of(True), stall_timeout_s=0, fake_step_ms=5.0)
        async with running(config, folder) as service:
            request = Request("a", (1, 2), LONG)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            await stopped_and_replaced(service, 1)
            assert await task == reference(request)[0]
            (incident,) = service.engine.incidents
            assert "makes no progress" in incident["reason"]
            assert not incident["crashed"]  # it was stopped from outside

    run(main)


def test_lost_engines_leave_no_descriptors_behind(folder: str) -> None:
    """At once, not when the collector of cycles finds them."""

    async def main() -> None:
        config = engine_of(config_of(True), stall_timeout_s=0, fake_step_ms=5.0)
        async with running(config, folder) as service:
            before = len(os.listdir("/proc/self/fd"))
            for count in range(1, 4):
                task = asyncio.create_task(collect(service, Request(f"r{count}", (1, 2), LONG)))
                await until(lambda: service.stats.num_running == 1)
                await stopped_and_replaced(service, count)
                await task
            # What other tests have left may be closed meanwhile.
            assert len(os.listdir("/proc/self/fd")) <= before

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


def test_commands_that_nobody_takes_make_the_server_unready(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle engine that was stopped has no step in flight to be late with."""
    monkeypatch.setattr("dynamo_serve.stall.RED_SECONDS", 0.1)

    async def main() -> None:
        config = engine_of(config_of(True), stall_timeout_s=0)
        async with running(config, folder) as service:
            await until(lambda: service.engine.trouble() is None)
            os.kill(pid_of(service), signal.SIGSTOP)
            request = Request("a", (1, 2), 4)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.engine.trouble() is not None)
            for check in (service.check_ready, service.check_alive):
                with pytest.raises(Unavailable, match="makes no progress: 1 commands"):
                    check()
            os.kill(pid_of(service), signal.SIGCONT)
            assert await task == reference(request)[0]
            await until(lambda: service.engine.trouble() is None)
            service.check_alive()

    run(main)


def test_an_end_by_a_signal_without_a_name_is_an_end_like_any_other(folder: str) -> None:
    async def main() -> None:
        async with running(unhurried(True), folder) as service:
            request = Request("a", (1, 2), LONG)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            os.kill(pid_of(service), signal.SIGRTMIN + 1)
            assert await task == reference(request)[0]
            assert "signal 35" in service.engine.incidents[0]["reason"]

    run(main)


def test_an_engine_that_hangs_while_it_starts_again_is_ended(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = itertools.chain([1.0], itertools.repeat(PATIENCE_S))  # the first is stopped
    monkeypatch.setattr(Supervisor, "start_limit", property(lambda engine: next(limits)))
    monkeypatch.setattr("dynamo_serve.supervisor.MAX_BACKOFF_SECONDS", 0.0)

    run(stop_while_it_starts_again(config_of(True), folder))


def test_an_engine_that_is_stopped_while_it_starts_again_is_ended_sooner(folder: str) -> None:
    run(stop_while_it_starts_again(engine_of(config_of(True), stall_timeout_s=0.3), folder))


def stop_while_it_starts_again(config: Config, folder: str) -> Callable[[], Awaitable[None]]:
    async def main() -> None:
        async with running(config, folder) as service:
            old = pid_of(service)
            kill_engine(service)
            await until(lambda: service.state is State.RESTARTING)
            await until(lambda: pid_of(service) != old)
            os.kill(pid_of(service), signal.SIGSTOP)
            request = Request("a", (1, 2), 4)
            assert await collect(service, request) == reference(request)[0]

    return main


def test_a_deadline_is_not_forgotten_by_who_comes_back_without_an_engine(folder: str) -> None:
    async def main() -> None:
        async with running(unhurried(True), folder) as service:
            far_off(service)
            request = Request("a", (1, 2), 4000, deadline=time.monotonic() + 2.0)
            async with aclosing(service.generate(request, keep_seconds=PATIENCE_S)) as events:
                await anext(events)
                kill_engine(service)
                await until(lambda: service.state is State.RESTARTING)
            async with aclosing(service.rejoin("a", 0)) as events:
                assert [event.finish async for event in events][-1] is Finish.DEADLINE

    run(main)


POISON = 19


class Poisoned(FakeEngine):
    """The process dies of a certain prompt."""

    def step(self, batch: Batch) -> list[SequenceOutput]:
        if any(work.token_ids[:1] == (POISON,) and work.position == 0 for work in batch.work):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().step(batch)


WORKER = """
import os, signal, sys
from dynamo_serve import building, worker
from tests.test_survival import Poisoned
building.FakeEngine = Poisoned
sys.exit(worker.main(*map(int, sys.argv[1:])))
"""


def test_a_request_that_kills_engines_is_failed_alone(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours in the step are suspects too, and cleared."""
    monkeypatch.setattr("dynamo_serve.process.WORKER", ("-c", WORKER))
    monkeypatch.setattr("dynamo_serve.supervisor.MAX_BACKOFF_SECONDS", 0.0)

    async def main() -> None:
        async with running(config_of(True, max_queue_delay_ms=50), folder) as service:
            requests = [Request(f"r{i}", (1, i), 200) for i in range(6)]
            tasks = [asyncio.create_task(collect(service, request)) for request in requests[:3]]
            bad = asyncio.create_task(collect(service, Request("bad", (POISON, 2), 50)))
            tasks += [asyncio.create_task(collect(service, request)) for request in requests[3:]]
            with pytest.raises(EngineFailure, match=r"alone in its step.*SIGSEGV.*2 prompt tokens"):
                await bad
            assert await asyncio.gather(*tasks) == [reference(r)[0] for r in requests]
            incidents = list(service.engine.incidents)
            assert [incident["failed"] for incident in incidents[:-1]] == [[]] * (
                len(incidents) - 1
            )
            assert incidents[-1]["failed"] == ["bad"]
            assert incidents[-1]["in_step"] == ["bad"]
            assert len(incidents) <= 3

    run(main)


class Flaky(FakeEngine):
    """Every third step raises, and whatever holds the culprit."""

    num_steps = 0

    def step(self, batch: Batch) -> list[SequenceOutput]:
        Flaky.num_steps += 1
        if any(work.token_ids[:1] == (POISON,) and work.position == 0 for work in batch.work):
            raise RuntimeError("out of memory")
        if Flaky.num_steps % 3 == 0:
            raise RuntimeError("a passing trouble")
        return super().step(batch)


def test_steps_that_raise_fail_nobody_but_the_culprit(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Flaky)

    async def main() -> None:
        async with running(config_of(False), folder) as service:
            requests = [Request(f"r{i}", (1, i), 60) for i in range(5)]
            tasks = [asyncio.create_task(collect(service, request)) for request in requests]
            bad = asyncio.create_task(collect(service, Request("bad", (POISON, 2), 50)))
            with pytest.raises(EngineFailure, match=r"2 tokens up to position 2.*out of memory"):
                await bad
            assert await asyncio.gather(*tasks) == [reference(r)[0] for r in requests]
            assert service.engine.num_restarts == 0

    run(main)


class Moody(FakeEngine):
    """Starts the first and the third time; then a step fails unless it is the third engine."""

    num_starts = 0

    def start(self) -> EngineSpec:
        Moody.num_starts += 1
        if Moody.num_starts == 2:
            raise RuntimeError("out of memory")
        return super().start()

    def step(self, batch: Batch) -> list[SequenceOutput]:
        if Moody.num_starts == 1:
            raise EngineBroken("no device")
        return super().step(batch)


def test_restarts_go_on_whatever_a_start_raises(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Moody)
    monkeypatch.setattr("dynamo_serve.supervisor.MAX_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(Moody, "num_starts", 0)

    async def main() -> None:
        async with running(config_of(False), folder) as service:
            request = Request("a", (1, 2), 4)
            assert await collect(service, request) == reference(request)[0]
            assert (service.engine.num_restarts, Moody.num_starts) == (1, 3)
            (incident,) = service.engine.incidents
            assert incident["in_step"] == ["a"] and incident["crashed"]
            assert "no device" in incident["reason"]

    run(main)


class Shrinking(FakeEngine):
    """The first one dies; the second one has less room."""

    num_starts = 0

    def start(self) -> EngineSpec:
        Shrinking.num_starts += 1
        if Shrinking.num_starts == 2:
            self.spec = replace(self.spec, max_model_len=100, num_pages=25)
        return super().start()

    def step(self, batch: Batch) -> list[SequenceOutput]:
        if Shrinking.num_starts == 1 and batch.work[0].position > 10:
            raise EngineBroken("no device")
        return super().step(batch)


def test_what_does_not_fit_the_next_engine_is_failed_and_the_rest_goes_on(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", Shrinking)
    monkeypatch.setattr(Shrinking, "num_starts", 0)

    async def main() -> None:
        async with running(config_of(False), folder) as service:
            long, short = Request("long", (1, 2), 500), Request("short", (1, 3), 50)
            tasks = [asyncio.create_task(collect(service, r)) for r in (long, short)]
            with pytest.raises(ContextTooLong, match="limit of 100"):
                await tasks[0]
            assert await tasks[1] == reference(short)[0]

    run(main)


def test_a_request_that_comes_while_the_engine_restarts_waits_for_it(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            kill_engine(service)
            await until(lambda: service.state is State.RESTARTING)
            with pytest.raises(Unavailable, match="restarted"):
                service.check_ready()
            request = Request("a", (1, 2), 4)
            assert await collect(service, request) == reference(request)[0]

    run(main)


def test_requests_are_refused_while_it_would_take_too_long(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(True), folder) as service:
            far_off(service)
            kill_engine(service)
            await until(lambda: service.state is State.RESTARTING)
            with pytest.raises(Unavailable, match="restarted") as caught:
                await collect(service, Request("a", (1, 2), 4))
            assert caught.value.retry_after > 15
            with pytest.raises(Unavailable, match="again and again"):
                service.check_alive()

    run(main)


def test_whoever_waits_for_an_engine_too_long_is_told(folder: str) -> None:
    async def main() -> None:
        config = engine_of(config_of(True), restart_patience_s=0.05, fake_step_ms=5.0)
        async with running(config, folder) as service:
            stream = service.generate(Request("a", (1, 2), 4000))
            await anext(stream)
            far_off(service)
            kill_engine(service)
            with pytest.raises(Unavailable, match="SIGKILL") as caught:
                while True:
                    await anext(stream)
            assert caught.value.retry_after > 15
            assert service.num_live == 0

    run(main)


def test_a_deadline_holds_also_without_an_engine(folder: str) -> None:
    async def main() -> None:
        async with running(unhurried(True), folder) as service:
            far_off(service)
            request = Request("a", (1, 2), 4000, deadline=time.monotonic() + 2.0)
            async with aclosing(service.generate(request)) as events:
                await anext(events)
                kill_engine(service)
                assert [event.finish async for event in events][-1] is Finish.DEADLINE

    run(main)


def test_a_server_that_drains_starts_an_engine_for_those_who_are_left(folder: str) -> None:
    async def main() -> None:
        async with running(unhurried(True), folder) as service:
            request = Request("a", (1, 2), LONG)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            draining = asyncio.create_task(service.drain(PATIENCE_S))
            await until(lambda: service.state is State.DRAINING)
            kill_engine(service)
            assert await task == reference(request)[0]
            await draining

    run(main)


class Absurd(Scheduler):
    """Cannot take in what a step brought for a certain request."""

    def update(
        self, batch: Batch, outputs: Iterable[SequenceOutput], now: float
    ) -> list[TokenEvent]:
        if any(work.seq_id == "bad" for work in batch.work):
            raise AssertionError("the books do not balance")
        return super().update(batch, outputs, now)


def test_a_request_of_which_the_scheduler_dies_does_not_do_so_for_ever(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.scheduling.Scheduler", Absurd)
    monkeypatch.setattr("dynamo_serve.supervisor.MAX_BACKOFF_SECONDS", 0.0)

    async def main() -> None:
        async with running(config_of(False), folder) as service:
            good = Request("good", (1, 3), 3000)
            async with aclosing(service.generate(good)) as events:
                tokens = list((await anext(events)).token_ids)
                bad = asyncio.create_task(collect(service, Request("bad", (1, 2), 50)))
                with pytest.raises(EngineFailure, match="between two steps"):
                    await bad
                tokens += [token async for event in events for token in event.token_ids]
            assert tokens == reference(good)[0]
            assert len(service.engine.incidents) <= 4

    run(main)
