"""The official client of Anthropic for Python."""

from __future__ import annotations

import json
from typing import Any

import anthropic
from pydantic import BaseModel
from telling import BASE, FOX, GET_WEATHER, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

client = anthropic.Anthropic(base_url=BASE, api_key="none", max_retries=0)
FUNCTION = GET_WEATHER["function"]
TOOL: Any = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}


class Person(BaseModel):
    name: str
    age: int


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def asked(text: str, **more: Any) -> dict[str, Any]:
    """This version has no argument for the temperature, which the protocol still has."""
    extra = {"temperature": 0, **more.pop("extra_body", {})}
    return {
        "model": MODEL,
        "max_tokens": 300,
        "messages": say(text),
        "extra_body": extra,
        **more,
    }


@feature
def models() -> Any:
    return [model.id for model in client.models.list()]


@feature
def chat() -> Any:
    answer = client.messages.create(**asked(SUM, system="You are a helpful assistant."))
    return {
        "text": answer.content[0].text,
        "finish": answer.stop_reason,
        "tokens": answer.usage.input_tokens + answer.usage.output_tokens,
    }


@feature
def stream() -> Any:
    with client.messages.stream(**asked(FOX)) as streamed:
        pieces = list(streamed.text_stream)
        message = streamed.get_final_message()
    whole = client.messages.create(**asked(FOX))
    return {
        "text": "".join(pieces),
        "pieces": len(pieces),
        "whole": whole.content[0].text,
        "tokens": [message.usage.output_tokens],
    }


@feature
def tool_loop() -> Any:
    messages = say(WEATHER)
    first = client.messages.create(**{**asked("", tools=[TOOL]), "messages": messages})
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": json.dumps(SUNNY)}
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(**{**asked("", tools=[TOOL]), "messages": messages})
    return {
        "finish": [first.stop_reason, second.stop_reason],
        "call": [call.name, call.input],
        "text": second.content[0].text,
    }


@feature
def stream_tools() -> Any:
    with client.messages.stream(**asked(WEATHER, tools=[TOOL])) as streamed:
        content = streamed.get_final_message().content
    return [[block.name, block.input] for block in content if block.type == "tool_use"]


@feature
def tool_choice() -> Any:
    called = []
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        choice["disable_parallel_tool_use"] = True
        answer = client.messages.create(**asked(WEATHER, tools=[TOOL], tool_choice=choice))
        called.append([[block.name, block.input] for block in answer.content])
    return called


@feature
def tool_runner() -> Any:
    """The client's own loop: it calls the function and sends the result."""
    cities = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city.

        Args:
            city: Which one.
        """
        cities.append(city)
        return json.dumps(SUNNY)

    runner = client.beta.messages.tool_runner(**asked(WEATHER), tools=[get_weather])
    return {"text": runner.until_done().content[0].text, "cities": cities}


@feature
def parse() -> Any:
    answer = client.messages.parse(**asked(MIA), output_format=Person)
    return answer.parsed_output.model_dump()


@feature
def count_tokens() -> Any:
    counted = client.messages.count_tokens(model=MODEL, messages=say(SUM)).input_tokens
    usage = client.messages.create(**asked(SUM)).usage
    return [counted, usage.input_tokens + (usage.cache_read_input_tokens or 0)]


@feature
def stop_sequence() -> Any:
    answer = client.messages.create(**asked(SUM, stop_sequences=["42"]))
    return [answer.stop_reason, answer.stop_sequence]


@feature
def refusal() -> Any:
    """A fault comes as the client's own class."""
    try:
        client.messages.create(**asked(SUM, extra_body={"mcp_servers": [{"url": "http://x"}]}))
    except anthropic.BadRequestError as error:
        return error.body["error"]["type"]
    return None


tell()
