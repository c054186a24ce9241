"""What the tests of /v1/responses have in common: asking, and holding answers to the shapes that
the official client declares."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import httpx
import openai.types.responses as shapes
import pydantic

from dynamo_serve.config import ResponsesSection
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import Script, StubService
from tests.api.talking import tokenizer_of
from tests.patience import PATIENCE_S

Json = dict[str, Any]
PATH = "/v1/responses"
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK: Json = {"type": "function", "name": "clock"}
EVENTS: dict[str, type[pydantic.BaseModel]] = {
    "response.created": shapes.ResponseCreatedEvent,
    "response.in_progress": shapes.ResponseInProgressEvent,
    "response.output_item.added": shapes.ResponseOutputItemAddedEvent,
    "response.content_part.added": shapes.ResponseContentPartAddedEvent,
    "response.output_text.delta": shapes.ResponseTextDeltaEvent,
    "response.output_text.done": shapes.ResponseTextDoneEvent,
    "response.reasoning_text.delta": shapes.ResponseReasoningTextDeltaEvent,
    "response.reasoning_text.done": shapes.ResponseReasoningTextDoneEvent,
    "response.function_call_arguments.delta": shapes.ResponseFunctionCallArgumentsDeltaEvent,
    "response.function_call_arguments.done": shapes.ResponseFunctionCallArgumentsDoneEvent,
    "response.content_part.done": shapes.ResponseContentPartDoneEvent,
    "response.output_item.done": shapes.ResponseOutputItemDoneEvent,
    "response.completed": shapes.ResponseCompletedEvent,
    "response.incomplete": shapes.ResponseIncompleteEvent,
    "response.failed": shapes.ResponseFailedEvent,
}
# Different each time, also where the answer is the same.
OWN = ("id", "created_at", "completed_at")


@contextlib.contextmanager
def keeping(
    template: str, script: Callable[[Tokenizer], Script], **responses: Any
) -> Generator[tuple[StubService, str]]:
    """A server that says what `script` tells it to, with these settings of its store."""
    tokenizer = tokenizer_of(template)
    service = StubService(script(tokenizer))
    service.spec = replace(service.spec, max_model_len=4096)
    with serving(
        service, tokenizer, replace(config(), responses=ResponsesSection(**responses))
    ) as base:
        yield service, base


def ask(base: str, **fields: Any) -> Json:
    """A whole response."""
    answer = httpx.post(base + PATH, json={"input": "hello", **fields}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    response: Json = answer.json()
    shapes.Response.model_validate(as_declared(response))
    return response


def as_declared(response: Json) -> Json:
    """The same without the one word that is ours alone."""
    if response["incomplete_details"] == {"reason": "deadline"}:
        return {**response, "incomplete_details": None}
    return response


def stream(base: str, **fields: Any) -> list[Json]:
    """The events of one."""
    body = {"input": "hello", "stream": True, **fields}
    answer = httpx.post(base + PATH, json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def events_of(text: str) -> list[Json]:
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event: Json = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        declared = {**event}
        if "response" in event:
            declared["response"] = as_declared(event["response"])
        EVENTS[event["type"]].model_validate(declared)
        events.append(event)
    return events


def put_together(events: list[Json]) -> Json:
    """What a client makes of a stream: the last response, all of whose items were told before."""
    items: list[Json] = []
    for event in events:
        kind, at = event["type"].removeprefix("response."), event.get("output_index", -1)
        if kind == "output_item.added":
            assert at == len(items)
            assert all(item["is_done"] for item in items), "two items grow at once"
            item = event["item"]
            assert item["status"] == "in_progress" and not (item.get("content") or [])
            items.append({"item": item, "text": "", "parts": 0, "is_done": False})
        elif kind == "content_part.added":
            assert event["part"]["text"] == "" and event["content_index"] == items[at]["parts"]
            items[at]["parts"] += 1
        elif kind.endswith(".delta"):
            assert event["delta"] and not items[at]["is_done"]
            items[at]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == items[at]["text"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == items[at]["text"]
        elif kind == "content_part.done":
            assert event["part"]["text"] == items[at]["text"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == items[at]["item"]["id"]
            items[at] |= {"item": event["item"], "is_done": True}
        if "item_id" in event:
            assert event["item_id"] == items[at]["item"]["id"]
    last: Json = events[-1]["response"]
    assert last["output"] == [item["item"] for item in items]
    return last


def same(response: Json) -> Json:
    """Without what is each response's own."""
    told = {key: value for key, value in response.items() if key not in OWN}
    own = ("id", "call_id")
    told["output"] = [
        {key: value for key, value in item.items() if key not in own} for item in told["output"]
    ]
    return told


def text_of(response: Json) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )
