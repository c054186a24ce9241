"""A job's answer on the wire: server-sent events, or their fold as one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dynamo_serve.api.choices import Updates, fold
from dynamo_serve.api.frames import EventWriter, Writer, frames
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import HEADER, Mark, resume, written
from dynamo_serve.api.render import Envelope, Renderer, to_json
from dynamo_serve.delivery import nobody
from dynamo_serve.errors import ServerHandover, ServerShutdown
from dynamo_serve.text.stream import Delta

CONNECTION = "dynamo_serve.connection"  # in the scope of a request, if the server put it there
NOT_BEGUN = "The server was replaced before this answer had begun. Send the request again."
EVENTS = "text/event-stream"
PING = b": ping\n\n"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # a proxy that collects the events would hold them back
}

T = TypeVar("T")


async def respond(
    http: Request,
    job: Job,
    updates: Updates,
    renderer: Renderer,
    ping: float,
    heads: Sequence[tuple[Mark, Delta]] = (),
) -> Response:
    """Answer `http` with what `updates` brings; a hang-up closes `updates`. Of a stream that is
    gone on with, `heads` are what the client has.

    What goes wrong before the first token is raised, and so becomes a proper HTTP status.
    """
    if job.stream:
        writer = Writer(job, renderer, shows_ids=knows_ids(http))
        for index, (mark, head) in enumerate(heads):
            writer.skip(index, mark, head)
        return await streamed(http, job, updates, writer, ping, heads)
    answers, tally = await until_hang_up(fold(updates, job), hang_up(http.receive))
    choices = [renderer.choice(i, answer, streamed=False) for i, answer in enumerate(answers)]
    body = Envelope(job, renderer).whole(choices, tally.usage())
    return Response(to_json(body), media_type="application/json")


async def streamed(
    http: Request,
    job: Job,
    updates: Updates,
    writer: EventWriter,
    ping: float,
    heads: Sequence[tuple[Mark, Delta]] = (),
) -> Response:
    """What `updates` brings as the events that `writer` makes of it, otherwise as `respond`."""
    first = await until_hang_up(_beginning(updates, job, heads), hang_up(http.receive))
    return EventStream(frames(first, updates, writer, job.id), updates, ping)


def knows_ids(http: Request) -> bool:
    """Whether a client wants an id with every event: who names `text/event-stream` reads events as
    the standard has them, and who goes on with a stream does. Others may take every line for data,
    as load generators do."""
    asks = EVENTS in http.headers.get("accept", "").lower()
    return asks or HEADER in http.headers or http.method == "GET"


async def _beginning(
    updates: Updates, job: Job, heads: Sequence[tuple[Mark, Delta]]
) -> tuple[int, Delta] | None:
    """The first update, if there is one."""
    try:
        return await _first(updates)
    except ServerHandover as error:
        if not heads:  # it has no event to go on from
            raise ServerShutdown(NOT_BEGUN, retry_after=error.retry_after) from None
        error.resume = resume(job, f"{job.id}:{written([mark for mark, _ in heads])}")
        raise


async def _first(updates: Updates) -> tuple[int, Delta] | None:
    return await anext(updates, None)


def abort(http: Request) -> Callable[[], None]:
    """What ends the connection of `http` at once, whatever waits to be sent."""
    connection = http.scope.get(CONNECTION)
    return nobody if connection is None else connection.cut


class EventStream(StreamingResponse):
    """Sends `frames`, and a comment every `ping` seconds; however that ends, `updates` (already
    begun) is closed and so cancelled.

    A generator that never began does not run its `finally`: this is why it is not enough to
    close `frames`.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], updates: Updates, ping: float) -> None:
        super().__init__(frames, headers=HEADERS, media_type=EVENTS)
        self._updates = updates
        self._ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._updates):
            with suppress(ClientDisconnect):
                await until_hang_up(self.stream_response(send), self._keep_alive(receive, send))

    async def _keep_alive(self, receive: Receive, send: Send) -> None:
        """`hang_up`, with pings until then. It sleeps between them, whatever is streamed."""
        while True:
            try:
                async with asyncio.timeout(self._ping):
                    return await hang_up(receive)
            except TimeoutError:
                await send({"type": "http.response.body", "body": PING, "more_body": True})


async def until_hang_up(work: Coroutine[Any, Any, T], client: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, which is cancelled if `client` ends first: then `ClientDisconnect`."""
    task, watch = asyncio.create_task(work), asyncio.create_task(client)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait({task, watch})  # what they held is the caller's again


async def hang_up(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
