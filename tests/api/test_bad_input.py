"""Every fault of a client gets a 4xx that names it, and harms nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message

from dynamo_serve.errors import Unavailable
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import app_of, config, serving
from tests.api.stub import StubService, hangs, says
from tests.patience import PATIENCE_S

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture
def http(url: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        yield client


def user(content: object = "hello", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


def fault(answer: httpx.Response) -> dict[str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error  # type: ignore[no-any-return]


# (path, body, param, a part of the message)
TABLE: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "list"),
    (CHAT, {"messages": ["hi"]}, "messages[0]", "an object"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", "required"),
    (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "'assistant'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    (CHAT, user(3), "messages[0].content", "string"),
    (CHAT, user([{"type": "text", "text": 1}]), "messages[0].content[0].text", "string"),
    (CHAT, user([{"type": "text"}]), "messages[0].content[0].text", "required"),
    (CHAT, user([{"text": "a"}]), "messages[0].content[0].type", "required"),
    (CHAT, user([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", "image"),
    (
        CHAT,
        user([{"type": "text", "text": "a", "cache_control": {}}]),
        "messages[0].content[0].cache_control",
        "not supported",
    ),
    (CHAT, user(mood="bad"), "messages[0].mood", "Unknown"),
    (CHAT, user(function_call={}), "messages[0].function_call", "not supported"),
    (CHAT, {"messages": [{"role": "function", "content": ""}]}, "messages[0].role", "use 'tool'"),
    (CHAT, user("refuse me"), "messages", "no such talk"),
    (CHAT, user("hello " * 300), "messages", "together may have 256"),
    (CHAT, {**user(), "max_tokens": 256}, "messages", "max_tokens is 256"),
    (CHAT, {**user(), "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    (CHAT, {**user(), "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradict"),
    (CHAT, {**user(), "min_tokens": 5, "max_tokens": 3}, "min_tokens", "more than the 3"),
    (CHAT, {**user(), "temperature": 3}, "temperature", "less than or equal to 2"),
    (CHAT, {**user(), "temperature": "hot"}, "temperature", '"hot"'),
    (CHAT, {**user(), "temperature": True}, "temperature", "true"),
    (CHAT, {**user(), "top_p": 0}, "top_p", "greater than 0"),
    (CHAT, {**user(), "top_k": -2}, "top_k", "-1"),
    (CHAT, {**user(), "top_k": 2**63}, "top_k", "less than"),
    (CHAT, {**user(), "min_p": 1.5}, "min_p", "1"),
    (CHAT, {**user(), "repetition_penalty": 0}, "repetition_penalty", "0"),
    (CHAT, {**user(), "repetition_penalty": 5e-324}, "repetition_penalty", "equal to 0.01"),
    (CHAT, {**user(), "presence_penalty": 2.5}, "presence_penalty", "2"),
    (CHAT, {**user(), "frequency_penalty": -3}, "frequency_penalty", "-2"),
    (CHAT, {**user(), "seed": 2**63}, "seed", "less than"),
    (CHAT, {**user(), "seed": 1.5}, "seed", "integer"),
    (CHAT, {**user(), "n": 0}, "n", "1"),
    (CHAT, {"messages": [{"role": "user"}] * 10_001}, "messages", "at most 10000"),
    (CHAT, user([{"type": "text", "text": ""}] * 1025), "messages[0].content", "at most 1024"),
    (CHAT, user(name="x" * 257), "messages[0].name", "at most 256"),
    (
        CHAT,
        {**user(), "chat_template_kwargs": {str(i): i for i in range(65)}},
        "chat_template_kwargs",
        "at most 64",
    ),
    (
        CHAT,
        {**user(), "chat_template_kwargs": {"a": [[1] * 600, {str(i): i for i in range(600)}]}},
        "chat_template_kwargs",
        "more than 1024 values",
    ),
    (CHAT, {**user(), "n": 2**63}, "n", "less than"),
    (CHAT, {**user(), "n": 10**400}, "n", "a number of length 401"),
    (CHAT, {**user(), "max_tokens": 2**63}, "max_tokens", "less than"),
    (CHAT, {**user(), "min_tokens": 2**63}, "min_tokens", "less than"),
    (CHAT, {**user(), "stop_token_ids": [10**400]}, "stop_token_ids[0]", "out of range"),
    (CHAT, {**user(), "n": 17}, "n", "the limit is 16"),
    (CHAT, {**user(), "stop": ""}, "stop", "at least 1"),
    (CHAT, {**user(), "stop": ["a"] * 17}, "stop", "at most 16"),
    (CHAT, {**user(), "stop": ["a", "b" * 257]}, "stop[1]", "at most 256"),
    (CHAT, {**user(), "stop": 5}, "stop", "string"),
    (CHAT, {**user(), "stop_token_ids": [-1]}, "stop_token_ids[0]", "out of range"),
    (CHAT, {**user(), "stop_token_ids": [5, 10**9]}, "stop_token_ids[1]", "out of range"),
    (CHAT, {**user(), "logit_bias": {"100000": 1}}, "logit_bias", "100000"),
    (CHAT, {**user(), "logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    (CHAT, {**user(), "logit_bias": {"9" * 5000: 1}}, "logit_bias", "999"),
    (CHAT, {**user(), "logit_bias": {"05": 1}}, "logit_bias", "'05'"),
    (CHAT, {**user(), "logit_bias": {"٥": 1}}, "logit_bias", "'٥'"),
    (CHAT, {**user(), "logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    (CHAT, {**user(), "logit_bias": [1]}, "logit_bias", "an object"),
    (CHAT, {**user(), "top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
    (CHAT, {**user(), "logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    (CHAT, {**user(), "logprobs": 3}, "logprobs", "boolean"),
    (CHAT, {**user(), "stream": "yes"}, "stream", "boolean"),
    (CHAT, {**user(), "stream_options": {"include_usage": True}}, "stream_options", "stream"),
    (
        CHAT,
        {**user(), "stream": True, "stream_options": {"colour": 1}},
        "stream_options.colour",
        "Unknown",
    ),
    (CHAT, {**user(), "stream": True, "stream_options": 7}, "stream_options", "an object"),
    (CHAT, {**user(), "wisdom": 1}, "wisdom", "Unknown field"),
    (CHAT, {**user(), "functions": [{}]}, "functions", "not supported"),
    (CHAT, {**user(), "response_format": {"type": "json_object"}}, "response_format", "not supp"),
    (CHAT, {**user(), "reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (CHAT, {**user(), "modalities": ["audio"]}, "modalities", "not supported"),
    (CHAT, {**user(), "best_of": 2}, "best_of", "not supported"),
    (CHAT, {**user(), "guided_json": {}}, "guided_json", "not supported"),
    (
        CHAT,
        {**user(), "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs.tokenize",
        "set by the server",
    ),
    (TEXT, {}, "prompt", "required"),
    (TEXT, {"prompt": 5}, "prompt", "string"),
    (TEXT, {"prompt": []}, "prompt", "at least 1"),
    (TEXT, {"prompt": [[]]}, "prompt[0]", "at least 1"),
    (TEXT, {"prompt": ["a", 5]}, "prompt[1]", "string"),
    (TEXT, {"prompt": [5, "a"]}, "prompt[1]", "integer"),
    (TEXT, {"prompt": [5, 10**6]}, "prompt[1]", "out of range"),
    (TEXT, {"prompt": [[5], [-3]]}, "prompt[1][0]", "out of range"),
    (TEXT, {"prompt": [[5], ["a"]]}, "prompt[1][0]", "integer"),
    (TEXT, {"prompt": ["a"] * 17}, "prompt", "the limit is 16"),
    (TEXT, {"prompt": ["a"] * 9, "n": 2}, "n", "the limit is 16"),
    (TEXT, {"prompt": [5] * 250}, "prompt", "250 tokens and max_tokens is 16"),
    (TEXT, {"prompt": "a", "echo": 1}, "echo", "boolean"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
    (TEXT, {"prompt": "a", "messages": []}, "messages", "Unknown"),
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": ""}]}, "prompt", "eith"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "goes"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]", "out of range"),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "integer"),
]


@pytest.mark.parametrize(("path", "body", "param", "part"), TABLE)
def test_a_bad_field_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, part: str
) -> None:
    answer = http.post(path, json=body)
    error = fault(answer)
    assert answer.status_code == 400
    assert error["param"] == param
    assert part in (error["message"] or "")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b"null", "not null"),
        (b'"\xff"', "not UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": ""}]}', "finite"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"prompt": ["a", "\\ud83d"]}', "prompt[1]"),
        (b'{"metadata": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper than 64"),
        (b"[" * 60_000, "nested deeper than 64"),
        (b"[" * 90_000, "too many parts: at most 65536 objects"),
        (b'{"a":' * 20_000, "nested deeper than 64"),
    ],
)
def test_a_bad_body_is_named(http: httpx.Client, raw: bytes, part: str) -> None:
    answer = http.post(CHAT, content=raw, headers=JSON)
    assert answer.status_code == 400
    assert part in (fault(answer)["message"] or "")


def test_other_content_types_are_refused(http: httpx.Client) -> None:
    answer = http.post(CHAT, content=json.dumps(user()))
    assert answer.status_code == 400
    assert "Content-Type: application/json" in (fault(answer)["message"] or "")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/nowhere", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
def test_wrong_addresses_are_openai_shaped_too(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert fault(answer)["code"] == code


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/completion", TEXT),
        ("/v1/embedding", "/v1/embeddings"),
        ("/v1/tokenize", "/tokenize"),
        ("/healthz", "/health"),
        ("/v1/score", None),
        ("/admin", None),
        ("/", None),
        ("/a" * 4000, None),
    ],
)
def test_an_address_that_is_nearly_right_is_told(
    http: httpx.Client, path: str, meant: str | None
) -> None:
    message = fault(http.post(path, json={}))["message"] or ""
    assert message.endswith("/openapi.json lists what there is.")
    assert (f"did you mean {meant}?" in message) if meant else ("mean" not in message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({**user(), "temprature": 1}, "Unknown field 'temprature'. Did you mean 'temperature'?"),
        ({**user(), "bananas": 1}, "Unknown field 'bananas'."),
        (
            {**user(), "stream": True, "stream_options": {"include_usge": True}},
            "Unknown field 'stream_options.include_usge'. "
            "Did you mean 'stream_options.include_usage'?",
        ),
        ({**user(), "stop": ["a"] * 17}, "'stop': list should have at most 16 items, not 17."),
        ({"messages": []}, "'messages' is empty; at least 1 item is needed."),
    ],
)
def test_a_fault_says_what_was_probably_meant(
    http: httpx.Client, body: dict[str, object], message: str
) -> None:
    assert fault(http.post(CHAT, json=body))["message"] == message


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_model_that_is_not_served_is_not_found(http: httpx.Client, path: str) -> None:
    rest: dict[str, dict[str, object]] = {
        CHAT: user(),
        TEXT: {"prompt": "a"},
        "/tokenize": {"prompt": "a"},
    }
    body = {"model": "gpt-17", **rest.get(path, {"tokens": [5]})}
    answer = http.post(path, json=body)
    assert answer.status_code == 404
    assert fault(answer)["param"] == "model"
    assert "'tiny'" in (fault(answer)["message"] or "")


def test_null_means_not_given(http: httpx.Client) -> None:
    body = {**user(), "max_tokens": 2, "temperature": None, "tools": None, "stop": None, "n": None}
    assert http.post(CHAT, json=body).status_code == 200


def test_a_body_that_says_it_is_too_large_is_not_read(http: httpx.Client) -> None:
    answer = http.post(CHAT, content=b" " * 10_000_000, headers=JSON)
    assert answer.status_code == 413
    assert fault(answer)["code"] == "payload_too_large"
    assert "200000 bytes" in (fault(answer)["message"] or "")
    assert http.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_body_without_length_is_cut_off_on_the_way(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 50_000

    answer = http.post(CHAT, content=endless(), headers=JSON)
    assert answer.status_code == 413


@pytest.mark.parametrize(("declared", "expected"), [(None, 11), (b"10001", 0), (b"10000", 11)])
def test_no_more_of_a_body_is_read_than_the_limit(
    tokenizer: Tokenizer, declared: bytes | None, expected: int
) -> None:
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def call() -> int:
        app = app_of(StubService(hangs), tokenizer, config(max_body_bytes=10_000))
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                *([(b"content-length", declared)] if declared else []),
            ],
        }
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(call()) == 413
    assert num_read == expected


@pytest.fixture
def guarded(tokenizer: Tokenizer) -> Generator[httpx.Client]:
    """A server that wants a key and lets one origin in."""
    settings = config(api_keys=("sésame", "other"), cors_origins=("https://a.example",))
    service = StubService(says(tokenizer, "hi"))
    with serving(service, tokenizer, settings) as base, httpx.Client(base_url=base) as client:
        yield client


@pytest.mark.parametrize("header", [None, "sésame", "Basic other", "Bearer", "Bearer nope"])
def test_a_wrong_key_is_turned_away_before_the_body_is_read(
    guarded: httpx.Client, header: str | None
) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    answer = guarded.post(CHAT, content=b"{", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert fault(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["sésame", "other"])
def test_every_key_opens(guarded: httpx.Client, key: str) -> None:
    headers = {b"Authorization": f"Bearer {key}".encode()}
    assert guarded.post(CHAT, json=user(), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/server"])
def test_what_tells_about_the_server_needs_a_key(guarded: httpx.Client, path: str) -> None:
    assert guarded.get(path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(guarded: httpx.Client, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_browsers_may_call_from_the_configured_origin_only(guarded: httpx.Client) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Origin": "https://a.example"}
    assert guarded.options(CHAT, headers=asks).status_code == 200
    other = guarded.options(CHAT, headers={**asks, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_server_that_is_not_ready_says_when_to_come_back(
    stubbed: Stubbed, tokenizer: Tokenizer
) -> None:
    service, base = stubbed(says(tokenizer, "hi"))
    service.refusal = Unavailable("the server is starting", retry_after=1.2)
    for path in ("/ready", "/v1/server"):
        answer = httpx.get(base + path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    answer = httpx.post(base + CHAT, json=user())
    assert (answer.status_code, fault(answer)["code"]) == (503, "unavailable")
    assert httpx.get(f"{base}/health").status_code == 200


def test_an_unknown_field_can_be_a_warning(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(unknown_fields="warn")
    with serving(StubService(says(tokenizer, "hi")), tokenizer, settings) as base:
        answer = httpx.post(base + CHAT, json={**user(), "wisdom": 1})
        refused = httpx.post(base + CHAT, json={**user(), "functions": [{}]})
    assert answer.status_code == 200
    assert refused.status_code == 400
    assert "unknown request field 'wisdom' ignored" in caplog.text


def test_a_bug_is_a_500_that_tells_nothing(stubbed: Stubbed) -> None:
    async def script(request: object) -> AsyncGenerator[Any, None]:
        raise ZeroDivisionError("secret")
        yield

    _, base = stubbed(script)
    answer = httpx.post(base + CHAT, json=user())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert fault(answer)["code"] == "internal_error"
