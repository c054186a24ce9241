"""instructor: an object of a class instead of a text, in each of its ways."""

from __future__ import annotations

from typing import Any

import instructor
import openai
from pydantic import BaseModel
from telling import BASE, MIA, MODEL, feature, tell

official = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)
MESSAGES: list[Any] = [{"role": "user", "content": MIA}]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def ask(mode: instructor.Mode) -> Any:
    client = instructor.from_openai(official, mode=mode)
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=Person, temperature=0, max_retries=0
    ).model_dump()


@feature
def tools() -> Any:
    return ask(instructor.Mode.TOOLS)


@feature
def tools_strict() -> Any:
    return ask(instructor.Mode.TOOLS_STRICT)


@feature
def json_schema() -> Any:
    return ask(instructor.Mode.JSON_SCHEMA)


@feature
def json() -> Any:
    return ask(instructor.Mode.JSON)


@feature
def partial() -> Any:
    """Objects that grow while the answer is streamed."""
    client = instructor.from_openai(official, mode=instructor.Mode.TOOLS)
    grown = client.chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, response_model=Person, temperature=0, max_retries=0
    )
    *_, last = [person.model_dump() for person in grown]
    return last


@feature
def iterable() -> Any:
    client = instructor.from_openai(official, mode=instructor.Mode.JSON_SCHEMA)
    people = client.chat.completions.create_iterable(
        model=MODEL,
        messages=MESSAGES,
        response_model=Person,
        temperature=0,
        max_retries=0,
        max_tokens=200,
    )
    return [person.model_dump() for person in people]


@feature
def with_completion() -> Any:
    client = instructor.from_openai(official, mode=instructor.Mode.TOOLS)
    person, raw = client.chat.completions.create_with_completion(
        model=MODEL, messages=MESSAGES, response_model=Person, temperature=0, max_retries=0
    )
    return {"person": person.model_dump(), "tokens": raw.usage.total_tokens}


tell()
