"""The JSON that leaves the server: chunks and whole answers, for chat and for completions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from dynamo_serve.api.echo import Echo, finite, likeliest, told
from dynamo_serve.api.job import Job
from dynamo_serve.core.request import Finish, Summary
from dynamo_serve.text.parts import CallPart, Parts
from dynamo_serve.text.stream import Delta, ScoredToken
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.forms import call_id

Json = dict[str, Any]

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Some clients end a line at these, as Python's splitlines does; an event must stay one line.
PIECE = 32  # elements of a list
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def to_json(value: object) -> str:
    """Compact JSON on a single line."""
    text = _encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def to_long_json(value: Any) -> str:
    """The same of what is long, in pieces: to encode it at once lets no other thread run."""
    match value:
        case dict():
            inner = (f"{to_json(key)}:{to_long_json(each)}" for key, each in value.items())
            return f"{{{','.join(inner)}}}"
        case list() | tuple() if len(value) > PIECE:
            starts = range(0, len(value), PIECE)
            return f"[{','.join(to_json(value[at : at + PIECE])[1:-1] for at in starts)}]"
        case list() | tuple():
            return f"[{','.join(map(to_long_json, value))}]"
    return to_json(value)


def answer(value: Any, status: int = 200) -> Response:
    """What was asked for, as JSON; numbers that are not finite are null."""
    return Response(to_json(plain(value)), status, media_type="application/json")


def plain(value: Any) -> Any:
    """`value` as JSON can have it: null for numbers that are not finite."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
    return value


class Renderer(Protocol):
    """The shapes of one endpoint. A choice is the dict for one element of `choices`."""

    object: str
    chunk_object: str

    def opening(self, index: int, first: Delta) -> Json | None:
        """What a choice begins with in a stream, before the text of its first delta."""
        ...

    def choice(self, index: int, delta: Delta, *, streamed: bool) -> Json:
        """A delta as a choice; a whole answer is rendered as a delta that has it all."""
        ...


class ChatRenderer:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer

    def opening(self, index: int, first: Delta) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, delta: Delta, *, streamed: bool) -> Json:
        choice: Json = {"index": index}
        if streamed:
            choice["delta"] = self._delta(index, delta)
        else:
            choice["message"] = self._message(index, delta)
        choice["logprobs"] = self._logprobs(delta.tokens)
        choice["finish_reason"] = delta.finish.value if delta.finish else None
        if delta.finish is Finish.STOP and delta.parts is not None and delta.parts.is_calling:
            choice["finish_reason"] = "tool_calls"
        if self._job.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice | ending(self._job, delta)

    def _delta(self, index: int, delta: Delta) -> Json:
        parts = delta.parts or Parts(delta.text)
        told: Json = {}
        if parts.thought:
            told["reasoning_content"] = parts.thought
        if parts.content:
            told["content"] = parts.content
        if parts.calls:
            told["tool_calls"] = [
                {"index": call.number, **self._call(index, call)} for call in parts.calls
            ]
        return told

    def _message(self, index: int, delta: Delta) -> Json:
        parts = delta.parts or Parts(delta.text)
        told: Json = {"role": "assistant", "content": parts.content, "refusal": None}
        if self._job.parsing is not None and self._job.parsing.thoughts:
            told["reasoning_content"] = parts.thought or None
        if parts.calls:
            told["content"] = parts.content or None
            told["tool_calls"] = [self._call(index, call) for call in parts.calls]
        return told

    def _call(self, index: int, part: CallPart) -> Json:
        """What is new of a call; its id is a function of the choice, so it survives a resume."""
        if part.name is None:
            return {"function": {"arguments": part.arguments}}
        assert self._job.parsing is not None
        return {
            "id": call_id(self._job.requests[index].id, part.number, self._job.parsing.tools),
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Json | None:
        if self._job.logprobs is None:
            return None
        return {"content": scored(tokens, self._tokenizer), "refusal": None}


class CompletionRenderer:
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        # Of each prompt: made once, and by whoever makes this, for it takes a while.
        self._echoes = [
            Echo(ids, tokenizer, job.logprobs) for ids in (job.prompts if job.echo else ())
        ]

    def opening(self, index: int, first: Delta) -> Json | None:
        if not (self._job.return_token_ids or self._job.echo):
            return None
        choice: Json = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        if self._job.echo:
            choice |= self._echo(index).before(choice, first.prompt_logprobs)
        if self._job.return_token_ids:
            choice["prompt_token_ids"] = self._job.requests[index].prompt_ids
        return choice

    def _echo(self, index: int) -> Echo:
        return self._echoes[index // self._job.n]

    def choice(self, index: int, delta: Delta, *, streamed: bool) -> Json:
        choice: Json = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, delta.tokens),
            "finish_reason": delta.finish.value if delta.finish else None,
        }
        if self._job.echo and not streamed:
            choice |= self._echo(index).before(choice, delta.prompt_logprobs)
        if self._job.prompt_logprobs is not None:
            choice["prompt_logprobs"] = told(
                self._job, index, delta.prompt_logprobs, self._tokenizer
            )
        if self._job.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if not streamed:
                choice["prompt_token_ids"] = self._job.requests[index].prompt_ids
        return choice | ending(self._job, delta)

    def _logprobs(self, index: int, tokens: Sequence[ScoredToken]) -> Json | None:
        if self._job.logprobs is None:
            return None
        begin = len(self._echo(index).text) if self._job.echo else 0
        return {
            "tokens": [self._tokenizer.token_text(t.logprob.token_id) for t in tokens],
            "token_logprobs": [finite(t.logprob.logprob) for t in tokens],
            "top_logprobs": [likeliest(t.logprob, self._tokenizer) for t in tokens],
            "text_offset": [begin + t.offset for t in tokens],
        }


def scored(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> list[Json]:
    """The log probability of each token, with those of the likeliest beside it."""

    def told(token_id: int, logprob: float) -> Json:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return [
        {
            **told(token.logprob.token_id, token.logprob.logprob),
            "top_logprobs": [told(*top) for top in token.logprob.top],
        }
        for token in tokens
    ]


def ending(job: Job, delta: Delta) -> Json:
    """What the end of a choice has besides."""
    if delta.finish is None:
        return {}
    told: Json = {"explain": explained(delta.summary)} if job.explain else {}
    if "finish_reason" in job.infers and delta.finish in (Finish.STOP, Finish.LENGTH):
        told["finish_reason_inferred"] = True
    return told


def explained(summary: Summary | None) -> Json | None:
    """Where the time of a choice went, for the client; times in ms."""
    if summary is None:
        return None
    return {
        "queue_ms": round(summary.queue_seconds * 1e3, 3),
        "transit_ms": round(summary.transit_seconds * 1e3, 3),
        "prefill_ms": round(summary.prefill_seconds * 1e3, 3),
        "decode_ms": round(summary.decode_seconds * 1e3, 3),
        "stall_ms": round(summary.stall_seconds * 1e3, 3),
        "device_ms": round(summary.device_seconds * 1e3, 3),
        "page_seconds": round(summary.page_seconds, 3),
        "cached_tokens": summary.cached_tokens,
        "num_preemptions": summary.num_preemptions,
        "draft_tokens": summary.draft_tokens,
        "draft_accepted_tokens": summary.draft_accepted,
    }


def renderer_of(job: Job, tokenizer: Tokenizer) -> Renderer:
    """How the choices of a job look: as messages, or as text that goes on."""
    return (CompletionRenderer if job.continues_text else ChatRenderer)(job, tokenizer)


class Envelope:
    """What surrounds the choices: the same in every chunk of a stream, so it is encoded once."""

    def __init__(self, job: Job, renderer: Renderer) -> None:
        self._job = job
        self._whole = self._head(renderer.object)
        self._head_json = to_json(self._head(renderer.chunk_object))[:-1] + ',"choices":['
        self._tail_json = '],"usage":null}' if job.include_usage else "]}"

    def _head(self, kind: str) -> Json:
        job = self._job
        return {
            "id": job.id,
            "object": kind,
            "created": job.created,
            "model": job.model,
            "system_fingerprint": job.fingerprint,
        }

    def chunk(self, choice: Json, encode: Callable[[Any], str] = to_json) -> str:
        return self._head_json + encode(choice) + self._tail_json

    def prompt_chunk(self, choice: Json, encode: Callable[[Any], str] = to_json) -> str:
        """A chunk that also carries the ids of the (one) prompt."""
        ids = to_json(self._job.prompts[0])
        return f'{self._head_json}{encode(choice)}],"prompt_token_ids":{ids}{self._tail_json[1:]}'

    def usage_chunk(self, usage: Json) -> str:
        return f'{self._head_json}],"usage":{to_json(usage)}}}'

    def whole(self, choices: list[Json], usage: Json) -> Json:
        body = {**self._whole, "choices": choices, "usage": usage}
        if self._job.return_token_ids and not self._job.continues_text:
            body["prompt_token_ids"] = self._job.prompts[0]
        return body
