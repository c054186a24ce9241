"""The prefix cache, for who asks: why a prompt was not found, and what there is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from dynamo_serve.api import parse
from dynamo_serve.api.auth import credentials
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import completion_prompts
from dynamo_serve.api.render import answer
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.tools import chat_prompt
from dynamo_serve.core.prefix_index import extend_keys
from dynamo_serve.directory import Caller
from dynamo_serve.errors import ContextTooLong, InvalidRequest
from dynamo_serve.prefixes import Prefix
from dynamo_serve.text.tokenizer import Tokenizer

INLINE_TOKENS = 8192  # to hash more would hold up every other stream
CONTEXT = 8  # tokens before a difference that are shown with it
SHOWN_TOKENS = 24  # after it
SHOWN_CHARACTERS = 60  # of a run
MOST_SALTS = 1024  # of other tenants that a prompt is looked for; the loop stands still meanwhile
Told = dict[str, Any]

ASKED = takes(ChatRequest, CompletionRequest)
ASKED_FOR = {
    **ASKED,
    "parameters": [
        {
            "name": "tenant",
            "in": "query",
            "required": True,
            "description": "Who asks.",
            "schema": {"type": "string"},
        }
    ],
}

WHY = {
    "first_time": "Nothing of yours that goes on so after token {position} has been stored, as far "
    "as is remembered.",
    "evicted": "It was stored and had to go {evicted_s_ago:.0f} s ago, for {whose}.",
    "differs": "Token {position} differs: the prompt goes on with {prompt!r}, what is stored with "
    "{stored!r}.",
    "too_short": "What is left is less than a page, and no part of one is worth a copy; or it is "
    "the last token, which is always computed.",
    "being_computed": "A request is computing it now; one that is sent meanwhile waits for it.",
    "salted_apart": "Up to token {apart_until} it is stored for you, but under another cache_salt, "
    "or none: only requests with an equal one find it.",
    "not_shared": "cache.prefix_sharing is off.",
}
OF_OTHERS = "It is stored for others, {} tokens of it, whose pages this tenant never finds."
WHOSE = {
    "own": "your own requests",
    "others": "others",
    "damaged": "nobody: it could not be read back",
}


def cache_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/v1/cache", tags=["tokens"])

    @routes.post("/explain", openapi_extra=ASKED)
    async def explain(http: Request) -> Response:
        """How much of a prompt is in the prefix cache, and why the rest is not. The body is that
        of a chat (`messages`) or of a completion (one `prompt`); of its other fields those that do
        not change the prompt are checked and change nothing. Nothing is computed or stored. Told
        are only texts that the caller's own tenant has sent."""
        asked = await _asked(edge, http)
        # Now, not before the body: meanwhile the tenants may have been reloaded.
        caller = edge.access.caller(credentials(http.headers)).salted(asked.cache_salt)
        return answer(await _explain(edge, asked, caller))

    return routes


def cache_admin_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/admin", tags=["administration"])

    @routes.post("/cache/explain", openapi_extra=ASKED_FOR)
    async def explain(http: Request) -> Response:
        """What `/v1/cache/explain` tells the tenant that `?tenant=` names, and where else the
        prompt is: `apart` has, by tenants that share pages, how many of its tokens are stored for
        them. The tenant never finds those, and is not told of them."""
        asked = await _asked(edge, http)
        caller = _named(edge, http.query_params.get("tenant", ""))
        sharing = edge.access.sharing()
        others = [salt for salt in sharing if salt != caller.salt][:MOST_SALTS]
        told = await _explain(edge, asked, caller.salted(asked.cache_salt), others)
        apart = [
            {"tenants": sharing[salt], "tokens": tokens} for salt, tokens in told.get("apart", ())
        ]
        most = max((entry["tokens"] for entry in apart), default=0)
        if most > told["matched_tokens"] and told["miss"]["reason"] == "first_time":
            told["miss"].update(reason="salted_apart", message=OF_OTHERS.format(most))
        return answer({**told, "tenant": caller.tenant, "salts_asked": len(others), "apart": apart})

    @routes.get("/cache")
    async def cache() -> Response:
        """The tree of cached prompts in runs, pages without a branch between them: sizes, tiers,
        hits, ages, tenants and how their text begins; the latest used and the largest 200."""
        told = await edge.service.inspect("cache")
        runs = [_run(run, edge.tokenizer) for run in told["runs"]]
        pins = await edge.service.inspect("pins")
        shared = [_shared(prefix, pins) for prefix in edge.service.prefixes.shared()]
        return answer({**told, "shared_prefixes": shared, "runs": runs})

    return routes


class ToExplain(NamedTuple):
    """A prompt to explain, and the name of the model that it is for."""

    model: str
    ids: list[int]
    cache_salt: str | None


async def _asked(edge: Edge, http: Request) -> ToExplain:
    body = await _body(edge, http)
    model = edge.model_name(body.model)
    edge.service.check_open()
    return ToExplain(model, await _ids(edge, body, edge.encoder(http)), body.cache_salt)


async def _explain(
    edge: Edge, asked: ToExplain, caller: Caller, others: Sequence[str] = ()
) -> Told:
    """Why a prompt of a caller is not found; `others`: salts to look for it, too."""
    ids, size, prefixes = asked.ids, edge.service.spec.page_size, edge.service.prefixes
    keys: list[bytes] = []
    chain = (keys, ids, caller.salt, size, len(ids), prefixes.shared_keys)
    if len(ids) <= INLINE_TOKENS:
        extend_keys(*chain)
    else:
        await asyncio.to_thread(extend_keys, *chain)
    about = (caller.tenant, caller.salt, keys, ids, *([list(others)] if others else ()))
    told = await edge.service.inspect("prompt", about=about)
    miss = _miss(told["miss"], ids, edge.tokenizer)
    shared = prefixes.name_of(keys) if told["shared_tokens"] else None
    return {"model": asked.model, **told, "shared_prefix": shared, "miss": miss}


def _named(edge: Edge, tenant: str) -> Caller:
    caller = edge.access.caller_named(tenant)
    if caller is None:
        raise InvalidRequest(
            f"?tenant= names no tenant that has a key: {tenant!r}.", param="tenant"
        )
    return caller


async def _body(edge: Edge, http: Request) -> ChatRequest | CompletionRequest:
    raw = await parse.read_object(http, edge.server.max_body_bytes)
    given = [name for name in ("messages", "prompt") if raw.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    if given == ["messages"]:
        return parse.to_model(ChatRequest, raw, edge.server.unknown_fields)
    return parse.to_model(CompletionRequest, raw, edge.server.unknown_fields)


async def _ids(
    edge: Edge, body: ChatRequest | CompletionRequest, encoder: TextEncoder
) -> list[int]:
    """The token ids of the one prompt. Raises `InvalidRequest` and its kind."""
    spec = edge.service.spec
    limit = spec.max_model_len
    if isinstance(body, ChatRequest):
        ids, _ = await chat_prompt(body, encoder, edge.dialect, limit)
        field = "messages"
    else:
        (ids,) = await completion_prompts(body, encoder, spec.vocab_size, 1, limit)
        field = "prompt"
    if len(ids) >= limit:
        raise ContextTooLong(
            f"The prompt has {len(ids)} tokens; prompt and answer together may have {limit}.",
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


def _shared(prefix: Prefix, pins: dict[str, Told]) -> Told:
    pinned = pins.get(prefix.request.id, {})
    return {
        "name": prefix.name,
        "status": prefix.status,
        "error": prefix.error,
        "tokens": len(prefix.request.prompt_ids),
        "hits": pinned.get("hits"),
        "last_hit_s_ago": pinned.get("last_hit_age_s"),
    }
