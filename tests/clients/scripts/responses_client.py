"""The Responses API: the official client for Python, and LangChain."""

from __future__ import annotations

import json
from typing import Any

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from telling import BASE, FOX, GET_WEATHER, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)
TOOL: Any = {"type": "function", **GET_WEATHER["function"]}
chain = ChatOpenAI(
    model=MODEL,
    base_url=f"{BASE}/v1",
    api_key="none",
    temperature=0,
    max_retries=0,
    use_responses_api=True,
)


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return json.dumps(SUNNY)


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


@feature
def chat() -> Any:
    answer = client.responses.create(model=MODEL, input=SUM, temperature=0)
    finish = "stop" if answer.status == "completed" else answer.status
    return {"text": answer.output_text, "finish": finish, "tokens": answer.usage.total_tokens}


@feature
def stream() -> Any:
    with client.responses.stream(model=MODEL, input=FOX, temperature=0) as events:
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    return {
        "text": "".join(pieces),
        "pieces": len(pieces),
        "whole": client.responses.create(model=MODEL, input=FOX, temperature=0).output_text,
        "tokens": [final.usage.output_tokens],
    }


@feature
def parse() -> Any:
    answer = client.responses.parse(model=MODEL, input=MIA, text_format=Person, temperature=0)
    return answer.output_parsed.model_dump()


@feature
def tool_loop() -> Any:
    items = say(WEATHER)
    asked = {"model": MODEL, "tools": [TOOL], "temperature": 0}
    first = client.responses.create(input=items, **asked)
    call = next(item for item in first.output if item.type == "function_call")
    items += first.output
    items.append(
        {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(SUNNY)}
    )
    second = client.responses.create(input=items, **asked)
    return {
        "call": [call.name, json.loads(call.arguments)],
        "text": second.output_text,
    }


@feature
def previous_response() -> Any:
    """What the server keeps, so that the client need not send it."""
    asked = {"model": MODEL, "tools": [TOOL], "temperature": 0, "store": True}
    first = client.responses.create(input=WEATHER, **asked)
    call = next(item for item in first.output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(SUNNY)}
    second = client.responses.create(input=[result], previous_response_id=first.id, **asked)
    return second.output_text


@feature
def langchain_chat() -> Any:
    answer = chain.invoke(SUM)
    return {
        "text": answer.text,
        "finish": {"completed": "stop"}.get(answer.response_metadata["status"]),
        "tokens": answer.usage_metadata["total_tokens"],
    }


@feature
def langchain_stream() -> Any:
    chunks = list(chain.stream(FOX))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return {
        "text": total.text,
        "pieces": sum(bool(chunk.text) for chunk in chunks),
        "whole": chain.invoke(FOX).text,
        "tokens": [total.usage_metadata["output_tokens"]],
    }


@feature
def langchain_tool_loop() -> Any:
    bound = chain.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(WEATHER)]
    first = bound.invoke(messages)
    call = first.tool_calls[0]
    messages += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    second = bound.invoke(messages)
    return {
        "call": [call["name"], call["args"]],
        "text": second.text,
    }


@feature
def langchain_structured_output() -> Any:
    return chain.with_structured_output(Person).invoke(MIA).model_dump()


tell()
