"""A job's answer on the wire: server-sent events, or their fold as one JSON body."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dynamo_serve.api.choices import Tally, Updates, fold
from dynamo_serve.api.job import Job
from dynamo_serve.api.render import Envelope, Renderer, to_json
from dynamo_serve.errors import RequestError
from dynamo_serve.text.stream import Delta

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


async def respond(
    http: Request, job: Job, updates: Updates, renderer: Renderer, ping: float
) -> Response:
    """Answer `http` with what `updates` brings; a hang-up closes `updates`.

    What goes wrong before the first token is raised, and so becomes a proper HTTP status.
    """
    if job.stream:
        first = await until_disconnect(http, _first(updates))
        return EventStream(frames(first, updates, job, renderer), updates, ping)
    answers, tally = await until_disconnect(http, fold(updates, job))
    choices = [renderer.choice(i, answer, streamed=False) for i, answer in enumerate(answers)]
    body = Envelope(job, renderer).whole(choices, tally.usage())
    return Response(to_json(body), media_type="application/json")


async def _first(updates: Updates) -> tuple[int, Delta]:
    return await anext(updates)


async def frames(
    first: tuple[int, Delta], updates: Updates, job: Job, renderer: Renderer
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, ready to be sent; an error after the first token is an event too."""
    envelope = Envelope(job, renderer)
    tally = Tally(job)
    opened: set[int] = set()
    verbose = job.return_token_ids
    try:
        async for index, delta in _chain(first, updates):
            tally.add(index, delta)
            if index not in opened:
                opened.add(index)
                if (opening := renderer.opening(index)) is not None:
                    chat_ids = verbose and not job.continues_text
                    text = (envelope.prompt_chunk if chat_ids else envelope.chunk)(opening)
                    yield _frame(text)
            if delta.text or delta.finish or delta.tokens or verbose:
                yield _frame(envelope.chunk(renderer.choice(index, delta, streamed=True)))
        if job.include_usage:
            yield _frame(envelope.usage_chunk(tally.usage()))
    except RequestError as error:
        yield _frame(to_json(error.body()))
    except Exception:
        logger.exception("request %s failed in the middle of its stream", job.id)
        yield _frame(to_json(RequestError("The server failed; its log says why.").body()))
    yield DONE


async def _chain(first: tuple[int, Delta], updates: Updates) -> Updates:
    yield first
    async for update in updates:
        yield update


def _frame(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """Sends `frames`; however that ends, `updates` (already begun) is closed and so cancelled.

    A generator that never began does not run its `finally`: this is why it is not enough to
    close `frames`.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], updates: Updates, ping: float) -> None:
        super().__init__(media_type="text/event-stream")
        self._updates = updates
        self._events = EventSourceResponse(frames, ping=ping, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._updates):
            await self._events(scope, receive, send)


async def until_disconnect(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client hangs up: then `ClientDisconnect`."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_hung_up(http))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _hung_up(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
