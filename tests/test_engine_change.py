"""Rungs that change the engine: ended in order, started with other weights, the ladder goes on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.config import Config, EngineSection, ModelSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Request
from dynamo_serve.core.stats import Standing
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import EngineStartError, InvalidRequest, Unavailable
from dynamo_serve.ladder import LIGHTER, RESTART, Ladder
from dynamo_serve.link import ProcessLink
from dynamo_serve.service import Service
from tests.core.traffic import reference
from tests.test_service import (
    Witness,
    collect,
    config_of,
    kill_engine,
    pid_of,
    run,
    running,
    until,
)
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture


def lighter(process: bool = True, step_ms: float = 0.0, **scheduler: Any) -> Config:
    return replace(
        config_of(process, **scheduler),
        model=ModelSection(lighter="int8"),
        engine=EngineSection(kind="fake", process=process, fake_step_ms=step_ms),
    )


def weights(service: Service) -> object:
    return service.spec.facts["quantization"]


async def changed(service: Service, times: int) -> None:
    await until(lambda: service.engine.num_restarts == times and service.engine.is_up)


async def rungs(service: Service) -> dict[str, dict[str, Any]]:
    told = await service.inspect("controller")
    return {rung["rung"]: rung for rung in told["rungs"]}


@pytest.mark.parametrize("process", [True, False])
def test_everybody_goes_on_with_lighter_weights_and_back(process: bool, folder: str) -> None:
    """Each token once, and each step's tokens from the engine that told them."""

    async def main() -> None:
        witness = Witness()
        config = lighter(process, 1.0, max_decode_sequences=4)
        async with running(config, folder, witness) as service:
            requests = [Request(f"r{i}", (1, i), 200 + i) for i in range(8)]
            tasks = [asyncio.create_task(collect(service, request)) for request in requests]
            for count, (mode, wanted) in enumerate((("pin", "int8"), ("forbid", "none")), start=1):
                seen = len(witness.events) + 40
                await until(lambda: len(witness.events) >= seen)  # noqa: B023 - awaited at once
                service.steer(LIGHTER, mode)
                await changed(service, count)
                assert weights(service) == wanted
            assert await asyncio.gather(*tasks) == [reference(r)[0] for r in requests]
            assert not service.engine.incidents and service.engine._num_quick_deaths == 0
            assert (await rungs(service))[LIGHTER]["num_undone"] == 1
        assert [e.finish for e in witness.events if e.finish] == [Finish.LENGTH] * 8

    run(main)


def test_the_next_engine_knows_since_when_which_rung_is_taken(folder: str) -> None:
    """After a change as after a crash; else nobody would undo what is taken."""

    async def main() -> None:
        async with running(lighter(), folder) as service:
            for rung in ("cap_batch", LIGHTER):
                service.steer(rung, "pin")
            await changed(service, 1)
            service.steer(LIGHTER, "auto")
            first = await rungs(service)
            kill_engine(service)
            await changed(service, 2)
            assert weights(service) == "int8", "nobody has undone it"
            second = await rungs(service)
            for rung, level in (("cap_batch", 2), (LIGHTER, 1)):
                assert (first[rung]["level"], second[rung]["level"]) == (level, level)
                assert first[rung]["trigger"] == second[rung]["trigger"] == "operator"
                assert second[rung]["taken_s_ago"] > first[rung]["taken_s_ago"] > 0
                assert second[rung]["num_taken"] == level
            history = (await service.inspect("controller"))["history"]
            assert [c["rung"] for c in history] == ["cap_batch", "cap_batch", LIGHTER]
            assert len(service.engine.incidents) == 1, "a change of engines is none"

    run(main)


def test_whoever_comes_or_goes_meanwhile_is_answered(folder: str) -> None:
    async def main() -> None:
        async with running(lighter(step_ms=20.0), folder) as service:
            gone = asyncio.create_task(collect(service, Request("gone", (1,), 3000)))
            await until(lambda: service.stats.num_running == 1)
            service.steer(LIGHTER, "pin")
            await until(lambda: not service.engine.is_up)
            late = asyncio.create_task(collect(service, Request("late", (2,), 3)))
            service.cancel("gone")
            assert len(await gone) < 3000
            assert await late == reference(Request("late", (2,), 3))[0]
            assert weights(service) == "int8"

    run(main)


def test_an_engine_killed_while_it_is_ended_is_replaced_all_the_same(folder: str) -> None:
    async def main() -> None:
        async with running(lighter(step_ms=20.0), folder) as service:
            request = Request("a", (1, 2), 30)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            service.steer(LIGHTER, "pin")
            await until(lambda: not service.engine.is_up)
            kill_engine(service)
            await changed(service, 1)
            assert weights(service) == "int8"
            assert await task == reference(request)[0]

    run(main)


def test_a_server_that_closes_while_it_changes_engines_leaves_none_behind(folder: str) -> None:
    async def main() -> None:
        async with running(lighter(step_ms=50.0), folder) as service:
            task = asyncio.create_task(collect(service, Request("a", (1, 2), 3000)))
            await until(lambda: service.stats.num_running == 1)
            process = service.engine._link.process  # type: ignore[union-attr]
            service.steer(LIGHTER, "pin")
            await until(lambda: not service.engine.is_up)
        with pytest.raises(Unavailable, match="shutting down"):
            await task
        assert process is not None and process.returncode is not None
        link = service.engine._link
        assert isinstance(link, ProcessLink) and link.process
        assert link.process.returncode is not None

    run(main)


def test_weights_that_do_not_load_are_given_up_and_the_usual_ones_come_back(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = FakeEngine.start

    def cannot(self: FakeEngine) -> EngineSpec:
        if self.spec.facts["quantization"] == "int8":
            raise EngineStartError("no such kernels")
        return start(self)

    monkeypatch.setattr(FakeEngine, "start", cannot)

    async def main() -> None:
        async with running(lighter(process=False), folder) as service:
            request = Request("a", (1, 2), 2000)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            service.steer(LIGHTER, "pin")
            await changed(service, 1)
            assert weights(service) == "none"
            told = (await rungs(service))[LIGHTER]
            assert (told["mode"], told["level"]) == ("forbid", 0)
            assert await task == reference(request)[0]

    run(main)


def test_what_is_pinned_from_the_start_is_there_from_the_start(folder: str) -> None:
    async def main() -> None:
        async with running(lighter(ladder_pin=(LIGHTER,)), folder) as service:
            assert weights(service) == "int8"
            assert (await rungs(service))[LIGHTER]["level"] == 1
            assert service.engine.num_restarts == 0
            service.steer(LIGHTER, "forbid")
            await changed(service, 1)
            assert weights(service) == "none"
            assert (await rungs(service))[LIGHTER]["level"] == 0

    run(main)


def test_a_new_start_that_the_ladder_wants_is_one_start(folder: str) -> None:
    async def main() -> None:
        async with running(lighter(), folder) as service:
            old = pid_of(service)
            request = Request("a", (1, 2), 1500)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            taken = (await rungs(service))[RESTART]
            assert taken["is_possible"] and taken["levels"] == 1
            standing = service.engine._ladder._standing._replace(taken=(RESTART,))
            service.engine._on_step([], service.stats._replace(ladder=standing))
            await changed(service, 1)
            assert pid_of(service) != old
            assert await task == reference(request)[0]
            assert (await rungs(service))[RESTART]["level"] == 0
            assert service.engine.num_restarts == 1 and not service.engine.incidents

    run(main)


def test_what_makes_no_sense_is_refused() -> None:
    ladder = Ladder(config_of(False))
    with pytest.raises(InvalidRequest, match="has no undo"):
        ladder.steer(RESTART, "pin")
    with pytest.raises(InvalidRequest, match=r"set model\.lighter"):
        ladder.steer(LIGHTER, "pin")
    assert ladder.modes == {}
    for rung in (LIGHTER, RESTART):
        ladder.steer(rung, "forbid")
    assert ladder.next_engine()[1] == Standing({LIGHTER: "forbid", RESTART: "forbid"})


def test_the_fake_engine_is_faster_with_lighter_weights(folder: str) -> None:
    """So that tests and rehearsals see an effect."""

    async def main() -> None:
        async with running(lighter(process=False, step_ms=20.0), folder) as service:
            fastest = {}
            for mode in ("auto", "pin"):
                service.steer(LIGHTER, mode)
                await until(lambda: weights(service) == {"auto": "none", "pin": "int8"}[mode])  # noqa: B023
                await until(lambda: service.engine.is_up)
                assert service.engine._link._config.model.lighter == "int8"  # type: ignore[union-attr]
                steps: list[float] = []
                task = asyncio.create_task(collect(service, Request(mode, (1,), 20)))
                while not task.done():
                    if service.stats.step:
                        steps.append(service.stats.step.seconds)
                    await asyncio.sleep(0.001)
                fastest[mode] = min(steps)
            assert fastest["auto"] > 0.019 > fastest["pin"] > 0.009

    run(main)
