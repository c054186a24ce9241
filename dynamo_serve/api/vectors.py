"""Texts to vectors: one request of the service for each, under the caller's caps."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from fastapi import Request as Http
from starlette.responses import Response

from dynamo_serve.api.auth import credentials
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.hang_up import hang_up, until_hang_up
from dynamo_serve.api.render import to_json
from dynamo_serve.api.schema_vectors import Vectors
from dynamo_serve.api.terms import HEADER, Terms, terms_of
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Pooling, Request
from dynamo_serve.directory import Caller
from dynamo_serve.errors import (
    ContextTooLong,
    DeadlinePassed,
    InvalidRequest,
    Unavailable,
    UnsupportedField,
)
from dynamo_serve.service import Service
from dynamo_serve.text.inputs import Input

SHORTEN = "Shorten it, or set truncate_prompt_tokens."
AT_ONCE = 128  # requests of one call that are in the service; the next follows when one is done


class Wanted(NamedTuple):
    """The inputs of a call, each with its path in the body; `pooling` is what is made of them,
    `beside` names what each was put together with."""

    inputs: Sequence[Input]
    paths: Sequence[str]
    pooling: str
    beside: str = ""


class VectorCall(NamedTuple):
    """A call: the id of its answer, and the requests behind it."""

    id: str
    requests: tuple[Request, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)


def unread(body: Vectors, caller: Caller) -> Request:
    """What is known of a call at whose inputs nobody has looked."""
    return Request(
        id="",
        prompt_ids=(),
        max_tokens=0,
        tenant=caller.tenant,
        arrival=time.monotonic(),
        class_name=body.class_name,
    )


def refuse(spec: EngineSpec, wish: str, remedy: str) -> NoReturn:
    """Raise `UnsupportedField` for what this engine does not do."""
    name = spec.facts.get("architecture", "this one")
    raise UnsupportedField(
        f"The model served here ({name}) does not make {wish}: {remedy}.", param="model"
    )


def most_tokens(body: Vectors, spec: EngineSpec) -> int | None:
    """To how many tokens inputs are cut, if they are. Raises `InvalidRequest`."""
    most = body.truncate_prompt_tokens
    if most is None or most == -1:
        return most and spec.max_model_len
    if not 1 <= most <= spec.max_model_len:
        raise InvalidRequest(
            f"'truncate_prompt_tokens': {most} tokens; the model takes 1 to {spec.max_model_len}.",
            param="truncate_prompt_tokens",
        )
    return most


async def inputs(
    encoder: TextEncoder,
    texts: Sequence[str],
    paths: Sequence[str],
    spec: EngineSpec,
    *,
    before: str | None = None,
    most: int | None = None,
) -> list[Input]:
    """The inputs that texts are, each with its path in the body, as `TextEncoder.inputs` makes
    them. Raises `ContextTooLong` for one that cannot fit, unless it is cut to `most` tokens."""
    if most is None:
        limit = spec.max_model_len
        remedy = f"the model takes {limit}. {SHORTEN}"
        for text, path in zip(texts, paths, strict=True):
            await encoder.check_fits(text, limit, f"'{path}'", remedy, path)
    return await encoder.inputs(texts, before=before, most=most)


def check_count(count: int, name: str, edge: Edge) -> None:
    """Raise `InvalidRequest` for more inputs than one call may have."""
    most = edge.server.max_inputs
    if count > most:
        raise InvalidRequest(
            f"'{name}': {count} in one request, the limit is {most} (server.max_inputs); send "
            "several requests.",
            param=name,
        )


def asked(edge: Edge, http: Http, body: Vectors, wanted: Wanted, prefix: str) -> VectorCall:
    """The requests of a call. Raises `ContextTooLong` or `InvalidRequest` naming the input."""
    _check_lengths(wanted, edge.service.spec.max_model_len)
    # Asked again: between the headers and the end of the body the tenants may have been reloaded.
    caller = edge.access.caller(credentials(http.headers)).salted(body.cache_salt)
    tenancy, header = edge.access.tenancy, http.headers.get(HEADER)
    terms = terms_of(body, header, caller.tenant, tenancy, edge.max_queue_delay)
    call = VectorCall(f"{prefix}-{secrets.token_hex(12)}", ())
    call = call._replace(requests=tuple(_requests(call.id, wanted, caller, terms)))
    edge.lookup.add(caller.tenant, http.state.request_id, call)
    return call


def _check_lengths(wanted: Wanted, limit: int) -> None:
    for each, path in zip(wanted.inputs, wanted.paths, strict=True):
        if not each.ids:
            raise InvalidRequest(f"'{path}' is empty.", param=path)
        if len(each.ids) > limit:
            raise ContextTooLong(
                f"'{path}'{wanted.beside} has {len(each.ids)} tokens, the model takes {limit}. "
                + SHORTEN,
                param=path,
            )


def _requests(call: str, wanted: Wanted, caller: Caller, terms: Terms) -> Iterator[Request]:
    """The first one answers to the quotas for all."""
    now = time.monotonic()
    tokens = sum(len(each.ids) for each in wanted.inputs)
    for i, each in enumerate(wanted.inputs):
        yield Request(
            id=f"{call}-{i}",
            prompt_ids=tuple(each.ids),
            max_tokens=0,
            tenant=caller.tenant,
            salt=caller.salt,
            arrival=now,
            deadline=now + terms.deadline,
            class_name=terms.class_name,
            priority=terms.priority,
            num_choices=0 if i else len(wanted.inputs),
            call_tokens=0 if i else tokens,
            is_stream=False,
            pooling=Pooling(wanted.pooling, each.second_at),
            has_class_deadline=terms.has_class_deadline,
        )


async def vectors_of(edge: Edge, http: Http, call: VectorCall) -> list[bytes]:
    """What the engine makes of each, in order. A hang-up cancels them all, and so does one that
    fails; its error is raised."""
    work = _together(edge.service, call.requests)
    return await until_hang_up(work, hang_up(http.receive))


async def _together(service: Service, requests: Sequence[Request]) -> list[bytes]:
    found: dict[str, bytes] = {}
    left = iter(requests)

    async def one_after_another() -> None:
        for request in left:  # it has not waited for the server before, but for those before it
            begun = replace(request, arrival=time.monotonic())
            found[request.id] = await _vector(service, begun)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in requests[:AT_ONCE]:
                group.create_task(one_after_another())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [found[request.id] for request in requests]


async def _vector(service: Service, request: Request) -> bytes:
    async with aclosing(service.generate(request, is_begun=True)) as events:
        async for event in events:
            if event.artifact is not None:
                return event.artifact
            if event.finish is Finish.DEADLINE:
                raise DeadlinePassed("The deadline passed before everything was computed.")
            if event.finish is not None:
                why = event.finish.value
                raise Unavailable(f"The server ended this request early ({why}).")
    raise AssertionError("the events of a request ended without a finish")


async def respond(parts: Iterator[str], fields: dict[str, Any]) -> Response:
    """A JSON object of `fields`, the last of which is a list of `parts`, each JSON already; written
    on a thread, for there may be millions of numbers."""
    *others, (last, _) = fields.items()

    def write() -> str:
        head = to_json(dict(others))[:-1]
        return f'{head}{"," if others else ""}"{last}":[{",".join(parts)}]}}'

    return Response(await asyncio.to_thread(write), media_type="application/json")
