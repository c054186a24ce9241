"""POST /v1/rerank: which of some documents says most about a query."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.numbers import cosine, ranking, sigmoid, vector_of
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.render import to_json
from dynamo_serve.api.schema_vectors import RerankRequest
from dynamo_serve.api.vectors import (
    Wanted,
    asked,
    check_count,
    inputs,
    most_tokens,
    refuse,
    respond,
    unread,
    vectors_of,
)
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.errors import ContextTooLong, InvalidRequest

SCORE = "score"  # the pooling of cross-encoders


def rerank_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(tags=["rerank"])

    @routes.post("/v2/rerank", openapi_extra=takes(RerankRequest))
    @routes.post("/v1/rerank", openapi_extra=takes(RerankRequest))
    async def rerank(http: Request) -> Response:
        """Documents in the order of their relevance to a query. A cross-encoder reads each with the
        query and scores the pair (0 to 1); other models embed them, and the score is the cosine."""
        body = await edge.body(http, RerankRequest)
        model = edge.model_name(body.model)
        edge.check_open(unread(body, http.state.caller))
        spec = edge.service.spec
        _check(edge, body, spec)
        texts = [d if isinstance(d, str) else d.text for d in body.documents]
        wanted = await _wanted(edge.encoder(http), body, texts, spec)
        call = asked(edge, http, body, wanted, "rerank")
        found = await vectors_of(edge, http, call)
        scores = await asyncio.to_thread(_scores, body, wanted.pooling, found)
        usage = {"prompt_tokens": call.num_tokens, "total_tokens": call.num_tokens}
        fields = {"id": call.id, "model": model, "usage": usage, "results": ()}
        return await respond(_parts(body, texts, scores), fields)

    return routes


def _check(edge: Edge, body: RerankRequest, spec: EngineSpec) -> None:
    if not spec.pooling:
        refuse(spec, "scores or embeddings", "serve it with the local engine")
    if body.raw_scores and spec.pooling != SCORE:
        raise InvalidRequest(
            "'raw_scores' are those of a cross-encoder; of this model a score is a cosine.",
            param="raw_scores",
        )
    check_count(len(body.documents), "documents", edge)


async def _wanted(
    encoder: TextEncoder, body: RerankRequest, texts: list[str], spec: EngineSpec
) -> Wanted:
    """Pairs, or the documents and then the query."""
    paths, most = [f"documents[{i}]" for i in range(len(texts))], most_tokens(body, spec)
    if spec.pooling == SCORE:
        await _check_query(encoder, body.query, spec.max_model_len)
        pairs = await inputs(encoder, texts, paths, spec, before=body.query, most=most)
        return Wanted(pairs, paths, SCORE, beside=" with 'query'")
    paths.append("query")
    made = await inputs(encoder, [*texts, body.query], paths, spec, most=most)
    return Wanted(made, paths, spec.pooling)


async def _check_query(encoder: TextEncoder, query: str, most: int) -> None:
    """Raise `ContextTooLong` for what would be in every pair and does not fit by itself."""
    remedy = f"the model takes {most} with a document. Shorten it."
    await encoder.check_fits(query, most, "'query'", remedy, "query")
    (alone,) = await encoder.inputs([query])
    if len(alone.ids) > most:
        raise ContextTooLong(f"'query' has {len(alone.ids)} tokens, {remedy}", param="query")


def _scores(body: RerankRequest, pooling: str, found: list[bytes]) -> list[float]:
    if pooling != SCORE:
        *documents, query = map(vector_of, found)
        return [cosine(query, document) for document in documents]
    logits = [vector_of(artifact, is_unit=False)[0] for artifact in found]
    return logits if body.raw_scores else [sigmoid(logit) for logit in logits]


def _parts(body: RerankRequest, texts: list[str], scores: list[float]) -> Iterator[str]:
    for i in ranking(scores, body.top_n):
        told = {"index": i, "relevance_score": scores[i]}
        yield to_json(told | ({"document": {"text": texts[i]}} if body.return_documents else {}))
