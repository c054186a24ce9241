"""An HTTP/1.1 client that costs little: it stamps each read when it comes, others parse it later.

Times are `time.monotonic`. A connection that has been idle for long is not used again, because
its server may be about to close it. What is sent on one that the server closes just then, without
a byte of an answer, is sent once more, on a new one; whatever else breaks has failed.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from dynamo_serve.errors import ConfigError

LATE = "no whole answer within"  # begins what is said of who takes too long
IDLE_S = 2.0  # uvicorn and node close after 5
SMALL_BUFFER = 4096  # of a slow reader: else the system reads ahead for it


@dataclass(slots=True)
class Answer:
    """One answer as it came: the body of each read with its time. `error` says why it broke, or
    is empty; `has_left` that the client hung up by its own will."""

    sent: float = 0.0
    end: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """How an answer is read. `is_enough` sees each body, and says when to hang up."""

    bytes_per_s: float | None = None
    leaves_after_s: float | None = None
    is_enough: Callable[[bytes], bool] | None = None
    timeout_s: float = 600.0
    most_bytes: int = 1 << 28  # heads and all; who sends more would fill our memory


AT_ONCE = Reading()


class Connection(asyncio.Protocol):
    """One connection; at most one answer is under way on it."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.is_usable = True
        self.was_closed = False  # by the server, instead of any answer
        self._now = 0.0
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def begin(self, raw: bytes, answer: Answer, reading: Reading) -> asyncio.Future[None]:
        """Send a request; the future is done when its answer is over, whatever became of it."""
        loop = asyncio.get_running_loop()
        self._answer, self._reading = answer, reading
        self._parser, self._num_bytes = httptools.HttpResponseParser(self), 0
        self._done: asyncio.Future[None] = loop.create_future()
        self._timers = [loop.call_later(reading.timeout_s, self._time_out)]
        if reading.leaves_after_s is not None:
            self._timers.append(loop.call_later(reading.leaves_after_s, self.leave))
        answer.sent = time.monotonic()
        self._transport.write(raw)
        return self._done

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        if self._answer is None:
            self.close()  # nobody has asked
            return
        self._num_bytes += len(data)
        if self._num_bytes > self._reading.most_bytes:
            self._over(f"more than {self._reading.most_bytes >> 20} MiB in one answer")
            return
        rate = self._reading.bytes_per_s
        if rate is not None:
            self._transport.pause_reading()
            timer = asyncio.get_running_loop().call_later(len(data) / rate, self._read_on)
            self._timers.append(timer)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._over(f"no HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_usable = False
        self._now = time.monotonic()
        if self._answer is None:
            return
        sized = self._answer.headers.keys() & {"content-length", "transfer-encoding"}
        if error is None and self._answer.status and not sized:
            self._over("")  # an answer without a length lasts until the connection ends
        else:
            self.was_closed = not self._num_bytes
            self._over(f"the connection broke{f': {error}' if error else ''}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None:
            self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer is None:
            return  # hung up within this read
        self._answer.reads.append((self._now, body))
        is_enough = self._reading.is_enough
        if is_enough is not None and is_enough(body):
            self.leave()

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status >= 200:
            self.is_usable = self.is_usable and self._parser.should_keep_alive()
            self._over("", keep=True)

    def leave(self) -> None:
        """Hang up, by the client's own will."""
        if self._answer is not None:
            self._now = time.monotonic()
            self._answer.has_left = True
            self._over("")

    def close(self) -> None:
        self.is_usable = False
        self._transport.abort()

    def _time_out(self) -> None:
        self._now = time.monotonic()
        self._over(f"{LATE} {self._reading.timeout_s:g} s")

    def _read_on(self) -> None:
        if self._answer is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _over(self, error: str, *, keep: bool = False) -> None:
        answer = self._answer
        if answer is None:
            return
        self._answer = None
        answer.end, answer.error = self._now, error
        for timer in self._timers:
            timer.cancel()
        self.idle_since = self._now
        if not keep or not self.is_usable or self._reading.bytes_per_s is not None:
            self.close()
        if not self._done.done():
            self._done.set_result(None)


class Client:
    """Asks one server; connections are kept and used again."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` for what is no address of a server."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url}: an address is like http://host:port")
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self._host, self._tls = parts.hostname, None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context()
        try:
            self._port = parts.port or (443 if self._tls else 80)
        except ValueError as error:
            raise ConfigError(f"{url}: {error}") from None
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
        self._idle: list[Connection] = []
        self.num_opened = 0

    def request(self, method: str, path: str, body: bytes = b"", api_key: str = "") -> bytes:
        """A request as bytes. `path` begins behind the server's address, as in /v1/models."""
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        kind = "Content-Type: application/json\r\n" if body else ""
        size = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {self.base}{path} HTTP/1.1\r\n{self._head}{key}{kind}{size}\r\n"
        return head.encode() + body

    async def send(self, raw: bytes, reading: Reading = AT_ONCE) -> Answer:
        """The answer, whatever it is; cancelling this hangs up."""
        kept = self._kept(reading)
        if kept is None:
            return await self._send(raw, reading, None)
        answer = await self._send(raw, reading, kept)
        if not kept.was_closed:
            return answer
        again = await self._send(raw, reading, None)
        again.sent = answer.sent  # the client has waited since then
        return again

    async def _send(self, raw: bytes, reading: Reading, kept: Connection | None) -> Answer:
        answer = Answer()
        try:
            connection = kept or await self._fresh(reading)
        except OSError as error:  # a TimeoutError is one, too, and says nothing
            answer.sent = answer.end = time.monotonic()
            answer.error = f"no connection: {str(error) or f'none within {reading.timeout_s:g} s'}"
            return answer
        try:
            await connection.begin(raw, answer, reading)
        except asyncio.CancelledError:
            connection.leave()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        return answer

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # sockets are closed in the loop's next turn

    def _kept(self, reading: Reading) -> Connection | None:
        if reading.bytes_per_s is not None:
            return None
        fresh_since = time.monotonic() - IDLE_S
        while self._idle:
            connection = self._idle.pop()  # the newest: the others may grow old and go
            if connection.is_usable and connection.idle_since > fresh_since:
                return connection
            connection.close()
        return None

    async def _fresh(self, reading: Reading) -> Connection:
        async with asyncio.timeout(reading.timeout_s):
            return await self._open(small=reading.bytes_per_s is not None)

    async def _open(self, *, small: bool) -> Connection:
        loop = asyncio.get_running_loop()
        self.num_opened += 1
        if not small:
            _, made = await loop.create_connection(
                Connection, self._host, self._port, ssl=self._tls
            )
            return made
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            await loop.sock_connect(sock, address)
            name = self._host if self._tls else None
            _, made = await loop.create_connection(
                Connection, sock=sock, ssl=self._tls, server_hostname=name
            )
        except BaseException:
            sock.close()
            raise
        return made
