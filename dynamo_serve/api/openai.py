"""The OpenAI endpoints: chat completions, completions, models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.choices import run
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.enforce import chat_grammar
from dynamo_serve.api.job import Body, Bounds, Job, check_generates, to_job, unread
from dynamo_serve.api.marks import HEADER as LAST_EVENT_ID
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import completion_prompts
from dynamo_serve.api.render import renderer_of
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.sse import abort, respond
from dynamo_serve.api.streams import go_on
from dynamo_serve.api.terms import HEADER, terms_of
from dynamo_serve.api.tools import chat_prompt
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import Unavailable
from dynamo_serve.service import State
from dynamo_serve.text.dialect import Parsing


def openai_routes(edge: Edge) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(http: Request) -> Response:
        """Answer a conversation. With `stream` the answer comes as server-sent events."""
        if last := http.headers.get(LAST_EVENT_ID):
            return await go_on(edge, http, last)
        body = await edge.body(http, ChatRequest)
        model = edge.model_name(body.model)
        check_open(edge, http, body)
        ids, parsing = await chat_prompt(body, edge.tokenizer, edge.dialect)
        grammars = edge.grammars_of(http.state.caller)
        grammar = await chat_grammar(body, parsing, grammars, edge.tokenizer)
        return await _answer(edge, http, job_of(edge, http, body, [ids], model, grammar, parsing))

    @routes.post("/completions", openapi_extra=takes(CompletionRequest))
    async def complete(http: Request) -> Response:
        """Continue each prompt. With `stream` the answer comes as server-sent events."""
        if last := http.headers.get(LAST_EVENT_ID):
            return await go_on(edge, http, last)
        body = await edge.body(http, CompletionRequest)
        model = edge.model_name(body.model)
        check_open(edge, http, body)
        grammar = await edge.grammars_of(http.state.caller).of(body)
        prompts = await completion_prompts(
            body, edge.tokenizer, edge.service.spec.vocab_size, edge.server.max_choices
        )
        return await _answer(edge, http, job_of(edge, http, body, prompts, model, grammar))

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The names the model is served under, and what it can do."""
        return {"object": "list", "data": [_model(edge, name) for name in edge.model_names]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of these names, or 404."""
        return _model(edge, edge.model_name(name))

    return routes


async def _answer(edge: Edge, http: Request, job: Job) -> Response:
    updates = run(job, edge.service, edge.tokenizer, abort(http))
    renderer = renderer_of(job, edge.tokenizer)
    return await respond(http, job, updates, renderer, edge.server.ping_interval_s)


def check_open(edge: Edge, http: Request, body: Body) -> None:
    """Raise `Unavailable` unless new requests are accepted, before anything is done for this, and
    `UnsupportedField` if they could not be answered."""
    try:
        edge.service.check_open()
    except Unavailable as error:
        edge.service.turn_away(unread(body, http.state.caller), error)
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
    """The job of a checked request, known from now on to those who look for it."""
    server = edge.server
    bounds = Bounds(
        edge.service.spec, server.max_choices, server.resume_grace_s, edge.tokenizer.eos_ids
    )
    # Asked again: between the headers and the end of the body the tenants may have been reloaded.
    caller = edge.access.caller(http.headers.get("authorization"))
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


def _model(edge: Edge, name: str) -> dict[str, Any]:
    told = {"id": name, "object": "model", "created": edge.started, "owned_by": "dynamo_serve"}
    if edge.service.state is State.STARTING:  # what it can do is not known yet
        return told
    spec = edge.service.spec
    capabilities = {
        "completions": spec.generates,
        "chat": spec.generates and edge.tokenizer.has_chat_template,
        "embeddings": spec.pooling not in ("", "score"),
        "rerank": bool(spec.pooling),
    }
    return {**told, "max_model_len": spec.max_model_len, "capabilities": capabilities}
