"""Where a client is in a stream, and which streams can be gone on with."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

from dynamo_serve.api.job import Job
from dynamo_serve.errors import InvalidRequest, RequestNotFound, ServerHandover
from dynamo_serve.service import Service

NEW_SECONDS = 60
HEADER = "Last-Event-ID"
MOVED = (
    "This server has handed over to another, which has this stream: connect again, with the id of "
    "the last event in the header Last-Event-ID."
)
EVENT_ID = re.compile(r"([\w-]{1,64}):(\d{1,9}e?(?:,\d{1,9}e?)*)", re.ASCII)


class Mark(NamedTuple):
    """Where a client is in one choice: after so many tokens, and whether it has had the end."""

    num_tokens: int = 0
    is_ended: bool = False


def written(marks: Iterable[Mark]) -> str:
    """The part of an event's id behind the colon: "17", or "17,20e" for two choices."""
    return ",".join([f"{count}e" if is_ended else str(count) for count, is_ended in marks])


def resume(job: Job, last_id: str) -> dict[str, str]:
    """What a client needs that goes on with a stream over another connection."""
    return {"path": f"/v1/streams/{job.id}", "last_event_id": last_id}


def read(last: str) -> tuple[str, list[Mark]]:
    """The stream and the marks of an event's id; the bare id of a stream has none. Raises
    `InvalidRequest`."""
    if ":" not in last:
        return last, []
    match = EVENT_ID.fullmatch(last)
    if match is None:
        raise InvalidRequest(f"{HEADER!r} is not the id of an event.", param=HEADER)
    marks = [Mark(int(mark.rstrip("e")), mark.endswith("e")) for mark in match[2].split(",")]
    return match[1], marks


async def nowhere(tenant: str, id: str) -> None:
    """There is no other server that may have the stream."""


class Streams:
    """Jobs whose streams are live or kept, by the id of the answer, with their tenants.

    `fetch` brings a stream that is not here from the server that this one takes over from.
    """

    def __init__(self, service: Service) -> None:
        self.fetch: Callable[[str, str], Awaitable[None]] = nowhere
        self._service = service
        self._jobs: dict[str, tuple[str, Job]] = {}  # oldest first
        self._moved: set[str] = set()

    def add(self, tenant: str, job: Job) -> None:
        if not job.keep_seconds:
            return
        # Two looks for each newcomer are enough to catch up: whoever is kept is put last again.
        for _ in range(min(2, len(self._jobs))):
            oldest = next(iter(self._jobs))
            entry = self._jobs.pop(oldest)
            is_new = time.time() - entry[1].created < NEW_SECONDS  # it may not have begun yet
            if is_new or self._is_kept(entry[1]):
                self._jobs[oldest] = entry
        self._jobs[job.id] = tenant, job

    def entries(self) -> list[tuple[str, Job]]:
        """Every stream that is live or kept, with its tenant."""
        return [entry for entry in self._jobs.values() if self._is_kept(entry[1])]

    def move_out(self, id: str) -> None:
        """The next server has this stream."""
        del self._jobs[id]
        self._moved.add(id)

    async def seek(self, tenant: str, id: str) -> Job:
        """`find`, wherever the stream is."""
        if id not in self._jobs:
            await self.fetch(tenant, id)
        return self.find(tenant, id)

    def find(self, tenant: str, id: str) -> Job:
        """Raises the same `RequestNotFound` for another tenant's stream as for none."""
        if id in self._moved:
            raise ServerHandover(MOVED, retry_after=0.0)
        owner, job = self._jobs.get(id, ("", None))
        if job is None or owner != tenant or not self._is_kept(job):
            raise RequestNotFound(
                f"There is no stream {id[:64]!r} to go on with: its time is over, or it never was. "
                "Send the request again."
            )
        return job

    def _is_kept(self, job: Job) -> bool:
        return any(self._service.is_known(request.id) for request in job.requests)
