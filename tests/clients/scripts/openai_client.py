"""The official client for Python."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
from pydantic import BaseModel
from telling import BASE, FOX, GET_WEATHER, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)


class Person(BaseModel):
    name: str
    age: int


class GetWeather(BaseModel):
    """Get the weather in a city."""

    city: str


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@feature
def models() -> Any:
    return [model.id for model in client.models.list()]


@feature
def chat() -> Any:
    answer = client.chat.completions.create(
        model=MODEL, messages=say(SUM), temperature=0, n=1, stop=None, user="someone"
    )
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish": choice.finish_reason,
        "tokens": answer.usage.total_tokens,
    }


@feature
def stream() -> Any:
    asked = client.chat.completions.create(
        model=MODEL,
        messages=say(FOX),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(asked)
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    whole = client.chat.completions.create(model=MODEL, messages=say(FOX), temperature=0)
    return {
        "text": "".join(pieces),
        "pieces": len(pieces),
        "whole": whole.choices[0].message.content,
        "tokens": [c.usage.completion_tokens for c in chunks if c.usage],
    }


@feature
def stream_helper() -> Any:
    """The client folds the events itself."""
    with client.chat.completions.stream(
        model=MODEL, messages=say(WEATHER), tools=[GET_WEATHER], temperature=0
    ) as events:
        kinds = {event.type for event in events}
        message = events.get_final_completion().choices[0].message
    call = message.tool_calls[0].function
    return {"kinds": sorted(kinds), "call": [call.name, json.loads(call.arguments)]}


@feature
def parse() -> Any:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=say(MIA), response_format=Person, temperature=0
    )
    return parsed.choices[0].message.parsed.model_dump()


@feature
def parse_tool() -> Any:
    """A strict tool made of a class, and its arguments as an object of that."""
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=say(WEATHER),
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    function = parsed.choices[0].message.tool_calls[0].function
    return [function.name, function.parsed_arguments.model_dump()]


@feature
def tool_loop() -> Any:
    messages = say(WEATHER)
    asked = {"model": MODEL, "tools": [GET_WEATHER], "temperature": 0}
    first = client.chat.completions.create(messages=messages, **asked).choices[0]
    call = first.message.tool_calls[0]
    messages.append(first.message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(SUNNY)})
    second = client.chat.completions.create(messages=messages, **asked).choices[0]
    return {
        "finish": [first.finish_reason, second.finish_reason],
        "call": [call.function.name, json.loads(call.function.arguments)],
        "text": second.message.content,
    }


@feature
def logprobs() -> Any:
    answer = client.chat.completions.create(
        model=MODEL, messages=say(SUM), temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    return {
        "text": "".join(token.token for token in content),
        "tops": [len(token.top_logprobs) for token in content],
        "whole": answer.choices[0].message.content,
    }


@feature
def completion() -> Any:
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0)
    return {"finish": answer.choices[0].finish_reason, "tokens": answer.usage.completion_tokens}


@feature
def several_at_once() -> Any:
    async def ask(asynchronous: openai.AsyncOpenAI) -> str:
        answer = await asynchronous.chat.completions.create(
            model=MODEL, messages=say(SUM), temperature=0
        )
        return answer.choices[0].message.content

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{BASE}/v1", api_key="none") as asynchronous:
            return await asyncio.gather(*(ask(asynchronous) for _ in range(4)))

    return asyncio.run(main())


@feature
def refusal() -> Any:
    """A fault comes as the client's own class, with the field at fault."""
    try:
        client.chat.completions.create(model=MODEL, messages=say(SUM), modalities=["audio"])
    except openai.BadRequestError as error:
        return {"param": error.param, "code": error.code}
    return None


tell()
