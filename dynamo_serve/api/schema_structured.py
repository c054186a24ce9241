"""What clients may send to say what an answer has to be: OpenAI's field, and vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dynamo_serve.api.schema_base import Model

MAX_CHOICES = 10_000
MAX_SCHEMA_NAME = 64
NAME_OF_A_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMATS = [
    {"type": "json_schema", "json_schema": {"name": "place", "schema": NAME_OF_A_CITY}},
    {"type": "json_object"},
]
STRUCTURES = [
    {"json": NAME_OF_A_CITY},
    {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
    {"choice": ["yes", "no"]},
    {"grammar": 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/'},
]


class JsonSchema(Model):
    name: str = Field(max_length=MAX_SCHEMA_NAME, description="For people; not shown to the model.")
    description: str | None = Field(None, description="As name.")
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="What the answer is to be; without it, any JSON value."
    )
    strict: bool | None = Field(
        None, description="No difference: a schema is always followed as it stands, or refused."
    )


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text is no constraint."
    )
    json_schema: JsonSchema | None = Field(None, description="Only, and always, for its type.")


def _schema_kind(value: Any) -> str:
    return "#text" if isinstance(value, str) else "#bool" if isinstance(value, bool) else "#object"


# Tags, so that a fault is at the field and not at one of its types.
AnySchema = Annotated[
    Annotated[dict[str, Any], Tag("#object")]
    | Annotated[bool, Tag("#bool")]
    | Annotated[str, Tag("#text")],
    Discriminator(_schema_kind),
]


class StructuredOutputs(Model):
    """Exactly one of the first five."""

    json_: AnySchema | None = Field(
        None, alias="json", description="A JSON schema, or the text of one."
    )
    regex: str | None = Field(
        None, min_length=1, description="A regular expression (Rust's) that the answer matches."
    )
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
        ]
        | None
    ) = Field(None, description="The answer is one of these texts.")
    grammar: str | None = Field(
        None, min_length=1, description="A context-free grammar: Lark, or GBNF with ::= rules."
    )
    json_object: bool | None = Field(None, description="The answer is any JSON object.")
    disable_any_whitespace: bool = Field(
        False, description="json, json_object: no white space between the parts."
    )
