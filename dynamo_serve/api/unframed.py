"""Answers to HTTP/1.0, which knows no chunks: the end of the connection ends an answer whose length
was not told (RFC 9112, 6.1). uvicorn sends it chunks."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def framed(cycle: RequestResponseCycle, app: Any) -> Any:
    """`app`, and for a client of HTTP/1.0 without chunks around what it sends to `cycle`."""
    return _Unframed(cycle, app) if cycle.scope["http_version"] == "1.0" else app


class _Unframed:
    def __init__(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        self._cycle = cycle
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_counted = True

        async def unframed(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                is_counted = any(
                    name.lower() == b"content-length" for name, _ in message["headers"]
                )
                if not is_counted:
                    self._cycle.chunked_encoding = False
            elif not is_counted:  # uvicorn counts what is left of the length: just this piece
                self._cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, unframed)
