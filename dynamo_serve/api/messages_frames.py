"""The events of a stream as Anthropic's Messages API has them, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_serve.api.choices import Head, Tally
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Mark, written
from dynamo_serve.api.messages_blocks import Blocks
from dynamo_serve.api.messages_errors import error_body
from dynamo_serve.api.messages_render import ending, message, usage
from dynamo_serve.api.render import to_json
from dynamo_serve.errors import RequestError
from dynamo_serve.text.stream import Delta

Json = dict[str, Any]


def frame(event: Json, id: str = "") -> bytes:
    """One server-sent event; its name is its type."""
    first = f"id: {id}\n" if id else ""
    return f"{first}event: {event['type']}\ndata: {to_json(event)}\n\n".encode()


PING = frame({"type": "ping"})


class MessageWriter:
    """An `EventWriter`. An id is at the last event of a step, and stands for all of them: who goes
    on with a stream forgets what came after the last id."""

    closing = b""

    def __init__(self, job: Job, *, shows_ids: bool = True) -> None:
        self._job = job
        self._blocks = Blocks(job)
        self._shows_ids = shows_ids
        self._mark = Mark()
        self._has_begun = False
        self._last: Delta | None = None
        self.last_id = self._written() if job.keep_seconds else ""

    def skip(self, index: int, head: Head) -> None:
        self._mark = head.mark
        self._has_begun = head.mark != Mark()
        for delta in head.told:
            for _ in self._blocks.add(delta):
                pass
        self.last_id = self._written()

    def events(self, index: int, delta: Delta) -> bytes:
        opening = b"" if self._has_begun else self._open(delta)
        self._mark = Mark(self._mark.num_tokens + len(delta.token_ids))
        events = list(self._blocks.add(delta))
        if delta.finish is None:
            return opening + self._frames(events)
        self._last = delta
        # These go without an id: the next one is that of the end.
        return opening + b"".join(map(frame, [*events, *self._blocks.close()]))

    def end(self, tally: Tally) -> bytes:
        if self._last is None:  # the client has had it
            return b""
        told = ending(self._job, self._last, self._mark.num_tokens)
        self._mark = self._mark._replace(is_ended=True)
        delta = {"type": "message_delta", "delta": told, "usage": usage(tally)}
        return self._frames([delta, {"type": "message_stop"}])

    def fault(self, error: RequestError) -> bytes:
        return frame(error_body(error))

    def _open(self, delta: Delta) -> bytes:
        self._has_begun = True
        tally = Tally(self._job)
        tally.add(0, delta)
        start = message(self._job, [], {}, usage(tally))
        return self._frames([{"type": "message_start", "message": start}])

    def _frames(self, events: Sequence[Json]) -> bytes:
        if not events:
            return b""
        *others, last = events
        return b"".join(map(frame, others)) + frame(last, self._id())

    def _id(self) -> str:
        if not self._job.keep_seconds:
            return ""
        self.last_id = self._written()
        return self.last_id if self._shows_ids else ""

    def _written(self) -> str:
        return f"{self._job.id}:{written([self._mark])}"
