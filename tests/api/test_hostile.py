"""Clients that want to take the server from others: everything of theirs has an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dynamo_serve.api import gate, protocol
from dynamo_serve.api.watch import Watch
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import StubService, begins_and_hangs, hangs, says
from tests.patience import PATIENCE_S

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
CHUNKED = b"\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "send_timeout_s": 0.3}

Served = Callable[..., tuple[StubService, str]]


@pytest.fixture
def served(tokenizer: Tokenizer) -> Generator[Served]:
    """Serves a stub under the given limits: (service, base URL)."""
    with contextlib.ExitStack() as stack:

        def start(script: Any = None, **limits: Any) -> tuple[StubService, str]:
            service = StubService(script or says(tokenizer, "hi"))
            settings = config(**limits)
            return service, stack.enter_context(serving(service, tokenizer, settings))

        yield start


def connect(base: str, receive_buffer: int = 0) -> socket.socket:
    address = urlsplit(base)
    assert address.hostname and address.port
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE_S)
    connection.connect((address.hostname, address.port))
    return connection


def head(path: str, length: int | None = None, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*lines, *([f"Content-Length: {length}"] * (length is not None))]).encode()


def post(path: str, **body: Any) -> bytes:
    raw = json.dumps(body).encode()
    return head(path, len(raw)) + b"\r\n\r\n" + raw


def answer_of(connection: socket.socket) -> tuple[HTTPResponse, bytes]:
    with contextlib.closing(HTTPResponse(connection)) as answer:
        answer.begin()
        return answer, answer.read()


def refusal(connection: socket.socket) -> tuple[int, str]:
    """Status and code of an error after which the connection is closed."""
    answer, body = answer_of(connection)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert is_closed(connection)
    return answer.status, json.loads(body)["error"]["code"]


def is_closed(connection: socket.socket) -> bool:
    """Waits until the server has said everything, and says whether it closed."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def healthy(base: str) -> bool:
    return httpx.get(f"{base}/health", timeout=PATIENCE_S).status_code == 200


def until(true: Callable[[], bool], base: str) -> None:
    """Goes through the server's event loop until `true()`."""
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        assert healthy(base)


# Old clients


def test_who_speaks_http_1_0_gets_no_chunks(served: Served) -> None:
    _, base = served()
    for stream in (True, False):
        raw = post(TEXT, prompt="a", stream=stream).replace(b"HTTP/1.1", b"HTTP/1.0")
        with connect(base) as connection:
            connection.sendall(raw)
            answer, body = answer_of(connection)
            assert answer.headers["transfer-encoding"] is None
            assert answer.headers["connection"] == "close"
            assert (answer.headers["content-length"] is None) is stream
            if stream:
                assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
                assert is_closed(connection)
            else:
                assert json.loads(body)["choices"]


# Slow senders


def test_half_a_head_is_not_waited_for_for_ever(served: Served) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        connection.sendall(head(TEXT))
        assert refusal(connection) == (408, "request_timeout")


def test_a_head_that_grows_byte_by_byte_has_no_more_time(served: Served) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        answered = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                for byte in head(TEXT) + b"\r\nX-Slow: " + b"a" * 10_000:
                    connection.sendall(bytes([byte]))
                    if answered.wait(0.01):
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer, _ = answer_of(connection)
        answered.set()
        dripping.join(PATIENCE_S)
    assert answer.status == 408


def test_a_connection_that_says_nothing_is_closed_without_a_word(served: Served) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("more", [b"\r\n", b"GET /hea"])
def test_a_kept_connection_has_no_more_time_for_the_next_head(served: Served, more: bytes) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        connection.sendall(head("/health", method="GET") + b"\r\n\r\n")
        assert answer_of(connection)[0].status == 200
        connection.sendall(more)
        assert refusal(connection) == (408, "request_timeout")


@pytest.mark.parametrize(
    "begun",
    [
        head(TEXT, 100) + b'\r\n\r\n{"prom',
        head(TEXT) + CHUNKED + b"5\r\n{",
    ],
)
def test_half_a_body_is_not_waited_for_for_ever(
    served: Served, begun: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    service, base = served(**SHORT)
    with connect(base) as connection:
        connection.sendall(begun)
        assert refusal(connection) == (408, "request_timeout")
    assert healthy(base)
    assert service.seen.empty()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_waits_to_be_asked_for_the_body_has_no_more_time(served: Served) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        connection.sendall(head(TEXT, 100) + b"\r\nExpect: 100-continue\r\n\r\n")
        answer, _ = answer_of(connection)  # skips "100 Continue"
        assert answer.status == 408
        assert is_closed(connection)


def test_the_time_for_an_answer_does_not_count(served: Served) -> None:
    service, base = served(begins_and_hangs, **SHORT)
    with connect(base) as quiet, connect(base) as asking:
        asking.sendall(post(TEXT, prompt="a", stream=True))
        assert asking.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(3):  # each outlives every limit
            with connect(base) as other:
                assert other.recv(1) == b""
        assert quiet.recv(1) == b""
        assert service.cancelled.empty()


def test_a_body_that_nobody_reads_ends_too(served: Served) -> None:
    _, base = served(**SHORT)
    with connect(base) as connection:
        connection.sendall(head("/nowhere", 10_000) + b"\r\n\r\n{")
        assert answer_of(connection)[0].status == 404
        assert is_closed(connection)


# Too much


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (head("/" + "a" * 9_000, method="GET") + b"\r\n\r\n", 414, "address_too_long"),
        (b"GET /" + b"a" * 60_000, 431, "headers_too_large"),
        (head("/health", method="GET") + b"\r\nA: b" * 101 + b"\r\n\r\n", 431, "headers_too_large"),
        (
            head("/health", method="GET") + (b"\r\nA: " + b"b" * 400) * 90 + b"\r\n\r\n",
            431,
            "headers_too_large",
        ),
        (head("/health", method="GET") + b"\r\nA: " + b"b" * 60_000, 431, "headers_too_large"),
        (b"\r\n" * 40_000, 431, "headers_too_large"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_value"),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "invalid_value"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_value"),
        (head(TEXT) + b"\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n", 400, "invalid_value"),
        (head(TEXT, 5) + CHUNKED, 400, "invalid_value"),
        (
            head(TEXT) + CHUNKED + b"nonsense\r\n",
            400,
            "invalid_value",
        ),
    ],
)
def test_a_bad_head_is_refused_and_the_connection_closed(
    served: Served, raw: bytes, status: int, code: str
) -> None:
    _, base = served()
    with connect(base) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
        if code == "address_too_long" or raw.startswith(b"GET /a"):
            assert refusal(connection)[0] in (414, 431)
        else:
            assert refusal(connection) == (status, code)
    assert healthy(base)


def test_an_endless_head_is_cut_off(served: Served) -> None:
    _, base = served()
    with connect(base) as connection:
        connection.sendall(head("/health", method="GET") + b"\r\nA: ")
        with pytest.raises(ConnectionError):
            for _ in range(1_000):
                connection.sendall(b"b" * 65_536)
    assert healthy(base)


def test_what_follows_the_body_is_no_header(served: Served) -> None:
    service, base = served()
    with connect(base) as connection:
        body = b'{"prompt": "a", "max_tokens": 1}'
        trailer = b"0\r\nX-Request-Deadline-Ms: nonsense\r\n\r\n"
        connection.sendall(head(TEXT) + CHUNKED + b"%x\r\n%s\r\n" % (len(body), body) + trailer)
        assert answer_of(connection)[0].status == 200
    assert service.seen.get(timeout=PATIENCE_S)


def test_a_wish_for_another_protocol_is_answered_as_http(served: Served) -> None:
    _, base = served()
    wish = b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with connect(base) as connection:
        connection.sendall(head("/health", method="GET") + wish)
        assert answer_of(connection)[0].status == 200
        assert is_closed(connection)


# Requests ahead of their answers


def test_a_few_requests_at_once_are_answered_in_order(served: Served) -> None:
    _, base = served()
    with connect(base) as connection:
        heads = [head(path, method="GET") for path in ("/health", "/nowhere", "/v1/models")]
        last = head("/health", method="GET") + b"\r\nConnection: close\r\n\r\n"
        connection.sendall(b"\r\n\r\n".join([*heads, last]))
        with connection.makefile("rb") as answers:
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answers.read())
    assert statuses == [b"200", b"404", b"200", b"200"]


@pytest.mark.parametrize(
    "flood",
    [
        (head("/health", method="GET") + b"\r\n\r\n") * 5_000,
        post(TEXT, prompt="a" * 30_000) * 4,
        b"nonsense",
    ],
)
def test_a_flood_behind_a_request_ends_both(served: Served, flood: bytes) -> None:
    service, base = served(begins_and_hangs)
    with connect(base) as connection:
        connection.sendall(post(TEXT, prompt="a", stream=True))
        service.seen.get(timeout=PATIENCE_S)
        with contextlib.suppress(ConnectionError):
            connection.sendall(flood)
        assert is_closed(connection)
    assert service.cancelled.get(timeout=PATIENCE_S)
    assert healthy(base)


def test_hanging_up_is_seen_behind_further_requests(served: Served) -> None:
    service, base = served(hangs)
    with connect(base) as connection:
        connection.sendall(post(TEXT, prompt="a") * 3)
        service.seen.get(timeout=PATIENCE_S)
    assert service.cancelled.get(timeout=PATIENCE_S)
    assert healthy(base)
    assert service.seen.empty()  # the further ones never began


# Floods


def test_beyond_the_limit_only_probes_are_answered(served: Served) -> None:
    service, base = served(begins_and_hangs, max_connections=2)
    with connect(base) as stream, connect(base):
        stream.sendall(post(TEXT, prompt="a", stream=True))
        assert stream.recv(4096).startswith(b"HTTP/1.1 200")
        with connect(base) as other:
            other.sendall(post(TEXT, prompt="a"))
            answer, body = answer_of(other)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert "which is the limit" in json.loads(body)["error"]["message"]
            assert is_closed(other)
        for probe in gate.PROBES:
            found = httpx.get(base + probe)
            assert found.status_code == 200
            assert found.headers["connection"] == "close"
        assert service.cancelled.empty()


def test_a_silent_flood_leaves_room_for_probes_and_streams(served: Served) -> None:
    service, base = served(begins_and_hangs, max_connections=8)
    with connect(base) as stream, contextlib.ExitStack() as stack:
        stream.sendall(post(TEXT, prompt="a", stream=True))
        assert stream.recv(4096).startswith(b"HTTP/1.1 200")
        flood = [stack.enter_context(connect(base)) for _ in range(400)]
        assert healthy(base)
        refused = flood[7 : -gate.RESERVE - 1]  # the first seven are guests
        assert {refusal(c) for c in refused[-50:]} == {(503, "unavailable")}
        assert healthy(base)
        assert service.cancelled.empty()


def test_a_place_that_is_free_again_is_given_away(served: Served) -> None:
    _, base = served(max_connections=1)
    for _ in range(20):
        assert httpx.get(f"{base}/v1/models").status_code in (200, 503)
    until(lambda: httpx.get(f"{base}/v1/models").status_code == 200, base)


def test_two_thousand_requests_at_once_leave_the_server_responsive(
    model_folder: str, tokenizer: Tokenizer
) -> None:
    settings = config()
    service = Service(settings, model_path=model_folder)

    def flood(base: str, wanted: bytes, times: int) -> set[int]:
        with connect(base) as connection:
            statuses = set()
            for _ in range(times):
                connection.sendall(wanted)
                statuses.add(answer_of(connection)[0].status)
        return statuses

    request = post(TEXT, prompt=[5], max_tokens=1)
    probe = head("/health", method="GET") + b"\r\n\r\n"
    with serving(service, tokenizer, settings) as base, ThreadPoolExecutor(41) as pool:
        floods = [pool.submit(flood, base, request, 50) for _ in range(40)]
        probing = pool.submit(flood, base, probe, 20)
        assert probing.result() == {200}
        assert set().union(*(done.result() for done in floods)) == {200}
        until(lambda: service.num_live == 0, base)


# Slow readers


async def endless(request: Request) -> AsyncGenerator[TokenEvent, None]:
    while True:
        yield TokenEvent(request.id, (100,) * 200)
        await asyncio.sleep(0)


def test_what_waits_for_a_reader_who_stopped_is_bounded(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, paused = 0, threading.Event()

    class Counting(Watch):
        def start(self) -> None:
            paused.set()

    monkeypatch.setattr(protocol, "Watch", Counting)

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        nonlocal written
        while True:
            written += 200  # a byte each, before the frame around them
            yield TokenEvent(request.id, (100,) * 200)
            await asyncio.sleep(0)

    buffer = 16_384
    _, base = served(script, stream_buffer_bytes=buffer)
    with connect(base, receive_buffer=4096) as reader:
        reader.sendall(post(TEXT, prompt="a", stream=True))
        assert paused.wait(PATIENCE_S)
        assert healthy(base)
        stopped_at = written
        for _ in range(20):
            assert healthy(base)
        assert written == stopped_at
        # Ours, the system's (which doubles what it is told), and the reader's own.
        assert written < 8 * buffer


def test_a_reader_who_takes_nothing_any_more_is_cut_off(served: Served) -> None:
    service, base = served(endless, **SHORT)
    with connect(base, receive_buffer=4096) as reader:
        reader.sendall(post(TEXT, prompt="a", stream=True))
        assert service.cancelled.get(timeout=PATIENCE_S)
        assert is_closed(reader)


def test_an_answer_that_does_not_end_with_the_server_is_cut_in_one_line(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    service = StubService(begins_and_hangs)
    with contextlib.ExitStack() as later:
        with serving(service, tokenizer, config()) as base:
            reader = later.enter_context(connect(base))
            reader.sendall(post(TEXT, prompt="a", stream=True))
            assert reader.recv(1024)
        assert is_closed(reader)
    assert service.cancelled.get(timeout=PATIENCE_S)
    assert [(line.levelname, line.exc_info) for line in caplog.records] == [("WARNING", None)]
    assert caplog.text.count("1 connections cut") == 1


def test_a_reader_who_takes_little_is_not_cut_off(served: Served) -> None:
    service, base = served(endless, stream_buffer_bytes=4096, send_timeout_s=0.8)
    with connect(base, receive_buffer=4096) as reader:
        reader.sendall(post(TEXT, prompt="a", stream=True))
        give_up = time.monotonic() + 2.4  # three times the limit
        while time.monotonic() < give_up:
            assert reader.recv(8192)
        assert service.cancelled.empty()
