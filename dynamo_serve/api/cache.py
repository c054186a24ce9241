"""The prefix cache, for who asks: why a prompt was not found, and what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve.api import parse
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import completion_prompts, render_messages
from dynamo_serve.api.render import answer
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.core.prefix_index import extend_keys
from dynamo_serve.errors import ContextTooLong, InvalidRequest
from dynamo_serve.text.tokenizer import Tokenizer

INLINE_TOKENS = 8192  # to hash more would hold up every other stream
CONTEXT = 8  # tokens before a difference that are shown with it
SHOWN_TOKENS = 24  # after it
SHOWN_CHARACTERS = 60  # of a run
Told = dict[str, Any]

WHY = {
    "first_time": "Nothing that goes on so after token {position} has been stored, as far as is "
    "remembered.",
    "evicted": "It was stored and had to go {evicted_s_ago:.0f} s ago, for {whose}.",
    "differs": "Token {position} differs: the prompt goes on with {prompt!r}, what is stored with "
    "{stored!r}.",
    "too_short": "What is left is less than a page, or has the last token, which is always "
    "computed.",
    "being_computed": "A request is computing it now; one that is sent meanwhile waits for it.",
    "not_shared": "cache.prefix_sharing is off.",
}
WHOSE = {
    "own": "your own requests",
    "others": "others",
    "damaged": "nobody: it could not be read back",
}


def cache_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/v1/cache", tags=["tokens"])

    @routes.post("/explain", openapi_extra=takes(ChatRequest, CompletionRequest))
    async def explain(http: Request) -> Response:
        """How much of a prompt is in the prefix cache, and why the rest is not. The body is that
        of a chat (`messages`) or of a completion (one `prompt`); of its other fields those that do
        not change the prompt are checked and change nothing. Nothing is computed or stored. Told
        are only texts that the caller's own tenant has sent."""
        body = await _body(edge, http)
        model = edge.model_name(body.model)
        edge.service.check_open()
        ids = await _ids(edge, body)
        # Now, not before the body: meanwhile the tenants may have been reloaded.
        caller = edge.access.caller(http.headers.get("authorization"))
        size = edge.service.spec.page_size
        keys: list[bytes] = []
        if len(ids) <= INLINE_TOKENS:
            extend_keys(keys, ids, caller.salt, size, len(ids))
        else:
            await asyncio.to_thread(extend_keys, keys, ids, caller.salt, size, len(ids))
        about = (caller.tenant, caller.salt, keys, ids)
        told = await edge.service.inspect("prompt", about=about)
        return answer({"model": model, **told, "miss": _miss(told["miss"], ids, edge.tokenizer)})

    return routes


def cache_admin_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/admin", tags=["administration"])

    @routes.get("/cache")
    async def cache() -> Response:
        """The tree of cached prompts in runs, pages without a branch between them: sizes, tiers,
        hits, ages, tenants and how their text begins; the latest used and the largest 200."""
        told = await edge.service.inspect("cache")
        runs = [_run(run, edge.tokenizer) for run in told["runs"]]
        return answer({**told, "runs": runs})

    return routes


async def _body(edge: Edge, http: Request) -> ChatRequest | CompletionRequest:
    raw = await parse.read_object(http, edge.server.max_body_bytes)
    given = [name for name in ("messages", "prompt") if raw.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    if given == ["messages"]:
        return parse.to_model(ChatRequest, raw, edge.server.unknown_fields)
    return parse.to_model(CompletionRequest, raw, edge.server.unknown_fields)


async def _ids(edge: Edge, body: ChatRequest | CompletionRequest) -> list[int]:
    """The token ids of the one prompt. Raises `InvalidRequest` and its kind."""
    spec = edge.service.spec
    if isinstance(body, ChatRequest):
        text = await render_messages(body.messages, edge.tokenizer, body.chat_template_kwargs)
        ids, field = await edge.tokenizer.encode_async(text), "messages"
    else:
        (ids,) = await completion_prompts(body, edge.tokenizer, spec.vocab_size, 1)
        field = "prompt"
    if len(ids) >= spec.max_model_len:
        raise ContextTooLong(
            f"The prompt has {len(ids)} tokens; prompt and answer together may have "
            f"{spec.max_model_len}.",
            param=field,
        )
    return ids


def _miss(miss: Told, ids: Sequence[int], tokenizer: Tokenizer) -> Told:
    """What the engine says of a miss, with the texts on both sides of it, and in words."""
    told, stored_ids = dict(miss), miss["stored_ids"]
    del told["stored_ids"]
    at = miss["position"]
    before = ids[max(0, at - CONTEXT) : at]
    told["text"] = {
        "before": tokenizer.decode(before),
        "prompt": _after(before, ids[at : at + SHOWN_TOKENS], tokenizer),
        "stored": _after(before, stored_ids[:SHOWN_TOKENS], tokenizer) if stored_ids else None,
    }
    whose = WHOSE.get(miss.get("pressure", ""), "")
    told["message"] = WHY[miss["reason"]].format(**{**told, **told["text"], "whose": whose})
    return told


def _after(before: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens where they stand: some begin with a space only after others."""
    return tokenizer.decode([*before, *ids]).removeprefix(tokenizer.decode(before))


def _run(run: Told, tokenizer: Tokenizer) -> Told:
    told = {name: value for name, value in run.items() if name != "first_ids"}
    return {**told, "text": tokenizer.decode(run["first_ids"])[:SHOWN_CHARACTERS]}
