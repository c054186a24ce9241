"""Tools in a request: what the template gets to see, and how the answer will be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.names import OWN, Names
from dynamo_serve.api.prompts import render_messages
from dynamo_serve.api.schema import ChatRequest
from dynamo_serve.api.schema_tools import NamedTool, Tool
from dynamo_serve.api.thinking import template_arguments
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.dialect import Dialect, Parsing, ends_thinking

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def offered(body: ChatRequest, dialect: Dialect) -> list[Tool]:
    """The tools that the model may call, none with tool_choice none.

    Raises `InvalidRequest` and `UnsupportedField`.
    """
    check_tools(body.tools, dialect, body.names, is_shown=body.tool_choice != "none")
    _check_choice(body)
    return [] if body.tool_choice == "none" else list(body.tools)


def check_tools(
    tools: Sequence[Tool], dialect: Dialect, names: Names = OWN, *, is_shown: bool = True
) -> None:
    """Raises `InvalidRequest` and `UnsupportedField`."""
    known: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        if name in known:
            path = names.of(f"tools[{i}].function.name")
            raise InvalidRequest(f"'{path}': there are two tools called {name!r}.", param=path)
        known.add(name)
    if not (tools and is_shown):
        return
    if not dialect.takes_tools:
        raise UnsupportedField(
            "'tools': this model's chat template has no place for tools.", param="tools"
        )
    if not dialect.tools:
        raise UnsupportedField(
            "'tools': in which form this model calls them is not known here; the operator may say "
            "so with model.tool_parser.",
            param="tools",
        )


def _check_choice(body: ChatRequest) -> None:
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not body.tools:
        raise InvalidRequest("'tool_choice' needs 'tools'.", param="tool_choice")
    if isinstance(choice, NamedTool) and not callable_tools(body, body.tools):
        path = body.names.of("tool_choice.function.name")
        raise InvalidRequest(f"'{path}': {choice.function.name!r} is none of 'tools'.", param=path)


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as templates know them: a name, a description and a schema each."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                **({"description": tool.function.description} if tool.function.description else {}),
                "parameters": tool.function.parameters or NO_PARAMETERS,
            },
        }
        for tool in tools
    ]


async def chat_prompt(
    body: ChatRequest, encoder: TextEncoder, dialect: Dialect, limit: int | None = None
) -> tuple[list[int], Parsing | None]:
    """The token ids of a conversation, and how to read what follows them. `limit`: as for
    `TextEncoder.prompt_ids`.

    Raises `InvalidRequest`, `UnsupportedField` and what `TextEncoder.prompt_ids` raises.
    """
    tools = offered(body, dialect)
    arguments = template_arguments(body, dialect)
    shown = for_template(tools)
    prompt = await render_messages(
        body.messages, encoder.tokenizer, arguments, tools=shown, names=body.names
    )
    ids = await encoder.prompt_ids(prompt, limit, body.names.of("messages"))
    return ids, parsing_of(body, tools, dialect, prompt)


def callable_tools(body: ChatRequest, tools: Sequence[Tool]) -> list[Tool]:
    """Those of `tools` that may be called: all of them, or the one that was named."""
    choice = body.tool_choice
    if not isinstance(choice, NamedTool):
        return list(tools)
    return [tool for tool in tools if tool.function.name == choice.function.name]


def parsing_of(
    body: ChatRequest, tools: list[Tool], dialect: Dialect, prompt: str
) -> Parsing | None:
    """How to read the answer to `prompt`; None if all of it is content."""
    if not (tools or dialect.thoughts):
        return None
    is_thinking = ends_thinking(prompt, dialect.thoughts)
    if not tools:
        return Parsing(thoughts=dialect.thoughts, is_thinking=is_thinking)
    return Parsing(
        dialect.tools,
        tuple(tool.function.name for tool in callable_tools(body, tools)),
        isinstance(body.tool_choice, NamedTool) or not body.parallel_tool_calls,
        dialect.thoughts,
        is_thinking,
    )
