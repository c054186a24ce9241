"""From a checked body to its answer: what all endpoints that generate have in common."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request, Response

from dynamo_serve.api.auth import credentials
from dynamo_serve.api.capable import check_generates
from dynamo_serve.api.choices import run
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.faces import face_of
from dynamo_serve.api.job import Body, Bounds, Job, to_job, unread
from dynamo_serve.api.sse import abort, respond
from dynamo_serve.api.terms import HEADER, terms_of
from dynamo_serve.core.request import Grammar
from dynamo_serve.text.dialect import Parsing


def check_takes(edge: Edge, http: Request, body: Body) -> None:
    """Raise `Unavailable` unless new requests are accepted, before anything is done for this, and
    `UnsupportedField` if they could not be answered."""
    edge.check_open(unread(body, http.state.caller))
    check_generates(edge.service.spec)


def job_of(
    edge: Edge,
    http: Request,
    body: Body,
    prompts: list[list[int]],
    model: str,
    grammar: Grammar | None,
    parsing: Parsing | None = None,
) -> Job:
    """Raises `InvalidRequest` (or one of its kind), `Unauthorized` and `Forbidden`."""
    server = edge.server
    bounds = Bounds(
        edge.service.spec, server.max_choices, server.resume_grace_s, edge.tokenizer.eos_ids
    )
    # Asked again: between the headers and the end of the body the tenants may have been reloaded.
    caller = edge.access.caller(credentials(http.headers))
    terms = terms_of(
        body,
        http.headers.get(HEADER),
        caller.tenant,
        edge.access.tenancy,
        edge.max_queue_delay,
    )
    job = to_job(body, prompts, bounds, caller, terms, model, grammar, parsing)
    edge.lookup.add(caller.tenant, http.state.request_id, job)
    edge.streams.add(caller.tenant, job)
    return job


async def respond_to(edge: Edge, http: Request, job: Job) -> Response:
    """The answer of a job, as JSON or as a stream."""
    updates = run(job, edge.service, edge.tokenizer, abort(http))
    make = partial(face_of, job, edge.tokenizer)
    face = await asyncio.to_thread(make) if job.echo else make()
    return await respond(http, job, updates, face, edge.server.ping_interval_s)
