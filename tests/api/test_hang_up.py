"""To hang up is to cancel: on real connections, because only these can be cut."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import AsyncGenerator
from functools import partial
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Message

from dynamo_serve import building
from dynamo_serve.api.faults import CLIENT_GONE
from dynamo_serve.api.sse import EventStream
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import EngineFailure, Unavailable
from dynamo_serve.service import Service
from dynamo_serve.text.stream import Delta
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import app_of, config, serving
from tests.api.stub import Script, StubService, begins_and_hangs, hangs
from tests.patience import PATIENCE_S

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def send(base: str, path: str, body: dict[str, object]) -> socket.socket:
    """Post a body and leave the answer unread."""
    raw = json.dumps(body).encode()
    address = urlsplit(base)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


def cancelled(service: StubService, count: int) -> set[str]:
    return {service.cancelled.get(timeout=PATIENCE_S) for _ in range(count)}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [hangs, begins_and_hangs])
def test_hanging_up_closes_every_choice(
    stubbed: Stubbed, script: Script, stream: bool, n: int
) -> None:
    service, base = stubbed(script)
    connection = send(base, "/v1/chat/completions", {**CHAT, "stream": stream, "n": n})
    ids = {service.seen.get(timeout=PATIENCE_S).id for _ in range(n)}
    if stream and script is begins_and_hangs:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()
    assert cancelled(service, n) == ids


def test_a_reset_connection_is_a_hang_up_too(stubbed: Stubbed) -> None:
    service, base = stubbed(begins_and_hangs)
    connection = send(base, "/v1/completions", {"prompt": "a", "stream": True})
    assert connection.recv(4096)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert len(cancelled(service, 1)) == 1


def test_hanging_up_in_the_middle_of_a_body_is_no_fault_of_ours(tokenizer: Tokenizer) -> None:
    arrives: list[Message] = [
        {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return arrives.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    path = "/v1/completions"
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": headers,
    }
    app = app_of(StubService(hangs), tokenizer, config())
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == CLIENT_GONE


def test_hanging_up_before_the_first_byte_is_out_cancels_too() -> None:
    closed = False

    async def source() -> AsyncGenerator[tuple[int, Delta], None]:
        nonlocal closed
        try:
            yield 0, Delta("a", (5,))
        finally:
            closed = True

    async def never_begun() -> AsyncGenerator[bytes, None]:
        raise AssertionError("nothing can be sent")
        yield b""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    async def call() -> None:
        updates = source()
        await anext(updates)
        await EventStream(never_begun(), updates, 15, b": ping\n\n")(
            {"type": "http", "method": "POST"}, receive, send
        )
        assert closed

    asyncio.run(call())


def test_one_choice_that_fails_cancels_the_others(stubbed: Stubbed) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        if request.id.endswith("-1"):
            raise EngineFailure("no luck")
        async for event in begins_and_hangs(request):
            yield event

    service, base = stubbed(script)
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "n": 3})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "no luck"
    assert {name[-2:] for name in cancelled(service, 3)} == {"-0", "-1", "-2"}


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_that_ends_without_finish_is_a_bug_and_not_a_wait(
    stubbed: Stubbed, n: int
) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, (100,))

    _, base = stubbed(script)
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "n": n}, timeout=PATIENCE_S)
    assert answer.status_code == 500


def test_a_silent_stream_is_kept_alive(tokenizer: Tokenizer) -> None:
    settings = config(ping_interval_s=1)
    with serving(StubService(begins_and_hangs), tokenizer, settings) as base:
        body = {**CHAT, "stream": True}
        with httpx.stream("POST", f"{base}/v1/chat/completions", json=body) as answer:
            assert any(line.startswith(": ping") for line in answer.iter_lines())


@pytest.mark.parametrize(
    ("error", "status"), [(Unavailable("full", retry_after=2.5), 503), (EngineFailure("oh"), 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_is_a_status(
    stubbed: Stubbed, error: Exception, status: int, stream: bool
) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        raise error
        yield TokenEvent(request.id)

    _, base = stubbed(script)
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == str(error)
    assert answer.headers.get("retry-after") == ("3" if status == 503 else None)


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (Unavailable("the engine was lost"), "the engine was lost", "unavailable"),
        (ZeroDivisionError("secret"), "The server failed; its log says why.", "internal_error"),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    stubbed: Stubbed, error: Exception, message: str, code: str
) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, (100,))
        raise error

    _, base = stubbed(script)
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.status_code == 200
    *_, last, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    fault = json.loads(last.removeprefix("data: "))["error"]
    assert (fault["message"], fault["code"]) == (message, code)


def test_two_hundred_random_hang_ups_leave_nothing_behind(
    model_folder: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "FakeEngine", partial(FakeEngine, step_seconds=0.001))
    settings = config()
    service = Service(settings, model_path=model_folder)
    rng = random.Random(0)
    with serving(service, tokenizer, settings) as base:
        connections = []
        for _ in range(200):
            body = {"prompt": [5, rng.randrange(300)], "max_tokens": rng.randrange(1, 200)}
            extra = {"stream": rng.random() < 0.5, "n": rng.choice([1, 1, 2])}
            connections.append(send(base, "/v1/completions", {**body, **extra}))
            if rng.random() < 0.7:
                connections.pop(rng.randrange(len(connections))).close()
        for connection in connections:
            connection.close()
        answer = httpx.post(f"{base}/v1/completions", json={"prompt": "hello", "max_tokens": 4})
        assert answer.status_code == 200
        give_up = time.monotonic() + PATIENCE_S
        while (service.num_live or service.stats.num_running) and time.monotonic() < give_up:
            httpx.get(f"{base}/health")
        assert service.num_live == 0
        assert service.stats.num_running == service.stats.num_waiting == 0
        assert service.stats.pages_used == 0
