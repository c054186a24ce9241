"""Prompts as token ids, before anything is generated: for routers that choose a server by them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.ops import INLINE_TOKENS, pieces
from dynamo_serve.api.prompts import completion_prompts
from dynamo_serve.api.render import to_json
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.tools import chat_prompt


def rendering_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["tokens"])

    @routes.post("/chat/completions/render", openapi_extra=takes(ChatRequest))
    async def render_chat(http: Request) -> Response:
        """The token ids of the prompt that `/v1/chat/completions` would make of this body. Of its
        other fields those that do not change the prompt are checked and change nothing. Nothing is
        generated."""
        body = await edge.body(http, ChatRequest)
        model = edge.model_name(body.model)
        edge.service.check_open()
        ids, _ = await chat_prompt(body, edge.encoder(http), edge.dialect)
        return await _answer(_head(http, model), [ids], is_list=False)

    @routes.post("/completions/render", openapi_extra=takes(CompletionRequest))
    async def render(http: Request) -> Response:
        """The same for `/v1/completions`: a list with one entry for each prompt."""
        body = await edge.body(http, CompletionRequest)
        model = edge.model_name(body.model)
        edge.service.check_open()
        prompts = await completion_prompts(
            body, edge.encoder(http), edge.service.spec.vocab_size, edge.server.max_choices
        )
        return await _answer(_head(http, model), prompts, is_list=True)

    return routes


def _head(http: Request, model: str) -> str:
    return to_json({"request_id": http.state.request_id, "model": model})[:-1]


async def _answer(head: str, prompts: Sequence[Sequence[int]], *, is_list: bool) -> Response:
    if sum(map(len, prompts)) <= INLINE_TOKENS:
        entries = _entries(head, prompts)
    else:
        entries = await asyncio.to_thread(_entries, head, prompts)
    text = f"[{','.join(entries)}]" if is_list else entries[0]
    return Response(text, media_type="application/json")


def _entries(head: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    return [f'{head},"count":{len(ids)},"token_ids":{pieces(ids)}}}' for ids in prompts]
