"""Events of one request on their way from the engine to its reader."""

from __future__ import annotations

import asyncio
import time

from dynamo_serve.core.request import TokenEvent
from dynamo_serve.errors import RequestError

TOKEN_BYTES = 8  # about what one waiting token will be on the wire, merged with others
LOGPROB_BYTES = 200


class Inbox:
    """Events of one request on their way to one reader; those that wait are merged.

    `num_bytes` is about how much waits, `since` when the oldest of it came.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.since: float | None = None
        self._event: TokenEvent | None = None
        self.has_failed = False
        self._errors: list[RequestError] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        if self._event is None:
            self._event, self.since = event, time.monotonic()
        else:
            self._event = merge(self._event, event)
        self.num_bytes += TOKEN_BYTES * len(event.token_ids) + LOGPROB_BYTES * len(event.logprobs)
        self.num_bytes += sum(map(len, event.texts))
        self._wake()

    def fail(self, error: RequestError) -> None:
        self.has_failed = True
        self._errors = [error]
        self._wake()

    async def take(self) -> TokenEvent:
        """What has come since the last call, as one event; raises what `fail` was given, once.

        Nothing here holds the error then: it holds the frames it went through, and they the inbox
        and all that its reader has, until the collector of cycles came by.
        """
        while self._event is None:
            if self._errors:
                raise self._errors.pop()
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event, self._event = self._event, None
        self.num_bytes, self.since = 0, None
        return event

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """Two consecutive events of a request as one: a slow reader costs no memory but its tokens."""
    return second._replace(
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        texts=first.texts + second.texts,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        cached_tokens=first.cached_tokens if second.cached_tokens is None else second.cached_tokens,
    )
