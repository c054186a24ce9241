"""The end of a connection on which the client may still be sending."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_serve.delivery import nobody

SILENCE_S = 1.0


class Linger:
    """Half-closes, then reads and throws away what still comes, until the client has closed.

    To close with bytes unread, or before some that are on their way, would be a reset: the client's
    system may then drop an answer that it has received. It ends on silence, and with `cut` after
    `seconds` or `num_bytes`. Without a half-close (TLS has none) all but that is the same.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        num_bytes: int,
        seconds: float,
        cut: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._num_bytes = num_bytes
        self._seconds = seconds
        self._cut = cut
        self._taken = 0
        self._until = 0.0
        self._next_look: asyncio.TimerHandle | None = None
        self.is_on = False

    def begin(self) -> None:
        """Everything has been written."""
        self.is_on = True
        try:
            self._transport.write_eof()
        except NotImplementedError:
            pass
        except OSError:  # the connection is gone
            self._transport.close()
            return
        self._until = self._loop.time() + self._seconds
        self._look_later()

    def take(self, num_bytes: int) -> None:
        """So many bytes were thrown away."""
        self._taken += num_bytes
        if self._taken > self._num_bytes:
            self._cut()

    def forget(self) -> None:
        """The connection is closed."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._cut = nobody

    def _look_later(self) -> None:
        self._next_look = self._loop.call_later(SILENCE_S, self._look, self._taken)

    def _look(self, before: int) -> None:
        if self._loop.time() >= self._until:
            self._cut()
        elif self._taken > before or self._transport.get_write_buffer_size():
            self._look_later()
        else:
            self._transport.close()


class Yielding(asyncio.Transport):
    """What uvicorn writes an answer to. To close it is `close`, which decides how."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        super().__init__()
        self._transport = transport
        self._close = close

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._close()

    def forget(self) -> None:
        """The connection is closed."""
        self._close = nobody
