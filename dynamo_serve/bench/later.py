"""Work that must not keep the event loop from its reads: done in slices, whenever none wait."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")
SLICE_S = 0.0003


class Later:
    """Runs generators, a slice at a time, between the loop's turns."""

    def __init__(self) -> None:
        self._work: deque[tuple[Generator[None, None, Any], asyncio.Future[Any]]] = deque()
        self._is_due = False

    def __len__(self) -> int:
        return len(self._work)

    async def run(self, work: Generator[None, None, T]) -> T:
        """What `work` returns, once its turn has come; or raises what it raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._work.append((work, done))
        self._wake(loop)
        return await done

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._work and not self._is_due:
            self._is_due = True
            loop.call_soon(self._slice, loop)

    def _slice(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_due = False
        until = time.monotonic() + SLICE_S
        work, done = self._work[0]
        while time.monotonic() < until:
            try:
                next(work)
            except StopIteration as end:
                self._work.popleft()
                if not done.done():
                    done.set_result(end.value)
                break
            except Exception as error:
                self._work.popleft()
                if not done.done():
                    done.set_exception(error)
                break
        self._wake(loop)
