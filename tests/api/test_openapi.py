"""The OpenAPI document as a source of bodies, good and bad: nothing may hurt the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_params
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from dynamo_serve.api import bodies, fields, fields_vectors, schema, schema_vectors
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import app_of, config
from tests.api.stub import StubService, hangs
from tests.patience import PATIENCE_S

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
# Enough to see many tokens, not so many that the test takes minutes.
CALM = {"max_tokens": 8, "max_completion_tokens": None, "n": 2, "min_tokens": 0}


class Bodies:
    """Strategies from the schemas of an OpenAPI document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]

    def of(self, node: dict[str, Any]) -> st.SearchStrategy[Any]:
        if "$ref" in node:
            return self.of(self._schemas[node["$ref"].rsplit("/", 1)[1]])
        if options := node.get("anyOf", node.get("oneOf")):
            return st.one_of([self.of(option) for option in options])
        if "enum" in node:
            return st.sampled_from(node["enum"])
        kinds: dict[str, Callable[[dict[str, Any]], st.SearchStrategy[Any]]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda node: st.booleans(),
            "null": lambda node: st.none(),
        }
        return kinds[node["type"]](node) if "type" in node else JSON_VALUES

    def _array(self, node: dict[str, Any]) -> st.SearchStrategy[Any]:
        low, high = node.get("minItems", 0), min(node.get("maxItems", 4), 4)
        return st.lists(self.of(node.get("items", {})), min_size=low, max_size=high)

    def _string(self, node: dict[str, Any]) -> st.SearchStrategy[Any]:
        low, high = node.get("minLength", 0), min(node.get("maxLength", 30), 30)
        return st.text(min_size=low, max_size=high)

    def _integer(self, node: dict[str, Any]) -> st.SearchStrategy[Any]:
        high = node.get("maximum", node.get("exclusiveMaximum", 301) - 1)
        return st.integers(node.get("minimum", -5), high)

    def _number(self, node: dict[str, Any]) -> st.SearchStrategy[Any]:
        low = node.get("minimum", node.get("exclusiveMinimum", -100))
        open_below = "exclusiveMinimum" in node
        return st.floats(low, node.get("maximum", 100), exclude_min=open_below)

    def _object(self, node: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        properties = {name: self.of(part) for name, part in node.get("properties", {}).items()}
        if not properties:
            inner = node.get("additionalProperties")
            values = self.of(inner) if isinstance(inner, dict) else JSON_VALUES
            return st.dictionaries(st.text(max_size=6), values, max_size=3)
        required = {name: properties.pop(name) for name in node.get("required", [])}
        return st.fixed_dictionaries(required, optional=properties)


@pytest.fixture(scope="session")
def document(tokenizer: Tokenizer) -> dict[str, Any]:
    return app_of(StubService(hangs), tokenizer, config()).openapi()


@pytest.fixture(scope="module")
def http(url: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        yield client


MODELS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": schema.ChatRequest,
    "/v1/completions": schema.CompletionRequest,
    "/tokenize": schema.TokenizeRequest,
    "/detokenize": schema.DetokenizeRequest,
    "/v1/embeddings": schema_vectors.EmbeddingRequest,
    "/v1/rerank": schema_vectors.RerankRequest,
}


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": f"#/components/schemas/{MODELS[path].__name__}"}
    return dict(document["components"]["schemas"][MODELS[path].__name__])


def check(answer: httpx.Response) -> None:
    assert 200 <= answer.status_code < 300 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert not any("error" in json.loads(e.partition("data: ")[2]) for e in events[:-2])
    else:
        assert "error" not in answer.json()


def post(http: httpx.Client, path: str, body: object) -> httpx.Response:
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    return http.post(path, content=raw, headers={"content-type": "application/json"})


def a_good_request_still_works(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("path", MODELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_harms_the_server(
    http: httpx.Client, document: dict[str, Any], path: str, data: st.DataObject
) -> None:
    bodies = Bodies(document)
    body = data.draw(bodies.of(body_schema(document, path)))
    body = {k: CALM.get(k, v) for k, v in body.items()}
    if path in FREE:
        body["max_tokens"] = 8
    elif "deadline_ms" in body:  # past it there is no part of an answer to send, but a 504
        body["deadline_ms"] = 60_000
    spoiled = data.draw(
        st.lists(st.sampled_from(sorted(body)), max_size=1) if body else st.just([])
    )
    for name in spoiled:
        body[name] = data.draw(JSON_VALUES)
    body |= data.draw(st.just({}) | st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=1))
    check(post(http, path, body))
    a_good_request_still_works(http)


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant"]),
            "content": st.text(max_size=10)
            | st.lists(st.just({"type": "text", "text": "hello"}), max_size=2),
        },
        optional={"name": st.text(max_size=5), "refusal": st.none()},
    ),
    min_size=1,
    max_size=3,
)
FREE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": st.text(min_size=1, max_size=9)},
}
# Bounded by the model, by other fields or by the template, and not by the schema.
BOUND = {
    *("model", "stop_token_ids", "logit_bias", "chat_template_kwargs", "max_completion_tokens"),
    *("tools", "tool_choice", "reasoning_effort", "thinking_token_budget"),
    *("response_format", "structured_outputs"),
}
USAGE = {"stream": st.just(True), "stream_options": st.just({"include_usage": True})}


@pytest.mark.parametrize("path", FREE)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_supported_fields_within_bounds_are_taken(
    http: httpx.Client, document: dict[str, Any], path: str, data: st.DataObject
) -> None:
    node = body_schema(document, path)
    supported = set(MODELS[path].model_fields) - BOUND - set(USAGE)
    node["properties"] = {k: v for k, v in node["properties"].items() if k in supported}
    body = data.draw(Bodies(document).of(node))
    body = {k: CALM.get(k, v) for k, v in body.items()} | {"max_tokens": 8}
    body |= data.draw(st.fixed_dictionaries(FREE[path]))
    body |= data.draw(st.just({}) | st.fixed_dictionaries(USAGE))
    if "stream" in body:
        body.pop("prompt_logprobs", None)
    if "top_logprobs" in body:
        body["logprobs"] = True
    if "deadline_ms" in body:  # one that cannot be kept is refused, with a 503
        body["deadline_ms"] = 60_000
    answer = post(http, path, body)
    assert answer.status_code == 200, answer.text
    check(answer)


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
EARLIER = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "tool", "tool_call_id": "a", "content": "18"},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["none", "two"])
@pytest.mark.parametrize("choice", ["auto", "none", None])
@pytest.mark.parametrize("is_stream", [False, True])
def test_tools_within_bounds_are_taken(
    http: httpx.Client, tools: list[Any], choice: str | None, is_stream: bool
) -> None:
    body = {"messages": EARLIER, "tools": tools, "tool_choice": choice, "stream": is_stream}
    more = {"logprobs": True, "n": 2, "parallel_tool_calls": not is_stream, "max_tokens": 8}
    answer = post(http, "/v1/chat/completions", {**body, **more})
    assert answer.status_code == 200, answer.text
    check(answer)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=60) | JSON_VALUES.map(lambda v: json.dumps(v).encode()))
def test_no_bytes_harm_the_server(http: httpx.Client, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = http.post("/v1/chat/completions", content=raw, headers=headers)
    assert answer.status_code == 400
    check(answer)


def test_every_field_of_the_official_client_is_in_the_table() -> None:
    chat = set(chat_params.CompletionCreateParamsStreaming.__annotations__)
    text = set(completion_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert chat <= set(schema.ChatRequest.model_fields) | set(fields.CHAT)
    assert text <= set(schema.CompletionRequest.model_fields) | set(fields.COMPLETION)
    embeddings = set(embedding_create_params.EmbeddingCreateParams.__annotations__)
    ours = set(schema_vectors.EmbeddingRequest.model_fields) | set(fields_vectors.EMBEDDING)
    assert embeddings <= ours


@pytest.mark.parametrize("model", bodies.KNOWN)
def test_no_field_is_in_the_table_twice(model: type[BaseModel]) -> None:
    assert not set(model.model_fields) & set(bodies.KNOWN[model])
    rows = fields.field_rows(model, bodies.KNOWN[model])
    assert all(status in ("supported", "bookkeeping", "refused") for _, status, _ in rows)
    assert all(remark for _, _, remark in rows)


def test_the_document_describes_every_field_and_every_error(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["temperature"]["description"]
    assert properties["functions"]["description"].startswith("refused")
    assert properties["user"]["description"].startswith("bookkeeping")
    assert set(document["paths"]) >= {*MODELS, "/health", "/ready", "/metrics", "/v1/server"}
