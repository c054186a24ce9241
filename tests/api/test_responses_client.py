"""/v1/responses with the official client, unmodified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from functools import partial
from typing import Any, Literal

import openai
import pydantic
import pytest

from dynamo_serve import bundled
from dynamo_serve.api.schema_tools import EXAMPLE
from dynamo_serve.config import (
    CacheSection,
    Config,
    EngineSection,
    ModelSection,
    ResponsesSection,
    SchedulerSection,
)
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import serving
from tests.api.responding import WEATHER, keeping
from tests.api.stub import says
from tests.api.talking import HERMES, THINKING, one_after_another, talking
from tests.api.test_openai_client import client_of
from tests.api.test_tools import PARIS, says_it


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    inhabitants: int = pydantic.Field(ge=0, le=9)


@pytest.fixture(scope="module")
def own() -> Generator[openai.OpenAI]:
    """The model that ships with us, with a store."""
    path = str(bundled.path())
    settings = Config(
        engine=EngineSection(process=False, device="cpu", threads=1),
        model=ModelSection(max_model_len=1024),
        cache=CacheSection(num_pages=256),
        scheduler=SchedulerSection(max_decode_sequences=8),
        responses=ResponsesSection(store="default"),
    )
    with (
        serving(Service(settings, model_path=path), Tokenizer.load(path), settings) as base,
        client_of(base) as client,
    ):
        yield client


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_response_that_fits_a_schema(own: openai.OpenAI, is_stream: bool) -> None:
    args: Any = {"model": "tiny", "input": "Where?", "text_format": Place, "max_output_tokens": 200}
    if is_stream:
        with own.responses.stream(**args) as stream:
            done = [event for event in stream if event.type == "response.output_text.done"]
            response = stream.get_final_response()
        assert done[0].parsed == response.output_parsed
    else:
        response = own.responses.parse(**args)
    assert isinstance(response.output_parsed, Place)
    assert response.status == "completed"
    assert response.text is not None and response.text.format is not None
    assert response.text.format.type == "json_schema"


def test_a_function_that_has_to_be_called(own: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Place, name="place")["function"]
    args: Any = {
        "model": "tiny",
        "input": "hello",
        "tools": [{"type": "function", **tool}],
        "max_output_tokens": 300,
        "parallel_tool_calls": False,
    }
    choices: list[Any] = ["required", {"type": "function", "name": "place"}]
    for choice in choices:
        [call] = own.responses.parse(tool_choice=choice, **args).output
        assert call.type == "function_call"
        assert Place.model_validate_json(call.arguments)
        assert call.parsed_arguments == json.loads(call.arguments)


@pytest.mark.parametrize("is_kept", [False, True])
def test_two_steps_with_the_model_that_ships_with_us(own: openai.OpenAI, is_kept: bool) -> None:
    """The tour of docs/responses.md."""
    tools: Any = [{"type": "function", **EXAMPLE}]
    ask = partial(own.responses.create, model="tiny", tools=tools, temperature=0)
    items: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    response = ask(input=items)
    [call] = response.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    result = json.dumps({"temperature": 18, "condition": "sunny"})
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": result}
    if is_kept:
        last = ask(input=[output], previous_response_id=response.id)
    else:
        last = ask(input=[*items, *response.output, output])
    assert all(word in last.output_text for word in ("18", "sunny", "Paris"))


def test_a_stream_as_the_client_puts_it_together() -> None:
    text = f"<think>Which?</think>\nI ask.{PARIS}"
    with talking(THINKING, says_it(text)) as (_, base), client_of(base) as client:
        args: Any = {"model": "tiny", "input": "hello", "tools": [WEATHER]}
        with client.responses.stream(**args) as stream:
            events = list(stream)
            final = stream.get_final_response()
        plain = list(client.responses.create(stream=True, **args))
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "I ask."
    calls = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads(calls[-1].snapshot) == {"city": "Zürich 😀"}
    assert [e.sequence_number for e in plain] == list(range(len(plain)))
    assert plain[-1].type == "response.completed"
    assert plain[-1].response.usage is not None


def test_what_a_response_says_can_be_sent_back_as_it_is() -> None:
    text = f"<think>Which?</think>\nI ask.{PARIS}"
    script = partial(one_after_another, answers=[text, "Sunny."])
    with talking(THINKING, script) as (_, base), client_of(base) as client:
        args: Any = {"model": "tiny", "tools": [WEATHER]}
        first = client.responses.create(input="hello", **args)
        items: list[Any] = [{"role": "user", "content": "hello"}, *first.output]
        items += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
            for item in first.output
            if item.type == "function_call"
        ]
        assert client.responses.create(input=items, **args).output_text == "Sunny."


def test_kept_responses_are_found_and_deleted() -> None:
    with (
        keeping(HERMES, lambda tokenizer: says(tokenizer, "Hello."), store="asked") as (_, base),
        client_of(base) as client,
    ):
        made = client.responses.create(model="tiny", input="hello", store=True)
        assert client.responses.retrieve(made.id) == made
        items = list(client.responses.input_items.list(made.id))
        assert [(item.type, item.role) for item in items] == [("message", "user")]  # type: ignore[union-attr]
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        again = client.responses.create(model="tiny", input="hello")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(again.id)
        with pytest.raises(openai.BadRequestError) as gone:
            client.responses.create(model="tiny", input="x", previous_response_id=made.id)
        assert gone.value.code == "previous_response_not_found"


def test_tokens_are_counted_before_they_are_spent(own: openai.OpenAI) -> None:
    count = own.responses.input_tokens.count(model="tiny", input="hello")
    usage = own.responses.create(model="tiny", input="hello", max_output_tokens=1).usage
    assert usage is not None and count.input_tokens == usage.input_tokens


def test_errors_arrive_as_the_clients_own_classes(url: str) -> None:
    with client_of(url) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny", input="hello", background=True)
        assert (refused.value.param, refused.value.code) == ("background", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="nobody", input="hello")
        assert missing.value.code == "model_not_found"


def test_many_async_clients_get_the_answer_they_get_alone(url: str) -> None:
    args: Any = {"model": "tiny", "max_output_tokens": 12, "temperature": 0}
    with client_of(url) as client:
        alone = [client.responses.create(input=f"a{i}", **args).output_text for i in range(8)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as many:

            async def one(i: int) -> str:
                stream = await many.responses.create(input=f"a{i}", stream=True, **args)
                return "".join([e.delta async for e in stream if e.type.endswith("text.delta")])

            return await asyncio.gather(*map(one, range(8)))

    assert asyncio.run(together()) == alone
