"""The events of a stream as bytes, ready to be sent."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Protocol

from dynamo_serve.api.choices import Tally, Updates
from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Mark, resume, written
from dynamo_serve.api.render import Envelope, Renderer, to_json
from dynamo_serve.errors import RequestError, ServerHandover
from dynamo_serve.text.parts import Parts
from dynamo_serve.text.stream import Delta

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
MARK = "\0"  # stands for the text of an event; in no id, and in no name of a model


class EventWriter(Protocol):
    """Writes the events of one answer, whatever they look like."""

    def events(self, index: int, delta: Delta) -> bytes:
        """What a delta adds to a choice."""
        ...

    def ending(self) -> bytes:
        """What comes when every choice has ended."""
        ...

    def failure(self, error: RequestError) -> bytes:
        """What comes in place of the rest."""
        ...


async def frames(
    first: tuple[int, Delta] | None, updates: Updates, writer: EventWriter, name: str
) -> AsyncGenerator[bytes, None]:
    """What each update adds to the stream; an error after the first token is an event too. The log
    knows the request by its `name`."""
    update = first
    try:
        while update is not None:
            if events := writer.events(*update):
                yield events
            update = await anext(updates, None)
        yield writer.ending()
    except RequestError as error:
        yield writer.failure(error)
    except Exception:
        logger.exception("request %s failed in the middle of its stream", name)
        yield writer.failure(RequestError("The server failed; its log says why."))


class Writer:
    """Writes the events of a chat, or of a completion."""

    def __init__(self, job: Job, renderer: Renderer, *, shows_ids: bool = True) -> None:
        self._job = job
        self._tally = Tally(job)
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

    def skip(self, index: int, mark: Mark, head: Delta) -> None:
        """The client has this much of a choice."""
        self._tally.add(index, head)
        self._marks[index] = mark
        self.last_id = self._written()
        if mark.num_tokens or mark.is_ended:
            self._around[index] = self._split(index)

    def events(self, index: int, delta: Delta) -> bytes:
        """What a delta adds to a choice, and before the first what the choice opens with."""
        self._tally.add(index, delta)
        if index in self._around:
            return self._told(index, delta)
        self._around[index] = self._split(index)
        opening = self._opening(index)
        return (self._id() + opening if opening else b"") + self._told(index, delta)

    def _told(self, index: int, delta: Delta) -> bytes:
        count = self._marks[index].num_tokens + len(delta.token_ids)
        self._marks[index] = Mark(count, delta.finish is not None)
        parts = delta.parts or Parts(delta.text)
        is_plain = self._only_text and delta.finish is None and not (parts.thought or parts.calls)
        if is_plain and parts.content:  # nearly all there ever are
            before, after = self._around[index]
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

    def ending(self) -> bytes:
        if not self._job.include_usage:
            return DONE
        return _frame(self._envelope.usage_chunk(self._tally.usage())) + DONE

    def failure(self, error: RequestError) -> bytes:
        if isinstance(error, ServerHandover):
            error.resume = resume(self._job, self.last_id)
        # Without an id: the client's last one stays valid.
        return _frame(to_json(error.body())) + DONE

    def _split(self, index: int) -> tuple[bytes, bytes]:
        """The bytes before and after the text in an event that has nothing else to say."""
        before, after = self._choice(index, Delta(MARK, ())).split(to_json(MARK).encode())
        return before, after

    def _opening(self, index: int) -> bytes:
        opening = self._renderer.opening(index)
        if opening is None:
            return b""
        envelope = self._envelope
        return _frame((envelope.prompt_chunk if self._prompt_first else envelope.chunk)(opening))

    def _choice(self, index: int, delta: Delta) -> bytes:
        return _frame(self._envelope.chunk(self._renderer.choice(index, delta, streamed=True)))


def _frame(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"
