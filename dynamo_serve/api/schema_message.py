"""What clients may send as a message."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from dynamo_serve.api.schema_base import MAX_NAME, Model, one_or_several
from dynamo_serve.api.schema_tools import MAX_CALL_ID, ToolCalls

MAX_PARTS = 1024  # of a message


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    type: str = Field(description="'text' is the only supported type.")
    text: str | None = None


class Message(Model):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="developer means system to models that do not know it; function is refused."
    )
    content: (
        Annotated[
            Annotated[str, Tag("#one")]
            | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), Tag("#several")],
            Discriminator(one_or_several),
        ]
        | None
    ) = Field(None, description="Text, or parts of type text, which are joined.")
    name: str | None = Field(
        None, max_length=MAX_NAME, description="Handed to the model's chat template."
    )
    tool_calls: ToolCalls | None = Field(
        None,
        description="assistant: what it called. Arguments that are a JSON object are handed "
        "to the template as one, else as text.",
    )
    tool_call_id: str | None = Field(
        None, max_length=MAX_CALL_ID, description="tool, required: which call this answers."
    )
    reasoning_content: str | None = Field(
        None, description="assistant: its thoughts. The template decides which it keeps."
    )
