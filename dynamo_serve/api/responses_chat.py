"""A request to /v1/responses as the chat that it is, and the faults of that chat in its terms."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from dynamo_serve.api import parse
from dynamo_serve.api.responses_items import Placed, messages_of
from dynamo_serve.api.schema import ChatRequest, Sampled
from dynamo_serve.api.schema_responses import (
    LOGPROBS,
    ChosenFunction,
    ResponsesRequest,
    TextFormat,
)
from dynamo_serve.errors import InvalidRequest, RequestError

Json = dict[str, Any]
CALL_FIELD = re.compile(r"messages\[(\d+)\][\w.\[\]]*")
# What a chat calls it, and what a response does.
NAMES = (
    (re.compile(r"\bresponse_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"\bmax(_completion)?_tokens\b"), "max_output_tokens"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^messages$|(?<=')messages(?=')"), "input"),
)


class ResponseChat(ChatRequest):
    """The chat that a response is made of."""

    id_prefix: ClassVar[str] = "resp_"
    is_resumable: ClassVar[bool] = False


class Chat:
    """`request`, and what its messages came from: call what reads it within `in_our_terms`."""

    def __init__(self, body: ResponsesRequest, placed: Sequence[Placed]) -> None:
        """Raises `InvalidRequest`."""
        _check(body)
        messages = messages_of(placed)
        if body.instructions is not None:
            system = {"role": "system", "content": body.instructions}
            messages.insert(0, (system, "instructions"))
        self._paths = [path for _, path in messages]
        with self.in_our_terms():
            self.request = _request(body, [message for message, _ in messages])

    @contextlib.contextmanager
    def in_our_terms(self) -> Generator[None]:
        """Faults name the fields of /v1/responses."""
        try:
            yield
        except RequestError as error:
            error.message = self._renamed(error.message)
            error.param = error.param and self._renamed(error.param)
            raise

    def _renamed(self, text: str) -> str:
        text = CALL_FIELD.sub(self._path, text)
        for name, ours in NAMES:
            text = name.sub(ours, text)
        return text

    def _path(self, match: re.Match[str]) -> str:
        number = int(match[1])
        return self._paths[number] if number < len(self._paths) else match[0]


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


def _request(body: ResponsesRequest, messages: list[Json]) -> ResponseChat:
    shared = {info.alias or name: getattr(body, name) for name, info in _sampled()}
    wish = body.text.format if body.text is not None else None
    try:
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
    except ValidationError as error:  # too many messages, or calls in one
        raise parse.first_fault(error) from error


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
