"""Texts to token ids for every endpoint, so that long ones hold up nobody else.

A short text is tokenized at once, a longer one on a thread. What is so long that it may take
seconds waits for its turn: one at a time, and tenants take turns. What cannot fit is refused first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from dynamo_serve.api.hang_up import hang_up, until_hang_up
from dynamo_serve.errors import ContextTooLong, QuotaExceeded, Unavailable
from dynamo_serve.preparing import Preparing
from dynamo_serve.text.inputs import Input, inputs_of
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.turns import Turns

T = TypeVar("T")

# Above so many characters, encoding would hold up the event loop for a millisecond and more.
INLINE_CHARACTERS = 8_192
# Above so many it may take a tenth of a second: the time of a word without end grows with its
# square. The threads that all the others use too are not for that.
LONG_CHARACTERS = 131_072
MOST_WAITING = 256  # requests with long texts
MOST_OF_A_TENANT = 32


class LongTexts:
    """The long texts of all requests, one at a time."""

    def __init__(self) -> None:
        self._turns = Turns[Callable[[], Any], Any](lambda work: work())
        self._num_waiting: Counter[str] = Counter()  # by tenant

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Raises `QuotaExceeded` and `Unavailable` if too many wait."""
        self._check_room(tenant)
        self._num_waiting[tenant] += 1
        try:
            made: T = await self._turns.run(tenant, work)
        finally:
            self._num_waiting[tenant] -= 1
            self._num_waiting += Counter()  # forgets tenants with none
        return made

    def _check_room(self, tenant: str) -> None:
        if self._num_waiting[tenant] >= MOST_OF_A_TENANT:
            raise QuotaExceeded(
                f"{MOST_OF_A_TENANT} of your texts of more than {LONG_CHARACTERS} characters wait "
                "to be tokenized: send fewer at a time.",
                retry_after=1.0,
                reason="texts_waiting",
                limit=MOST_OF_A_TENANT,
            )
        if self._num_waiting.total() >= MOST_WAITING:
            raise Unavailable("Too many long texts wait to be tokenized.", retry_after=1.0)


class TextEncoder:
    """Tokenizes the texts of one request."""

    def __init__(
        self, tokenizer: Tokenizer, long_texts: LongTexts, preparing: Preparing, http: Request
    ) -> None:
        self.tokenizer = tokenizer
        self._long_texts = long_texts
        self._preparing = preparing
        self._http = http

    async def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """As `Tokenizer.encode`. Raises `QuotaExceeded`, `Unavailable` (also if the server ends
        before), and `ClientDisconnect` if the client goes before its turn."""
        work = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._run(len(text), work)

    async def inputs(
        self, texts: Sequence[str], *, before: str | None = None, most: int | None = None
    ) -> list[Input]:
        """As `inputs_of`. Raises what `ids` raises."""
        work = partial(inputs_of, self.tokenizer, texts, before, most)
        return await self._run(sum(map(len, texts)) + len(before or ""), work)

    async def check_fits(self, text: str, limit: int, what: str, remedy: str, param: str) -> None:
        """Raise `ContextTooLong` for a text that is certain to have more tokens than `limit`.
        `what` it is and the `remedy` begin and end the message."""
        if len(text) <= INLINE_CHARACTERS:
            return  # tokenized as soon as looked at
        fewest = await asyncio.to_thread(self.tokenizer.fewest_tokens, text)
        if fewest > limit:
            raise ContextTooLong(f"{what} has at least {fewest} tokens; {remedy}", param=param)

    async def prompt_ids(
        self, text: str, limit: int | None, param: str, *, add_special_tokens: bool = False
    ) -> list[int]:
        """The ids of a prompt for a model that takes `limit` tokens; None: they are only shown.
        Raises `ContextTooLong` and what `ids` raises."""
        if limit is not None:
            remedy = f"prompt and answer together may have {limit}."
            await self.check_fits(text, limit, "The prompt", remedy, param)
        return await self.ids(text, add_special_tokens=add_special_tokens)

    async def _run(self, num_characters: int, work: Callable[[], T]) -> T:
        if num_characters <= INLINE_CHARACTERS:
            return work()
        if num_characters <= LONG_CHARACTERS:
            return await asyncio.to_thread(work)
        caller = getattr(self._http.state, "caller", None)  # none: an operator
        turn = self._long_texts.run(caller.tenant if caller else "", work)
        # A drain waits for the answer to begin, not only for the turn.
        if not hasattr(self._http.state, "prepared"):  # by another of its texts
            self._http.state.prepared = self._preparing.begin()
        return await until_hang_up(turn, self._gone())

    async def _gone(self) -> None:
        """Return when the client has gone. Raises `ServerShutdown`."""
        with suppress(ClientDisconnect):
            await until_hang_up(self._preparing.ended(), hang_up(self._http.receive))
