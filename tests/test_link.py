"""Engines that start, report and end as they should not, in a process and in a thread."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve import process
from dynamo_serve.config import CacheSection, Config, EngineSection
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import EngineStartError
from dynamo_serve.link import Hooks, Loss, ProcessLink
from tests.core.traffic import VOCAB_SIZE
from tests.test_service import run

CONFIG = Config(engine=EngineSection(kind="fake"), cache=CacheSection(page_size=4, num_pages=64))
TALKS = """
import sys
from dynamo_serve import building, worker
from dynamo_serve.core import rescue
from dynamo_serve.building import FakeEngine
def start(self, start=FakeEngine.start):
    self.tell("weights", 0.5)
    return start(self)
def build(config, path, progress, build=building.build_engine):
    FakeEngine.tell = staticmethod(progress)
    return build(config, path, progress)
FakeEngine.start, building.build_engine = start, build
sys.exit(worker.main(*map(int, sys.argv[1:])))
"""
LINGERS = """
import sys, threading
from dynamo_serve import building, worker
from dynamo_serve.core import rescue
from dynamo_serve.building import FakeEngine
def step(self, batch):
    raise MemoryError("no more")
FakeEngine.step, rescue.MAX_FAILED_STEPS = step, 1
threading.Thread(target=threading.Event().wait).start()  # keeps the interpreter from ending
sys.exit(worker.main(*map(int, sys.argv[1:])))
"""


class Heard:
    """What the hooks were told."""

    def __init__(self, **others: Callable[..., None]) -> None:
        self.steps: list[tuple[list[TokenEvent], Stats]] = []
        self.lost: asyncio.Queue[Loss] = asyncio.Queue()
        given: dict[str, Any] = {
            "on_step": lambda events, stats: self.steps.append((events, stats)),
            "on_lost": self.lost.put_nowait,
            "on_answer": lambda ticket, answer: None,
            "progress": lambda stage, fraction: None,
        }
        self.hooks = Hooks(**{**given, **others})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    facts = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return str(tmp_path)


def test_a_process_that_cannot_be_made_leaves_nothing_behind(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[socket.socket, socket.socket]] = []
    make_pair = socket.socketpair

    def pair() -> tuple[socket.socket, socket.socket]:
        pairs.append(make_pair())
        return pairs[-1]

    def no_process(*arguments: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        engine = ProcessLink(CONFIG, folder, Heard().hooks, Tenancy())
        monkeypatch.setattr(socket, "socketpair", pair)
        monkeypatch.setattr(subprocess, "Popen", no_process)
        with pytest.raises(OSError, match="Too many"):
            await engine.start()
        await engine.close()
        assert [end.fileno() for end in pairs[-1]] == [-1, -1]

    run(main)


def test_a_cancelled_start_ends_the_process_without_a_stray_error(folder: str) -> None:
    stray: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
        engine = ProcessLink(CONFIG, folder, Heard().hooks, Tenancy())
        starting = asyncio.create_task(engine.start())
        while engine.process is None:
            await asyncio.sleep(0)
        process = engine.process
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert process.returncode is not None
        del engine, starting
        gc.collect()

    run(main)
    assert stray == []


def test_progress_that_cannot_be_shown_does_not_stop_the_start(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def progress(stage: str, fraction: float) -> None:
        told.append(stage)
        raise BrokenPipeError("the terminal is gone")

    async def main() -> None:
        monkeypatch.setattr(process, "WORKER", ("-c", TALKS))
        engine = ProcessLink(CONFIG, folder, Heard(progress=progress).hooks, Tenancy())
        spec = await engine.start()
        assert (spec.vocab_size, told) == (VOCAB_SIZE, ["weights"])
        await engine.close()

    run(main)


def test_an_engine_that_failed_is_lost_even_if_its_process_does_not_end(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "WORKER", ("-c", LINGERS))
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.2)

    async def main() -> None:
        heard = Heard()
        engine = ProcessLink(CONFIG, folder, heard.hooks, Tenancy())
        await engine.start()
        engine.send(Submit(Request("a", (1, 2), 4)))
        assert (await heard.lost.get()).reason == "MemoryError: no more"
        assert engine.process and engine.process.returncode is not None
        await engine.close()

    run(main)


def test_a_start_that_failed_does_not_wait_for_a_process_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "WORKER", ("-c", LINGERS))
    monkeypatch.setattr(process, "CLOSE_SECONDS", 0.2)

    async def main() -> None:
        engine = ProcessLink(CONFIG, "nowhere", Heard().hooks, Tenancy())
        with pytest.raises(EngineStartError, match="needs nowhere"):
            await engine.start()

    run(main)


def test_a_message_that_cannot_be_taken_in_loses_the_engine_and_ends_its_process(
    folder: str,
) -> None:
    def on_step(events: list[TokenEvent], stats: Stats) -> None:
        raise RuntimeError("cannot count")

    async def main() -> None:
        heard = Heard(on_step=on_step)
        engine = ProcessLink(CONFIG, folder, heard.hooks, Tenancy())
        await engine.start()
        engine.send(Submit(Request("a", (1, 2), 4)))
        assert (await heard.lost.get()).reason == "RuntimeError: cannot count"
        assert engine.process and engine.process.returncode is not None
        await engine.close()

    run(main)
