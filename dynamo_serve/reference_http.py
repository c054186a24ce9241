"""The generated page of endpoints, request fields and errors."""

from __future__ import annotations

from typing import Any

from dynamo_serve.api import fields, fields_responses, fields_vectors, messages_fields
from dynamo_serve.api import schema_messages as of
from dynamo_serve.api.app import create_app
from dynamo_serve.api.fields import field_rows
from dynamo_serve.api.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from dynamo_serve.api.schema_message import Message
from dynamo_serve.api.schema_structured import JsonSchema, ResponseFormat, StructuredOutputs
from dynamo_serve.api.schema_tools import Function, ToolCall
from dynamo_serve.api.schema_vectors import EmbeddingRequest, RerankRequest
from dynamo_serve.config import Config
from dynamo_serve.errors import RequestError
from dynamo_serve.reference_tables import GENERATED, cell, table


def http_page() -> str:
    """Endpoints, request fields and errors."""

    tables = (
        ("/v1/chat/completions", field_rows(ChatRequest, fields.CHAT)),
        ("A message", field_rows(Message, fields.MESSAGE)),
        ("A call in a message", field_rows(ToolCall, {})),
        ("The function of a tool", field_rows(Function, {})),
        ("/v1/completions", field_rows(CompletionRequest, fields.COMPLETION)),
        ("/tokenize", field_rows(TokenizeRequest, fields.TOKENS)),
        ("/detokenize", field_rows(DetokenizeRequest, fields.TOKENS)),
        ("/v1/embeddings", field_rows(EmbeddingRequest, fields_vectors.EMBEDDING)),
        ("/v1/rerank", field_rows(RerankRequest, fields_vectors.RERANK)),
        ("stream_options", field_rows(StreamOptions, fields.STREAM_OPTIONS)),
        ("response_format", field_rows(ResponseFormat, fields.RESPONSE_FORMAT)),
        ("response_format.json_schema", field_rows(JsonSchema, {})),
        ("structured_outputs", field_rows(StructuredOutputs, fields.STRUCTURED_OUTPUTS)),
        *_responses(),
        *_messages_tables(),
    )
    parts = [
        GENERATED + "# HTTP\n\nThe server describes itself in full at `/openapi.json`. "
        "This page says what\nbecomes of the fields that clients are known to send.\n\n",
        table(("Endpoint", "What it does"), _endpoints()),
        "\nA *supported* field has the effect it is known for. A *bookkeeping* field is accepted "
        "and has\nno effect on the answer. A *refused* field would change the answer and is not "
        "built: it gets a\n400 that names it, unless its value asks for what happens anyway. Any "
        "other field is unknown:\na 400 as well, or a warning in the log if "
        "`server.unknown_fields` is `warn`. `null` means not given.\n",
    ]
    for title, rows in tables:
        lines = [(f"`{name}`", status, cell(why)) for name, status, why in rows]
        parts.append(f"\n## {title}\n\n" + table(("Field", "Status", "Remark"), lines))
    parts.append("\n## Errors\n\n" + table(("Status", "Code", "Type"), _errors()))
    return "".join(parts)


def _responses() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The tables of /v1/responses: of the request, and of what is in it."""
    names = ("/v1/responses", *(f"Responses: {name}" for name in fields_responses.TITLES[1:]))
    models = fields_responses.KNOWN.items()
    return [(name, field_rows(*model)) for name, model in zip(names, models, strict=True)]


def _messages_tables() -> list[tuple[str, list[tuple[str, str, str]]]]:
    titles: dict[str, Any] = {
        "/v1/messages": of.MessagesRequest,
        "/v1/messages/count_tokens": of.CountTokensRequest,
        "A turn": of.InputMessage,
        **{f"A block of type {kind}": model for kind, model in of.BLOCKS.items()},
        "A tool of /v1/messages": of.OfferedTool,
        "tool_choice of /v1/messages": of.ToolWish,
        "thinking": of.Thinking,
        "output_config": of.OutputConfig,
        "output_config.format": of.OutputFormat,
    }
    return [
        (title, field_rows(model, messages_fields.KNOWN[model])) for title, model in titles.items()
    ]


def _endpoints() -> list[tuple[str, str]]:
    unused: Any = None  # routes are declared without touching what they will use
    parts = (unused, unused, Config(), unused, unused)
    app = create_app(*parts, model_names=["unused"], dialect=unused)
    return [
        (f"`{method.upper()} {path}`", " ".join(operation["description"].split()))
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]


def _errors() -> list[tuple[str, str, str]]:
    def tree(error: type[RequestError]) -> list[type[RequestError]]:
        return [error, *(leaf for child in error.__subclasses__() for leaf in tree(child))]

    ours = [e for e in tree(RequestError) if e.__module__.startswith("dynamo_serve.")]
    return sorted({(str(e.status), f"`{e.code}`", f"`{e.type}`") for e in ours})
