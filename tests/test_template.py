"""Engine processes that are forked from a template, and what happens if that cannot be."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynamo_serve import process, start, template
from dynamo_serve.core.request import Request
from dynamo_serve.link import ProcessLink
from dynamo_serve.process import Forked
from dynamo_serve.service import Service
from dynamo_serve.start import Template, TemplateError
from tests.core.traffic import reference
from tests.patience import PATIENCE_S
from tests.test_service import collect, config_of, kill_engine, pid_of, run, until
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no Linux")

LIGHT = """
import os, sys, threading
from dynamo_serve import building, template, worker
def load():
    {load}
template.load = load
{more}
sys.exit(template.main(int(sys.argv[1])))
"""
SERVES = """
import asyncio, sys
from dynamo_serve.service import Service
from tests import test_template
async def main():
    async with test_template.serving(sys.argv[1]) as service:
        pids = test_template.pid_of(service), test_template.template_of(service).pid
        print(*pids, flush=True)
        await asyncio.Event().wait()
test_template.process.TEMPLATE = test_template.light()
asyncio.run(main())
"""


def light(load: str = "pass", more: str = "") -> tuple[str, ...]:
    """A template for the fake engine, which needs no imports."""
    return "-c", LIGHT.format(load=load, more=more)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(process, "TEMPLATE", light())
    caplog.set_level(logging.INFO, "dynamo_serve.start")


@asynccontextmanager
async def serving(folder: str) -> AsyncIterator[Service]:
    service = Service(config_of(True), model_path=folder)
    service.engine._template = Template(0)
    try:
        await service.start()
        yield service
    finally:
        await service.close()


def template_of(service: Service) -> subprocess.Popen[bytes]:
    assert service.engine._template and service.engine._template._process
    return service.engine._template._process


def is_forked(service: Service) -> bool:
    assert isinstance(service.engine._link, ProcessLink)
    return isinstance(service.engine._link.process, Forked)


async def replaced(service: Service) -> None:
    """Kill the engine, and wait for the next one."""
    count = service.engine.num_restarts
    kill_engine(service)
    await until(lambda: service.engine.num_restarts > count)


def test_engines_are_forked_and_everybody_goes_on(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(folder) as service:
            request = Request("a", (1, 2), 1000)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            await replaced(service)
            assert await task == reference(request)[0]
            pid, used = pid_of(service), template_of(service)
            assert is_forked(service)
            assert b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert os.getsid(pid) == pid  # Ctrl-C is not for it
        assert used.returncode == -signal.SIGKILL
        assert not Path(f"/proc/{pid}").exists()
        assert caplog.text.count("forked from the template") == 2

    run(main)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGRTMIN + 1, "signal 35"),
    ],
)
def test_the_end_of_a_forked_engine_is_known(number: int, reason: str, folder: str) -> None:
    async def main() -> None:
        async with serving(folder) as service:
            os.kill(pid_of(service), number)
            await until(lambda: service.engine.num_restarts == 1)
            (incident,) = service.engine.incidents
            assert reason in incident["reason"]
            assert incident["crashed"] == (number != signal.SIGKILL)

    run(main)


def test_an_exit_code_of_a_forked_engine_is_known(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits = "building.FakeEngine.step = lambda self, batch: os._exit(7)"
    monkeypatch.setattr(process, "TEMPLATE", light(more=exits))

    async def main() -> None:
        async with serving(folder) as service:
            task = asyncio.create_task(collect(service, Request("a", (1, 2), 4)))
            await until(lambda: len(service.engine.incidents) > 0)
            assert "exited with code 7" in service.engine.incidents[0]["reason"]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main)


def test_an_engine_survives_its_template_and_another_is_started(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(folder) as service:
            request, used = Request("a", (1, 2), 500), template_of(service)
            task = asyncio.create_task(collect(service, request))
            await until(lambda: service.stats.num_running == 1)
            used.kill()
            assert await task == reference(request)[0]
            assert service.engine.num_restarts == 0
            await replaced(service)
            assert is_forked(service)
            assert template_of(service) is not used
        assert "the template process died of SIGKILL; another one is started" in caplog.text

    run(main)


def test_without_an_answer_of_the_template_the_engine_is_started_directly(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one that was stopped; the next engine is forked from another."""

    async def main() -> None:
        async with serving(folder) as service:
            used = template_of(service)
            os.kill(used.pid, signal.SIGSTOP)
            await replaced(service)
            assert not is_forked(service)
            assert "it stands still for a signal; the engine is started without it" in caplog.text
            await replaced(service)
            assert is_forked(service)
        assert used.returncode == -signal.SIGKILL

    run(main)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        ("sys.exit(3)", "it has ended"),
        ("threading.Thread(target=threading.Event().wait, daemon=True).start()", "2 threads"),
        ("template.os.fork = None; template.fork_away = lambda: os.close(-1)", "Bad file"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(
    load: str,
    reason: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(process, "TEMPLATE", light(load=load))

    async def main() -> None:
        async with serving(folder) as service:
            assert not is_forked(service)
            assert reason in caplog.text
            await replaced(service)
            assert caplog.text.count(reason) == 2
            request = Request("a", (1, 2), 4)
            assert await collect(service, request) == reference(request)[0]

    run(main)


def test_a_start_that_is_cancelled_ends_a_template_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "TEMPLATE", light(load="threading.Event().wait()"))

    async def main() -> None:
        hanging = Template(0)
        forking = asyncio.create_task(hanging.fork((0, 1)))
        await until(lambda: hanging._process is not None)
        used = hanging._process
        forking.cancel()
        await asyncio.gather(forking, return_exceptions=True)
        await hanging.close()
        assert used and used.returncode == -signal.SIGKILL

    run(main)


def test_a_template_that_is_slow_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "TEMPLATE", light(load="threading.Event().wait()"))
    monkeypatch.setattr(start, "IMPORT_SECONDS", 0.5)

    async def main() -> None:
        hanging = Template(0)
        with pytest.raises(TemplateError, match=r"not answered within 0\.5 s"):
            await hanging.fork((0, 1))
        await hanging.close()

    run(main)


@pytest.mark.parametrize("is_template_stopped", [False, True])
def test_nobody_outlives_the_api_process(is_template_stopped: bool, folder: str) -> None:
    command = [sys.executable, "-c", SERVES, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout
        pids = [int(word) for word in server.stdout.readline().split()]
        fds = [os.pidfd_open(pid) for pid in pids]
        if is_template_stopped:
            os.kill(pids[1], signal.SIGSTOP)
        server.kill()
        for fd in fds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(1000 * PATIENCE_S)
            os.close(fd)


def test_two_may_wait_for_a_forked_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        child, codes = Forked(started.pid), list[int]()
        threads = [threading.Thread(target=lambda: codes.append(child.wait())) for _ in range(4)]
        for thread in threads:
            thread.start()
        child.kill()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert codes == [-signal.SIGKILL] * 4
        child.kill()  # it is gone: its number may be somebody else's


def test_a_wait_has_a_limit() -> None:
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as waiting,
        pytest.raises(subprocess.TimeoutExpired),
    ):
        Forked(waiting.pid).wait(0.01)


def test_who_is_not_our_child_is_not_taken_for_one() -> None:
    with pytest.raises(ChildProcessError, match="not a child"):
        Forked(os.getppid())


def test_a_device_in_use_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "DEVICES", ("/dev/null",))
    fd = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(os, "listdir", lambda path: ["1"] if path.endswith("task") else [str(fd)])
    assert template.obstacle() == "it has opened /dev/null, which a copy could not use"
    os.close(fd)
    assert template.obstacle() is None


def test_what_engines_import_starts_no_threads_and_touches_no_device() -> None:
    code = (
        "from dynamo_serve import template; template.load(); import os, torch; "
        "print(template.obstacle(), torch.cuda.is_initialized(), "
        "'OPENBLAS_NUM_THREADS' in os.environ)"
    )
    environment = process.engine_environment(2)
    environment.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, timeout=300,
        check=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["None", "False", "False"]
