"""An event loop whose timers are right to some tens of microseconds."""

from __future__ import annotations

import asyncio
import select
import selectors
import sys

if sys.platform == "linux":

    class PreciseSelector(selectors.EpollSelector):
        """epoll rounds a wait up to whole milliseconds; select() on the epoll itself does not."""

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)

    def new_loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(PreciseSelector())

else:

    def new_loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop()
