"""The engine process: which descriptor it reads, and that it does not outlive its parent."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from dynamo_serve import wire
from dynamo_serve.building import build_fake
from dynamo_serve.config import CacheSection, Config, EngineSection
from dynamo_serve.core.loop import Command, Stop, Submit
from dynamo_serve.core.request import Request
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.link import ENGINE_SECTIONS
from dynamo_serve.worker import Channel, settings_of
from tests.core.traffic import VOCAB_SIZE
from tests.patience import PATIENCE_S

CONFIG = Config(engine=EngineSection(kind="fake"), cache=CacheSection(page_size=4, num_pages=64))
ROOT = Path(__file__).parents[1]
HIGH = 1100  # above what select() takes
HANGS = """
import sys, threading
from dynamo_serve import building, worker
def hang(self, *arguments):
    worker.end_with.__globals__["ORPHAN_SECONDS"] = 0.1
    print("hanging", flush=True)
    threading.Event().wait()
building.FakeEngine.{method} = hang
sys.exit(worker.main(int(sys.argv[1])))
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    facts = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return str(tmp_path)


def test_the_fake_engine_sleeps_as_long_as_it_is_told(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.building.FakeEngine", lambda **arguments: arguments)
    config = Config(engine=EngineSection(kind="fake", fake_step_ms=5))
    assert build_fake(config, folder)["step_seconds"] == 0.005  # type: ignore[index]


def configure(folder: str) -> bytes:
    sections = {name: asdict(getattr(CONFIG, name)) for name in ENGINE_SECTIONS}
    return wire.pack("configure", sections, folder, asdict(Tenancy()), Standing())


@contextlib.contextmanager
def worker(code: tuple[str, ...], fd: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, *code, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE, cwd=ROOT
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("method", ["start", "step"])
def test_an_engine_that_hangs_ends_with_the_api_process(method: str, folder: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs, worker(("-c", HANGS.format(method=method)), theirs.fileno()) as process:
        theirs.close()
        with ours:
            ours.sendall(configure(folder))
            if method == "step":
                assert ours.recv(1)  # ready
                ours.sendall(wire.pack_command(Submit(Request("a", (1, 2), 4))))
            assert process.stdout
            assert process.stdout.readline() == b"hanging\n"
        assert process.wait(PATIENCE_S) == 1


def test_an_idle_engine_ends_with_the_api_process(folder: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs, worker(("-m", "dynamo_serve.worker"), theirs.fileno()) as process:
        theirs.close()
        with ours:
            ours.sendall(configure(folder))
            assert ours.recv(1)  # ready
        assert process.wait(PATIENCE_S) == 0


def test_the_socket_may_have_any_number(folder: str) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] <= HIGH:
        pytest.skip("this machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], HIGH + 1), limits[1]))
    ours, theirs = socket.socketpair()
    try:
        os.dup2(theirs.fileno(), HIGH, inheritable=False)
        with theirs, ours, worker(("-m", "dynamo_serve.worker"), HIGH) as process:
            os.close(HIGH)
            ours.sendall(configure(folder))
            ours.settimeout(PATIENCE_S)
            frames, kinds = wire.Frames(), list[str]()
            while kinds.count("step") < 4:
                data = ours.recv(1 << 16)
                assert data, f"the engine is gone after {kinds}"
                kinds += [message[0] for message in frames.feed(data)]
                if kinds == ["ready"]:
                    ours.sendall(wire.pack_command(Submit(Request("a", (1, 2), 4))))
            ours.shutdown(socket.SHUT_RDWR)
            assert process.wait(PATIENCE_S) == 0
        assert kinds[0] == "ready"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_comes_with_the_settings_is_not_lost() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        commands: list[Command] = [Submit(Request("a", (1, 2), 4)), Stop()]
        ours.sendall(configure("here") + b"".join(map(wire.pack_command, commands)))
        channel = Channel(theirs)
        assert settings_of(channel.receive_message())[1:] == ("here", Tenancy(), Standing())
        assert channel.receive(PATIENCE_S) == commands
        assert channel.receive(0.0) == []
