"""The models of request bodies: what is in them, and what becomes of fields they do not have."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from dynamo_serve.api import (
    fields,
    fields_responses,
    fields_vectors,
    messages_fields,
    schema,
    schema_responses,
    schema_tools,
    schema_vectors,
)
from dynamo_serve.api.by_type import Inner
from dynamo_serve.api.schema_admin import SteerRequest
from dynamo_serve.api.schema_message import Message
from dynamo_serve.api.schema_structured import ResponseFormat, StructuredOutputs

KNOWN: dict[type[BaseModel], Mapping[str, fields.Known]] = {
    schema.ChatRequest: fields.CHAT,
    schema.CompletionRequest: fields.COMPLETION,
    schema.TokenizeRequest: fields.TOKENS,
    schema.DetokenizeRequest: fields.TOKENS,
    SteerRequest: {},
    schema.PrefixRequest: {},
    Message: fields.MESSAGE,
    schema.StreamOptions: fields.STREAM_OPTIONS,
    schema_tools.Tool: {},
    schema_tools.Function: {},
    schema_tools.NamedTool: {},
    schema_tools.NamedFunction: {},
    schema_tools.ToolCall: {},
    schema_tools.CalledFunction: fields.CALLED_FUNCTION,
    ResponseFormat: fields.RESPONSE_FORMAT,
    StructuredOutputs: fields.STRUCTURED_OUTPUTS,
    schema_vectors.EmbeddingRequest: fields_vectors.EMBEDDING,
    schema_vectors.RerankRequest: fields_vectors.RERANK,
    schema_vectors.Document: {},
    **fields_responses.KNOWN,
    **messages_fields.KNOWN,
}
GENERATION: dict[str, Inner] = {
    "stream_options": schema.StreamOptions,
    "response_format": ResponseFormat,
    "structured_outputs": StructuredOutputs,
}
# Of each model the fields that are objects of ours, or lists of them.
INNER: dict[type[BaseModel], Mapping[str, Inner]] = {
    schema.ChatRequest: {
        **GENERATION,
        "messages": Message,
        "tools": schema_tools.Tool,
        "tool_choice": schema_tools.NamedTool,
    },
    schema.CompletionRequest: GENERATION,
    schema.TokenizeRequest: {"messages": Message, "tools": schema_tools.Tool},
    schema.PrefixRequest: {"messages": Message, "tools": schema_tools.Tool},
    Message: {"tool_calls": schema_tools.ToolCall},
    schema_tools.Tool: {"function": schema_tools.Function},
    schema_tools.NamedTool: {"function": schema_tools.NamedFunction},
    schema_tools.ToolCall: {"function": schema_tools.CalledFunction},
    schema_responses.ResponsesRequest: {
        "structured_outputs": StructuredOutputs,
        "input": fields_responses.ITEMS,
        "tools": fields_responses.TOOLS,
        "tool_choice": fields_responses.CHOICES,
        "text": schema_responses.TextConfig,
        "reasoning": schema_responses.ReasoningConfig,
    },
    schema_responses.MessageItem: {"content": fields_responses.PARTS},
    schema_responses.FunctionCallOutputItem: {"output": fields_responses.PARTS},
    schema_responses.ReasoningItem: {"content": schema_responses.ReasoningPart},
    schema_responses.TextConfig: {"format": schema_responses.TextFormat},
    schema_vectors.RerankRequest: {"documents": schema_vectors.Document},
    **messages_fields.INNER,
}
