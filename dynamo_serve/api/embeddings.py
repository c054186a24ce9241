"""POST /v1/embeddings: texts to vectors."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.numbers import to_base64, to_json, vector_of
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.prompts import check_ids, prompt_kind
from dynamo_serve.api.schema_vectors import EmbeddingRequest
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
from dynamo_serve.errors import InvalidRequest
from dynamo_serve.text.inputs import Input


def embedding_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/embeddings", openapi_extra=takes(EmbeddingRequest))
    async def embed(http: Request) -> Response:
        """A vector for each input, in order: text, texts, token ids or lists of them. Each input is
        a request of its own to the scheduler and its quotas."""
        body = await edge.body(http, EmbeddingRequest)
        model = edge.model_name(body.model)
        edge.check_open(unread(body, http.state.caller))
        spec = edge.service.spec
        _check(body, spec)
        call = asked(edge, http, body, await _wanted(edge, edge.encoder(http), body, spec), "embd")
        found = await vectors_of(edge, http, call)
        usage = {"prompt_tokens": call.num_tokens, "total_tokens": call.num_tokens}
        fields = {"object": "list", "model": model, "usage": usage, "data": ()}
        return await respond(_parts(body, found), fields)

    return routes


def _check(body: EmbeddingRequest, spec: EngineSpec) -> None:
    if not spec.pooling:
        refuse(spec, "embeddings", "serve it with the local engine")
    if spec.pooling == "score":
        refuse(spec, "embeddings", "it is a cross-encoder, for /v1/rerank")
    if body.dimensions is not None and body.dimensions > spec.vector_size:
        raise InvalidRequest(
            f"'dimensions': the model makes {spec.vector_size}, not {body.dimensions}.",
            param="dimensions",
        )


async def _wanted(
    edge: Edge, encoder: TextEncoder, body: EmbeddingRequest, spec: EngineSpec
) -> Wanted:
    texts, id_lists = prompt_kind(body.input)
    count, most = len(texts) + len(id_lists), most_tokens(body, spec)
    check_count(count, "input", edge)
    is_one = isinstance(body.input, str) or isinstance(body.input[0], int)
    paths = ["input"] if is_one else [f"input[{i}]" for i in range(count)]
    for ids, path in zip(id_lists, paths, strict=False):
        check_ids(ids, spec.vocab_size, path)
    made = [Input(ids[:most]) for ids in id_lists] or await inputs(
        encoder, texts, paths, spec, most=most
    )
    return Wanted(made, paths, spec.pooling)


def _parts(body: EmbeddingRequest, found: list[bytes]) -> Iterator[str]:
    write = to_base64 if body.encoding_format == "base64" else to_json
    for i, artifact in enumerate(found):
        vector = vector_of(artifact, body.dimensions, is_unit=body.normalize)
        yield f'{{"object":"embedding","index":{i},"embedding":{write(vector)}}}'
