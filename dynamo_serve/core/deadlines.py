"""When requests have to end at the latest."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf

from dynamo_serve.core.request import Request


class Deadlines:
    """A heap; of those that are gone some are still in it. `is_live` tells of a request's id."""

    def __init__(self, is_live: Callable[[str], bool]) -> None:
        self._is_live = is_live
        self._heap: list[tuple[float, str]] = []

    def add(self, request: Request, num_live: int) -> None:
        """Watch a request; now and then forget those that are gone."""
        if request.deadline == inf:
            return
        if len(self._heap) > 2 * num_live + 64:
            self._heap = list({at for at in self._heap if self._is_live(at[1])})
            heapify(self._heap)
        heappush(self._heap, (request.deadline, request.id))

    def pop(self, now: float) -> list[str]:
        """The ids whose time is over."""
        over: list[str] = []
        while self._heap and self._heap[0][0] <= now:
            over.append(heappop(self._heap)[1])
        return over

    @property
    def next(self) -> float:
        return self._heap[0][0] if self._heap else inf
