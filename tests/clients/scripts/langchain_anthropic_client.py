"""LangChain, with its package for Anthropic."""

from __future__ import annotations

import json
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel
from telling import BASE, FOX, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

model = ChatAnthropic(
    model=MODEL, base_url=BASE, api_key="none", temperature=0, max_tokens=300, max_retries=0
)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return json.dumps(SUNNY)


@feature
def chat() -> Any:
    answer = model.invoke(SUM)
    return {
        "text": answer.text,
        "finish": answer.response_metadata["stop_reason"],
        "tokens": answer.usage_metadata["total_tokens"],
    }


@feature
def stream() -> Any:
    chunks = list(model.stream(FOX))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return {
        "text": total.text,
        "pieces": sum(bool(chunk.text) for chunk in chunks),
        "whole": model.invoke(FOX).text,
        "tokens": [total.usage_metadata["output_tokens"]],
    }


@feature
def tool_loop() -> Any:
    bound = model.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(WEATHER)]
    first = bound.invoke(messages)
    call = first.tool_calls[0]
    messages += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    second = bound.invoke(messages)
    return {
        "finish": [m.response_metadata["stop_reason"] for m in (first, second)],
        "call": [call["name"], call["args"]],
        "text": second.text,
    }


@feature
def stream_tools() -> Any:
    chunks = list(model.bind_tools([get_weather]).stream(WEATHER))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return [[call["name"], call["args"]] for call in total.tool_calls]


@feature
def structured_output() -> Any:
    return {
        method: model.with_structured_output(Person, method=method).invoke(MIA).model_dump()
        for method in ("function_calling", "json_schema")
    }


tell()
