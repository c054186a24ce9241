"""Whose level is highest, of many whose levels change all the time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import Generic, Protocol, TypeVar

SPARE_ENTRIES = 64  # beyond two for each item, before they are cleared up


class Numbered(Protocol):
    """By its number an item wins over an equal one."""

    number: int

    def __hash__(self) -> int: ...


T = TypeVar("T", bound=Numbered)


class Ranking(Generic[T]):
    """A heap that is put right where it is looked at: an entry that says too much when it comes up;
    but what has risen has to be told (`rose`) before anybody looks. Level -inf is to be left out.
    """

    def __init__(self, level: Callable[[T], float]) -> None:
        self._level = level
        self._listed: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []

    def rose(self, item: T) -> None:
        """Its level may be higher than it was."""
        level = self._level(item)
        if level > self._listed.get(item, -inf):
            self._listed[item] = level
            heappush(self._heap, (-level, item.number, item))
            if len(self._heap) > 2 * len(self._listed) + SPARE_ENTRIES:
                self._heap = [(-level, item.number, item) for item, level in self._listed.items()]
                heapify(self._heap)

    def knows(self, item: T) -> bool:
        """Whether it has been told of all rises of an item."""
        return self._level(item) <= self._listed.get(item, -inf)

    def top(self, above: float = -inf) -> T | None:
        """The highest, if it is higher than that. Costs next to nothing where it is not."""
        heap, listed = self._heap, self._listed
        while heap and -heap[0][0] > above:
            entry, number, item = heap[0]
            level = self._level(item)
            if -entry == level:
                return item
            if -entry != listed.get(item):
                heappop(heap)  # listed anew since
            elif level == -inf:
                heappop(heap)
                del listed[item]
            else:
                listed[item] = level
                heapreplace(heap, (-level, number, item))
        return None

    def second(self) -> float:
        """After `top`: no level of another item is higher than this."""
        return max((-entry[0] for entry in self._heap[1:3]), default=-inf)
