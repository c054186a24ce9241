"""Finding a request again by the X-Request-Id it came with, also before it has an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dynamo_serve.core.request import Request
from dynamo_serve.service import Service

KEPT = 1000  # finished ones; the live are kept besides


class Ids(NamedTuple):
    """Of a response and of its choices."""

    response: str
    choices: Sequence[str]


class Answering(Protocol):
    """What is remembered: a response and the requests behind it."""

    @property
    def id(self) -> str: ...

    @property
    def requests(self) -> Sequence[Request]: ...


class Lookup:
    """X-Request-Id → response id, within a tenant."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ids: dict[tuple[str, str], Ids] = {}  # oldest first

    def add(self, tenant: str, request_id: str, asked: Answering) -> None:
        """Remember a request; a second one with the same id takes its place."""
        self._ids.pop((tenant, request_id), None)
        # Not itself, for it holds the prompts.
        self._ids[tenant, request_id] = Ids(asked.id, [request.id for request in asked.requests])
        # Two looks for each newcomer are enough to catch up after a wave of live ones.
        for _ in range(min(2, len(self._ids) - KEPT)):
            oldest = next(iter(self._ids))
            ids = self._ids.pop(oldest)
            if any(map(self._service.is_live, ids.choices)):
                self._ids[oldest] = ids

    def find(self, tenant: str, id: str) -> str:
        """The response id that `id` stands for: itself, if it is no X-Request-Id of the tenant."""
        ids = self._ids.get((tenant, id))
        return ids.response if ids else id
