"""A request to /v1/responses as the chat that it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from dynamo_serve.api import parse
from dynamo_serve.api.names import Names
from dynamo_serve.api.responses_items import Placed, messages_of
from dynamo_serve.api.schema import ChatRequest, Sampled
from dynamo_serve.api.schema_responses import (
    LOGPROBS,
    ChosenFunction,
    ResponsesRequest,
    TextFormat,
)
from dynamo_serve.errors import InvalidRequest

Json = dict[str, Any]
# What a chat calls a field, and what a response does.
FIELDS = {
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "tools[].function": "tools[]",
    "tool_choice.function": "tool_choice",
    "messages": "input",
    "logprobs": "include",
}


class ResponseChat(ChatRequest):
    """The chat that a response is made of."""

    endpoint: ClassVar[str] = "responses"
    is_resumable: ClassVar[bool] = False


def chat_of(body: ResponsesRequest, placed: Sequence[Placed]) -> ResponseChat:
    """The chat, whose faults name what was sent. Raises `InvalidRequest`."""
    _check(body)
    messages = messages_of(placed)
    if body.instructions is not None:
        system = {"role": "system", "content": body.instructions}
        messages.insert(0, (system, "instructions"))
    names = Names(FIELDS, [path for _, path in messages])
    try:
        return _chat(body, [message for message, _ in messages]).named(names)
    except ValidationError as error:  # too many messages, or calls in one
        raise parse.first_fault(error, names) from error


def _check(body: ResponsesRequest) -> None:
    """Raises `InvalidRequest` for what is wrong in ways that a chat cannot be."""
    if body.top_logprobs and LOGPROBS not in body.include:
        raise InvalidRequest(
            f"'top_logprobs' needs {LOGPROBS!r} in 'include'.", param="top_logprobs"
        )
    wish = body.text.format if body.text is not None else None
    if wish is not None:
        for name, value in (("name", wish.name), ("schema", wish.schema_)):
            path = f"text.format.{name}"
            if wish.type == "json_schema" and value is None:
                raise InvalidRequest(f"'{path}' is required.", param=path)
            if wish.type != "json_schema" and value is not None:
                raise InvalidRequest(f'\'{path}\' needs "type": "json_schema".', param=path)


def _chat(body: ResponsesRequest, messages: list[Json]) -> ResponseChat:
    shared = {info.alias or name: getattr(body, name) for name, info in _sampled()}
    wish = body.text.format if body.text is not None else None
    return ResponseChat.model_validate(
        {
            **shared,
            "messages": messages,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": LOGPROBS in body.include,
            "top_logprobs": body.top_logprobs if LOGPROBS in body.include else None,
            "response_format": None if wish is None else _format(wish),
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"})}
                for tool in body.tools
            ],
            "tool_choice": _choice(body.tool_choice),
            "parallel_tool_calls": body.parallel_tool_calls,
            "reasoning_effort": body.reasoning and body.reasoning.effort,
            "thinking_token_budget": body.thinking_token_budget,
            "chat_template_kwargs": body.chat_template_kwargs,
        }
    )


def _sampled() -> list[tuple[str, Any]]:
    return list(Sampled.model_fields.items())


def _format(wish: TextFormat) -> Json:
    if wish.type != "json_schema":
        return {"type": wish.type}
    return {"type": wish.type, "json_schema": {"name": wish.name, "schema": wish.schema_}}


def _choice(choice: str | ChosenFunction | None) -> Any:
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice
