"""The events of a stream as bytes, ready to be sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from dynamo_serve.api.choices import Head, Tally, Updates
from dynamo_serve.api.echo import scores_many
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Mark, resume, written
from dynamo_serve.api.render import Envelope, Renderer, to_json, to_long_json
from dynamo_serve.errors import RequestError, ServerHandover
from dynamo_serve.text.parts import Parts
from dynamo_serve.text.stream import Delta

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment: clients skip it
MARK = "\0"  # stands for the text of an event; in no id, and in no name of a model


class EventWriter(Protocol):
    """Writes the events of one job as its endpoint has them. `last_id` is the id of the last."""

    last_id: str

    def skip(self, index: int, head: Head) -> None:
        """The client has this much of a choice."""
        ...

    def events(self, index: int, delta: Delta) -> bytes:
        """What a delta adds to a choice, and before the first what the choice opens with."""
        ...

    def end(self, tally: Tally) -> bytes:
        """What follows when all choices have ended."""
        ...

    def fault(self, error: RequestError) -> bytes:
        """The end of a stream that goes wrong. Without an id: the client's last one stays valid."""
        ...

    @property
    def closing(self) -> bytes:
        """What comes last, whatever has happened."""
        ...


async def frames(
    first: tuple[int, Delta] | None,
    updates: Updates,
    job: Job,
    writer: EventWriter,
    heads: Sequence[Head] = (),
) -> AsyncGenerator[bytes, None]:
    """What each update adds to the stream; an error after the first token is an event too. Of a
    stream that is gone on with, `heads` are what the client has of each choice."""
    tally = Tally(job)
    for index, head in enumerate(heads):
        tally.add(index, head.counted)
        writer.skip(index, head)
    update = first
    try:
        while update is not None:
            tally.add(*update)
            if scores_many((update[1],)):
                events = await asyncio.to_thread(writer.events, *update)
            else:
                events = writer.events(*update)
            if events:
                yield events
            update = await anext(updates, None)
        if end := writer.end(tally):
            yield end
    except RequestError as error:
        if isinstance(error, ServerHandover):
            error.resume = resume(job, writer.last_id)
        yield writer.fault(error)
    except Exception:
        logger.exception("request %s failed in the middle of its stream", job.id)
        yield writer.fault(RequestError("The server failed; its log says why."))
    if writer.closing:
        yield writer.closing


class Writer:
    """An `EventWriter` of chunks, as chat and plain completions have them."""

    closing = DONE

    def __init__(self, job: Job, renderer: Renderer, *, shows_ids: bool = True) -> None:
        self._job = job
        self._renderer = renderer
        self._envelope = Envelope(job, renderer)
        self._verbose = job.return_token_ids
        self._prompt_first = job.return_token_ids and not job.continues_text
        self._only_text = job.logprobs is None and not job.return_token_ids
        self._around: dict[int, tuple[bytes, bytes]] = {}  # of each choice that has begun
        self._prefix = f"{job.id}:" if job.keep_seconds else ""
        self._shows_ids = shows_ids
        self._marks = [Mark()] * len(job.requests)
        self.last_id = self._written() if job.keep_seconds else ""

    def skip(self, index: int, head: Head) -> None:
        mark = self._marks[index] = head.mark
        self.last_id = self._written()
        if mark.num_tokens or mark.is_ended:
            self._around[index] = self._split(index)

    def events(self, index: int, delta: Delta) -> bytes:
        around = self._around.get(index)
        if around is None:
            self._around[index] = self._split(index)
            opening = self._opening(index, delta)
            return (self._id() + opening if opening else b"") + self.events(index, delta)
        count = self._marks[index].num_tokens + len(delta.token_ids)
        self._marks[index] = Mark(count, delta.finish is not None)
        parts = delta.parts or Parts(delta.text)
        is_plain = self._only_text and delta.finish is None and not (parts.thought or parts.calls)
        if is_plain and parts.content:  # nearly all there ever are
            before, after = around
            return self._id() + before + to_json(parts.content).encode() + after
        if parts.is_telling or delta.finish or delta.tokens or self._verbose:
            return self._id() + self._choice(index, delta)
        return b""

    def _id(self) -> bytes:
        """The line that says how far a client is that has this event."""
        if not self._prefix:
            return b""
        self.last_id = self._written()
        return f"id: {self.last_id}\n".encode() if self._shows_ids else b""

    def _written(self) -> str:
        return f"{self._prefix}{written(self._marks)}"

    def end(self, tally: Tally) -> bytes:
        if not self._job.include_usage:
            return b""
        return _frame(self._envelope.usage_chunk(tally.usage()))

    def fault(self, error: RequestError) -> bytes:
        return _frame(to_json(error.body()))

    def _split(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text in an event that has nothing else to say."""
        before, after = self._choice(index, Delta(MARK, ())).split(to_json(MARK).encode())
        return before, after

    def _opening(self, index: int, delta: Delta) -> bytes:
        opening = self._renderer.opening(index, delta)
        if opening is None:
            return b""
        envelope = self._envelope
        chunk = envelope.prompt_chunk if self._prompt_first else envelope.chunk
        return _frame(chunk(opening, _encoder(delta)))

    def _choice(self, index: int, delta: Delta) -> bytes:
        choice = self._renderer.choice(index, delta, streamed=True)
        return _frame(self._envelope.chunk(choice, _encoder(delta)))


def _encoder(delta: Delta) -> Callable[[Any], str]:
    return to_long_json if scores_many((delta,)) else to_json


def _frame(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"
