"""LangChain, with its package for OpenAI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from telling import BASE, FOX, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

model = ChatOpenAI(model=MODEL, base_url=f"{BASE}/v1", api_key="none", temperature=0, max_retries=0)


class Person(BaseModel):
    """A person."""

    name: str = Field(description="What they are called.")
    age: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return json.dumps(SUNNY)


@feature
def chat() -> Any:
    answer = model.invoke(SUM)
    return {
        "text": answer.content,
        "finish": answer.response_metadata["finish_reason"],
        "tokens": answer.usage_metadata["total_tokens"],
    }


@feature
def chain() -> Any:
    """A prompt, the model and a parser, one behind the other."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "You are a helpful assistant."), ("human", "What is {a} plus {b}?")]
    )
    return (prompt | model | StrOutputParser()).invoke({"a": 17, "b": 25})


@feature
def stream() -> Any:
    """Of another server than OpenAI's it asks for usage only if it is told to."""
    chunks = list(model.stream(FOX, stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return {
        "text": total.content,
        "pieces": sum(bool(chunk.content) for chunk in chunks),
        "whole": model.invoke(FOX).content,
        "tokens": [total.usage_metadata["output_tokens"]],
    }


@feature
def batch() -> Any:
    return [answer.content for answer in model.batch([SUM] * 3)]


@feature
def asynchronous() -> Any:
    async def main() -> str:
        return "".join([chunk.content async for chunk in model.astream(SUM)])

    return asyncio.run(main())


@feature
def tool_loop() -> Any:
    bound = model.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(WEATHER)]
    first = bound.invoke(messages)
    call = first.tool_calls[0]
    messages += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    second = bound.invoke(messages)
    return {
        "finish": [m.response_metadata["finish_reason"] for m in (first, second)],
        "call": [call["name"], call["args"]],
        "text": second.content,
    }


@feature
def stream_tools() -> Any:
    chunks = list(model.bind_tools([get_weather]).stream(WEATHER))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return [[call["name"], call["args"]] for call in total.tool_calls]


@feature
def tool_choice() -> Any:
    """Every way to say that a call has to be made."""
    called = []
    for choice in ("any", "required", "get_weather", True):
        bound = model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
        called.append([[call["name"], call["args"]] for call in bound.invoke(WEATHER).tool_calls])
    return called


@feature
def strict_tools() -> Any:
    call = model.bind_tools([get_weather], strict=True).invoke(WEATHER).tool_calls[0]
    return [call["name"], call["args"]]


@feature
def structured_output() -> Any:
    """All three methods that the package has, and a raw schema."""
    answers = {
        method: model.with_structured_output(Person, method=method).invoke(MIA).model_dump()
        for method in ("json_schema", "function_calling", "json_mode")
    }
    schema = {"title": "person", **Person.model_json_schema()}
    answers["schema"] = model.with_structured_output(schema).invoke(MIA)
    return answers


@feature
def stream_structured_output() -> Any:
    *_, last = model.with_structured_output(Person).stream(MIA)
    return last.model_dump()


@feature
def logprobs() -> Any:
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(SUM)
    content = answer.response_metadata["logprobs"]["content"]
    return {
        "text": "".join(token["token"] for token in content),
        "tops": [len(token["top_logprobs"]) for token in content],
        "whole": answer.content,
    }


tell()
