"""Requests that were taken on and are not the engine's yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dynamo_serve.errors import ServerShutdown


class Preparing:
    """A drain waits for them, and the end of the server ends them."""

    def __init__(self) -> None:
        self._begun: set[object] = set()
        self._over = asyncio.Event()

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self) -> Callable[[], None]:
        """One more, until what this returns is called; that may be more than once."""
        request = object()
        self._begun.add(request)
        return lambda: self._begun.discard(request)

    def end(self) -> None:
        """The server waits no longer."""
        self._over.set()

    async def ended(self) -> None:
        """Wait for `end`, which raises `ServerShutdown`."""
        await self._over.wait()
        raise ServerShutdown("the server is shutting down", retry_after=5.0)
