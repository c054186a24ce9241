"""A time limit on a client that does not take what is sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_serve.delivery import nobody


class Watch:
    """Calls `cut` when, from one look to the next, nothing of what waits has left.

    Only to be started while nothing more is written: what waits can then only become less.
    """

    def __init__(
        self, transport: asyncio.Transport, seconds: float, cut: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._seconds = seconds
        self._cut = cut
        self._next_look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.stop()
        if waiting := self._transport.get_write_buffer_size():
            self._next_look = self._loop.call_later(self._seconds, self._look, waiting)

    def stop(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def forget(self) -> None:
        """The connection is closed."""
        self.stop()
        self._cut = nobody

    def _look(self, before: int) -> None:
        if self._transport.get_write_buffer_size() >= before:
            self._cut()
        else:
            self.start()
