"""uvicorn as this server runs it: with our limits, and an end without tracebacks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from dataclasses import replace

import uvicorn
from starlette.types import ASGIApp

from dynamo_serve.api.gate import ACCEPTED_AT_ONCE
from dynamo_serve.api.protocol import LimitedProtocol, limited
from dynamo_serve.config import ServerSection
from dynamo_serve.open_files import make_room

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that may wait in the system
FLUSH_S = 5  # after the last request ended, for its bytes to leave
CANCEL_S = 1  # after that, until who has no answer yet is told that there will be none


def http_settings(app: ASGIApp, server: ServerSection) -> uvicorn.Config:
    """How uvicorn serves `app`: with our limits."""
    room = make_room(server.max_connections)
    return uvicorn.Config(
        app,
        http=limited(replace(server, max_connections=room)),
        ws="none",  # a web socket would leave the limits behind
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,  # the app logs requests itself, if log.requests says so
        timeout_graceful_shutdown=FLUSH_S + CANCEL_S,
    )


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a drain must go on accepting, to answer 503."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has made it as short as what it accepts at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = (self.config.timeout_graceful_shutdown or 0) - CANCEL_S
        timer = asyncio.get_running_loop().call_later(seconds, self._cut, seconds)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _cut(self, seconds: float) -> None:
        """End the answers that have begun; uvicorn would, with an error and a traceback each."""
        slow = []
        for connection in self.server_state.connections:
            assert isinstance(connection, LimitedProtocol)
            if connection.cycle is None or connection.cycle.response_started:
                slow.append(connection)
        for connection in slow:
            connection.cut()
        if slow:
            told = "%d connections cut: the rest of their answers was not taken within %g s"
            log.warning(told, len(slow), seconds)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
