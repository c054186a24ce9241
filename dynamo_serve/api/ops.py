"""Endpoints for operators and tools: health, metrics, facts, tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve import __version__
from dynamo_serve.api.edge import Edge, Metrics
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import check_ids, render_messages
from dynamo_serve.api.render import to_json
from dynamo_serve.api.schema import DetokenizeRequest, TokenizeRequest
from dynamo_serve.api.tools import check_tools, for_template
from dynamo_serve.config import Config
from dynamo_serve.errors import InvalidRequest
from dynamo_serve.text.tokenizer import Tokenizer

INLINE_TOKENS = 8_192  # more would hold up the event loop for a millisecond and more


def open_routes(edge: Edge, metrics: Metrics) -> APIRouter:
    """What probes and scrapers read; no key is asked for, but one shows more of the metrics."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """200 while the server gets on, or means to, as while the engine restarts; else 503 with
        the reason: the engine makes no progress, or dies again and again."""
        edge.service.check_alive()
        return {"status": "ok", "state": edge.service.state.value}

    @routes.get("/ready")
    async def ready() -> dict[str, str]:
        """200 if new requests are welcome; else 503 with Retry-After and the reason: starting,
        restarting, draining, full, or an engine that makes no progress. Asks the engine nothing."""
        edge.service.check_ready()
        return {"status": "ready"}

    async def ask(what: str, seconds: float) -> Any:
        return await edge.service.inspect(what, timeout=seconds)

    @routes.get("/metrics", response_class=Response)
    async def scrape(http: Request) -> Response:
        """Prometheus metrics. With a tenants file what tells of single tenants
        (`dserve_tenant_*`) is there for an admin key only; without one the rest is."""
        tenants = edge.access.shows_tenants(http.headers.get("authorization"))
        await metrics.refresh(ask, tenants=tenants)
        page, content_type = metrics.render(tenants=tenants)
        return Response(page, media_type=content_type)

    return routes


def token_routes(edge: Edge) -> APIRouter:
    """Text to token ids and back, with the model's tokenizer."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/tokenize", openapi_extra=takes(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        """The token ids of a text, or of a conversation as the model gets to see it."""
        body = await edge.body(http, TokenizeRequest)
        edge.model_name(body.model)
        edge.service.check_open()
        text, add_special = await _text(body, edge)
        ids = await edge.encoder(http).ids(text, add_special_tokens=add_special)
        args = (edge.tokenizer, ids, edge.service.spec.max_model_len, body.return_token_strs)
        if len(ids) <= INLINE_TOKENS:
            return _json(_tokens(*args))
        return _json(await asyncio.to_thread(_tokens, *args))

    @routes.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
    async def detokenize(http: Request) -> dict[str, str]:
        """The text of token ids, special tokens included."""
        body = await edge.body(http, DetokenizeRequest)
        edge.model_name(body.model)
        edge.service.check_open()
        check_ids(body.tokens, edge.service.spec.vocab_size, "tokens")
        if len(body.tokens) <= INLINE_TOKENS:
            return {"prompt": edge.tokenizer.decode(body.tokens)}
        return {"prompt": await asyncio.to_thread(edge.tokenizer.decode, body.tokens)}

    return routes


def _tokens(tokenizer: Tokenizer, ids: list[int], max_model_len: int, with_texts: bool) -> str:
    """The answer of /tokenize."""
    texts = pieces([tokenizer.token_text(i) for i in ids]) if with_texts else "null"
    return (
        f'{{"count":{len(ids)},"max_model_len":{max_model_len},'
        f'"tokens":{pieces(ids)},"token_strs":{texts}}}'
    )


def pieces(items: Sequence[Any]) -> str:
    """A list as JSON, in pieces: to encode a long one at once lets no other thread run."""
    starts = range(0, len(items), INLINE_TOKENS)
    return f"[{','.join(to_json(items[at : at + INLINE_TOKENS])[1:-1] for at in starts)}]"


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


async def _text(body: TokenizeRequest, edge: Edge) -> tuple[str, bool]:
    """The text to encode, and whether the tokenizer adds its special tokens."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    if body.prompt is not None:
        about_messages = {"add_generation_prompt", "chat_template_kwargs", "tools"}
        for name in sorted(body.model_fields_set & about_messages):
            raise InvalidRequest(f"'{name}' goes with messages, not with a prompt.", param=name)
        return body.prompt, body.add_special_tokens is not False
    check_tools(body.tools, edge.dialect)
    text = await render_messages(
        body.messages or [],
        edge.tokenizer,
        body.chat_template_kwargs,
        body.add_generation_prompt,
        for_template(body.tools),
    )
    return text, bool(body.add_special_tokens)


def server_routes(edge: Edge, config: Config) -> APIRouter:
    """What this server is and what it allows."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/v1/server")
    async def server() -> dict[str, Any]:
        """Version, model, device, attention backend, parsers and limits: facts, not wishes.
        `recording` is there if traffic is recorded: whether it still is, and whether prompts are as
        text."""
        edge.service.check_open()
        spec = edge.service.spec
        return {
            "version": __version__,
            "models": edge.model_names,
            "state": edge.service.state.value,
            "engine": dict(spec.facts),
            "parsers": {
                "tools": edge.dialect.tools or None,
                "reasoning": edge.dialect.thoughts or None,
            },
            "limits": {
                "max_model_len": spec.max_model_len,
                "vocab_size": spec.vocab_size,
                "page_size": spec.page_size,
                "num_pages": spec.num_pages,
                "max_prefill_tokens": config.scheduler.max_prefill_tokens,
                "max_step_ms": config.scheduler.max_step_ms,
                "max_decode_sequences": config.scheduler.max_decode_sequences,
                "max_waiting": config.scheduler.max_waiting,
                "max_choices": config.server.max_choices,
                "max_inputs": config.server.max_inputs,
                "max_body_bytes": config.server.max_body_bytes,
            },
            **edge.recording(),
        }

    return routes
