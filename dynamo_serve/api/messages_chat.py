"""From Anthropic's conversation to a chat, which everything behind it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from pydantic import ValidationError

from dynamo_serve.api.names import Names
from dynamo_serve.api.parse import first_fault
from dynamo_serve.api.schema import ChatRequest
from dynamo_serve.api.schema_messages import (
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    OfferedTool,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    ToolWish,
)
from dynamo_serve.errors import InvalidRequest, UnsupportedField

ERROR = "Error: "  # before the result of a call that failed
AUTO = ToolWish.model_validate({"type": "auto"})
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# What a chat calls a field, and what its client does; for `reasoning_effort` see `to_chat`.
FIELDS = {
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "tools[].function": "tools[]",
    "tools[].function.parameters": "tools[].input_schema",
    "tool_choice.function": "tool_choice",
    "thinking_token_budget": "thinking.budget_tokens",
    "chat_template_kwargs": "thinking",
    "stop": "stop_sequences",
}
Json = dict[str, Any]


class MessagesChat(ChatRequest):
    """A chat whose answer is told as Anthropic tells it."""

    endpoint: ClassVar[str] = "messages"


class _Part(NamedTuple):
    """A message, or a part of one, and where it came from."""

    role: str
    path: str
    text: str | None = None
    thought: str | None = None
    call: Json | None = None
    result_of: str | None = None


def to_chat(body: CountTokensRequest, thinking: Json) -> MessagesChat:
    """The same as a chat. `thinking`: the chat's fields about it.

    Raises `InvalidRequest` and `UnsupportedField`.
    """
    if body.messages[-1].role == "assistant":
        path = f"messages[{len(body.messages) - 1}].role"
        raise UnsupportedField(
            f"'{path}': the last turn is the assistant's, and its answer always a new one: "
            "the beginning of an answer cannot be given.",
            param=path,
        )
    messages, origins = _joined(body)
    # A chat's effort is what the client said of it, or that it wants no thoughts.
    effort = "thinking" if "reasoning_effort" in thinking else "output_config.effort"
    names = Names({**FIELDS, "reasoning_effort": effort}, origins)
    fields = {"model": body.model, "messages": messages, **_tools(body), **thinking}
    if body.output_config is not None:
        fields |= _output(body)
    if isinstance(body, MessagesRequest):
        fields |= _generation(body)
    try:
        return MessagesChat.model_validate(fields).named(names)
    except ValidationError as error:  # bounds of what several turns have come to
        raise first_fault(error, names) from error


def _output(body: CountTokensRequest) -> Json:
    config = body.output_config
    assert config is not None
    fields: Json = {}
    if config.effort is not None:
        fields["reasoning_effort"] = config.effort
    if config.format is not None:
        wanted = {"name": "output", "schema": config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return fields


def _generation(body: MessagesRequest) -> Json:
    names = (
        *("max_tokens", "stream", "temperature", "top_p", "top_k", "deadline_ms", "priority"),
        "cache_salt",
    )
    fields = {name: getattr(body, name) for name in names}
    return {**fields, "class": body.class_name, "stop": body.stop_sequences or None}


def _tools(body: CountTokensRequest) -> Json:
    wish = body.tool_choice or AUTO
    if (wish.name is None) == (wish.type == "tool"):
        fault = "is required" if wish.name is None else "goes with the type 'tool'"
        raise InvalidRequest(f"'tool_choice.name' {fault}.", param="tool_choice.name")
    choice: Any = CHOICES.get(wish.type)
    if wish.type == "tool":
        choice = {"type": "function", "function": {"name": wish.name}}
    return {
        "tools": [_tool(tool) for tool in body.tools],
        "tool_choice": None if body.tool_choice is None else choice,
        "parallel_tool_calls": not wish.disable_parallel_tool_use,
    }


def _tool(tool: OfferedTool) -> Json:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _joined(body: CountTokensRequest) -> tuple[list[Json], list[str]]:
    """The messages of a chat, and for each where it begins. Neighbours of one role are one, but
    each result is a message of its own."""
    groups: list[list[_Part]] = []
    for part in _parts(body):
        last = groups[-1][-1] if groups else None
        if last is not None and last.role == part.role != "tool":
            groups[-1].append(part)
        else:
            groups.append([part])
    names = {p.call["id"]: p.call["function"]["name"] for g in groups for p in g if p.call}
    return [_message(group, names) for group in groups], [group[0].path for group in groups]


def _message(parts: Sequence[_Part], names: dict[str, str]) -> Json:
    first = parts[0]
    texts = [part.text for part in parts if part.text is not None]
    thoughts = [part.thought for part in parts if part.thought is not None]
    message: Json = {"role": first.role, "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls := [part.call for part in parts if part.call is not None]:
        message["tool_calls"] = calls
    if first.result_of is not None:
        message |= {"tool_call_id": first.result_of, "name": names.get(first.result_of)}
    return message


def _parts(body: CountTokensRequest) -> Iterator[_Part]:
    if body.system is not None:
        yield _Part("system", "system", _text(body.system))
    for i, turn in enumerate(body.messages):
        yield from _turn(turn, f"messages[{i}].content")


def _turn(turn: InputMessage, path: str) -> Iterator[_Part]:
    if isinstance(turn.content, str):
        yield _Part(turn.role, path, turn.content)
        return
    if not turn.content:
        raise InvalidRequest(f"'{path}' has no block.", param=path)
    for i, block in enumerate(turn.content):
        at = f"{path}[{i}]"
        match block:
            case TextBlock():
                yield _Part(turn.role, at, block.text)
            case ToolResultBlock() if turn.role == "user":
                text = (ERROR if block.is_error else "") + _text(block.content)
                yield _Part("tool", at, text, result_of=block.tool_use_id)
            case ThinkingBlock() if turn.role == "assistant":
                yield _Part(turn.role, at, thought=block.thinking)
            case ToolUseBlock() if turn.role == "assistant":
                yield _Part(turn.role, at, call=_call(block))
            case _:
                raise InvalidRequest(
                    f"'{at}.type': a block of type {block.type!r} is not for turns of role "
                    f"{turn.role!r}.",
                    param=f"{at}.type",
                )


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _call(block: ToolUseBlock) -> Json:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "function": {"name": block.name, "arguments": arguments}}
