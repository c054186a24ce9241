"""Questions to the engine that wait for an answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from dynamo_serve.core.loop import Inspect
from dynamo_serve.errors import Unavailable


class Questions:
    """Matches answers with who asked. All calls come from one event loop."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._pending: dict[int, asyncio.Future[Any]] = {}

    async def ask(
        self,
        send: Callable[[Inspect], None],
        what: str,
        id: str,
        about: tuple[Any, ...],
        timeout: float,
    ) -> Any:
        """The answer. Raises `Unavailable` if there is none within `timeout` seconds."""
        ticket = next(self._tickets)
        answer = self._pending[ticket] = asyncio.get_running_loop().create_future()
        try:
            send(Inspect(ticket, what, id, about))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {timeout:g} s") from None
        finally:
            del self._pending[ticket]

    def answer(self, ticket: int, data: Any) -> None:
        """Hand over an answer; nobody waits any more for one that comes too late."""
        pending = self._pending.get(ticket)
        if pending is not None and not pending.done():
            pending.set_result(data)

    def fail(self, message: str) -> None:
        """The engine is gone: none of these will be answered."""
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(Unavailable(message))
