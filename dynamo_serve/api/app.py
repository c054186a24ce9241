"""The HTTP application, put together from the parts it is handed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer

from dynamo_serve import __version__
from dynamo_serve.api.admin import admin_routes
from dynamo_serve.api.auth import Access, credentials
from dynamo_serve.api.cache import cache_admin_routes, cache_routes
from dynamo_serve.api.console import console_routes
from dynamo_serve.api.edge import Edge, Metrics
from dynamo_serve.api.embeddings import embedding_routes
from dynamo_serve.api.encoding import LongTexts
from dynamo_serve.api.faults import add_fault_handlers
from dynamo_serve.api.grammar import Compilers
from dynamo_serve.api.lookup import Lookup
from dynamo_serve.api.marks import Streams
from dynamo_serve.api.messages import messages_routes
from dynamo_serve.api.middleware import HEADER, Head, RequestId
from dynamo_serve.api.openai import openai_routes
from dynamo_serve.api.openapi import document
from dynamo_serve.api.ops import open_routes, server_routes, token_routes
from dynamo_serve.api.prefixes import prefix_routes
from dynamo_serve.api.rendering import rendering_routes
from dynamo_serve.api.requests import request_routes
from dynamo_serve.api.rerank import rerank_routes
from dynamo_serve.api.responses import responses_routes
from dynamo_serve.api.responses_store import ResponseStore
from dynamo_serve.api.streams import stream_routes
from dynamo_serve.config import Config
from dynamo_serve.service import Service
from dynamo_serve.text.dialect import Dialect
from dynamo_serve.text.tokenizer import Tokenizer

DESCRIPTION = (
    "OpenAI-compatible. A field that would change the answer and is not supported is refused by "
    "name; so is an unknown one."
)
BEARER = HTTPBearer(auto_error=False)  # for the document; `Access` decides


def create_app(
    service: Service,
    tokenizer: Tokenizer,
    config: Config,
    metrics: Metrics,
    access: Access,
    *,
    model_names: Sequence[str],
    dialect: Dialect,
    recording: Callable[[], Mapping[str, Any]] = dict,
) -> FastAPI:
    """The app for a started (or starting) service. It does not start or close the service."""
    assert model_names, "a model needs a name"
    # No browser pages for the document: FastAPI's load their scripts from the internet.
    app = FastAPI(
        title="dynamo_serve",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
    )
    names, started = tuple(model_names), int(time.time())
    delay = config.scheduler.max_queue_delay_ms / 1000
    lookup, streams = Lookup(service), Streams(service)
    compilers = Compilers(config.structured, service, tokenizer)
    parts = (service, tokenizer, config.server, access, lookup, streams, compilers, LongTexts())
    edge = Edge(*parts, names, started, delay, recording, dialect)
    _add_routes(app, edge, config, metrics)
    add_fault_handlers(app)
    if config.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )
    app.add_middleware(RequestId, log_requests=config.log.requests)
    app.state.streams = streams  # which a hand-over moves to the next server
    app.openapi = cache(lambda: document(app))  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, edge: Edge, config: Config, metrics: Metrics) -> None:
    """Every endpoint behind the door that it belongs to: none, a tenant's key, an admin key."""

    async def authorize(http: Request, _: Annotated[object, Depends(BEARER)]) -> None:
        http.state.caller = edge.access.caller(credentials(http.headers))

    async def authorize_admin(http: Request, _: Annotated[object, Depends(BEARER)]) -> None:
        edge.access.check_admin(http.headers.get("authorization"))

    app.add_middleware(Head)
    app.include_router(open_routes(edge, metrics))
    app.include_router(console_routes(edge))
    for routes in (openai_routes, messages_routes, stream_routes, token_routes, cache_routes):
        app.include_router(routes(edge), dependencies=[Depends(authorize)])
    for routes in (embedding_routes, rerank_routes, request_routes, rendering_routes):
        app.include_router(routes(edge), dependencies=[Depends(authorize)])
    app.include_router(prefix_routes(edge, config.cache), dependencies=[Depends(authorize)])
    kept = ResponseStore(config.responses)
    app.include_router(responses_routes(edge, kept), dependencies=[Depends(authorize)])
    app.include_router(server_routes(edge, config), dependencies=[Depends(authorize)])
    for routes in (admin_routes, cache_admin_routes):
        app.include_router(routes(edge), dependencies=[Depends(authorize_admin)])
