"""The shapes of an answer in Anthropic's Messages API: a message, its counts, why it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dynamo_serve.api.choices import Tally
from dynamo_serve.api.job import Job
from dynamo_serve.api.messages_blocks import Blocks, folded
from dynamo_serve.core.request import Finish
from dynamo_serve.text.stream import Delta

Json = dict[str, Any]
INVALID = "INVALID_JSON"  # of a call's input that is no JSON object, as Anthropic's manual has it


def message(job: Job, content: list[Json], ending: Json, usage: Json) -> Json:
    """A message, or the beginning of one."""
    return {
        "id": job.id,
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        **ending,
        "usage": usage,
    }


def whole_message(job: Job, deltas: Sequence[Delta], tally: Tally) -> Json:
    """An answer from all its deltas: the fold of what a stream shows."""
    blocks = Blocks(job)
    events = [event for delta in deltas for event in blocks.add(delta)]
    content, texts = folded([*events, *blocks.close()])
    for block, text in zip(content, texts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
    num_tokens = sum(len(delta.token_ids) for delta in deltas)
    return message(job, content, ending(job, deltas[-1], num_tokens), usage(tally))


def _input(text: str) -> Json:
    """The arguments of a call. What broke off is told, too."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {INVALID: text}
    return value if isinstance(value, dict) else {INVALID: text}


def ending(job: Job, last: Delta, num_tokens: int) -> Json:
    """Why an answer of so many tokens ended."""
    reason, sequence = _reason(job, last, num_tokens), None
    if reason == "stop_sequence":
        sequence = last.matched
    told: Json = {"stop_reason": reason, "stop_sequence": sequence}
    if "finish_reason" in job.infers and last.finish in (Finish.STOP, Finish.LENGTH):
        told["stop_reason_inferred"] = True
    return told


def _reason(job: Job, last: Delta, num_tokens: int) -> str:
    request = job.requests[0]
    match last.finish:
        case Finish.STOP if last.parts is not None and last.parts.is_calling:
            return "tool_use"
        case Finish.STOP:
            return "end_turn" if last.matched is None else "stop_sequence"
        case Finish.LENGTH if request.is_open_ended and num_tokens >= request.max_tokens:
            return "model_context_window_exceeded"
        case Finish.LENGTH:
            return "max_tokens"
    assert last.finish is not None, "it has ended"
    return str(last.finish.value)


def usage(tally: Tally) -> Json:
    """Token counts: the parts of the prompt add up, nothing is counted twice. Writing to the cache
    costs nothing here, so nothing is told of it."""
    counts = tally.usage()
    cached = counts["prompt_tokens_details"]["cached_tokens"]
    told: Json = {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"],
    }
    if details := counts.get("completion_tokens_details"):
        told["output_tokens_details"] = {"thinking_tokens": details["reasoning_tokens"]}
    return {**told, **({"inferred": True} if "inferred" in counts else {})}
