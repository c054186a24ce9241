"""How a server takes a port over when it starts, and hands it over or ends when it stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import uvicorn

from dynamo_serve.api.marks import Streams
from dynamo_serve.handover import Door
from dynamo_serve.line import Predecessor, Successor
from dynamo_serve.luggage import FORMAT
from dynamo_serve.moving import Arriving, Identity, Leaving
from dynamo_serve.observer import Observer
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LOOK_S = 0.02
IDLE_S = 5.0  # for connections without a request; as long as they are kept alive otherwise
CLOSE = (b"connection", b"close")


class Succession:
    """Who comes before and after this server. `door` is None where nobody can take over."""

    def __init__(
        self,
        service: Service,
        streams: Streams,
        http: uvicorn.Server,
        observer: Observer,
        *,
        models: Sequence[str],
        tokenizer: Tokenizer,
        predecessor: Predecessor | None,
        door: Door | None,
    ) -> None:
        self._service = service
        self._streams = streams
        self._http = http
        self._observer = observer
        self._models = models
        self._tokenizer = tokenizer
        self._predecessor = predecessor
        self._door = door
        self._successor: Successor | None = None
        self._leaving = Leaving(service.deliveries, streams)
        self._tasks: list[asyncio.Task[Any]] = []
        self._begun = asyncio.Event()

    # ── the start ────────────────────────────────────────────────────────────

    async def answer(self, starting: asyncio.Task[None], listener: socket.socket) -> None:
        """Serve HTTP. While the model loads, /health answers and /ready says why not; but where
        another server still serves, it does so until this one can."""
        if self._predecessor is not None:
            await asyncio.wait([starting])
            if starting.cancelled() or starting.exception():
                return
            self._streams.fetch = self._predecessor.fetch
        await self._http.serve(sockets=[listener])

    async def begin(self, answering: asyncio.Task[None]) -> None:
        """The engine runs: the server before this one may go, the next one may come."""
        if self._predecessor is not None or self._door is not None:
            digest = await asyncio.to_thread(self._tokenizer.digest)
            self._identity = Identity.of(self._models, self._service.spec, digest)
        if self._predecessor is not None:
            while not (self._http.started or answering.done()):
                await asyncio.sleep(LOOK_S)
            arriving = Arriving(self._service, self._streams, self._observer)
            await self._predecessor.go(FORMAT, asdict(self._identity))
            self._tasks.append(asyncio.create_task(self._predecessor.listen(arriving.adopt)))
        self._open_door()
        self._begun.set()

    def _open_door(self) -> None:
        try:
            if self._door is not None:
                self._door.open()
        except OSError as error:  # no reason to end: the server before this one has gone
            log.error("server.handover: %s; nobody can take over from this server", error)
            self._door = None

    # ── the end ──────────────────────────────────────────────────────────────

    async def handed(self) -> None:
        """Return when another server accepts connections in the place of this one."""
        await self._begun.wait()
        if self._predecessor is not None:  # whose streams come here, and may go on from here
            await self._predecessor.gone.wait()
        if self._door is None:
            await asyncio.Event().wait()
        else:
            self._successor = await self._door.successor()

    async def let_go(self, seconds: float) -> None:
        """Leave the port to the successor, if there is one, and serve who is connected: up to
        `seconds` for those without a request."""
        successor = self._successor
        if successor is None:
            return
        deliveries = self._service.deliveries
        self._leaving = Leaving(deliveries, self._streams, successor, self._identity)
        self._tasks.append(asyncio.create_task(successor.listen(self._leaving.on_want)))
        await stop_accepting(self._http)
        end_after_next_answer(self._http)
        log.info("another server has taken over: it accepts, this one drains")
        await empty(self._http, min(seconds, IDLE_S))

    async def leave(self) -> None:
        """Move the streams that there are, and end every request."""
        await self._leaving.finish()
        if self._successor is not None:
            self._successor.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.error("the hand-over failed", exc_info=outcome)
        if self._predecessor is not None:
            self._predecessor.close()
        if self._door is not None:
            self._door.close()


async def stop_accepting(http: uvicorn.Server) -> None:
    """Leave the listening socket to the other process. Who has been accepted is served."""
    loop = asyncio.get_running_loop()
    for server in http.servers:
        for listener in server.sockets:
            loop.remove_reader(listener.fileno())
    # Whoever was accepted just now becomes a connection in a task of its own, and asyncio drops
    # those that find their server closed.
    for _ in range(8):
        await asyncio.sleep(0)
    for server in http.servers:
        server.close()


def end_after_next_answer(http: uvicorn.Server) -> None:
    """Each connection is closed when its next answer is complete."""
    state = http.server_state
    http.config.encoded_headers.append(CLOSE)  # from here uvicorn renews the others each second
    state.default_headers = [*state.default_headers, CLOSE]
    for connection in list(state.connections):
        if is_busy(connection):  # its headers were chosen before; an idle one may be asking now
            connection.shutdown()


async def empty(http: uvicorn.Server, seconds: float) -> None:
    """Wait until all connections have ended; after `seconds` those without a request are closed."""
    state = http.server_state
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while state.connections and loop.time() < until:
        await asyncio.sleep(LOOK_S)
    for connection in list(state.connections):
        connection.shutdown()


def is_busy(connection: Any) -> bool:
    """Whether it has a request to answer."""
    return connection.cycle is not None and not connection.cycle.response_complete
