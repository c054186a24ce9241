"""What clients may send to Anthropic's Messages API, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from dynamo_serve.api.schema import (
    INT64,
    MAX_MESSAGES,
    MAX_STOPS,
    Count,
    StopString,
)
from dynamo_serve.api.schema_base import DAY_MS, MAX_SALT, Model, one_or_several
from dynamo_serve.api.schema_message import MAX_PARTS
from dynamo_serve.api.schema_structured import NAME_OF_A_CITY
from dynamo_serve.api.schema_tools import EXAMPLE, MAX_CALL_ID, MAX_TOOLS, ToolName


class TextBlock(Model):
    type: Literal["text"] = Field(description="Text.")
    text: str = Field(description="The blocks of a turn are joined by line ends.")


class ThinkingBlock(Model):
    type: Literal["thinking"] = Field(description="assistant: thoughts of an earlier answer.")
    thinking: str = Field(description="Handed to the template, which decides what it keeps.")


class ToolUseBlock(Model):
    type: Literal["tool_use"] = Field(description="assistant: a call.")
    id: str = Field(min_length=1, max_length=MAX_CALL_ID, description="Handed to the template.")
    name: ToolName = Field(description="Of the tool that was called.")
    input: dict[str, Any] = Field(description="Its arguments.")


def _type_of(value: Any) -> str:
    """The tag of a block. The '#' keeps it out of error paths."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"#{kind}" if kind in BLOCKS else "#text"


Texts = Annotated[
    Annotated[str, Tag("#one")]
    | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("#several")],
    Discriminator(one_or_several),
]


class ToolResultBlock(Model):
    type: Literal["tool_result"] = Field(description="user: what a call came to.")
    tool_use_id: str = Field(
        min_length=1, max_length=MAX_CALL_ID, description="Which call. Handed to the template."
    )
    content: Texts = Field("", description="Text, or blocks of text.")
    is_error: bool = Field(
        False, description="The model is told: the content begins with 'Error: '."
    )


BLOCKS: dict[str, type[BaseModel]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")],
    Discriminator(_type_of),
]


class InputMessage(Model):
    role: Literal["user", "assistant", "system"] = Field(
        description="Neighbours of one role become one message."
    )
    content: Annotated[
        Annotated[str, Tag("#one")]
        | Annotated[list[Block], Field(max_length=MAX_PARTS, fail_fast=True), Tag("#several")],
        Discriminator(one_or_several),
    ] = Field(description="Text, or blocks: text, thinking, tool_use, tool_result.")


OFFERED = {
    "name": EXAMPLE["name"],
    "description": EXAMPLE["description"],
    "input_schema": EXAMPLE["parameters"],
}
TURNS = [
    [{"role": "user", "content": "What is the weather in Paris?"}],
    [
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": [
                {
                    "type": "tool_use",
                    "id": "call_1",
                    "name": "get_weather",
                    "input": {"city": "Paris"},
                }
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}],
        },
    ],
]


class OfferedTool(Model):
    type: Literal["custom"] = Field("custom", description="The only type there is.")
    name: ToolName = Field(description="Letters, digits and _-.:/, up to 128.")
    description: str | None = Field(None, description="What it does, for the model.")
    input_schema: dict[str, Any] = Field(description="JSON schema of its arguments.")
    strict: bool = Field(
        False,
        description="Arguments are made to fit the schema. With tool_choice any or tool they are "
        "without this, too.",
    )


class ToolWish(Model):
    type: Literal["auto", "any", "tool", "none"] = Field(
        description="auto: the model decides. any: one call or more. tool: the one that name says. "
        "none: tools are not shown to it."
    )
    name: ToolName | None = Field(None, description="Of one of the tools; only and always: tool.")
    disable_parallel_tool_use: bool = Field(
        False, description="The answer ends with its first call."
    )


class Thinking(Model):
    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="enabled, adaptive: the template's switch is on, if it has one. disabled: off; "
        "refused where thinking cannot be turned off."
    )
    budget_tokens: Count | None = Field(
        None,
        description="enabled: handed to templates that take one; with others of no effect, "
        "max_tokens is for thoughts and answer together.",
    )
    display: Literal["summarized"] | None = Field(
        None, description="Thoughts are told in full; omitted is refused."
    )


class OutputFormat(Model):
    type: Literal["json_schema"] = Field(description="The only type there is.")
    schema_: dict[str, Any] = Field(alias="schema", description="What the answer is to be.")


class OutputConfig(Model):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="For templates that take one, else refused."
    )
    format: OutputFormat | None = Field(
        None,
        description="JSON that fits a schema, enforced token by token.",
        examples=[{"type": "json_schema", "schema": NAME_OF_A_CITY}],
    )


class CountTokensRequest(Model):
    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    messages: list[InputMessage] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="The conversation so far; the last turn is not the assistant's.",
        examples=TURNS,
    )
    system: Texts | None = Field(None, description="Text, or blocks of text.")
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        [], description="What the model may call.", examples=[[OFFERED]]
    )
    tool_choice: ToolWish | None = Field(None, description="Without it: auto.")
    thinking: Thinking | None = Field(
        None, description="Without it: as the model's chat template has it."
    )
    output_config: OutputConfig | None = Field(None, description="What the answer has to be.")


class MessagesRequest(CountTokensRequest):
    max_tokens: Count = Field(
        description="Most tokens to generate, thoughts included. If there is no room for so many, "
        "the answer may end with stop_reason model_context_window_exceeded.",
        examples=[1024],
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] = Field(
        [], description="Strings that end the answer, left out of it."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from this much probability mass.")
    top_k: int = Field(0, ge=0, lt=INT64, description="Sample from so many tokens; 0 from all.")
    deadline_ms: int | None = Field(
        None, ge=1, le=DAY_MS, description="As in a chat; the answer then ends with deadline."
    )
    priority: int = Field(0, ge=0, le=100, description="As in a chat.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=MAX_SALT, description="As in a chat."
    )
    class_name: str | None = Field(None, alias="class", max_length=64, description="As in a chat.")
