"""The fields that clients are known to send to /v1/responses, and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from dynamo_serve.api.by_type import ByType
from dynamo_serve.api.fields import COMMON, Known, bookkeeping, only, refused
from dynamo_serve.api.schema_responses import (
    LOGPROBS,
    ChosenFunction,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    MessageItem,
    ReasoningConfig,
    ReasoningItem,
    ReasoningPart,
    ReferenceItem,
    ResponsesRequest,
    TextConfig,
    TextFormat,
    TextPart,
    kind_without_type,
)

TOLD = ("user", "metadata", "store")  # bookkeeping elsewhere
RETURNED = bookkeeping("a client sends back what an answer carried")

RESPONSES: dict[str, Known] = {
    **{name: known for name, known in COMMON.items() if name not in TOLD},
    "background": refused("answers come at once, or as a stream", only(False)),
    "background_options": refused("answers come at once, or as a stream"),
    "conversation": refused("use previous_response_id"),
    "prompt": refused("send instructions and input"),
    "truncation": refused("prompts are never cut", only("disabled")),
    "context_management": refused("prompts are never cut", only([])),
    "max_tool_calls": bookkeeping("bounds the server's own tools, of which there are none"),
    "access_programs": refused("there are none"),
    "image": refused("the answer is text"),
    "stream_options": refused(
        "usage comes with the last event",
        lambda value, body: isinstance(value, dict) and not set(value) - {"include_obfuscation"},
    ),
    "messages": refused("use input"),
    "n": refused("there is one answer", only(1)),
    "max_tokens": refused("use max_output_tokens"),
    "max_completion_tokens": refused("use max_output_tokens"),
    "response_format": refused("use text.format"),
    "reasoning_effort": refused("use reasoning.effort"),
    "logprobs": refused(f"use include: [{LOGPROBS!r}]", only(False)),
    "return_token_ids": refused("see /tokenize", only(False)),
    "prompt_logprobs": refused("use /v1/chat/completions or /v1/completions"),
    "echo": refused("items are not repeated", only(False)),
}
MESSAGE_ITEM: dict[str, Known] = {
    "status": RETURNED,
    "phase": bookkeeping("templates know no phases"),
}
CALLER: dict[str, Known] = {
    "status": RETURNED,
    "caller": refused("there are no programs that call", only({"type": "direct"})),
    "namespace": refused("tools have no namespaces"),
    "created_by": RETURNED,
}
CALL_ITEM: dict[str, Known] = {
    **CALLER,
    "async": refused("calls are waited for", only(False)),
    "parsed_arguments": bookkeeping("what the official client made of the arguments"),
}
OUTPUT_ITEM: dict[str, Known] = {**CALLER, "name": bookkeeping("call_id says which call it is")}
REASONING_ITEM: dict[str, Known] = {
    "status": RETURNED,
    "summary": refused("thoughts are told whole, in content", only([])),
    "encrypted_content": refused("thoughts are told in the open, in content"),
}
TEXT_PART: dict[str, Known] = {
    "annotations": RETURNED,
    "logprobs": RETURNED,
    "parsed": bookkeeping("what the official client made of the text"),
    "prompt_cache_breakpoint": bookkeeping("equal prompt heads are shared without it"),
}
TOOL: dict[str, Known] = {
    "async": refused("calls are waited for", only(False)),
    "allowed_callers": refused("there are no programs that call", only([], ["direct"])),
    "defer_loading": refused("tools are always shown", only(False)),
    "output_schema": refused("say it in the description"),
}
TEXT: dict[str, Known] = {"verbosity": refused("say it in instructions", only("medium"))}
REASONING: dict[str, Known] = {
    "summary": refused("thoughts are told whole", only("auto")),
    "generate_summary": refused("thoughts are told whole", only("auto")),
    "context": refused("the template decides which thoughts it keeps", only("auto")),
    "mode": refused("there is one way to think", only("standard")),
}


def _these(
    models: dict[str, type[BaseModel]], default: str | Callable[[Mapping[str, Any]], str] = ""
) -> ByType:
    return ByType(models, f"only {', '.join(map(repr, models))}", default)


ITEMS = _these(
    {
        "message": MessageItem,
        "function_call": FunctionCallItem,
        "function_call_output": FunctionCallOutputItem,
        "reasoning": ReasoningItem,
        "item_reference": ReferenceItem,
    },
    kind_without_type,
)
TOOLS = _these({"function": FunctionTool})
CHOICES = _these({"function": ChosenFunction})
PARTS = _these({"input_text": TextPart, "output_text": TextPart})
TITLES = (
    *("the request", "a message", "a call", "what came of a call", "thoughts", "a reference"),
    *("a part of thoughts", "a part of text", "a tool", "tool_choice", "text", "text.format"),
    "reasoning",
)
KNOWN: dict[type[BaseModel], Mapping[str, Known]] = {  # in the order of `TITLES`
    ResponsesRequest: RESPONSES,
    MessageItem: MESSAGE_ITEM,
    FunctionCallItem: CALL_ITEM,
    FunctionCallOutputItem: OUTPUT_ITEM,
    ReasoningItem: REASONING_ITEM,
    ReferenceItem: {},
    ReasoningPart: {},
    TextPart: TEXT_PART,
    FunctionTool: TOOL,
    ChosenFunction: {},
    TextConfig: TEXT,
    TextFormat: {},
    ReasoningConfig: REASONING,
}
