"""Going on with a stream whose connection broke."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from dynamo_serve.api import marks
from dynamo_serve.api.choices import rejoin
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.faces import face_of
from dynamo_serve.api.marks import HEADER, Mark
from dynamo_serve.api.sse import abort, respond
from dynamo_serve.errors import InvalidRequest


def stream_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(tags=["requests"])

    @routes.get("/v1/streams/{id}")
    async def stream(http: Request, id: str) -> Response:
        """Go on with a stream of the caller's tenant after the event that the header
        Last-Event-ID names; without it, from the beginning."""
        last = http.headers.get(HEADER)
        if last is not None and last.partition(":")[0] != id:
            raise InvalidRequest(f"{HEADER!r} names another stream than the path.", param=HEADER)
        return await go_on(edge, http, last or id)

    return routes


async def go_on(edge: Edge, http: Request, last: str) -> Response:
    """The rest of a stream after its event `last`. Raises `RequestNotFound`, `InvalidRequest`."""
    id, had = marks.read(last)
    job = await edge.streams.seek(http.state.caller.tenant, id)
    had = had or [Mark()] * len(job.requests)
    if len(had) != len(job.requests):
        raise InvalidRequest(f"{HEADER!r} tells of {len(had)} choices.", param=HEADER)
    heads, updates = rejoin(job, edge.service, edge.tokenizer, had, abort(http))
    face = face_of(job, edge.tokenizer)
    return await respond(http, job, updates, face, edge.server.ping_interval_s, heads)
