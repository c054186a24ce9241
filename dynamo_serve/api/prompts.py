"""From messages, text or ids to the token ids of each prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from dynamo_serve.api.schema import CompletionRequest, Message, Part
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.tokenizer import Tokenizer

MAX_TEMPLATE_VALUES = 1024
INLINE_MESSAGES = 64  # rendering more than so many could hold up every other stream


async def render_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    """The prompt text of a conversation, rendered on a thread if it is long.

    Raises `InvalidRequest` and `UnsupportedField`.
    """
    if len(messages) <= INLINE_MESSAGES:
        return _render(messages, tokenizer, arguments, add_generation_prompt)
    return await asyncio.to_thread(_render, messages, tokenizer, arguments, add_generation_prompt)


def _render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    arguments: Mapping[str, Any],
    add_generation_prompt: bool,
) -> str:
    _check_size(arguments)
    for name in arguments:
        if name in tokenizer.template_parameters:
            raise UnsupportedField(
                f"'chat_template_kwargs.{name}' is set by the server.",
                param=f"chat_template_kwargs.{name}",
            )
    return tokenizer.render_chat(
        [_plain(m, f"messages[{i}]", tokenizer) for i, m in enumerate(messages)],
        add_generation_prompt=add_generation_prompt,
        template_arguments=arguments,
    )


def _check_size(arguments: Mapping[str, Any]) -> None:
    """What a template walks through has to be small: it is a program, and runs to its end."""
    waiting, num_values = [*arguments.values()], 0
    while waiting and num_values <= MAX_TEMPLATE_VALUES:
        value = waiting.pop()
        num_values += 1
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
    if num_values > MAX_TEMPLATE_VALUES:
        raise InvalidRequest(
            f"'chat_template_kwargs' holds more than {MAX_TEMPLATE_VALUES} values.",
            param="chat_template_kwargs",
        )


def _plain(message: Message, path: str, tokenizer: Tokenizer) -> dict[str, str]:
    role = message.role
    if role in ("tool", "function"):
        raise UnsupportedField(
            f"'{path}.role': messages of role {role!r} are not supported yet.", param=f"{path}.role"
        )
    if role == "developer" and not tokenizer.knows_developer_role:
        role = "system"
    if message.content is None:
        raise InvalidRequest(f"'{path}.content' is required.", param=f"{path}.content")
    if isinstance(message.content, str):
        content = message.content
    else:
        content = "".join(
            _part_text(part, f"{path}.content[{i}]") for i, part in enumerate(message.content)
        )
    plain = {"role": role, "content": content}
    return plain if message.name is None else plain | {"name": message.name}


def _part_text(part: Part, path: str) -> str:
    if part.type != "text":
        raise UnsupportedField(
            f"'{path}.type': parts of type {part.type[:40]!r} are not supported, only 'text'.",
            param=f"{path}.type",
        )
    # cache_control and the like would be lost on the way to the template.
    if extra := next((k for k, v in (part.model_extra or {}).items() if v is not None), None):
        raise UnsupportedField(
            f"'{path}.{extra[:40]}' is not supported.", param=f"{path}.{extra[:40]}"
        )
    if part.text is None:
        raise InvalidRequest(f"'{path}.text' is required.", param=f"{path}.text")
    return part.text


async def completion_prompts(
    body: CompletionRequest, tokenizer: Tokenizer, vocab_size: int, max_prompts: int
) -> list[list[int]]:
    """The ids of each prompt; text gets the special tokens the model wants, ids are taken as is."""
    texts, id_lists = _prompt_kind(body.prompt)
    if len(texts) + len(id_lists) > max_prompts:
        raise InvalidRequest(
            f"'prompt': {len(texts) + len(id_lists)} prompts in one request, "
            f"the limit is {max_prompts}.",
            param="prompt",
        )
    for i, ids in enumerate(id_lists):
        path = "prompt" if isinstance(body.prompt[0], int) else f"prompt[{i}]"
        check_ids(ids, vocab_size, path)
    prompts = [await tokenizer.encode_async(text, add_special_tokens=True) for text in texts]
    if not all(prompts):
        raise InvalidRequest("'prompt' is empty.", param="prompt")
    return prompts + id_lists


def _prompt_kind(
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
