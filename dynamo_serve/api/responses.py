"""OpenAI's Responses: a turn of a conversation of items, and answers that are kept."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.choices import run
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.enforce import chat_grammar
from dynamo_serve.api.generate import check_takes, job_of
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import HEADER as LAST_EVENT_ID
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.render import answer
from dynamo_serve.api.responses_chat import ResponseChat, chat_of
from dynamo_serve.api.responses_items import Placed, conversation, told_back
from dynamo_serve.api.responses_object import ResponseFace, ResponseWriter, head_of
from dynamo_serve.api.responses_store import ResponseStore
from dynamo_serve.api.schema_responses import ANSWER, ResponsesRequest
from dynamo_serve.api.sse import abort, respond
from dynamo_serve.api.tools import chat_prompt
from dynamo_serve.errors import InvalidRequest, UnknownField, UnsupportedField

Json = dict[str, Any]
JSON = "application/json"
NUMBER = re.compile(r"\d{1,9}", re.ASCII)
COUNTED = {"object": "response.input_tokens", "input_tokens": 12}
MAX_PAGE, PAGE = 100, 20


class Exchange(NamedTuple):
    """A request, the items up to its answer, and the chat that they are."""

    body: ResponsesRequest
    placed: list[Placed]
    chat: ResponseChat


def responses_routes(edge: Edge, store: ResponseStore) -> APIRouter:
    """The routes under /v1/responses."""
    routes = APIRouter(prefix="/v1/responses", tags=["OpenAI"])

    @routes.post("", openapi_extra=takes(ResponsesRequest, told=ANSWER))
    async def create(http: Request) -> Response:
        """Answer a conversation of items. With `stream` the answer comes as server-sent events."""
        if LAST_EVENT_ID in http.headers:
            raise UnsupportedField(
                f"{LAST_EVENT_ID!r}: streams of responses are not gone on with. Send the request "
                "again without this header.",
                param=LAST_EVENT_ID,
            )
        exchange = await _exchange(edge, http, store)
        is_kept = store.wants(exchange.body.store)
        job = await _job(edge, http, exchange.chat)
        return await _answer(edge, http, job, exchange, store, is_kept=is_kept)

    @routes.post("/input_tokens", openapi_extra=takes(ResponsesRequest, told=COUNTED))
    async def count(http: Request) -> Response:
        """How many tokens the prompt of such a request has. Nothing is generated."""
        exchange = await _exchange(edge, http, store)
        edge.model_name(exchange.body.model)
        edge.service.check_open()
        store.wants(exchange.body.store)
        ids, _ = await chat_prompt(exchange.chat, edge.encoder(http), edge.dialect)
        return answer({**COUNTED, "input_tokens": len(ids)})

    @routes.get("/{id}")
    async def retrieve(http: Request, id: str) -> Response:
        """A kept response of the caller's tenant."""
        _check_query(http, stream="false", include_obfuscation="false")
        return Response(store.response(http.state.caller.tenant, id), media_type=JSON)

    @routes.delete("/{id}")
    async def delete(http: Request, id: str) -> Response:
        """Forget a kept response of the caller's tenant."""
        store.delete(http.state.caller.tenant, id)
        return answer({"id": id, "object": "response", "deleted": True})

    @routes.get("/{id}/input_items")
    async def input_items(
        http: Request,
        id: str,
        limit: str = f"{PAGE}",
        order: str = "desc",
        after: str | None = None,
    ) -> Response:
        """The items that a kept response answers, with those of the conversation before it:
        `limit` of them (1 to 100) from the newest on or, with `order=asc`, from the oldest, behind
        the item `after`."""
        _check_query(http, limit=None, order=None, after=None)
        return answer(_page(store.items(http.state.caller.tenant, id), limit, order, after))

    return routes


async def _exchange(edge: Edge, http: Request, store: ResponseStore) -> Exchange:
    body = await edge.body(http, ResponsesRequest)
    placed = conversation(body, http.state.caller.tenant, store, edge.server.max_body_bytes)
    return Exchange(body, placed, chat_of(body, placed))


async def _job(edge: Edge, http: Request, chat: ResponseChat) -> Job:
    model = edge.model_name(chat.model)
    check_takes(edge, http, chat)
    encoder, limit = edge.encoder(http), edge.service.spec.max_model_len
    ids, parsing = await chat_prompt(chat, encoder, edge.dialect, limit)
    grammars = edge.grammars_of(http.state.caller)
    grammar = await chat_grammar(chat, parsing, grammars, edge.tokenizer)
    return job_of(edge, http, chat, [ids], model, grammar, parsing)


async def _answer(
    edge: Edge, http: Request, job: Job, exchange: Exchange, store: ResponseStore, *, is_kept: bool
) -> Response:
    items = told_back(exchange.placed, job.id) if is_kept else []
    keep = partial(store.keep, http.state.caller.tenant, job.id, items)
    writer = ResponseWriter(job, edge.tokenizer, head_of(exchange.body, job, store=is_kept), keep)
    updates = run(job, edge.service, edge.tokenizer, abort(http))
    return await respond(http, job, updates, ResponseFace(writer), edge.server.ping_interval_s)


def _check_query(http: Request, **harmless: str | None) -> None:
    """Raise for what is asked in the address and not done; None stands for any value."""
    for name, value in http.query_params.items():
        if name not in harmless:
            raise UnknownField(f"Unknown parameter {name[:100]!r}.", param=name[:100])
        if harmless[name] not in (None, value.lower()):
            raise UnsupportedField(
                f"'{name}' is not supported by this server: a kept response is told as a whole.",
                param=name,
            )


def _page(items: list[Json], limit: str, order: str, after: str | None) -> Json:
    """OpenAI's list object. Raises `InvalidRequest`."""
    if not (NUMBER.fullmatch(limit) and 1 <= int(limit) <= MAX_PAGE):
        raise InvalidRequest(f"'limit' must be from 1 to {MAX_PAGE}.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("'order' must be asc or desc.", param="order")
    ids = [item["id"] for item in items]
    if order == "desc":
        items, ids = items[::-1], ids[::-1]
    if after is not None and after not in ids:
        raise InvalidRequest(f"'after': there is no item {after[:100]!r}.", param="after")
    start = 0 if after is None else ids.index(after) + 1
    end = start + int(limit)
    page = items[start:end]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": end < len(items),
    }
