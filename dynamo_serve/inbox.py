"""Events of one request on their way from the engine to its reader."""

from __future__ import annotations

import asyncio

from dynamo_serve.core.request import Refusal, Request, TokenEvent
from dynamo_serve.errors import Overloaded, QuotaExceeded, RequestError, Shed


class Inbox:
    """Events of one request on their way to one reader."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.previous: float | None = None
        self._event: TokenEvent | None = None
        self._error: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._event = event if self._event is None else merge(self._event, event)
        self._wake()

    def fail(self, error: RequestError) -> None:
        self._error = error
        self._wake()

    async def take(self) -> TokenEvent:
        """What has come since the last call, as one event; raises what `fail` was given."""
        while self._event is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event, self._event = self._event, None
        return event

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """Two consecutive events of a request as one: a slow reader costs no memory but its tokens."""
    return second._replace(
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        cached_tokens=first.cached_tokens if second.cached_tokens is None else second.cached_tokens,
    )


def refused(refusal: Refusal) -> Shed:
    """The error that a shed request ends with."""
    kind = QuotaExceeded if refusal.is_own else Overloaded
    return kind(
        refusal.message,
        retry_after=refusal.retry_after,
        reason=refusal.reason,
        limit=refusal.limit,
        predicted_wait=refusal.predicted_wait,
        queue_position=refusal.queue_position,
    )
