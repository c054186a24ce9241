"""What clients may send about tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dynamo_serve.api.schema_base import Model

MAX_TOOLS = 128
MAX_CALLS = 128  # of a message
MAX_CALL_ID = 256

# No character that JSON escapes, so that a name reads the same wherever it is written.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


EXAMPLE = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


class Function(Model):
    name: ToolName = Field(description="Letters, digits and _-.:/, up to 128.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(
        None,
        description="Arguments are made to fit the schema. With tool_choice required or a named "
        "one they are without this, too.",
    )


class Tool(Model):
    type: Literal["function"] = Field(description="The only type there is.")
    function: Function = Field(
        description="A name, what it does, and a schema.", examples=[EXAMPLE]
    )


class NamedFunction(Model):
    name: ToolName = Field(description="Of one of the tools.")


class NamedTool(Model):
    type: Literal["function"] = Field(description="The only type there is.")
    function: NamedFunction = Field(description="Which one.")


def _choice_kind(value: Any) -> str:
    return "#named" if isinstance(value, dict) else "#word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#word")]
    | Annotated[NamedTool, Tag("#named")],
    Discriminator(_choice_kind),
]


class CalledFunction(Model):
    name: ToolName = Field(description="Of the tool that was called.")
    arguments: str = Field(
        description="JSON, as the model wrote it. Empty: none.", examples=['{"city": "Paris"}']
    )


class ToolCall(Model):
    id: str = Field(
        min_length=1, max_length=MAX_CALL_ID, description="Handed to the model's chat template."
    )
    type: Literal["function"] = Field("function", description="The only type there is.")
    function: CalledFunction = Field(description="A name, and arguments as JSON in a text.")
    index: int | None = Field(None, description="Left over from a stream; of no effect.")


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolCalls = Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
