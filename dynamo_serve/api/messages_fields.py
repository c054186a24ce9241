"""What becomes of fields of Anthropic's Messages API that are not in our models: see `fields`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from dynamo_serve.api import schema_messages
from dynamo_serve.api.by_type import ByType, Inner
from dynamo_serve.api.fields import Known, bookkeeping, only, refused

CACHED = {"cache_control": bookkeeping("equal prompt heads are shared without it")}

# Its clients go on without a thread when they are told this.
NO_THREADS = refused("no conversation is kept here")._replace(code="thread_unsupported_request")

COUNT: dict[str, Known] = {
    **CACHED,
    "speed": refused("there is one speed", only("standard")),
    "thread": NO_THREADS,
    "compaction": refused("messages are not edited"),
    "mcp_servers": refused("tools are called by the client", only([])),
    "context_management": refused("messages are not edited"),
    "output_format": refused("use output_config.format"),
}

MESSAGES: dict[str, Known] = {
    **COUNT,
    "metadata": bookkeeping("names the end user"),
    "service_tier": bookkeeping("there is one tier"),
    "container": refused("nothing is run here but the model"),
    "diagnostics": refused("use /v1/cache/explain"),
    "inference_geo": refused("there is one place"),
    "fallbacks": refused("there is one model", only([])),
    "fallback_credit_token": refused("there is one model"),
    "billing_policy": bookkeeping("nothing is billed here"),
}

TEXT: dict[str, Known] = {
    **CACHED,
    "citations": refused("there are no documents to cite", only([])),
    "parsed_output": bookkeeping("what the official client made of the text"),
}

THINKING: dict[str, Known] = {
    "signature": bookkeeping("thoughts may be anybody's"),
}

TOOL_USE: dict[str, Known] = {
    **CACHED,
    "caller": refused("only the model calls tools", only({"type": "direct"})),
    "toolset_name": refused("there are no toolsets"),
}

TOOL_RESULT: dict[str, Known] = {
    **CACHED,
    "toolset_name": refused("there are no toolsets"),
}

OFFERED_TOOL: dict[str, Known] = {
    **CACHED,
    "eager_input_streaming": bookkeeping("arguments are always streamed as they come"),
    "input_examples": refused("say it in the description", only([])),
    "allowed_callers": refused("only the model calls tools", only(["direct"])),
    "defer_loading": refused("tools are always shown", only(False)),
}

OUTPUT_CONFIG: dict[str, Known] = {
    "task_budget": refused("there is max_tokens"),
}

KNOWN: dict[type[BaseModel], Mapping[str, Known]] = {
    schema_messages.MessagesRequest: MESSAGES,
    schema_messages.CountTokensRequest: COUNT,
    schema_messages.InputMessage: {},
    schema_messages.TextBlock: TEXT,
    schema_messages.ThinkingBlock: THINKING,
    schema_messages.ToolUseBlock: TOOL_USE,
    schema_messages.ToolResultBlock: TOOL_RESULT,
    schema_messages.OfferedTool: OFFERED_TOOL,
    schema_messages.ToolWish: {},
    schema_messages.Thinking: {},
    schema_messages.OutputConfig: OUTPUT_CONFIG,
    schema_messages.OutputFormat: {},
}

TEXTS = ByType({"text": schema_messages.TextBlock}, "only text is")
BODY: dict[str, Inner] = {
    "messages": schema_messages.InputMessage,
    "system": TEXTS,
    "tools": ByType(
        {"custom": schema_messages.OfferedTool},
        "only tools are that the client describes and runs",
        "custom",
    ),
    "tool_choice": schema_messages.ToolWish,
    "thinking": schema_messages.Thinking,
    "output_config": schema_messages.OutputConfig,
}
INNER: dict[type[BaseModel], Mapping[str, Inner]] = {
    schema_messages.MessagesRequest: BODY,
    schema_messages.CountTokensRequest: BODY,
    schema_messages.InputMessage: {
        "content": ByType(
            schema_messages.BLOCKS, "only text, thinking, tool_use and tool_result are"
        )
    },
    schema_messages.ToolResultBlock: {"content": TEXTS},
    schema_messages.OutputConfig: {"format": schema_messages.OutputFormat},
}
