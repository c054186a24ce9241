"""Servers of models that call tools and think, played by a stub that says what it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from dynamo_serve.config import Config, ModelSection
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import Script, StubService, says
from tests.text.tiny import byte_level

MARKS = ["<think>", "[TOOL_CALLS]", "[ARGS]"]
TURNS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "CALL {{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}"
    "{% if m.tool_call_id %} FOR {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
HERMES = TURNS + "{# <tool_call> #}"
MISTRAL = TURNS + "{# [TOOL_CALLS] #}"
THINKING = HERMES + (
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% elif enable_thinking is true %}"
    "<think>\n{% endif %}"
)
GRADED = HERMES + "{{ reasoning_effort }} {{ thinking_budget }}{# </think> #}"


def tokenizer_of(template: str) -> Tokenizer:
    """Marks are special tokens, as in some families."""
    tokenizer: PreTrainedTokenizerFast = byte_level(template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return Tokenizer(tokenizer)


def one_after_another(tokenizer: Tokenizer, answers: Sequence[str]) -> Script:
    """Each request gets the next of `answers`."""
    left = list(answers)

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        async for event in says(tokenizer, left.pop(0))(request):
            yield event

    return script


def cut_short(tokenizer: Tokenizer, text: str) -> Script:
    return says(tokenizer, text, finish=Finish.LENGTH)


@contextlib.contextmanager
def talking(
    template: str, script: Callable[[Tokenizer], Script], **model: Any
) -> Generator[tuple[StubService, str]]:
    """A server whose model has this template and says what `script` tells it to."""
    tokenizer = tokenizer_of(template)
    service = StubService(script(tokenizer))
    service.spec = replace(service.spec, max_model_len=4096)  # a token here is about a letter
    settings: Config = replace(config(), model=ModelSection(**model))
    with serving(service, tokenizer, settings) as base:
        yield service, base
