"""A job's answer on the wire: server-sent events, or their fold as one JSON body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from dynamo_serve.api.choices import Head, Updates, fold
from dynamo_serve.api.echo import scores_many
from dynamo_serve.api.faces import Face
from dynamo_serve.api.frames import frames
from dynamo_serve.api.hang_up import hang_up, until_hang_up
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import HEADER, resume, written
from dynamo_serve.api.render import to_json, to_long_json
from dynamo_serve.delivery import nobody
from dynamo_serve.errors import ServerHandover, ServerShutdown
from dynamo_serve.text.stream import Delta

CONNECTION = "dynamo_serve.connection"  # in the scope of a request, if the server put it there
NOT_BEGUN = "The server was replaced before this answer had begun. Send the request again."
EVENTS = "text/event-stream"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # a proxy that collects the events would hold them back
}


async def respond(
    http: Request,
    job: Job,
    updates: Updates,
    face: Face,
    ping: float,
    heads: Sequence[Head] = (),
) -> Response:
    """Answer `http` with what `updates` brings; a hang-up closes `updates`. Of a stream that is
    gone on with, `heads` are what the client has.

    What goes wrong before the first token is raised, and so becomes a proper HTTP status.
    """
    if job.stream:
        first = await until_hang_up(_beginning(updates, job, heads), hang_up(http.receive))
        events = frames(first, updates, job, face.writer(shows_ids=knows_ids(http)), heads)
        return EventStream(events, updates, ping, face.ping)
    answers, tally = await until_hang_up(fold(updates, job), hang_up(http.receive))
    if scores_many([delta for deltas in answers for delta in deltas]):
        text = await asyncio.to_thread(lambda: to_long_json(face.whole(answers, tally)))
    else:
        text = to_json(face.whole(answers, tally))
    return Response(text, media_type="application/json")


def knows_ids(http: Request) -> bool:
    """Whether a client wants an id with every event: who names `text/event-stream` reads events as
    the standard has them, and who goes on with a stream does. Others may take every line for data,
    as load generators do."""
    asks = EVENTS in http.headers.get("accept", "").lower()
    return asks or HEADER in http.headers or http.method == "GET"


async def _beginning(updates: Updates, job: Job, heads: Sequence[Head]) -> tuple[int, Delta] | None:
    """The first update, if there is one."""
    try:
        return await _first(updates)
    except ServerHandover as error:
        if not heads:  # it has no event to go on from
            raise ServerShutdown(NOT_BEGUN, retry_after=error.retry_after) from None
        error.resume = resume(job, f"{job.id}:{written([head.mark for head in heads])}")
        raise


async def _first(updates: Updates) -> tuple[int, Delta] | None:
    return await anext(updates, None)


def abort(http: Request) -> Callable[[], None]:
    """What ends the connection of `http` at once, whatever waits to be sent."""
    connection = http.scope.get(CONNECTION)
    return nobody if connection is None else connection.cut


class EventStream(StreamingResponse):
    """Sends `frames`, and `idle` every `ping` seconds; however that ends, `updates` (already begun)
    is closed and so cancelled.

    A generator that never began does not run its `finally`: this is why it is not enough to
    close `frames`.
    """

    def __init__(
        self, frames: AsyncGenerator[bytes, None], updates: Updates, ping: float, idle: bytes
    ) -> None:
        super().__init__(frames, headers=HEADERS, media_type=EVENTS)
        self._updates = updates
        self._ping = ping
        self._idle = idle

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
                await send({"type": "http.response.body", "body": self._idle, "more_body": True})
