"""The response as an object, and its stream of events; the object is the fold of the stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from dynamo_serve.api.choices import Head, Tally
from dynamo_serve.api.frames import PING
from dynamo_serve.api.job import Job
from dynamo_serve.api.render import explained, to_json
from dynamo_serve.api.responses_output import Event, Json, Output
from dynamo_serve.api.schema_responses import ResponsesRequest
from dynamo_serve.core.request import Finish
from dynamo_serve.errors import QuotaExceeded, RequestError
from dynamo_serve.text.stream import Delta
from dynamo_serve.text.tokenizer import Tokenizer

CUT = {Finish.LENGTH: "max_output_tokens", Finish.DEADLINE: "deadline"}


def head_of(body: ResponsesRequest, job: Job, *, store: bool) -> Json:
    """What a response says of its request, from its first event to its last."""
    nested = {"text", "reasoning", "tool_choice"}
    told = body.model_dump(by_alias=True, exclude_none=True, include=nested)
    return {
        "id": job.id,
        "object": "response",
        "created_at": job.created,
        "model": job.model,
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **told.get("reasoning", {})},
        "service_tier": "default",
        "store": store,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, **told.get("text", {})},
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def usage_of(tally: Tally) -> Json:
    """Token counts as /v1/responses names them."""
    usage = tally.usage()
    thought = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    details = {**usage["prompt_tokens_details"], "cache_write_tokens": 0}  # nothing is set apart
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": details,
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["total_tokens"],
        **({"inferred": True} if "inferred" in usage else {}),
    }


class ResponseWriter:
    """Writes the events of a response, as an `EventWriter`.

    `keep` is told the response once it has ended, and says whether it is kept: the last thing that
    becomes known of it.
    """

    last_id = ""  # events have none
    closing = b""

    def __init__(
        self, job: Job, tokenizer: Tokenizer, head: Json, keep: Callable[[Json], bool]
    ) -> None:
        self._job = job
        self._head = head
        self._keep = keep
        self._output = Output(job, tokenizer)
        self._last = Delta("", ())
        self._number = 0

    def events(self, index: int, delta: Delta) -> bytes:
        begun = self._beginning() if not self._number else b""
        return begun + b"".join([self._event(*event) for event in self.take(delta)])

    def skip(self, index: int, head: Head) -> None:
        raise NotImplementedError("streams of responses are not gone on with")

    def end(self, tally: Tally) -> bytes:
        response = self.response(tally)
        return self._event(f"response.{response['status']}", {"response": response})

    def fault(self, error: RequestError) -> bytes:
        begun = self._beginning() if not self._number else b""
        code = "rate_limit_exceeded" if isinstance(error, QuotaExceeded) else "server_error"
        ends = [self._event(*event) for event in self._output.cut()]
        told = self._told("failed", {"code": code, "message": error.message}) | {"store": False}
        return begun + b"".join(ends) + self._event("response.failed", {"response": told})

    def take(self, delta: Delta) -> list[Event]:
        """Add a delta; what it comes to."""
        self._last = delta
        return self._output.push(delta)

    def response(self, tally: Tally) -> Json:
        """The whole of it, once it has ended."""
        cut = CUT.get(self._last.finish) if self._last.finish is not None else None
        told = self._told("incomplete" if cut else "completed", None)
        told |= {"usage": usage_of(tally)}
        if cut:
            told["incomplete_details"] = {"reason": cut}
        else:
            told["completed_at"] = int(time.time())
        if self._job.explain:
            told["explain"] = explained(self._last.summary)
        told["store"] = self._head["store"] and self._keep(told)
        return told

    def _told(self, status: str, error: Json | None) -> Json:
        return {
            **self._head,
            "status": status,
            "error": error,
            "incomplete_details": None,
            "completed_at": None,
            "output": [*self._output.items],
            "usage": None,
        }

    def _beginning(self) -> bytes:
        response = self._told("in_progress", None)
        return b"".join(
            self._event(f"response.{name}", {"response": response})
            for name in ("created", "in_progress")
        )

    def _event(self, kind: str, said: dict[str, Any]) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **said}
        self._number += 1
        return f"event: {kind}\ndata: {to_json(event)}\n\n".encode()


class ResponseFace:
    """How one response looks: as a stream, or as the object that such a stream would end with."""

    ping = PING

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer

    def writer(self, *, shows_ids: bool) -> ResponseWriter:
        return self._writer

    def whole(self, answers: Sequence[Sequence[Delta]], tally: Tally) -> Json:
        (deltas,) = answers
        for delta in deltas:
            self._writer.take(delta)
        return self._writer.response(tally)
