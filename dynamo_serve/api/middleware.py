"""Around every request: its id, and a line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_serve.api.sse import CONNECTION

logger = logging.getLogger(__name__)

PLAIN_ID = re.compile(r"[\x21-\x7e]{1,128}")
HEADER = "X-Request-Id"
STREAMS = "/v1/streams/"
MESSAGES, MESSAGES_HEADER = "/v1/messages", "request-id"  # the same, as Anthropic calls it


class Head:
    """HEAD is GET without its body, which uvicorn leaves out; but it takes no stream over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD" and not scope["path"].startswith(STREAMS):
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class RequestId:
    """Answers carry the X-Request-Id of the request, or a fresh one.

    Plain ASGI: a middleware that wraps the response in its own stream would hide hang-ups.
    """

    def __init__(self, app: ASGIApp, log_requests: bool) -> None:
        self._app = app
        self._log = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if PLAIN_ID.fullmatch(given) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        is_messages = scope["path"].startswith(MESSAGES)
        connection = scope.get(CONNECTION)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[HEADER] = request_id
                if connection is not None and connection.leaves_unread:
                    headers["Connection"] = "close"
                if is_messages:
                    headers[MESSAGES_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._log:
                milliseconds = (time.monotonic() - began) * 1e3
                logger.info(
                    "%s %s %d %.1f ms %s",
                    scope["method"],
                    quote(scope["path"]),  # decoded, it may hold a line break and a forged line
                    status,
                    milliseconds,
                    request_id,
                )
