"""Answers before the end of a request: they arrive whole, whatever the client goes on to send."""

from __future__ import annotations

import contextlib
import io
import json
import re
import select
import socket
import ssl
import subprocess
from collections.abc import Generator
from http.client import HTTPResponse
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from dynamo_serve.api.protocol import LINGER_BODIES, REST_BYTES
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import StubService, says
from tests.patience import PATIENCE_S

BODY_BYTES = 500_000
LARGE = 1_500_000  # three times the largest body, and within what is thrown away
CHAT = "/v1/chat/completions"
KEY = "the-key"
CHUNK = b"1000\r\n" + b"a" * 0x1000 + b"\r\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("certificate")
    files = {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}
    command = ["openssl", "req", "-x509", "-days", "1", "-newkey", "rsa:2048", "-nodes"]
    command += ["-subj", "/CN=localhost", "-out", files["ssl_certfile"]]
    try:
        subprocess.run(
            [*command, "-keyout", files["ssl_keyfile"]],
            check=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
    except FileNotFoundError:
        pytest.skip("there is no openssl to make certificates with")
    return files


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Generator[str]:
    settings = config(max_body_bytes=BODY_BYTES, api_keys=(KEY,))
    with serving(StubService(says(tokenizer, "hi")), tokenizer, settings) as base:
        yield base


@pytest.fixture(scope="module")
def encrypted(tokenizer: Tokenizer, certificate: dict[str, Any]) -> Generator[str]:
    settings = config(max_body_bytes=BODY_BYTES, api_keys=(KEY,))
    stub = StubService(says(tokenizer, "hi"))
    with serving(stub, tokenizer, settings, **certificate) as base:
        yield base


def connect(base: str, *, tls: bool = False) -> socket.socket:
    address = urlsplit(base)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)
    if not tls:
        return connection
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def head(
    method: str, path: str, *lines: str, key: str = KEY, kind: str = "application/json"
) -> bytes:
    asked = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}"]
    return "\r\n".join([*asked, f"Content-Type: {kind}", *lines, "", ""]).encode()


def length(num_bytes: int) -> str:
    return f"Content-Length: {num_bytes}"


CHUNKED = "Transfer-Encoding: chunked"
# What is sent, the rest that follows when the answer has begun, and the status of that answer.
EARLY: dict[str, tuple[tuple[str, ...], dict[str, str], bytes, bytes, int]] = {
    "405": (("PATCH", CHAT, length(LARGE)), {}, b"", b"a" * LARGE, 405),
    "404": (("POST", "/nowhere", length(LARGE)), {}, b"{", b"a" * (LARGE - 1), 404),
    "401": (("POST", CHAT, length(LARGE)), {"key": "other"}, b"{", b"a" * (LARGE - 1), 401),
    "413 declared": (("POST", CHAT, length(LARGE)), {}, b"{", b"a" * (LARGE - 1), 413),
    "413 chunked": (("POST", CHAT, CHUNKED), {}, CHUNK * 130, CHUNK * 360, 413),
    "404 chunked": (("POST", "/nowhere", CHUNKED), {}, CHUNK, CHUNK * 360, 404),
    "400 by its type": (("POST", CHAT, length(LARGE)), {"kind": "a/b"}, b"", b"a" * LARGE, 400),
    "400 in a chunk": (("POST", CHAT, CHUNKED), {}, CHUNK + b"nonsense\r\n", CHUNK * 360, 400),
    "an upgrade": (
        ("GET", "/health", "Upgrade: websocket", "Connection: Upgrade"),
        {},
        b"",
        b"a" * LARGE,
        200,
    ),
}


def read(connection: socket.socket, begun: bytes = b"") -> bytes:
    """All that comes until the server has said everything."""
    parts = [begun]
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


def read_answer(connection: socket.socket, begun: bytes) -> bytes:
    """All of one answer: without a half-close the end of the connection comes later."""
    raw = begun
    while not is_whole(raw):
        part = connection.recv(65_536)
        assert part, f"it ended after {raw!r}"
        raw += part
    return raw


def is_whole(raw: bytes) -> bool:
    head, end, body = raw.partition(b"\r\n\r\n")
    declared = re.search(rb"content-length: (\d+)", head)
    return bool(end and declared and len(body) >= int(declared[1]))


class Received:
    """As `HTTPResponse` reads it."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def answer_in(raw: bytes) -> tuple[int, str | None, Any]:
    """Status, `Connection` and the JSON of a whole answer."""
    with contextlib.closing(HTTPResponse(cast(socket.socket, Received(raw)))) as answer:
        answer.begin()
        return answer.status, answer.headers["connection"], json.loads(answer.read())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("closes", [False, True], ids=["kept", "closes"])
@pytest.mark.parametrize("case", EARLY)
def test_an_answer_before_the_body_arrives_whole(
    request: pytest.FixtureRequest, case: str, closes: bool, tls: bool
) -> None:
    base = request.getfixturevalue("encrypted" if tls else "plain")
    (method, path, *lines), fields, begun, rest, status = EARLY[case]
    lines += ["Connection: close"] * closes
    with connect(base, tls=tls) as connection:
        connection.sendall(head(method, path, *lines, **fields) + begun)
        first = connection.recv(1)  # so the server has answered, and may have closed
        connection.sendall(rest)
        found, _, body = answer_in(read_answer(connection, first))
    assert found == status
    assert status == 200 or body["error"]["message"]


def test_who_is_told_nothing_of_an_end_may_send_the_rest_and_go_on(plain: str) -> None:
    rest = REST_BYTES // 2
    asked = head("GET", "/health", "Connection: close")
    with connect(plain) as connection:
        connection.sendall(head("POST", "/nowhere", length(rest)))
        first = connection.recv(1)
        connection.sendall(b"a" * rest + asked)
        answers = read(connection, first)
    told, behind = answers.split(b"HTTP/1.1 200", 1)
    assert answer_in(told)[:2] == (404, None)
    assert answer_in(b"HTTP/1.1 200" + behind)[2]["status"] == "ok"


@pytest.mark.parametrize("num_bytes", [REST_BYTES + 1, 10**12])
def test_a_long_rest_is_known_to_end_the_connection(plain: str, num_bytes: int) -> None:
    with connect(plain) as connection:
        connection.sendall(head("POST", "/nowhere", length(num_bytes)))
        assert answer_in(read(connection))[:2] == (404, "close")


@pytest.mark.parametrize(
    ("path", "key", "status"), [(CHAT, "other", 401), ("/nowhere", KEY, 404), (CHAT, KEY, 413)]
)
def test_who_waits_to_be_asked_for_the_body_is_answered_instead(
    plain: str, path: str, key: str, status: int
) -> None:
    size = BODY_BYTES + 1
    with connect(plain) as connection:
        connection.sendall(head("POST", path, length(size), "Expect: 100-continue", key=key))
        assert answer_in(read(connection))[:2] == (status, "close")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_endless_rest_is_cut_off(request: pytest.FixtureRequest, tls: bool) -> None:
    base = request.getfixturevalue("encrypted" if tls else "plain")
    sent, most = 0, LINGER_BODIES * BODY_BYTES + 2 * REST_BYTES
    with connect(base, tls=tls) as connection:
        connection.sendall(head("POST", "/nowhere", CHUNKED, "Connection: close"))
        assert connection.recv(1)
        with pytest.raises(OSError):
            while sent < 20 * most:  # what the systems on both sides hold is not counted
                connection.sendall(CHUNK * 16)
                sent += len(CHUNK) * 16


@pytest.mark.parametrize("closes", [False, True], ids=["kept", "closes"])
def test_a_rest_that_drips_is_cut_off(tokenizer: Tokenizer, closes: bool) -> None:
    settings = config(body_timeout_s=0.3)
    lines = ["Connection: close"] * closes
    with (
        serving(StubService(says(tokenizer, "hi")), tokenizer, settings) as base,
        connect(base) as connection,
    ):
        connection.sendall(head("POST", "/nowhere", CHUNKED, *lines))
        assert connection.recv(1)
        with pytest.raises(ConnectionError):
            for _ in range(int(PATIENCE_S / 0.01)):
                connection.sendall(b"1\r\na\r\n")
                said_something, _, _ = select.select([connection], [], [], 0.01)
                if said_something and not connection.recv(4096):
                    while True:  # it has said everything; now it has to go
                        connection.sendall(b"1\r\na\r\n")


def test_a_connection_whose_rest_has_come_does_not_stay_for_ever(tokenizer: Tokenizer) -> None:
    service = StubService(says(tokenizer, "hi"))
    with (
        serving(service, tokenizer, config(), timeout_keep_alive=0.2) as base,
        connect(base) as connection,
    ):
        connection.sendall(head("POST", "/nowhere", length(1)))
        first = connection.recv(1)
        connection.sendall(b"a")
        assert answer_in(read(connection, first))[0] == 404
