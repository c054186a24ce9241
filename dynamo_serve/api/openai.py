"""The OpenAI endpoints: chat completions, completions, models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.enforce import chat_grammar
from dynamo_serve.api.generate import check_takes, job_of, respond_to
from dynamo_serve.api.marks import HEADER as LAST_EVENT_ID
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import completion_prompts
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.streams import go_on
from dynamo_serve.api.tools import chat_prompt
from dynamo_serve.service import State


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
        check_takes(edge, http, body)
        limit = edge.service.spec.max_model_len
        ids, parsing = await chat_prompt(body, edge.encoder(http), edge.dialect, limit)
        grammars = edge.grammars_of(http.state.caller)
        grammar = await chat_grammar(body, parsing, grammars, edge.tokenizer)
        job = job_of(edge, http, body, [ids], model, grammar, parsing)
        return await respond_to(edge, http, job)

    @routes.post("/completions", openapi_extra=takes(CompletionRequest))
    async def complete(http: Request) -> Response:
        """Continue each prompt. With `stream` the answer comes as server-sent events."""
        if last := http.headers.get(LAST_EVENT_ID):
            return await go_on(edge, http, last)
        body = await edge.body(http, CompletionRequest)
        model = edge.model_name(body.model)
        check_takes(edge, http, body)
        grammar = await edge.grammars_of(http.state.caller).of(body)
        prompts = await completion_prompts(
            body,
            edge.encoder(http),
            edge.service.spec.vocab_size,
            edge.server.max_choices,
            edge.service.spec.max_model_len,
        )
        return await respond_to(edge, http, job_of(edge, http, body, prompts, model, grammar))

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The names the model is served under."""
        return {"object": "list", "data": [_model(edge, name) for name in edge.model_names]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of these names, or 404."""
        return _model(edge, edge.model_name(name))

    return routes


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
