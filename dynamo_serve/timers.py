"""One timer for each of many things, by id."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timers:
    """A new timer of the same id takes the place of the old one."""

    def __init__(self) -> None:
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def start(self, id: str, seconds: float, then: Callable[[], None]) -> None:
        def ring() -> None:
            del self._handles[id]
            then()

        self.stop(id)
        self._handles[id] = asyncio.get_running_loop().call_later(seconds, ring)

    def left(self, id: str) -> float | None:
        """Seconds until it rings; None if there is no such timer."""
        handle = self._handles.get(id)
        if handle is None:
            return None
        return max(0.0, handle.when() - asyncio.get_running_loop().time())

    def stop(self, id: str) -> None:
        if handle := self._handles.pop(id, None):
            handle.cancel()
