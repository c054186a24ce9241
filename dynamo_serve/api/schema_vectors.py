"""What clients may send to have texts embedded, or documents reranked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from dynamo_serve.api.schema import INT64, Count, PromptField
from dynamo_serve.api.schema_base import Model, Scheduled

INPUTS = ["How long is a page?", ["a first text", "a second one"], [101, 7592, 102]]
DOCUMENTS = [["Paris lies on the Seine.", {"text": "Bread is made of flour."}]]


class Vectors(Scheduled):
    """What embeddings and reranking have in common."""

    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        lt=INT64,
        description="Keep so many tokens of what is longer, its first ones; -1: as many as the "
        "model takes. Without it, what is too long is refused.",
    )


class EmbeddingRequest(Vectors):
    input: PromptField = Field(
        description="A string, a list of strings, token ids, or a list of lists of token ids.",
        examples=INPUTS,
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: 32-bit floats of little-endian machines."
    )
    dimensions: Count | None = Field(
        None,
        description="Keep so many numbers, the first ones; for models that were trained for it.",
    )
    normalize: bool = Field(
        True, description="Of length 1, after `dimensions`; false: as the model has it."
    )


class Document(Model):
    text: str = Field(description="What it says.")


def _kind(value: Any) -> str:
    """The '#' keeps the tag out of error paths."""
    return "#object" if isinstance(value, dict) else "#text"


DocumentField = Annotated[
    Annotated[str, Tag("#text")] | Annotated[Document, Tag("#object")], Discriminator(_kind)
]


class RerankRequest(Vectors):
    query: str = Field(min_length=1, description="What is looked for.")
    documents: Annotated[list[DocumentField], Field(fail_fast=True)] = Field(
        min_length=1, description="Texts, or objects with a text.", examples=DOCUMENTS
    )
    top_n: Count | None = Field(None, description="So many results, the best ones; default: all.")
    return_documents: bool = Field(True, description="Results carry the text of their document.")
    raw_scores: bool = Field(
        False, description="Of cross-encoders: the logit, instead of its sigmoid."
    )
