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
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dynamo_serve.api.gate import Gate
from dynamo_serve.api.head_size import HeadSize, address_too_long, headers_too_large
from dynamo_serve.api.linger import Linger, Yielding
from dynamo_serve.api.refusal import refusal
from dynamo_serve.api.sse import CONNECTION
from dynamo_serve.api.unframed import framed
from dynamo_serve.api.watch import Watch
from dynamo_serve.config import ServerSection
from dynamo_serve.errors import InvalidRequest, RequestError, RequestTimeout

MAX_AHEAD = 16  # requests sent before the one before them was answered
MAX_AHEAD_BYTES = 65_536  # in the bodies of these
RESERVE_S = 1.0  # for the headers, if there is no room unless they are a probe's
REST_BYTES = 1_000_000  # of a body after its answer, for the connection to be kept
LINGER_BODIES = 4  # of the largest size, that are thrown away after the last answer
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
        self._head_size = HeadSize()
        self._num_heads = self._num_complete = self._ahead_bytes = self._rest_bytes = 0
        self._fault: RequestError | None = None
        self._linger: Linger = None  # type: ignore[assignment]  # with the transport
        self._exit: Yielding = None  # type: ignore[assignment]  # with the transport
        self._is_upgrade = False

    # A connection begins and ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.limits.stream_buffer_bytes)
        self._watch = Watch(transport, self.limits.send_timeout_s, self.cut)
        most = max(REST_BYTES, LINGER_BODIES * self.limits.max_body_bytes)
        self._linger = Linger(transport, most, self.limits.body_timeout_s, self.cut)
        self._exit = Yielding(transport, self._close)
        seconds = self.limits.header_timeout_s
        if not self.gate.enter(self):
            seconds = min(seconds, RESERVE_S)
        if not self._linger.is_on:
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
        self._linger.forget()
        self._exit.forget()
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
        if self._linger.is_on or self.transport.is_closing():
            return
        if self._active is not None and self.is_answering:
            is_own = self._active is self.cycle and not self._in_head
            if self._active.response_started or not is_own:
                self.cut()
                return
            self._hang_up()
        self.transport.write(refusal(error, self.server_state.default_headers))
        self._leave()

    @property
    def leaves_unread(self) -> bool:
        """Whether an answer that begins now is the last: the rest of its request's body is not
        asked for, or too long to be read for nothing."""
        if self._in_head or self._active is not self.cycle:
            return False
        declared = int(dict(self.cycle.scope["headers"]).get(b"content-length", 0))
        return self.cycle.waiting_for_100_continue or declared > REST_BYTES

    def _close(self) -> None:
        """Everything is answered that will be, or else cannot be."""
        if self._linger.is_on:
            return
        is_all_read = self._in_head and not self.pipeline and not self._is_upgrade
        if is_all_read or self.is_answering:
            self.transport.close()
            self._watch.start()
        else:
            self._leave()

    def _leave(self) -> None:
        self._forget_deadline()
        self._unset_keepalive_if_required()
        self._linger.begin()
        self._watch.start()
        self.gate.leave(self)
        self.flow.resume_reading()

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self._is_thrown_away(len(data)):
            return
        self._unset_keepalive_if_required()
        if self._deadline is None:
            self._expect(self.limits.header_timeout_s, self._on_slow_head)
        was_in_head, num_complete = self._in_head, self._num_complete
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_upgrade = True
            self.cycle.keep_alive = False  # answered as HTTP, and what follows is not read
        except httptools.HttpParserError:
            self.refuse(self._fault or InvalidRequest("This is not a request in HTTP/1.1."))
        else:
            is_between = was_in_head and self._in_head and self._num_complete == num_complete
            if is_between and self._head_size.add_bytes(len(data)):
                self.refuse(headers_too_large())

    def _is_thrown_away(self, num_bytes: int) -> bool:
        """Whether nobody needs these bytes: not even the parser, which looks for a next request."""
        if not self._in_head and self.cycle.response_complete:
            self._rest_bytes += num_bytes
            if self._rest_bytes > REST_BYTES:
                self._close()
        if self._linger.is_on or self._is_upgrade:
            self._linger.take(num_bytes)
            return True
        return False

    def _stop(self, error: RequestError) -> NoReturn:
        self._fault = error
        raise _Refused

    def on_message_begin(self) -> None:
        if self.is_answering and len(self.pipeline) >= MAX_AHEAD:
            self._stop(InvalidRequest(f"More than {MAX_AHEAD} requests ahead of their answers."))
        super().on_message_begin()
        self._num_heads += 1
        self._head_size.begin()
        self._unset_keepalive_if_required()
        if self._deadline is None:
            self._expect(self.limits.header_timeout_s, self._on_slow_head)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if self._head_size.is_too_long(self.url):
            self._stop(address_too_long())

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_size.add_header(name, value):
            self._stop(headers_too_large())
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
        self._rest_bytes = 0
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
        self._head_size.begin()
        self._forget_deadline()
        if self.cycle.response_complete:
            self._wait_for_next()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        cycle.transport = self._exit
        cycle.scope[CONNECTION] = self  # type: ignore[literal-required]
        if not self.pipeline:
            self._ahead_bytes = 0
        super()._start_asgi_task(cycle, framed(cycle, app))

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
        if not self._linger.is_on:  # else the connection has no next request
            super().on_response_complete()

    def _wait_for_next(self) -> None:
        seconds, then = self.timeout_keep_alive, self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(seconds, then)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not (self.transport.is_closing() or self._linger.is_on):
            self._watch.stop()
