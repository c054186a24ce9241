"""From messages, text or ids to the token ids of each prompt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from dynamo_serve.api.encoding import TextEncoder
from dynamo_serve.api.names import OWN, Names
from dynamo_serve.api.parse import is_deep
from dynamo_serve.api.schema import CompletionRequest
from dynamo_serve.api.schema_message import Message, Part
from dynamo_serve.api.schema_tools import ToolCall
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.tokenizer import Tokenizer

MAX_TEMPLATE_VALUES = 1024
At = Callable[[str], str]  # a message: the client's name of what is in it
INLINE_MESSAGES = 64  # rendering more than so many could hold up every other stream


async def render_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    names: Names = OWN,
) -> str:
    """The prompt text of a conversation, rendered on a thread if it is long or about tools.

    Raises `InvalidRequest` and `UnsupportedField`.
    """
    args = (messages, tokenizer, arguments, add_generation_prompt, tools, names)
    is_plain = not tools and not any(message.tool_calls for message in messages)
    if is_plain and len(messages) <= INLINE_MESSAGES:
        return _render(*args)
    return await asyncio.to_thread(_render, *args)


def _render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]],
    names: Names,
) -> str:
    _check_size(arguments, names)
    for name in arguments:
        if name in tokenizer.template_parameters:
            path = names.of(f"chat_template_kwargs.{name}")
            raise UnsupportedField(f"'{path}' is set by the server.", param=path)
    plain = [
        _plain(message, partial(names.in_message, i), tokenizer)
        for i, message in enumerate(messages)
    ]
    try:
        return tokenizer.render_chat(
            plain,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_arguments=arguments,
        )
    except InvalidRequest as error:
        error.param = names.of("messages")
        raise


def _check_size(arguments: Mapping[str, Any], names: Names) -> None:
    """What a template walks through has to be small: it is a program, and runs to its end."""
    waiting, num_values = [*arguments.values()], 0
    while waiting and num_values <= MAX_TEMPLATE_VALUES:
        value = waiting.pop()
        num_values += 1
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
    if num_values > MAX_TEMPLATE_VALUES:
        path = names.of("chat_template_kwargs")
        raise InvalidRequest(f"'{path}' holds more than {MAX_TEMPLATE_VALUES} values.", param=path)


def _plain(message: Message, at: At, tokenizer: Tokenizer) -> dict[str, Any]:
    """A message as templates know it."""
    role = message.role
    if role == "function":
        path = at("role")
        raise UnsupportedField(
            f"'{path}': messages of role 'function' are not supported; use 'tool'.", param=path
        )
    _check_fields(message, at, tokenizer)
    if role == "developer" and not tokenizer.knows_developer_role:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": _content(message, at)}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _check_fields(message: Message, at: At, tokenizer: Tokenizer) -> None:
    """Raise for what does not go with the role, or with the template."""
    own = {
        "tool_calls": ("assistant", message.tool_calls),
        "reasoning_content": ("assistant", message.reasoning_content),
        "tool_call_id": ("tool", message.tool_call_id),
    }
    for name, (role, value) in own.items():
        if value and message.role != role:
            path = at(name)
            raise InvalidRequest(f"'{path}' goes with messages of role {role!r}.", param=path)
    if message.role == "tool" and not message.tool_call_id:
        path = at("tool_call_id")
        raise InvalidRequest(f"'{path}' is required.", param=path)
    if (message.role == "tool" or message.tool_calls) and not tokenizer.takes_tools:
        path = at("role" if message.role == "tool" else "tool_calls")
        raise UnsupportedField(
            f"'{path}' is not supported: this model's chat template has no place for tools.",
            param=path,
        )


def _content(message: Message, at: At) -> str:
    if message.content is None:
        if message.tool_calls:
            return ""
        path = at("content")
        raise InvalidRequest(f"'{path}' is required.", param=path)
    if isinstance(message.content, str):
        return message.content
    parts = enumerate(message.content)
    return "".join(_part_text(part, at, f"content[{i}]") for i, part in parts)


def _plain_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(text: str) -> dict[str, Any] | str:
    """As an object, which is what most templates expect; as text if it is none, or an odd one."""
    try:
        value = json.loads(text or "{}")
        if isinstance(value, dict) and not is_deep(value):
            json.dumps(value, ensure_ascii=False).encode()  # half a character is in no prompt
            return value
    except (ValueError, RecursionError):
        pass
    return text


def _part_text(part: Part, at: At, inner: str) -> str:
    if part.type != "text":
        path = at(f"{inner}.type")
        raise UnsupportedField(
            f"'{path}': parts of type {part.type[:40]!r} are not supported, only 'text'.",
            param=path,
        )
    # cache_control and the like would be lost on the way to the template.
    if extra := next((k for k, v in (part.model_extra or {}).items() if v is not None), None):
        path = at(f"{inner}.{extra[:40]}")
        raise UnsupportedField(f"'{path}' is not supported.", param=path)
    if part.text is None:
        path = at(f"{inner}.text")
        raise InvalidRequest(f"'{path}' is required.", param=path)
    return part.text


async def completion_prompts(
    body: CompletionRequest,
    encoder: TextEncoder,
    vocab_size: int,
    max_prompts: int,
    limit: int | None = None,
) -> list[list[int]]:
    """The ids of each prompt; text gets the special tokens the model wants, ids are taken as is.
    `limit`: as for `TextEncoder.prompt_ids`."""
    texts, id_lists = prompt_kind(body.prompt)
    if len(texts) + len(id_lists) > max_prompts:
        raise InvalidRequest(
            f"'prompt': {len(texts) + len(id_lists)} prompts in one request, "
            f"the limit is {max_prompts}.",
            param="prompt",
        )
    for i, ids in enumerate(id_lists):
        path = "prompt" if isinstance(body.prompt[0], int) else f"prompt[{i}]"
        check_ids(ids, vocab_size, path)
    prompts = [
        await encoder.prompt_ids(text, limit, "prompt", add_special_tokens=True) for text in texts
    ]
    if not all(prompts):
        raise InvalidRequest("'prompt' is empty.", param="prompt")
    return prompts + id_lists


def prompt_kind(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str], list[list[int]]]:
    """The texts and the id lists of a prompt field; one of the two is empty."""
    if isinstance(prompt, str):
        return [prompt], []
    # The schema has seen to it that all are like the first; a walk over a million ids takes time.
    first = prompt[0] if prompt else []
    if isinstance(first, str):
        return cast(list[str], prompt), []
    return [], cast(list[list[int]], prompt if isinstance(first, list) else [prompt])


def check_ids(ids: Sequence[int], vocab_size: int, path: str) -> None:
    """Raise `InvalidRequest` naming the first id that the model does not have."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):  # there may be a million of them
        return
    for at, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"'{path}[{at}]': token id {str(token_id)[:40]} is out of range, "
                f"the vocabulary has {vocab_size}.",
                param=f"{path}[{at}]",
            )
