"""A queue in which tenants take turns."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Start-time fair queueing by measured seconds (Goyal, Vin, Cheng 1996): the tenant that has
    had the least goes first, and nobody saves up while they ask for nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._had: dict[str, float] = {}  # seconds; of those who wait, and of the one served
        self._served: str | None = None

    def push(self, tenant: str, thing: T) -> None:
        if tenant not in self._waiting:
            now = 0.0 if self._served is None else self._had[self._served]
            self._had[tenant] = max(self._had.get(tenant, 0.0), now)
        self._waiting.setdefault(tenant, deque()).append(thing)

    def pop(self) -> T | None:
        """The next to be done; None, and all is forgotten, if nothing is left."""
        if not self._waiting:
            self._served = None
            self._had.clear()
            return None
        tenant = self._served = min(self._waiting, key=self._had.__getitem__)
        things = self._waiting[tenant]
        thing = things.popleft()
        if not things:
            del self._waiting[tenant]
        return thing

    def discard(self, tenant: str, thing: T) -> None:
        """Forget what is not to be done any more, if it still waits."""
        things = self._waiting.get(tenant)
        if things is not None and thing in things:
            things.remove(thing)
            if not things:
                del self._waiting[tenant]

    def charge(self, seconds: float) -> None:
        """What the thing took that was popped last."""
        assert self._served is not None
        self._had[self._served] += seconds
