"""HTTP on a connection, with a limit on everything that a client could have too much of.

A connection reads heads and bodies in turn; `_deadline` is the time limit on what is being read,
`_watch` looks after what the client should be taking. Time that an answer takes counts for neither.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from dynamo_serve.api.gate import Gate
from dynamo_serve.api.render import to_json
from dynamo_serve.api.sse import CONNECTION
from dynamo_serve.api.watch import Watch
from dynamo_serve.config import ServerSection
from dynamo_serve.errors import (
    AddressTooLong,
    HeadersTooLarge,
    InvalidRequest,
    RequestError,
    RequestTimeout,
    TryLater,
)

MAX_URL_BYTES = 8_192
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32_768
MAX_HEAD_BYTES = MAX_URL_BYTES + MAX_HEADER_BYTES + 1024
MAX_AHEAD = 16  # requests sent before the one before them was answered
MAX_AHEAD_BYTES = 65_536  # in the bodies of these
RESERVE_S = 1.0  # for the headers, if there is no room unless they are a probe's
LINGER_S = 1.0  # for a refused client to read why; to close on what it still sends would be a reset
LINGER_BYTES = 1_000_000
NO_LINGER = struct.pack("ii", 1, 0)  # on, for no seconds: a reset


def limited(server: ServerSection) -> type[LimitedProtocol]:
    """The protocol of one server, for uvicorn to make one of for each connection."""

    class Configured(LimitedProtocol):
        limits = server
        gate = Gate(server.max_connections)

    return Configured


class _Refused(Exception):
    """Ends parsing."""


class LimitedProtocol(HttpToolsProtocol):
    limits: ServerSection
    gate: Gate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._watch: Watch = None  # type: ignore[assignment]  # with the transport
        self._active: RequestResponseCycle | None = None  # `cycle` is the one being read
        self._in_head = True  # or between two requests; else in a body
        self._num_heads = self._num_complete = 0
        self._head_bytes = self._header_bytes = self._num_headers = self._ahead_bytes = 0
        self._fault: RequestError | None = None
        self._is_refused = False
        self._lingered = 0

    # A connection begins and ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.stream_buffer_bytes)
        self._watch = Watch(transport, self.limits.send_timeout_s, self.cut)
        seconds = self.limits.header_timeout_s
        if not self.gate.enter(self):
            seconds = min(seconds, RESERVE_S)
        if not self._is_refused:
            self._deadline = self.loop.call_later(seconds, self._on_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.forget(self)
        self._forget_deadline()
        self.pipeline.clear()
        self._hang_up()
        super().connection_lost(exc)
        # Else it refers to itself, and stays until the collector of cycles looks at all there is.
        self._unset_keepalive_if_required()
        self._watch.forget()
        for cycle in filter(None, (self.cycle, self._active)):
            cycle.scope.pop(CONNECTION, None)  # type: ignore[misc]

    def _hang_up(self) -> None:
        """Tell the application that the client has gone. uvicorn tells the latest request only."""
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.waiting_for_100_continue = False
            self._active.message_event.set()

    def cut(self) -> None:
        """End the connection now; the kernel, too, forgets what waits to be sent."""
        self._hang_up()
        if sock := self.transport.get_extra_info("socket"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()

    @property
    def is_answering(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def refuse(self, error: RequestError) -> None:
        """Answer with `error` and leave; where another answer is due before it, just close."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._forget_deadline()
        self._unset_keepalive_if_required()
        if self._active is not None and self.is_answering:
            is_own = self._active is self.cycle and not self._in_head
            if self._active.response_started or not is_own:
                self.cut()
                return
            self._hang_up()
        self.transport.write(self._rendered(error))
        try:
            self.transport.write_eof()
        except (OSError, NotImplementedError):  # a connection that is gone, or encrypted
            self.transport.close()
        self.gate.leave(self)
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_S, self.cut)

    def _rendered(self, error: RequestError) -> bytes:
        body = to_json(error.body()).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if isinstance(error, TryLater):
            headers.append((b"retry-after", error.retry_after_header.encode()))
        lines = [b"%s: %s\r\n" % header for header in headers]
        return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body])

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self.cut()
            return
        self._unset_keepalive_if_required()
        if self._deadline is None:
            self._expect(self.limits.header_timeout_s, self._on_slow_head)
        was_in_head, num_complete = self._in_head, self._num_complete
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # answered as HTTP, and what follows is not read
        except httptools.HttpParserError:
            self.refuse(self._fault or InvalidRequest("This is not a request in HTTP/1.1."))
        else:
            if was_in_head and self._in_head and self._num_complete == num_complete:
                self._count_head(len(data))

    def _count_head(self, num_bytes: int) -> None:
        """The parser shows a header when it has ended; until then only its bytes are seen."""
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(_headers_too_large())

    def _stop(self, error: RequestError) -> NoReturn:
        self._fault = error
        raise _Refused

    def on_message_begin(self) -> None:
        if self.is_answering and len(self.pipeline) >= MAX_AHEAD:
            self._stop(InvalidRequest(f"More than {MAX_AHEAD} requests ahead of their answers."))
        super().on_message_begin()
        self._num_heads += 1
        self._num_headers = self._header_bytes = self._head_bytes = 0
        if self._deadline is None:
            self._expect(self.limits.header_timeout_s, self._on_slow_head)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop(AddressTooLong(f"The address is longer than {MAX_URL_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._header_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._stop(_headers_too_large())
        if self._in_head:  # after the body they are trailers, which nobody has asked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        if not self.gate.admits(self, path):
            self._stop(self.gate.full())
        super().on_headers_complete()
        if not self.gate.is_guest(self):
            self.cycle.keep_alive = False
        self._in_head = False
        self._expect(self.limits.body_timeout_s, self._on_slow_body)
        if self.cycle is not self._active:
            # What waits is bounded by `MAX_AHEAD`; who does not read does not see a hang-up.
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not self._active:
            self._ahead_bytes += len(body)
            if self._ahead_bytes > MAX_AHEAD_BYTES:
                self._stop(InvalidRequest("Too many bytes ahead of their answers."))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._num_complete += 1
        self._head_bytes = 0
        self._forget_deadline()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        cycle.scope[CONNECTION] = self  # type: ignore[literal-required]
        if not self.pipeline:
            self._ahead_bytes = 0
        super()._start_asgi_task(cycle, app)

    # Time limits on what the client sends

    def _expect(self, seconds: float, on_late: Any) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(seconds, on_late)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_slow_head(self) -> None:
        if self.flow.read_paused or self.is_answering:
            self._expect(self.limits.header_timeout_s, self._on_slow_head)
        elif not self.gate.is_guest(self):
            self.refuse(self.gate.full())
        elif self._num_heads == 0:
            self.transport.close()
        else:
            seconds = self.limits.header_timeout_s
            self.refuse(RequestTimeout(f"The headers did not arrive within {seconds:g} s."))

    def _on_slow_body(self) -> None:
        if self.flow.read_paused or self.cycle is not self._active:
            self._expect(self.limits.body_timeout_s, self._on_slow_body)
        elif self.cycle.response_complete:
            self._close()
        else:
            seconds = self.limits.body_timeout_s
            self.refuse(RequestTimeout(f"The body did not arrive within {seconds:g} s."))

    # What the client takes

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch.start()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch.start()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._watch.stop()


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"More than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them.")
