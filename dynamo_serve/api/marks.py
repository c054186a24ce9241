"""Where a client is in a stream, and which streams can be gone on with."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from dynamo_serve.api.job import Job
from dynamo_serve.errors import InvalidRequest, RequestNotFound
from dynamo_serve.service import Service

HEADER = "Last-Event-ID"
EVENT_ID = re.compile(r"([\w-]{1,64}):(\d{1,9}e?(?:,\d{1,9}e?)*)", re.ASCII)


class Mark(NamedTuple):
    """Where a client is in one choice: after so many tokens, and whether it has had the end."""

    num_tokens: int = 0
    is_ended: bool = False


def written(marks: Iterable[Mark]) -> str:
    """The part of an event's id behind the colon: "17", or "17,20e" for two choices."""
    return ",".join([f"{count}e" if is_ended else str(count) for count, is_ended in marks])


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


class Streams:
    """Jobs whose streams are live or kept, by the id of the answer, with their tenants."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, tuple[str, Job]] = {}  # oldest first

    def add(self, tenant: str, job: Job) -> None:
        if not job.keep_seconds:
            return
        # Two looks for each newcomer are enough to catch up: whoever is kept is put last again.
        for _ in range(min(2, len(self._jobs))):
            oldest = next(iter(self._jobs))
            entry = self._jobs.pop(oldest)
            if self._is_kept(entry[1]):
                self._jobs[oldest] = entry
        self._jobs[job.id] = tenant, job

    def find(self, tenant: str, id: str) -> Job:
        """Raises the same `RequestNotFound` for another tenant's stream as for none."""
        owner, job = self._jobs.get(id, ("", None))
        if job is None or owner != tenant or not self._is_kept(job):
            raise RequestNotFound(
                f"There is no stream {id[:64]!r} to go on with: its time is over, or it never was. "
                "Send the request again."
            )
        return job

    def _is_kept(self, job: Job) -> bool:
        return any(self._service.is_known(request.id) for request in job.requests)
