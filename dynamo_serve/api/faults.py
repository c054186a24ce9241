"""Every failure as OpenAI's error object, or as Anthropic's to who asks its API."""

from __future__ import annotations

import asyncio
import difflib
import logging

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_serve.api.messages_errors import error_body
from dynamo_serve.api.middleware import MESSAGES
from dynamo_serve.api.render import to_json
from dynamo_serve.delivery import nobody
from dynamo_serve.errors import (
    InvalidRequest,
    RequestError,
    ServerShutdown,
    TryLater,
    Unauthorized,
)

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nobody reads it, but the log line has a status
NEAR = 0.8  # of 1: so much alike are an address and a slip of it


def add_fault_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_hang_up)
    app.add_exception_handler(Exception, on_bug)
    app.add_middleware(Shutdown)


class Shutdown:
    """Tells those whose answer has not begun that the server ends before it. Only that cancels a
    request, and the cancellation is no `Exception`, for which there are handlers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = scope["type"] != "http"

        def prepared() -> None:
            scope.get("state", {}).get("prepared", nobody)()

        async def noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            prepared()
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if has_begun:
                raise
            error = ServerShutdown("the server is shutting down", retry_after=5.0)
            answer = await on_request_error(Request(scope), error)
            await answer(scope, receive, send)
        finally:
            prepared()


async def on_request_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {}
    if isinstance(error, TryLater):
        headers["Retry-After"] = error.retry_after_header
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return _json(http, error, error.status, headers)


async def on_http_exception(http: Request, error: Exception) -> Response:
    """Routing says 404 or 405."""
    assert isinstance(error, HTTPException)
    what = {
        404: f"There is no {http.url.path[:100]!r} here; {_near(http)}",
        405: f"{http.method} is not possible on {http.url.path[:100]!r}.",
    }
    fault = InvalidRequest(what.get(error.status_code, str(error.detail)))
    fault.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, fault.code)
    return _json(http, fault, error.status_code, dict(error.headers or {}))


def _near(http: Request) -> str:
    """What was probably meant: most often /v1 is missing, there twice, or too much."""
    paths = [str(path) for path in http.app.openapi()["paths"]]
    bare = http.url.path[:100].strip("/").removeprefix("v1/").removeprefix("v1/")
    meant = (f"/v1/{bare}", f"/{bare}")
    near = [path for path in meant if path in paths]
    for path in meant:
        near += difflib.get_close_matches(path, paths, n=1, cutoff=NEAR)
    return (f"did you mean {near[0]}? " if near else "") + "/openapi.json lists what there is."


async def on_hang_up(http: Request, error: Exception) -> Response:
    """The client went away before its body was here, or before there was an answer."""
    return Response(status_code=CLIENT_GONE)


async def on_bug(http: Request, error: Exception) -> Response:
    """Ours, not the client's; the server logs the traceback after this."""
    return _json(http, RequestError("The server failed; its log says why."), 500, {})


def _json(http: Request, error: RequestError, status: int, headers: dict[str, str]) -> Response:
    body = error.body()
    if http.url.path.startswith(MESSAGES):
        body = error_body(error, status, http.state.request_id)
    return Response(to_json(body), status, headers, "application/json")
