"""Anthropic's Messages API: what is refused, in which words and in which shape."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_serve.config import Config
from dynamo_serve.errors import Overloaded, QuotaExceeded, Unavailable
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import app_of, config, serving
from tests.api.stub import StubService, begins_and_hangs, hangs, says
from tests.api.talking import HERMES, THINKING, TURNS, talking
from tests.api.test_messages import CLOCK, HELLO, MESSAGES, TOOLS, body, events_of
from tests.api.test_openapi import JSON_VALUES, Bodies
from tests.api.test_tools import says_it

IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
DOCUMENT = {"type": "document", "source": {"type": "text", "data": "x", "media_type": "text/plain"}}
USE = {"type": "tool_use", "id": "a", "name": "clock", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "x"}


def by(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, *HELLO]}


def fault(answer: httpx.Response) -> tuple[str, str, str]:
    """Type, field at fault and message; asserts the shape."""
    told = answer.json()
    assert set(told) == {"type", "error", "request_id"} and told["type"] == "error"
    assert told["request_id"] == answer.headers["request-id"]
    assert set(told["error"]) == {"type", "message", "details"}
    return told["error"]["type"], told["error"]["details"].get("param"), told["error"]["message"]


@pytest.fixture(scope="module")
def base() -> Generator[str]:
    with talking(HERMES, says_it("Hello.")) as (_, base):
        yield base


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": None}, "max_tokens", "required"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [7]}, "messages[0]", "an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'assistant'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "no block"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages[1].role", "new"),
        (by("user", 7), "messages[0].content[0]", "an object"),
        (by("user", {}), "messages[0].content[0].type", "required"),
        (by("user", {"type": 7}), "messages[0].content[0].type", "a string"),
        (by("user", {"type": "text"}), "messages[0].content[0].text", "required"),
        (by("user", IMAGE), "messages[0].content[0].type", "'image' is not supported"),
        (by("user", DOCUMENT), "messages[0].content[0].type", "'document' is not supported"),
        (
            by("assistant", {"type": "redacted_thinking", "data": "x"}),
            "messages[0].content[0].type",
            "'redacted_thinking' is not supported",
        ),
        (
            by("user", {"type": "text", "text": "a", "citations": [1]}),
            "messages[0].content[0].citations",
            "no documents",
        ),
        (by("user", {"type": "text", "text": "a", "x": 1}), "messages[0].content[0].x", "Unknown"),
        (by("user", USE), "messages[0].content[0].type", "not for turns of role 'user'"),
        (by("assistant", RESULT), "messages[0].content[0].type", "not for turns of role"),
        (by("assistant", {**USE, "input": "x"}), "messages[0].content[0].input", "an object"),
        (by("assistant", {**USE, "id": ""}), "messages[0].content[0].id", "at least 1"),
        (
            by("user", {**RESULT, "content": [IMAGE]}),
            "messages[0].content[0].content[0].type",
            "'image' is not supported",
        ),
        ({"system": [IMAGE]}, "system[0].type", "'image' is not supported"),
        ({"system": 7}, "system", "string"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema", "required"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].name", "two tools called 'clock'"),
        ({"tools": [{**CLOCK, "input_schema": []}]}, "tools[0].input_schema", "an object"),
        ({"tools": [{**CLOCK, "input_examples": [{}]}]}, "tools[0].input_examples", "description"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]},
            "tools[0].type",
            "'web_search_20250305' is not supported here, only tools are that the client",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs 'tools'"),
        ({"tool_choice": "auto"}, "tool_choice", "an object"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name", "required"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "auto", "name": "clock"}},
            "tool_choice.name",
            "goes with",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nobody"}},
            "tool_choice.name",
            "none of 'tools'",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "tool_choice", "follows no grammar"),
        ({"tools": [{**CLOCK, "strict": True}]}, "tools[0].strict", "'tools[0].strict'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking", "does not think"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", "'adaptive'"),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 5}},
            "thinking.budget_tokens",
            "'enabled'",
        ),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display", "summar"),
        ({"output_config": {"effort": "low"}}, "output_config.effort", "no variable"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "output_config.format.schema",
            "'output_config.format.schema' is not supported here",
        ),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type", "json"),
        ({"output_format": {"type": "json_schema"}}, "output_format", "output_config.format"),
        ({"stop_sequences": "x"}, "stop_sequences", "list"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "at least 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"speed": "fast"}, "speed", "one speed"),
        ({"container": "x"}, "container", "nothing is run"),
        ({"mcp_servers": [{}]}, "mcp_servers", "by the client"),
        ({"colour": 1}, "colour", "Unknown"),
        ({"class": "nobody"}, "class", "no class"),
    ],
)
def test_what_is_wrong_is_named(
    base: str, fields: dict[str, Any], param: str, message: str
) -> None:
    whole = {k: v for k, v in body(**fields).items() if v is not None}
    answer = httpx.post(base + MESSAGES, json=whole)
    assert answer.status_code == 400, answer.text
    kind, at, told = fault(answer)
    assert (kind, at) == ("invalid_request_error", param)
    assert message in told


def test_thinking_that_cannot_be_turned_off_is_refused() -> None:
    template = TURNS + "{# </think> #}"
    with talking(template, says_it("a")) as (_, base):
        answer = httpx.post(base + MESSAGES, json=body(thinking={"type": "disabled"}))
    _, param, message = fault(answer)
    assert param == "thinking" and "cannot be turned off" in message


def test_a_template_without_tools_refuses_the_block_that_was_sent() -> None:
    with talking(TURNS.replace("tools", "others"), says_it("Hello.")) as (_, base):
        tools = httpx.post(base + MESSAGES, json=body(tools=TOOLS))
        turns = [*HELLO, *by("assistant", USE)["messages"]]
        called = httpx.post(base + MESSAGES, json=body(messages=turns))
    assert fault(tools)[1] == "tools"
    _, param, message = fault(called)
    assert param == "messages[1].content[0]" and "'messages[1].content[0]' is not" in message


def test_more_calls_than_a_message_may_have() -> None:
    calls = {"role": "assistant", "content": [{**USE, "id": str(i)} for i in range(200)]}
    with talking(THINKING, says_it("Hello.")) as (_, base):
        answer = httpx.post(base + MESSAGES, json=body(messages=[*HELLO, calls, *HELLO]))
    assert fault(answer)[1] == "messages[1].content[0]"
    assert "at most 128" in fault(answer)[2]


@pytest.mark.parametrize("quoted", ["reasoning_effort", "tools", "stop", "messages_0"])
def test_what_a_client_wrote_may_look_like_a_field(base: str, quoted: str) -> None:
    fields = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": quoted}}
    _, param, message = fault(httpx.post(base + MESSAGES, json=body(**fields)))
    assert (param, message) == (
        "tool_choice.name",
        f"'tool_choice.name': {quoted!r} is none of 'tools'.",
    )


FACTS: dict[str, Any] = {"retry_after": 2.5, "reason": "full"}
REFUSALS: dict[str, tuple[Any, int, str]] = {
    "quota": (QuotaExceeded("yours", **FACTS), 429, "rate_limit_error"),
    "full": (Overloaded("full", **FACTS), 503, "overloaded_error"),
    "starting": (Unavailable("starting", retry_after=2.5), 503, "overloaded_error"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_who_has_to_wait_is_told_how_long(name: str, stubbed: Stubbed) -> None:
    error, status, kind = REFUSALS[name]
    service, base = stubbed(hangs)
    service.refusal = error
    answer = httpx.post(base + MESSAGES, json=body())
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "3")
    assert fault(answer)[0] == kind
    if name != "starting":
        assert answer.json()["error"]["details"]["retry_after_s"] == 2.5


def test_other_statuses_have_their_types(base: str) -> None:
    unknown = httpx.post(base + MESSAGES, json=body(model="nobody"))
    nowhere = httpx.post(base + MESSAGES + "/batches", json={})
    method = httpx.get(base + MESSAGES)
    large = httpx.post(base + MESSAGES, json=body(system="x" * 50_000_000))
    assert [(a.status_code, fault(a)[0]) for a in (unknown, nowhere, method, large)] == [
        (404, "not_found_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
    ]
    elsewhere = httpx.post(f"{base}/v1/chat/completions", json={}).json()
    assert set(elsewhere["error"]) == {"message", "type", "param", "code"}, "as ever"


def test_a_stream_that_goes_wrong_tells_it_last(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    async def script(request: Any) -> Any:
        async for event in says(tokenizer, "a")(request):
            yield event
            raise Unavailable("the engine is gone")

    _, base = stubbed(script)
    answer = httpx.post(base + MESSAGES, json=body(stream=True, max_tokens=5))
    name, data = events_of(answer.text)[-1]
    assert name == "error"
    assert data["error"]["type"] == "overloaded_error"
    assert data["error"]["message"] == "the engine is gone"
    assert answer.text.count("message_stop") == 0


def test_an_idle_stream_pings(tokenizer: Tokenizer) -> None:
    settings = config(ping_interval_s=0.02)
    with (
        serving(StubService(begins_and_hangs), tokenizer, settings) as base,
        httpx.stream("POST", base + MESSAGES, json=body(stream=True, max_tokens=5)) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line.startswith("event: "))
        names = [next(lines) for _ in range(6)]
    assert names[0] == "event: message_start" and names[-1] == "event: ping"


def test_a_key_may_come_in_either_header(model_folder: str, tokenizer: Tokenizer) -> None:
    settings: Config = config(api_keys=["secret"])
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        statuses = {}
        for name, headers in {
            "none": {},
            "x-api-key": {"x-api-key": "secret"},
            "bearer": {"Authorization": "Bearer secret"},
            "wrong": {"x-api-key": "other"},
            "wrong bearer": {"Authorization": "Bearer other", "x-api-key": "secret"},
        }.items():
            sent = {**headers, "anthropic-version": "2023-06-01"}
            answer = httpx.post(base + MESSAGES, json=body(max_tokens=2), headers=sent)
            statuses[name] = answer.status_code
            if answer.status_code != 200:
                assert fault(answer)[0] == "authentication_error"
        chat = {"messages": HELLO, "max_tokens": 2}
        elsewhere = {
            httpx.post(base + path, json=sent, headers={"x-api-key": "secret"}).status_code
            for path, sent in {
                "/v1/chat/completions": chat,
                "/v1/responses": {"input": "hello", "max_output_tokens": 2},
                "/v1/embeddings": {"input": "hello"},
                "/v1/rerank": {"query": "hello", "documents": ["world"]},
            }.items()
        }
    assert statuses == {
        **{"none": 401, "x-api-key": 200, "bearer": 200, "wrong": 401, "wrong bearer": 401}
    }
    assert elsewhere == {200}


@pytest.fixture(scope="session")
def bodies(tokenizer: Tokenizer) -> tuple[Bodies, dict[str, Any]]:
    document = app_of(StubService(hangs), tokenizer, config()).openapi()
    return Bodies(document), document["components"]["schemas"]


@pytest.mark.parametrize("path", [MESSAGES, f"{MESSAGES}/count_tokens"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_harms_the_server(
    url: str, bodies: tuple[Bodies, dict[str, Any]], path: str, data: st.DataObject
) -> None:
    made, schemas = bodies
    name = "CountTokensRequest" if path.endswith("count_tokens") else "MessagesRequest"
    sent = data.draw(made.of(schemas[name]))
    if name == "MessagesRequest":
        sent["max_tokens"] = 8
    for spoiled in data.draw(st.lists(st.sampled_from(sorted(sent)), max_size=1)):
        sent[spoiled] = data.draw(JSON_VALUES)
    raw = json.dumps(sent).encode("utf-8", "surrogatepass")
    answer = httpx.post(url + path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert fault(answer)[0] in ("invalid_request_error", "not_found_error")
        assert fault(answer)[2]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert events_of(answer.text)[-1][0] == "message_stop"
