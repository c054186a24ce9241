"""Pinned prefixes on this side: whose they are, and that the next engine computes them again. What
an engine holds of them is in `core.pins`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from math import inf
from typing import NamedTuple

from dynamo_serve.core.eviction import ALL
from dynamo_serve.core.loop import Unpin
from dynamo_serve.core.request import Finish, Request, Sampling, TokenEvent
from dynamo_serve.errors import (
    Forbidden,
    PrefixNotFound,
    QuotaExceeded,
    RequestError,
    TryLater,
    Unavailable,
)
from dynamo_serve.supervisor import Supervisor
from dynamo_serve.timers import Timers

MOST_PREFIXES = 1000  # of one tenant; pages do not bound them, for equal ones share theirs
LOW_CLASS, LOW_PRIORITY = "batch", 100  # of what is computed again: nobody waits for it

MOST_REST = 60.0  # seconds between two tries to have one computed again

log = logging.getLogger(__name__)

Generate = Callable[[Request], AsyncGenerator[TokenEvent, None]]


class State(Enum):
    COMPUTING = "computing"
    LOST = "lost"  # with its engine; told as "computing"
    READY = "ready"
    FAILED = "failed"


class Head(NamedTuple):
    """A prefix that tenants share, and the keys of its full pages."""

    name: str
    token_ids: tuple[int, ...]
    keys: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class Prefix:
    """`request` computes it, and its id is the prefix's. Times are those of the wall clock, but
    `not_before`: when it is worth trying again."""

    request: Request
    name: str | None
    created_at: float
    expires_at: float
    state: State = State.COMPUTING
    cached_tokens: int = 0  # found when it was pinned first
    error: str | None = None
    not_before: float = 0.0

    @property
    def is_shared(self) -> bool:
        """Between tenants: declared by operators, and nobody's to give up."""
        return self.request.tenant == ALL[1]

    @property
    def status(self) -> str:
        state = State.COMPUTING if self.state is State.LOST else self.state
        return str(state.value)


class Prefixes:
    """All of this server, by id. All calls come from one event loop."""

    def __init__(
        self, engine: Supervisor, generate: Generate, cancel: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._generate = generate
        self._cancel = cancel
        self._all: dict[str, Prefix] = {}
        self._timers = Timers()
        self._restoring: asyncio.Task[None] | None = None
        self._is_computing = False  # what was lost; that goes on with the next engine by itself
        self._num_losses = 0  # of engines
        self.heads: list[Head] = []
        self.shared_keys: frozenset[bytes] = frozenset()

    def declare(self, heads: Iterable[Head]) -> None:
        """Prefixes that tenants share, before there is an engine: each one computes them."""
        self.heads = list(heads)
        self.shared_keys = frozenset(key for head in self.heads for key in head.keys)
        salt, tenant = ALL
        for head in self.heads:
            request = Request(
                id=f"shared-{head.name}",
                prompt_ids=head.token_ids,
                max_tokens=1,
                sampling=Sampling(temperature=0.0),
                tenant=tenant,
                salt=salt,
                pinned_until=inf,
            )
            prefix = Prefix(request, head.name, time.time(), inf, State.LOST)
            self._all[request.id] = prefix

    def name_of(self, keys: Sequence[bytes]) -> str | None:
        """Of the shared prefixes the one that has most of the pages that `keys` begin with."""
        best, most = None, 0
        for head in self.heads:
            count = 0
            while count < min(len(keys), len(head.keys)) and keys[count] == head.keys[count]:
                count += 1
            if count > most:
                best, most = head.name, count
        return best

    def of(self, tenant: str) -> list[Prefix]:
        return [p for p in self._all.values() if p.request.tenant == tenant]

    def shared(self) -> list[Prefix]:
        return self.of(ALL[1])

    def find(self, tenant: str, id: str) -> Prefix:
        """Its own, or a shared one. Raises `PrefixNotFound`, also for another tenant's."""
        prefix = self._all.get(id)
        if prefix is None or not (prefix.is_shared or prefix.request.tenant == tenant):
            raise PrefixNotFound("There is no such prefix; it may have expired.")
        return prefix

    async def pin(self, request: Request, name: str | None, ttl: float) -> Prefix:
        """Compute a prefix and keep it for `ttl` seconds from now. Raises what `generate` raises,
        and `PrefixNotFound` if it was deleted, or its time was over, before it was computed."""
        own = self.of(request.tenant)
        if len(own) >= MOST_PREFIXES:
            raise QuotaExceeded(
                f"{MOST_PREFIXES} prefixes of this tenant are pinned: DELETE one first",
                retry_after=min(self._timers.left(p.request.id) or 0.0 for p in own),
                reason="pins",
                limit=MOST_PREFIXES,
            )
        now = time.time()
        prefix = self._all[request.id] = Prefix(request, name, now, now + ttl)
        self._timers.start(request.id, ttl, partial(self._forget, prefix))
        try:
            await self._compute(prefix, request)
        except BaseException:  # a client that has hung up, too
            self._forget(prefix)
            raise
        return prefix

    def delete(self, tenant: str, id: str) -> None:
        """Raises `PrefixNotFound`; `Forbidden` for a shared one."""
        prefix = self.find(tenant, id)
        if prefix.is_shared:
            raise Forbidden(
                "This prefix is shared by all tenants: the server's operator has declared it "
                "(cache.shared_prefixes)."
            )
        if prefix.state in (State.COMPUTING, State.LOST):
            self._cancel(id)
        self._forget(prefix)

    def _forget(self, prefix: Prefix) -> None:
        id = prefix.request.id
        if self._all.pop(id, None) is None:
            return
        self._timers.stop(id)
        if self._engine.is_up:  # else there is nothing to give up
            self._engine.send(Unpin(id))

    async def _compute(self, prefix: Prefix, request: Request) -> None:
        num_losses, cached, finish = self._num_losses, 0, None
        async with aclosing(self._generate(request)) as events:
            async for event in events:
                cached = event.cached_tokens or cached
                finish = event.finish
        if self._all.get(request.id) is not prefix:
            raise PrefixNotFound("The prefix was deleted, or has expired, before it was computed.")
        if finish not in (Finish.STOP, Finish.LENGTH):
            why = finish.value if finish else "nothing came"
            raise Unavailable(f"The prefix could not be computed in time ({why}).")
        if request is prefix.request:
            prefix.cached_tokens = cached
        prefix.state, prefix.error = State.READY, None
        if self._num_losses > num_losses:  # nobody knows which of the engines has computed it
            prefix.state = State.LOST
            if request is prefix.request:
                self.on_up()

    # ── engines come and go ──────────────────────────────────────────────────

    def on_lost(self) -> None:
        self._num_losses += 1
        for prefix in self._all.values():
            if prefix.state is State.READY:
                prefix.state, prefix.not_before = State.LOST, 0.0

    def on_up(self) -> None:
        """Have everything computed again that was lost, one after the other."""
        if self._is_computing:
            return  # a second request of that id would get the end of the first
        self.close()
        if any(prefix.state is State.LOST for prefix in self._all.values()):
            self._restoring = asyncio.create_task(self._restore())

    def close(self) -> None:
        if self._restoring is not None:
            self._restoring.cancel()
            self._restoring = None

    async def _restore(self) -> None:
        while lost := [p for p in self._all.values() if p.state is State.LOST]:
            prefix = min(lost, key=lambda p: p.not_before)
            await asyncio.sleep(max(0.0, prefix.not_before - time.monotonic()))
            if self._all.get(prefix.request.id) is not prefix:
                continue
            again = replace(
                prefix.request,
                arrival=time.monotonic(),
                deadline=float("inf"),
                class_name=LOW_CLASS,
                priority=LOW_PRIORITY,
            )
            self._is_computing = True
            try:
                await self._compute(prefix, again)
            except PrefixNotFound:
                continue
            except TryLater as error:
                rest = min(MOST_REST, max(1.0, error.retry_after))
                prefix.not_before = time.monotonic() + rest
                self._fail(prefix, error.message, "is not computed yet")
            except RequestError as error:
                prefix.state = State.FAILED
                self._fail(prefix, error.message, "cannot be computed")
            finally:
                self._is_computing = False

    @staticmethod
    def _fail(prefix: Prefix, why: str, what: str) -> None:
        """Its tenant sees why; of a shared one the operator has to."""
        if prefix.is_shared and prefix.error != why:
            log.warning("the shared prefix %s %s: %s", prefix.name, what, why)
        prefix.error = why
