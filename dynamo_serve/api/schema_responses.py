"""What clients may send to /v1/responses: a conversation of items, and how to answer it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from dynamo_serve.api.schema import (
    INT64,
    MAX_MESSAGES,
    MAX_TEMPLATE_VARIABLES,
    MAX_TOP_LOGPROBS,
    Count,
    Sampled,
)
from dynamo_serve.api.schema_base import Model, one_or_several
from dynamo_serve.api.schema_message import MAX_PARTS
from dynamo_serve.api.schema_structured import MAX_SCHEMA_NAME, NAME_OF_A_CITY
from dynamo_serve.api.schema_tools import EXAMPLE, MAX_CALL_ID, MAX_TOOLS, Effort, ToolName

MAX_ITEM_ID = 256
MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"
ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
TOOL: dict[str, Any] = {"type": "function", **EXAMPLE}

ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ITEM_ID)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_CALL_ID)]


class TextPart(Model):
    type: Literal["input_text", "output_text"] = Field(description="The types there are.")
    text: str = Field(description="The parts of a message are joined.")


TextOrParts = Annotated[
    Annotated[str, Tag("#one")]
    | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("#several")],
    Discriminator(one_or_several),
]


class MessageItem(Model):
    type: Literal["message"] = Field("message", description="May be left out.")
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer means system to models that do not know it."
    )
    content: TextOrParts = Field(description="Text, or parts of it.")
    id: ItemId | None = Field(None, description="Told back with kept items.")


class FunctionCallItem(Model):
    type: Literal["function_call"] = Field(description="What the model called.")
    call_id: CallId = Field(description="Handed to the model's chat template.")
    name: ToolName = Field(description="Of the tool.")
    arguments: str = Field(
        description="JSON, as the model wrote it. Empty: none.", examples=['{"city": "Paris"}']
    )
    id: ItemId | None = Field(None, description="Told back with kept items.")


class FunctionCallOutputItem(Model):
    type: Literal["function_call_output"] = Field(description="What came of a call.")
    call_id: CallId = Field(description="Of which call.")
    output: TextOrParts = Field(description="Text, or parts of it.")
    id: ItemId | None = Field(None, description="Told back with kept items.")


class ReasoningPart(Model):
    type: Literal["reasoning_text"] = Field(description="The only type there is.")
    text: str = Field(description="What the model thought.")


class ReasoningItem(Model):
    type: Literal["reasoning"] = Field(description="What the model thought before an answer.")
    content: list[ReasoningPart] = Field(
        [], max_length=MAX_PARTS, description="The template decides what it keeps of it."
    )
    id: ItemId | None = Field(None, description="Told back with kept items.")


class ReferenceItem(Model):
    type: Literal["item_reference"] = Field("item_reference", description="May be left out.")
    id: ItemId = Field(description="Of an item of a kept response.")


class FunctionTool(Model):
    type: Literal["function"] = Field(description="The only type there is.")
    name: ToolName = Field(description="Letters, digits and _-.:/, up to 128.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(
        None,
        description="Arguments are made to fit the schema. Not unless it is said; with tool_choice "
        "required or a named one in any case.",
    )


class ChosenFunction(Model):
    type: Literal["function"] = Field(description="The only type there is.")
    name: ToolName = Field(description="Of one of the tools.")


class TextFormat(Model):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text is no constraint."
    )
    name: str | None = Field(
        None, max_length=MAX_SCHEMA_NAME, description="json_schema, required: for people."
    )
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="json_schema, required: what the answer is to be."
    )
    description: str | None = Field(None, description="As name.")
    strict: bool | None = Field(
        None, description="No difference: a schema is always followed as it stands, or refused."
    )


class TextConfig(Model):
    format: TextFormat | None = Field(
        None,
        description="What the answer has to be: any text, or JSON.",
        examples=[{"type": "json_schema", "name": "place", "schema": NAME_OF_A_CITY}],
    )


class ReasoningConfig(Model):
    effort: Effort | None = Field(
        None, description="For templates that take one; none turns thinking off where it can be."
    )


def kind_without_type(item: Mapping[str, Any]) -> str:
    """What an item is that does not say its type."""
    return "item_reference" if "id" in item and "role" not in item else "message"


def _item_kind(value: Any) -> str:
    """The tag of an item; `fields_responses.ITEMS` has seen to it that there is one."""
    kind = getattr(value, "type", None)
    if isinstance(value, dict):
        kind = value.get("type") or kind_without_type(value)
    return f"#{kind if kind in ITEMS else 'message'}"


def _choice_kind(value: Any) -> str:
    return "#named" if isinstance(value, (dict, ChosenFunction)) else "#word"


Item = Annotated[
    Annotated[MessageItem, Tag("#message")]
    | Annotated[FunctionCallItem, Tag("#function_call")]
    | Annotated[FunctionCallOutputItem, Tag("#function_call_output")]
    | Annotated[ReasoningItem, Tag("#reasoning")]
    | Annotated[ReferenceItem, Tag("#item_reference")],
    Discriminator(_item_kind),
]
Input = Annotated[
    Annotated[str, Tag("#one")]
    | Annotated[
        list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("#several")
    ],
    Discriminator(one_or_several),
]
Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")]
    | Annotated[ChosenFunction, Tag("#named")],
    Discriminator(_choice_kind),
]
EXAMPLES: list[Any] = [
    {"input": "Say hello.", "max_output_tokens": 32},
    {"input": [{"role": "user", "content": "What is the weather in Paris?"}], "tools": [TOOL]},
    {
        "input": "Where is the Eiffel Tower?",
        "instructions": "Answer in JSON.",
        "text": {"format": {"type": "json_schema", "name": "place", "schema": NAME_OF_A_CITY}},
        "stream": True,
    },
]
ANSWER: dict[str, Any] = {
    "id": "resp_0123456789abcdef01234567",
    "object": "response",
    "created_at": 1764000000,
    "completed_at": 1764000001,
    "status": "completed",
    "model": "dserve-tiny",
    "output": [
        {
            "type": "message",
            "id": "msg_0123456789abcdef01234567_0",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
            ],
        }
    ],
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    },
}


class ResponsesRequest(Sampled):
    model_config = ConfigDict(json_schema_extra={"examples": EXAMPLES})

    input: Input = Field(description="A text, which is a message of the user, or items.")
    instructions: str | None = Field(
        None, description="A system message before all others; not carried on to the next response."
    )
    max_output_tokens: Count | None = Field(
        None,
        description="Most tokens to generate, thoughts included. Default: all there is room for.",
    )
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        [], description="What the model may call.", examples=[[TOOL]]
    )
    tool_choice: Choice | None = Field(
        None,
        description="none (tools are not shown to the model), auto (the default with tools), "
        "required, or a named one.",
        examples=["auto", {"type": "function", "name": "get_weather"}],
    )
    parallel_tool_calls: bool = Field(
        True, description="false: the answer ends with its first call."
    )
    text: TextConfig | None = Field(None, description="What the answer has to be.")
    reasoning: ReasoningConfig | None = Field(None, description="How much the model thinks.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        [],
        max_length=8,
        description="message.output_text.logprobs: the log probability of each token. "
        "reasoning.encrypted_content changes nothing: thoughts come in the open.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description=f"So many of the likeliest tokens beside each; needs {LOGPROBS} in include.",
    )
    store: bool | None = Field(
        None, description="Keep the answer: see responses.store. Not given: as the server does."
    )
    previous_response_id: str | None = Field(
        None,
        max_length=MAX_ITEM_ID,
        description="A kept response: its conversation goes before input.",
    )
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_METADATA),
    ] = Field({}, description="The caller's own notes, told back.")
    user: str | None = Field(None, max_length=512, description="Names the end user; told back.")
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        max_length=MAX_TEMPLATE_VARIABLES,
        description="Further variables for the model's chat template (enable_thinking, ...).",
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, lt=INT64, description="For templates that take one: tokens to think in."
    )
