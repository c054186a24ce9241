"""Calls that have to be made, and arguments that have to fit, with the model that ships with us."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from bench.structured_schemas import fault_of
from dynamo_serve import bundled
from dynamo_serve.api.schema_tools import EXAMPLE
from dynamo_serve.config import CacheSection, Config, EngineSection, ModelSection, SchedulerSection
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import serving
from tests.api.test_openai_client import client_of
from tests.api.test_tools import CHAT, HELLO, put_together
from tests.patience import PATIENCE_S

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "depth": {"$ref": "#/$defs/depth"}},
    "required": ["colour", "depth"],
    "additionalProperties": False,
    "$defs": {"depth": {"type": "integer", "minimum": 1, "maximum": 9}},
}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": COLOUR}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "paint"}}
WEATHER = {"type": "function", "function": EXAMPLE}


@pytest.fixture(scope="module")
def base() -> Generator[str]:
    path = str(bundled.path())
    settings = Config(
        engine=EngineSection(process=False, device="cpu", threads=1),
        model=ModelSection(max_model_len=1024),
        cache=CacheSection(num_pages=256),
        scheduler=SchedulerSection(max_decode_sequences=8),
    )
    with serving(Service(settings, model_path=path), Tokenizer.load(path), settings) as base:
        yield base


def ask(base: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "tools": [PAINT, CLOCK], "max_tokens": 300, **fields}
    answer = httpx.post(base + CHAT, json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]  # type: ignore[no-any-return]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def test_a_required_call_is_made_whatever_was_said(base: str) -> None:
    for choice in ask(base, tool_choice="required", n=3, parallel_tool_calls=False, seed=1):
        [(name, arguments)] = calls_of(choice)
        assert not fault_of(json.dumps(arguments), COLOUR) if name == "paint" else arguments == {}


def test_a_named_tool_is_called_once(base: str) -> None:
    for choice in ask(base, tool_choice=NAMED, n=2, temperature=1.5, seed=2):
        [(name, arguments)] = calls_of(choice)
        assert name == "paint" and not fault_of(json.dumps(arguments), COLOUR)


def test_a_named_call_is_streamed(base: str) -> None:
    body = {"messages": HELLO, "tools": [PAINT], "tool_choice": NAMED, "stream": True}
    answer = httpx.post(base + CHAT, json=body, timeout=PATIENCE_S)
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    made = put_together([c for event in data[:-1] for c in json.loads(event)["choices"]])
    [call] = made["calls"]
    assert not fault_of(call["arguments"], COLOUR)
    assert (made["finish"], made["content"]) == ("tool_calls", "")


def test_a_strict_tool_leaves_the_choice_to_the_model(base: str) -> None:
    strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}  # type: ignore[dict-item]
    tools = [strict, WEATHER]
    weather = [{"role": "user", "content": "What is the weather in Paris?"}]
    [choice] = ask(base, tools=tools, messages=weather, temperature=0)
    assert calls_of(choice) == [("get_weather", {"city": "Paris"})]
    [choice] = ask(base, tools=tools, temperature=0)
    assert choice["finish_reason"] == "stop" and choice["message"]["content"]


def test_an_answer_in_json_does_not_shut_tools_out(base: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": COLOUR}}
    weather = [{"role": "user", "content": "What is the weather in Paris?"}]
    [choice] = ask(base, tools=[WEATHER], response_format=schema, messages=weather, temperature=0)
    assert calls_of(choice) == [("get_weather", {"city": "Paris"})]
    [choice] = ask(base, tools=[WEATHER], tool_choice="none", response_format=schema)
    assert not fault_of(choice["message"]["content"], COLOUR)


def test_two_steps_with_the_model_that_ships_with_us(base: str) -> None:
    """As the tour of the README has it."""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    args: Any = {"model": "tiny", "tools": [WEATHER], "temperature": 0}
    with client_of(base) as client:
        message = client.chat.completions.create(messages=messages, **args).choices[0].message
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == (
            "get_weather",
            '{"city": "Paris"}',
        )
        result = json.dumps({"temperature": 18, "condition": "sunny"})
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
        told = client.chat.completions.create(messages=messages, **args).choices[0].message.content
    assert told is not None and all(word in told for word in ("18", "sunny", "Paris"))


def test_arguments_become_the_clients_own_type_and_go_back(base: str) -> None:
    """With the helper of the official client, which asks for strict tools."""

    class Painting(pydantic.BaseModel):
        colour: Literal["red", "green"]
        depth: int = pydantic.Field(ge=1, le=9)

    tool = openai.pydantic_function_tool(Painting, name="paint")
    args: Any = {"model": "tiny", "tools": [tool], "max_tokens": 300, "temperature": 0}
    messages: list[Any] = [*HELLO]
    with client_of(base) as client:
        message = (
            client.chat.completions.parse(messages=messages, tool_choice=NAMED, **args)  # type: ignore[arg-type]
            .choices[0]
            .message
        )
        assert message.tool_calls
        [call] = message.tool_calls
        assert isinstance(call.function.parsed_arguments, Painting)
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        again = client.chat.completions.parse(messages=messages, **args)
    assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {
                "tool_choice": "required",
                "tools": [
                    CLOCK,
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/no"}},
                    },
                ],
            },
            "tools[1].function.parameters",
            "",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ],
            },
            "tools[0].function.parameters.type",
            "an object",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "two different answers",
        ),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", "together with"),
    ],
)
def test_what_cannot_be_required_is_named(
    base: str, fields: dict[str, Any], param: str, message: str
) -> None:
    body = {"messages": HELLO, "tools": [PAINT], **fields}
    answer = httpx.post(base + CHAT, json=body, timeout=PATIENCE_S)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert message in error["message"]
