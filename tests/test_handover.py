"""One server takes over from another: nobody is refused, and streams go on where they were."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dynamo_serve import bundled, wire
from dynamo_serve.config import ServerSection
from dynamo_serve.errors import ConfigError
from dynamo_serve.handover import Door, check_path, take_over
from tests.api.test_resume import EVENTS, Answer, events_of, read
from tests.patience import PATIENCE_S
from tests.test_service import run

SERVE = [sys.executable, "-m", "dynamo_serve.cli", "serve", "--set", "engine.kind=fake"]
ASK = "/v1/completions"


class Server(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def ended(self) -> str:
        """What it has logged; it is gone, and all was well."""
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()
        said = self.log.read_text()
        assert "Traceback" not in said
        return said


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's: a socket's path must be short."""
    path = Path(tempfile.mkdtemp(prefix="dserve-"))
    yield path
    shutil.rmtree(path)


class Starting:
    """Starts servers that take over from each other; afterwards they are gone."""

    def __init__(self, folder: Path, stack: ExitStack, *flags: str) -> None:
        self.socket = folder / "handover.sock"
        self._flags = ("--set", f"server.handover={self.socket}", *flags)
        self._folder = folder
        self._stack = stack
        self._num_started = 0

    def __call__(self, port: str = "0", *flags: str) -> Server:
        self._num_started += 1
        log = self._folder / f"{self._num_started}.log"
        process = self._stack.enter_context(launched(log, "--port", port, *self._flags, *flags))
        assert process.stdout is not None
        greeting = "".join(process.stdout.readline() for _ in range(5))
        found = re.search(r"http://[\d.]+:\d+", greeting)
        assert found, log.read_text()
        return Server(process, found.group(), log)

    def failing(self, *flags: str) -> str:
        """The last line of a server that does not come up."""
        log = self._folder / "failed.log"
        with launched(log, *self._flags, *flags) as process:
            assert process.wait(PATIENCE_S) == 2, log.read_text()
        return log.read_text().splitlines()[-1]


@contextmanager
def launched(log: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*SERVE, *flags], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


@contextmanager
def starting(folder: Path, *flags: str) -> Iterator[Starting]:
    with ExitStack() as stack:
        yield Starting(folder, stack, *flags)


def body_of(max_tokens: int, **fields: Any) -> dict[str, Any]:
    shown = {"logprobs": 2, "return_token_ids": True, "stream_options": {"include_usage": True}}
    limits = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return {"prompt": [5, 6, 7], "stream": True, **limits, **shown, **fields}


def whole(url: str, body: dict[str, Any]) -> Answer:
    answer = Answer()
    with httpx.stream("POST", url + ASK, json=body, headers=EVENTS, timeout=PATIENCE_S) as response:
        read(answer, response)
    answer.last_id = ""
    return answer


def events_until_error(answer: Answer, events: Iterator[str]) -> dict[str, Any]:
    """Read on until the event that says why the stream ends; what it says."""
    for event in events:
        if event.startswith("data: {") and "error" in (told := json.loads(event[6:])):
            assert next(events) == "data: [DONE]"
            error = told["error"]
            assert error.keys() >= {"message", "type", "param", "code", "retry_after_s"}
            assert error["type"] == "server_error"
            return dict(error)
        answer.take(event)
    raise AssertionError("the stream ended without an error")


class Load(threading.Thread):
    """Asks again and again until told to stop; keeps what went wrong."""

    def __init__(self, port: str, *, keeps_alive: bool) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.num_answers = 0
        self.is_over = False
        self._port = int(port)
        self._keeps_alive = keeps_alive

    def run(self) -> None:
        body = json.dumps({"prompt": "x", "max_tokens": 3})
        headers = {"Content-Type": "application/json"}
        if not self._keeps_alive:
            headers["Connection"] = "close"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        while not self.is_over:
            try:
                connection.request("POST", "/v1/completions", body, headers)
                answer = connection.getresponse()
                said = answer.read()  # it closes itself where the server says so
                self.num_answers += 1
                if answer.status != 200:
                    self.faults.append(f"{answer.status} {said!r}")
            except Exception as error:
                self.faults.append(repr(error))
                connection.close()
        connection.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline


def test_nobody_is_refused_while_servers_take_over_from_each_other(folder: Path) -> None:
    patience = ("--set", "server.header_timeout_s=60")
    with starting(folder, "--set", "engine.fake_step_ms=10", *patience) as start:
        server = start()
        assert stat.S_IMODE(start.socket.stat().st_mode) == 0o600
        clients = [Load(server.port, keeps_alive=at == 0) for at in range(3)]
        for client in clients:
            client.start()
        try:
            for _ in range(2):
                early = http.client.HTTPConnection("127.0.0.1", int(server.port), PATIENCE_S)
                early.connect()
                old, server = server, start(server.port)
                wait_for(lambda log=old.log: "this one drains" in log.read_text())  # type: ignore[misc]
                early.request("GET", "/health")  # to the old one, which has accepted it
                answer = early.getresponse()
                assert answer.read()
                assert (answer.status, answer.getheader("Connection")) == (200, "close")
                early.close()
                answer.close()
                assert "another server has taken over" in old.ended()
                before = [client.num_answers for client in clients]
                wait_for(
                    lambda had=before: all(  # type: ignore[misc]
                        c.num_answers > n for c, n in zip(clients, had, strict=True)
                    )
                )
        finally:
            for client in clients:
                client.is_over = True
            for client in clients:
                client.join()
        assert [client.faults for client in clients] == [[], [], []]
        assert list(folder.glob("*.sock*")) == [start.socket]
        server.process.send_signal(signal.SIGTERM)
        server.ended()
        assert not start.socket.exists()


def test_streams_go_on_in_the_next_server(folder: Path) -> None:
    """One whose reader stays, one with several choices, one whose reader has gone; and one that
    nobody can go on with."""
    flags = ("--set", "engine.fake_step_ms=60", "--set", "server.drain_timeout_s=0.2",
             "--set", f"server.resume_grace_s={PATIENCE_S}")  # fmt: skip
    with starting(folder, *flags) as start, ExitStack() as stack:
        old = start()
        bodies = [body_of(1500), body_of(1000, n=3), body_of(1200)]
        answers = [Answer(), Answer(), Answer()]
        streams = []
        for answer, body in zip(answers, bodies, strict=True):
            asking = httpx.stream(
                "POST", old.url + ASK, json=body, headers=EVENTS, timeout=PATIENCE_S
            )
            response = stack.enter_context(asking)
            streams.append(events_of(response.iter_bytes(), float("inf")))
            for _ in range(4):
                answer.take(next(streams[-1]))
        response.close()  # the last one's reader goes
        streams.pop()
        late: list[httpx.Response] = []
        wanted = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}
        asker = threading.Thread(
            target=lambda: late.append(
                httpx.post(old.url + ASK, json=wanted, timeout=PATIENCE_S),
            )
        )
        asker.start()
        wait_for(lambda: num_live(old.url) == 1 + 3 + 1)
        new = start(old.port, "--set", "engine.fake_step_ms=0")
        assert new.url == old.url
        for answer, events in zip(answers, streams, strict=False):
            error = events_until_error(answer, events)
            assert error["code"] == "server_handover"
            assert "Last-Event-ID" in error["message"]
            path = f"/v1/streams/{answer.last_id.partition(':')[0]}"
            assert error["resume"] == {"path": path, "last_event_id": answer.last_id}
        asker.join()
        assert late[0].status_code == 503
        assert late[0].json()["error"]["code"] == "server_shutdown"
        assert "3 of 3 streams handed over" in old.ended()
        metrics = httpx.get(new.url + "/metrics").text
        assert 'dserve_stream_changes_total{what="taken_over"} 5.0' in metrics
        for answer, body in zip(answers, bodies, strict=True):
            path = f"/v1/streams/{answer.last_id.partition(':')[0]}"
            headers = {"Last-Event-ID": answer.last_id}
            with httpx.stream(
                "GET", new.url + path, headers=headers, timeout=PATIENCE_S
            ) as response:
                read(answer, response)
            assert answer.is_done
            answer.last_id = ""
            assert answer == whole(new.url, body)


def test_a_server_that_fails_to_take_over_changes_nothing(folder: Path) -> None:
    """And one that succeeds gets a stream as soon as its client asks there for it."""
    dead = folder / "handover.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(dead))
    with starting(folder, "--set", "engine.fake_step_ms=60") as start, ExitStack() as stack:
        old = start()
        answer, body = Answer(), body_of(3000)
        asking = httpx.stream("POST", old.url + ASK, json=body, headers=EVENTS, timeout=PATIENCE_S)
        events = events_of(stack.enter_context(asking).iter_bytes(), float("inf"))
        answer.take(next(events))
        said = start.failing("--port", "1")
        assert f"listens on {old.port}" in said and said.startswith("dynamo-serve: server.port = 1")
        said = start.failing("--port", old.port, "--model", broken_model(folder))
        assert "the fake engine needs vocab_size" in said
        wait_for(lambda: "this one goes on" in old.log.read_text())
        answer.take(next(events))
        assert httpx.get(old.url + "/ready").status_code == 200
        new = start(old.port, "--set", "engine.fake_step_ms=0")
        wait_for(lambda: "this one drains" in old.log.read_text())
        answer.take(next(events))
        headers = {"Last-Event-ID": answer.last_id}
        with httpx.stream("POST", new.url + ASK, headers=headers, timeout=PATIENCE_S) as response:
            read(answer, response)
        answer.last_id = ""
        assert answer == whole(new.url, body)
        error = events_until_error(Answer(), events)
        assert error["code"] == "server_handover"
        old.ended()  # long before its drain is over: there is nothing left to wait for


def broken_model(folder: Path) -> str:
    """One whose engine does not start, and is asked to after the port was taken over."""
    broken = folder / "model"
    shutil.copytree(bundled.path(), broken)
    (broken / "config.json").write_text("{}")
    return str(broken)


def num_live(url: str) -> int:
    found = re.search(r"^dserve_sequences_live (\d+)", httpx.get(url + "/metrics").text, re.M)
    return int(found[1]) if found else 0


def test_whoever_says_nonsense_at_the_door_gets_nothing_by_it(folder: Path) -> None:
    """And a socket that was handed over is the same one, until the last process closes it."""
    path = str(folder / "x.sock")

    def nonsense(words: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(path)
            caller.recv(100)
            caller.sendall(words)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            door = Door(path, listener)
            door.open()
            coming = asyncio.create_task(door.successor())
            for words in (b"", b"GET / HTTP/1.1", wire.pack("go"), wire.pack(5), wire.pack("stop")):
                await asyncio.to_thread(nonsense, words)
            server = ServerSection(port=listener.getsockname()[1], handover=path)
            with pytest.raises(ConfigError, match=r"server\.host = '127\.0\.0\.2'"):
                await asyncio.to_thread(take_over, replace(server, host="127.0.0.2"))
            before = await asyncio.to_thread(take_over, server)
            assert before is not None
            assert not before.listener.get_inheritable()
            await before.go(7, {"models": ["tiny"]})
            after = await coming
            assert (after.format, after.identity) == (7, {"models": ("tiny",)})
            listener.close()
            socket.create_connection(before.listener.getsockname()).close()
            before.close()
            before.listener.close()
            after.close()
            door.close()
            assert not Path(path).exists()
            assert take_over(server) is None

    run(main)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("missing/x.sock", "there is no folder"),
        ("file", "something else is there"),
        ("x" * 91, "may have 90 bytes"),
    ],
)
def test_a_path_where_no_socket_can_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=fault):
        check_path(path)


def test_without_the_setting_nobody_is_asked() -> None:
    assert take_over(ServerSection()) is None
