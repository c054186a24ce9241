"""Anthropic's Messages API: the same conversations, tools and answers in another shape."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.enforce import chat_grammar
from dynamo_serve.api.generate import check_takes, job_of, respond_to
from dynamo_serve.api.marks import HEADER as LAST_EVENT_ID
from dynamo_serve.api.messages_chat import MessagesChat, to_chat
from dynamo_serve.api.messages_thinking import thinking_fields
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.schema_messages import CountTokensRequest, MessagesRequest
from dynamo_serve.api.streams import go_on
from dynamo_serve.api.tools import chat_prompt


def messages_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/v1/messages", tags=["Anthropic"])

    @routes.post("", openapi_extra=takes(MessagesRequest, error="MessagesError"))
    async def create(http: Request) -> Response:
        """Answer a conversation, as Anthropic's Messages API does. With `stream` the answer comes
        as server-sent events."""
        if last := http.headers.get(LAST_EVENT_ID):
            return await go_on(edge, http, last)
        body = await edge.body(http, MessagesRequest)
        model = edge.model_name(body.model)
        chat = _chat(edge, body)
        check_takes(edge, http, chat)
        grammars = edge.grammars_of(http.state.caller)
        encoder, limit = edge.encoder(http), edge.service.spec.max_model_len
        ids, parsing = await chat_prompt(chat, encoder, edge.dialect, limit)
        grammar = await chat_grammar(chat, parsing, grammars, edge.tokenizer)
        chat = _within_room(chat, limit - len(ids))
        job = job_of(edge, http, chat, [ids], model, grammar, parsing)
        return await respond_to(edge, http, job)

    @routes.post("/count_tokens", openapi_extra=takes(CountTokensRequest, error="MessagesError"))
    async def count_tokens(http: Request) -> dict[str, Any]:
        """How many tokens the prompt of such a conversation has. Nothing is computed."""
        body = await edge.body(http, CountTokensRequest)
        edge.model_name(body.model)
        chat = _chat(edge, body)
        edge.service.check_open()
        ids, _ = await chat_prompt(chat, edge.encoder(http), edge.dialect)
        return {"input_tokens": len(ids)}

    return routes


def _chat(edge: Edge, body: CountTokensRequest) -> MessagesChat:
    effort = body.output_config.effort if body.output_config is not None else None
    return to_chat(body, thinking_fields(body.thinking, edge.dialect, effort))


def _within_room(chat: MessagesChat, room: int) -> MessagesChat:
    """Who asks for more tokens than there is room for gets all there is."""
    if chat.max_tokens is None or chat.max_tokens <= room:
        return chat
    return chat.model_copy(update={"max_tokens": None})
