"""Prefixes that a tenant wants to stay in the KV pool: pin, look at, and give up."""

from __future__ import annotations

import secrets
import time
from math import inf
from typing import Any

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.auth import credentials
from dynamo_serve.api.capable import check_generates
from dynamo_serve.api.edge import Edge
from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.hang_up import hang_up, until_hang_up
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import check_ids, render_messages
from dynamo_serve.api.render import answer
from dynamo_serve.api.schema import PrefixRequest
from dynamo_serve.api.tools import check_tools, for_template
from dynamo_serve.config import CacheSection
from dynamo_serve.core import request as core
from dynamo_serve.errors import InvalidRequest, Unavailable, UnsupportedField
from dynamo_serve.prefixes import Prefix


def prefix_routes(edge: Edge, cache: CacheSection) -> APIRouter:
    routes = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])

    @routes.post("", openapi_extra=takes(PrefixRequest))
    async def pin(http: Request) -> Response:
        """Compute the beginning of prompts to come, and keep its full pages until `ttl_s` is over
        or it is deleted. Answers when it is computed; refused like any request, and when its
        tenant, all tenants together or the pool have no room for it (429, reason `pins`)."""
        if not cache.prefix_sharing:
            raise UnsupportedField("Nothing can be pinned here: cache.prefix_sharing is off.")
        body = await edge.body(http, PrefixRequest)
        edge.model_name(body.model)
        edge.service.check_open()
        check_generates(edge.service.spec)
        _check_time(body.ttl_s, cache.pinned_ttl_max_s)
        ids = await _token_ids(edge, body, edge.encoder(http))
        request = _request(edge, http, ids, body)
        pinning = edge.service.prefixes.pin(request, body.name, body.ttl_s)
        prefix = await until_hang_up(pinning, hang_up(http.receive))
        return answer(_told(edge, prefix, await _known(edge)), 201)

    @routes.get("")
    async def prefixes(http: Request) -> Response:
        """The pinned prefixes of the caller's tenant, and those that all tenants share."""
        tenant, known = http.state.caller.tenant, await _known(edge)
        own = [*edge.service.prefixes.of(tenant), *edge.service.prefixes.shared()]
        return answer({"object": "list", "data": [_told(edge, p, known) for p in own]})

    @routes.get("/{id}")
    async def prefix(http: Request, id: str) -> Response:
        """One of them: its status, tokens, when it expires, and who has found it since the engine
        started."""
        found = edge.service.prefixes.find(http.state.caller.tenant, id)
        return answer(_told(edge, found, await _known(edge)))

    @routes.delete("/{id}")
    async def delete(http: Request, id: str) -> Response:
        """Give it up: its pages may be evicted from now on. What is being computed is cancelled."""
        edge.service.prefixes.delete(http.state.caller.tenant, id)
        return answer({"id": id, "object": "prefix.deleted", "deleted": True})

    return routes


def _check_time(ttl: float, longest: float) -> None:
    if ttl > longest:
        what = f"'ttl_s': the longest time here is {longest:g} seconds (cache.pinned_ttl_max_s)."
        raise InvalidRequest(what, param="ttl_s")


async def _token_ids(edge: Edge, body: PrefixRequest, encoder: TextEncoder) -> list[int]:
    """Raises `InvalidRequest`, also for what does not fill a page."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
    limit = edge.service.spec.max_model_len
    if body.messages is not None:
        check_tools(body.tools, edge.dialect)
        messages, arguments = body.messages, body.chat_template_kwargs
        shown = for_template(body.tools)
        text = await render_messages(
            messages, edge.tokenizer, arguments, add_generation_prompt=False, tools=shown
        )
        ids = await encoder.prompt_ids(text, limit, "messages")
    elif body.chat_template_kwargs or body.tools:
        name = "chat_template_kwargs" if body.chat_template_kwargs else "tools"
        raise InvalidRequest(f"'{name}' goes with messages, not with a prompt.", param=name)
    elif isinstance(body.prompt, str):
        ids = await encoder.prompt_ids(body.prompt, limit, "prompt", add_special_tokens=True)
    else:
        ids = body.prompt or []
        check_ids(ids, edge.service.spec.vocab_size, "prompt")
    size = edge.service.spec.page_size
    if len(ids) < size:
        raise InvalidRequest(
            f"The prefix has {len(ids)} tokens; only full pages of {size} can be pinned.",
            param="prompt" if body.messages is None else "messages",
        )
    return ids


def _request(edge: Edge, http: Request, ids: list[int], body: PrefixRequest) -> core.Request:
    # Asked again: between the headers and the end of the body the tenants may have been reloaded.
    caller = edge.access.caller(credentials(http.headers)).salted(body.cache_salt)
    now = time.monotonic()
    return core.Request(
        id=f"prefix-{secrets.token_hex(12)}",
        prompt_ids=tuple(ids),
        max_tokens=1,
        sampling=core.Sampling(temperature=0.0),
        tenant=caller.tenant,
        salt=caller.salt,
        arrival=now,
        deadline=now + edge.access.tenancy.class_of(caller.tenant).deadline,
        has_class_deadline=True,
        pinned_until=now + body.ttl_s,
    )


async def _known(edge: Edge) -> dict[str, dict[str, Any]]:
    """What the engine says of the pins whose pages it holds; nothing while there is none."""
    try:
        known: dict[str, dict[str, Any]] = await edge.service.inspect("pins")
    except Unavailable:
        return {}
    return known


def _told(edge: Edge, prefix: Prefix, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    request, size = prefix.request, edge.service.spec.page_size
    held = known.get(request.id, {})
    # Of a shared one they would tell what other tenants do.
    seen = {} if prefix.is_shared else held
    age = seen.get("last_hit_age_s")
    pages = len(request.prompt_ids) // size
    return {
        "id": request.id,
        "object": "prefix",
        "name": prefix.name,
        "shared": prefix.is_shared,
        "status": prefix.status,
        "error": prefix.error,
        "tokens": len(request.prompt_ids),
        "pinned_tokens": pages * size,
        "pages": pages,
        "cached_tokens": prefix.cached_tokens,
        "created_at": prefix.created_at,
        "expires_at": prefix.expires_at if prefix.expires_at < inf else None,
        "hits": seen.get("hits"),
        "last_hit_at": None if age is None else time.time() - age,
        "tiers": ["device", *held["below"]] if held else [],
    }
