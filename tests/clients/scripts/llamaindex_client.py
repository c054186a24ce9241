"""LlamaIndex, with its packages for servers that are like OpenAI's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from telling import BASE, FOX, MIA, MODEL, SUM, SUNNY, WEATHER, feature, tell

llm = OpenAILike(
    model=MODEL,
    api_base=f"{BASE}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=4096,
    temperature=0,
    max_retries=0,
)
cities: list[str] = []


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """Get the weather in a city."""
    cities.append(city)
    return json.dumps(SUNNY)


@feature
def chat() -> Any:
    answer = llm.chat([ChatMessage(role="user", content=SUM)])
    return {"text": answer.message.content, "tokens": answer.raw.usage.total_tokens}


@feature
def complete() -> Any:
    return llm.complete(SUM).text


@feature
def stream() -> Any:
    *_, last = chunks = list(llm.stream_chat([ChatMessage(role="user", content=FOX)]))
    return {
        "text": "".join(chunk.delta or "" for chunk in chunks),
        "pieces": len(chunks),
        "whole": last.message.content,
    }


@feature
def plain_completions() -> Any:
    """The older endpoint, which this package takes for models that do not chat."""
    plain = OpenAILike(
        model=MODEL, api_base=f"{BASE}/v1", api_key="none", is_chat_model=False, max_tokens=4
    )
    return plain.complete("Hello").text


@feature
def tool_call() -> Any:
    tool = FunctionTool.from_defaults(get_weather)
    answer = llm.chat_with_tools([tool], user_msg=WEATHER)
    calls = llm.get_tool_calls_from_response(answer)
    return [[call.tool_name, call.tool_kwargs] for call in calls]


@feature
def agent() -> Any:
    """The whole loop: the agent calls the function, and answers with what it said."""

    async def main() -> str:
        helper = FunctionAgent(tools=[get_weather], llm=llm, streaming=True)
        return str(await helper.run(WEATHER))

    cities.clear()
    return {"text": asyncio.run(main()), "cities": cities}


@feature
def structured_predict() -> Any:
    asked = PromptTemplate(
        "Give me a JSON object for a person called {name} who is {age} years old."
    )
    return llm.structured_predict(Person, asked, name="Mia", age="31").model_dump()


@feature
def structured_output() -> Any:
    """A schema instead of a tool."""
    schema = OpenAILike(
        **{**llm.to_dict(), "api_key": "none", "should_use_structured_outputs": True}
    )
    answer = schema.as_structured_llm(Person).chat([ChatMessage(role="user", content=MIA)])
    return answer.raw.model_dump()


tell()
