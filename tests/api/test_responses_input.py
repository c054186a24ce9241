"""Bodies for /v1/responses, good and bad: each fault is named, and none harms the server."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.responses import response_create_params

from dynamo_serve.api import fields_responses
from dynamo_serve.api.fields import field_rows
from dynamo_serve.api.schema_responses import ResponsesRequest
from tests.api.responding import CLOCK, PATH, Json, events_of
from tests.api.talking import GRADED, HERMES, TURNS, talking
from tests.api.test_openapi import JSON_VALUES, Bodies, document
from tests.api.test_tools import says_it

__all__ = ["document"]  # a fixture

SCHEMA: Json = {"type": "object", "properties": {"a": {"not": {}}}}


def call(**fields: Any) -> Json:
    return {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", **fields}


def text_format(**fields: Any) -> Json:
    return {"text": {"format": fields}}


FAULTS: list[tuple[Json, str, str]] = [
    ({"input": None}, "input", "required"),
    ({"input": 7}, "input", "string"),
    ({"input": []}, "input", "at least 1"),
    ({"input": [7]}, "input[0]", "an object"),
    ({"input": [{}]}, "input[0].role", "required"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'user'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "required"),
    ({"input": [{"role": "user", "content": "x", "name": "a"}]}, "input[0].name", "Unknown"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type", "'web_search_call'"),
    ({"input": [{"type": 7}]}, "input[0].type", "string"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "'input_image' is not supported here, only 'input_text', 'output_text'",
    ),
    (
        {"input": [{"role": "user", "content": [{"text": "x"}]}]},
        "input[0].content[0].type",
        "required",
    ),
    ({"input": [call(call_id="")]}, "input[0].call_id", "at least 1"),
    ({"input": [call(name="a b")]}, "input[0].name", "pattern"),
    ({"input": [call(arguments={})]}, "input[0].arguments", "string"),
    ({"input": [call(namespace="x")]}, "input[0].namespace", "no namespaces"),
    ({"input": [call()] * 129}, "input[0]", "at most 128"),
    (
        {"input": [{"type": "function_call_output", "output": "x"}]},
        "input[0].call_id",
        "required",
    ),
    (
        {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
        "input[0].encrypted_content",
        "in the open",
    ),
    (
        {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}]},
        "input[0].summary",
        "told whole",
    ),
    ({"input": "x", "instructions": 7}, "instructions", "string"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
    ({"max_output_tokens": 10**6}, "input", "max_output_tokens is 1000000"),
    ({"min_tokens": 9, "max_output_tokens": 2}, "min_tokens", "more than the 2"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"background": True}, "background", "at once, or as a stream"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "/v1/completions"),
    ({"echo": True}, "echo", "not repeated"),
    ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
    ({"prompt": {"id": "x"}}, "prompt", "instructions and input"),
    ({"truncation": "auto"}, "truncation", "never cut"),
    ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
    ({"messages": []}, "messages", "use input"),
    ({"response_format": {}}, "response_format", "use text.format"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "last event"),
    ({"include": ["file_search_call.results"]}, "include[0]", "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "in 'include'"),
    ({"metadata": {"a": 7}}, "metadata.a", "string"),
    ({"metadata": {f"{i}": "" for i in range(17)}}, "metadata", "at most 16"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "only 'function'"),
    ({"tools": [{"name": "f"}]}, "tools[0].type", "required"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].name", "two tools called 'clock'"),
    ({"tools": [{**CLOCK, "defer_loading": True}]}, "tools[0].defer_loading", "always shown"),
    ({"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
    (
        {"tools": [CLOCK], "tool_choice": {"type": "function", "name": "nobody"}},
        "tool_choice.name",
        "none of 'tools'",
    ),
    (
        {"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
        "tool_choice.type",
        "'allowed_tools'",
    ),
    ({"tools": [CLOCK], "tool_choice": "required"}, "tool_choice", "engine follows no grammar"),
    (
        {"tools": [{**CLOCK, "strict": True}]},
        "tools[0].strict",
        "engine follows no grammar",
    ),
    (text_format(type="json_object"), "text.format", "engine follows no grammar"),
    (text_format(type="json_schema", name="x"), "text.format.schema", "required"),
    (text_format(type="json_schema", schema={}), "text.format.name", "required"),
    (text_format(type="text", name="x"), "text.format.name", "json_schema"),
    (
        text_format(type="json_schema", name="x", schema=SCHEMA),
        "text.format.schema",
        "",
    ),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "say it in instructions"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "no variable for thinking"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "told whole"),
    ({"colour": 1}, "colour", "Unknown"),
]


@pytest.fixture(scope="module")
def base() -> Generator[str]:
    with talking(HERMES, says_it("Hello.")) as (_, base):
        yield base


@pytest.mark.parametrize(("fields", "param", "message"), FAULTS)
def test_what_is_wrong_is_named_as_it_was_sent(
    base: str, fields: Json, param: str, message: str
) -> None:
    answer = httpx.post(base + PATH, json={"input": "hello", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param) if not message else error["param"] == param
    assert message in error["message"]
    assert "messages[" not in error["message"] and "function." not in error["message"]


def test_the_template_names_the_item_that_it_has_no_place_for() -> None:
    items = [{"role": "user", "content": "x"}, call()]
    with talking(TURNS.replace("tools", "others"), says_it("Hello.")) as (_, base):
        answer = httpx.post(base + PATH, json={"input": items, "instructions": "y"})
    assert answer.json()["error"]["param"] == "input[1]"
    assert "'input[1]' is not supported" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "quoted", ["reasoning_effort", "messages", "max_tokens", "response_format"]
)
def test_what_a_client_wrote_may_look_like_a_field(base: str, quoted: str) -> None:
    fields = {"tools": [CLOCK], "tool_choice": {"type": "function", "name": quoted}}
    error = httpx.post(base + PATH, json={"input": "hello", **fields}).json()["error"]
    told = f"'tool_choice.name': {quoted!r} is none of 'tools'."
    assert (error["param"], error["message"]) == ("tool_choice.name", told)


def test_a_degree_that_is_said_twice_is_named() -> None:
    fields = {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "low"}}
    with talking(GRADED, says_it("Hello.")) as (_, base):
        answer = httpx.post(base + PATH, json={"input": "x", **fields})
    error = answer.json()["error"]
    assert error["param"] == "reasoning.effort"
    assert error["message"].startswith(
        "'reasoning.effort' and 'chat_template_kwargs.reasoning_effort'"
    )


HARMLESS: Json = {
    **{"background": False, "truncation": "disabled", "max_tool_calls": 3, "store": False},
    **{"service_tier": "auto", "safety_identifier": "s", "user": "u", "metadata": {"a": "b"}},
    **{"parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "top_logprobs": 0},
    **{"include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}},
    **{"text": {"format": {"type": "text"}, "verbosity": "medium"}, "conversation": None},
    "prompt_cache_key": "k",
}


def test_values_that_change_nothing_are_taken(base: str) -> None:
    plain = httpx.post(base + PATH, json={"input": "hello"}).json()
    told = httpx.post(base + PATH, json={"input": "hello", **HARMLESS}).json()
    assert told["output"][0]["content"] == plain["output"][0]["content"]


def test_every_field_of_the_official_client_is_in_the_table() -> None:
    theirs = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    ours = set(ResponsesRequest.model_fields) | set(fields_responses.RESPONSES)
    assert theirs <= ours


def test_the_document_has_examples_that_are_good(base: str, document: Json) -> None:
    described = document["paths"][PATH]["post"]
    assert "4XX" in described["responses"]
    told = described["responses"]["200"]["content"]["application/json"]["example"]
    for example in document["components"]["schemas"]["ResponsesRequest"]["examples"]:
        if "text" in example:  # the stub follows no grammar
            continue
        answer = httpx.post(base + PATH, json=example).json()
        assert set(told) <= set(answer)
        assert set(told["output"][0]) == set(answer["output"][0])
        assert set(told["usage"]) == set(answer["usage"])


def test_the_page_has_every_field_with_its_status() -> None:
    page = (Path(__file__).parents[2] / "docs/responses.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {
        name: status.strip("| ")
        for names, status, *_ in rows
        for name in names.strip("| ").replace("`", "").split(", ")
    }
    for name, status, _ in field_rows(ResponsesRequest, fields_responses.RESPONSES):
        assert told.get(name) == status, name


MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=9)}
)
ITEMS = st.lists(
    MESSAGES
    | st.just(call())
    | st.just({"type": "function_call_output", "call_id": "a", "output": "18"})
    | st.just({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}),
    min_size=1,
    max_size=4,
)
# Bounded by the model, by other fields, by the template or by the store, and not by the schema.
BOUND = {
    *("model", "input", "stop_token_ids", "logit_bias", "chat_template_kwargs", "min_tokens"),
    *("tools", "tool_choice", "reasoning", "thinking_token_budget", "text", "top_logprobs"),
    *("structured_outputs", "store", "previous_response_id", "deadline_ms", "class"),
    "stream_options",
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_supported_fields_within_bounds_are_taken(
    url: str, document: Json, data: st.DataObject
) -> None:
    node = {**document["components"]["schemas"]["ResponsesRequest"]}
    supported = set(ResponsesRequest.model_fields) - BOUND
    node["properties"] = {k: v for k, v in node["properties"].items() if k in supported}
    node["required"] = []
    body = data.draw(Bodies(document).of(node))
    body |= {"max_output_tokens": 8, "input": data.draw(st.text(max_size=9) | ITEMS)}
    answer = httpx.post(url + PATH, json=body)
    assert answer.status_code == 200, answer.text


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_harms_the_server(url: str, document: Json, data: st.DataObject) -> None:
    node = document["components"]["schemas"]["ResponsesRequest"]
    body = data.draw(Bodies(document).of(node)) | {"max_output_tokens": 8, "min_tokens": 0}
    for name in data.draw(st.lists(st.sampled_from(sorted(body)), max_size=2)):
        body[name] = data.draw(JSON_VALUES)
    body |= data.draw(st.just({}) | st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=1))
    if "deadline_ms" in body:  # one that cannot be kept is refused, with a 503
        body["deadline_ms"] = 60_000
    raw = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = httpx.post(url + PATH, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert events_of(answer.text)[-1]["type"] != "response.failed"
