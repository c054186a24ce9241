"""A call as the body of a request, and the call that goes on after an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from dynamo_serve.bench.plan import Call

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class BodyExtras:
    """What this endpoint is asked for besides: counts at the end of streams, where a server's time
    went (`explain` of our own), and fields for every request."""

    model: str = ""
    usage: bool = True
    explain: bool = False
    extra: tuple[tuple[str, Any], ...] = ()


def path_of(call: Call) -> str:
    if call.is_embedding:
        return EMBEDDINGS
    return CHAT if call.messages else COMPLETIONS


def body_of(call: Call, extras: BodyExtras) -> bytes:
    body: dict[str, Any] = {"model": extras.model} if extras.model else {}
    if call.messages:
        body["messages"] = [dict(message) for message in call.messages]
    else:
        name = "input" if call.is_embedding else "prompt"
        body[name] = call.prompt() if callable(call.prompt) else call.prompt
    if not call.is_embedding:
        body |= _of_answer(call, extras)
    if call.class_name:
        body["class"] = call.class_name
    if call.priority:
        body["priority"] = call.priority
    if call.deadline is not None:
        body["deadline_ms"] = max(1, round(call.deadline * 1e3))
    body |= dict(extras.extra)
    body |= call.extra
    return json.dumps(body, separators=(",", ":")).encode()


def _of_answer(call: Call, extras: BodyExtras) -> dict[str, Any]:
    """What is said of the text that is to come."""
    body: dict[str, Any] = {"max_tokens": call.max_tokens}
    if call.is_stream:
        body["stream"] = True
        if extras.usage:
            body["stream_options"] = {"include_usage": True}
    if extras.explain:
        body["explain"] = True
    return body


def after(before: Call, answer: str, call: Call) -> Call:
    """`call` with the conversation so far before its own messages, or text before its prompt."""
    if call.messages:
        said = {"role": "assistant", "content": answer}
        return replace(call, messages=(*before.messages, said, *call.messages))
    if isinstance(before.prompt, str) and isinstance(call.prompt, str):
        return replace(call, prompt=before.prompt + answer + call.prompt)
    return call  # ids cannot be joined with text: the planner has put the whole prompt into it
