"""Tokens in, tokens out: accepted requests on this side, the engine on the other."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from enum import Enum
from typing import Any

from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.loop import Cancel, Configure, Steer, Submit
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import (
    ContextTooLong,
    EngineFailure,
    EngineStartError,
    Unavailable,
)
from dynamo_serve.inbox import Inbox, refused
from dynamo_serve.link import Hooks, Link, ProcessLink, ThreadLink
from dynamo_serve.observer import NoObserver, Observer
from dynamo_serve.questions import Questions
from dynamo_serve.worker import Progress

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
INSPECT_SECONDS = 2.0
STABLE_SECONDS = 60.0  # an engine that lived so long is restarted at once


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    CLOSED = "closed"


class Service:
    """Owns the engine and every accepted request.

    A request stays in `_live` from its acceptance until the engine has reported its finish or its
    refusal, also when its reader has gone.
    """

    def __init__(
        self,
        config: Config,
        *,
        model_path: str,
        observer: Observer | None = None,
        progress: Progress = lambda stage, fraction: None,
    ) -> None:
        self.state = State.STARTING
        self.stats = Stats()
        self.num_restarts = 0
        self.lost_reason: str | None = None
        self._config = config
        self._model_path = model_path
        self._observer = observer or NoObserver()
        self._tenancy = Tenancy()
        self._rung_modes: dict[str, str] = {}  # that operators have set, for every engine
        self._questions = Questions()
        self._hooks = Hooks(self._on_step, self._on_lost, self._questions.answer, progress)
        self._link: Link | None = None
        self._live: dict[str, Inbox] = {}
        self._idle = asyncio.Event()
        self._restarting: asyncio.Task[None] | None = None
        self._started_at = 0.0
        self._start_seconds = 1.0
        self._num_losses = 0
        self._num_quick_deaths = 0
        scheduler = config.scheduler
        # For the memory of this process only: the scheduler refuses earlier, and with numbers. It
        # is behind by what is still on its way to it, so twice its queue is surely too much.
        self._max_live = 2 * scheduler.max_waiting + scheduler.max_decode_sequences

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineStartError`."""
        began, num_losses = time.monotonic(), self._num_losses
        link_class = ProcessLink if self._config.engine.process else ThreadLink
        tenancy = self._tenancy
        self._link = link_class(self._config, self._model_path, self._hooks, tenancy)
        self.spec: EngineSpec = await self._link.start()
        if self._num_losses > num_losses:  # it was ready, and gone before we got to know
            raise EngineStartError(self.lost_reason or "the engine was lost")
        if self._tenancy is not tenancy:  # reloaded while the engine was starting
            self._link.send(Configure(self._tenancy))
        if self._rung_modes:
            self._link.send(Steer(self._rung_modes))
        self._started_at = time.monotonic()
        self._start_seconds = self._started_at - began
        self._tell(Stats(pages_free=self.spec.num_pages))
        self._check_guarantees()
        if self.state in (State.STARTING, State.RESTARTING):
            self.state = State.READY

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request; the last has `finish`. Closing the generator cancels.

        Waiting events are merged when the reader is slow. Raises `ContextTooLong`; `Unavailable`
        (starting, draining, queue full, engine lost; also in the middle of a stream when the engine
        dies); `QuotaExceeded` or `Overloaded` when the scheduler refuses it; `EngineFailure` when
        the engine failed this request (ERROR is never yielded).
        """
        self.check_ready()
        self._check_fits(request)
        link = self._link
        assert link, "ready without an engine"
        link.send(Submit(request))  # first: what cannot be sent must not count as live
        inbox = self._live[request.id] = Inbox(request)
        self._idle.clear()
        try:
            while True:
                event = await inbox.take()
                if event.refusal is not None:
                    raise refused(event.refusal)
                if event.finish is Finish.ERROR:
                    raise EngineFailure(event.error or "the engine failed this request")
                yield event
                if event.finish:
                    return
        finally:  # no await here: it may be running under cancellation
            if self._live.get(request.id) is inbox:
                link.send(Cancel(request.id))

    def cancel(self, request_id: str) -> None:
        """End a request early; its last event (CANCELLED) still comes."""
        if self._link and request_id in self._live:
            self._link.send(Cancel(request_id))

    def is_live(self, request_id: str) -> bool:
        """Whether a request is accepted and not finished."""
        return request_id in self._live

    def configure(self, tenancy: Tenancy) -> None:
        """Other tenants, classes and quotas, for this engine and those after it."""
        if self._link:
            self._link.send(Configure(tenancy))
        self._tenancy = tenancy  # last: what cannot be sent must not stop the next engine
        if self.state in (State.READY, State.DRAINING):  # else `start` will
            self._check_guarantees()

    def steer(self, rung: str, mode: str) -> None:
        """Pin, forbid or release a rung of the ladder, for this engine and those after it."""
        self._rung_modes = {**self._rung_modes, rung: mode}
        if self._link:
            self._link.send(Steer({rung: mode}))

    async def inspect(self, what: str, id: str = "", timeout: float = INSPECT_SECONDS) -> Any:
        """The scheduler's answer (see `core.views`) as plain data.

        Raises `Unavailable` if the engine is not up, is lost, or takes more than `timeout` seconds.
        """
        if self._link is None or self.state not in (State.READY, State.DRAINING):
            raise Unavailable("the engine is not up", retry_after=self._retry_after())
        return await self._questions.ask(self._link.send, what, id, timeout)

    @property
    def num_live(self) -> int:
        """Requests accepted and not finished."""
        return len(self._live)

    def check_ready(self) -> None:
        """Raise `Unavailable` (with retry_after) unless new requests are accepted."""
        match self.state:
            case State.READY:
                if len(self._live) >= self._max_live:
                    raise Unavailable(f"the server holds {len(self._live)} requests, its limit")
            case State.STARTING:
                raise Unavailable("the server is starting", retry_after=2.0)
            case State.RESTARTING:
                raise Unavailable(
                    f"the engine is being restarted ({self.lost_reason})",
                    retry_after=self._retry_after(),
                )
            case _:
                raise Unavailable("the server is shutting down", retry_after=5.0)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return when the live ones finished or `timeout` seconds passed."""
        self.state = State.DRAINING
        try:
            async with asyncio.timeout(timeout):
                while self._live:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests did not finish in %g s", len(self._live), timeout)

    async def close(self) -> None:
        """Stop the engine; whoever still waits gets `Unavailable`."""
        self.state = State.CLOSED
        if self._restarting:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        self._fail_all("the server is shutting down", retry_after=5.0)
        if self._link:
            await self._link.close()

    # ── what the link reports ────────────────────────────────────────────────

    def _on_step(self, events: list[TokenEvent], stats: Stats) -> None:
        now = time.monotonic()
        self._tell(stats)
        for event in events:
            inbox = self._live.get(event.request_id)
            if inbox is None:
                continue  # accepted by an engine that was declared lost since
            self._observer.on_event(inbox.request, event, now, inbox.previous)
            if event.token_ids:
                inbox.previous = now
            if event.finish or event.refusal:
                del self._live[event.request_id]
            inbox.put(event)
        if not self._live:
            self._idle.set()

    def _on_lost(self, reason: str) -> None:
        log.error("engine lost: %s; %d live requests fail", reason, len(self._live))
        self.lost_reason = reason
        self._num_losses += 1
        lived = time.monotonic() - self._started_at
        self._num_quick_deaths = 0 if lived > STABLE_SECONDS else self._num_quick_deaths + 1
        if self.state is State.READY:  # otherwise whoever is starting it deals with the loss
            self.state = State.RESTARTING
            self._restarting = asyncio.create_task(self._restart())
        self._fail_all(f"the engine was lost ({reason})", retry_after=self._retry_after())
        self._tell(Stats())

    def _tell(self, stats: Stats) -> None:
        self.stats = stats
        self._observer.on_stats(stats)

    async def _restart(self) -> None:
        """Start the engine again, with growing pauses, until it lives or the service closes."""
        await asyncio.sleep(self._backoff())
        while self.state is State.RESTARTING:
            try:
                await self.start()
                self.num_restarts += 1
                log.warning("engine restarted in %.1f s", self._start_seconds)
            except Exception as error:  # an end of this task would be an end of all restarts
                self._num_quick_deaths += 1
                self.lost_reason = str(error) or type(error).__name__
                log.error("the engine does not start: %s", self.lost_reason)
                await asyncio.sleep(self._backoff())

    def _backoff(self) -> float:
        """Seconds to pause before the next start: none after the first death, then 1, 2, 4, …"""
        if self._num_quick_deaths <= 1:
            return 0.0
        doublings = min(self._num_quick_deaths - 2, 10)  # a float overflows after a night of them
        return min(MAX_BACKOFF_SECONDS, 2.0**doublings)

    def _retry_after(self) -> float:
        return math.ceil(self._backoff() + self._start_seconds)

    def _fail_all(self, message: str, *, retry_after: float) -> None:
        self._questions.fail(message)
        failed = list(self._live.values())
        self._live.clear()
        self._idle.set()
        for inbox in failed:
            inbox.fail(Unavailable(message, retry_after=retry_after))
        now = time.monotonic()
        for inbox in failed:  # told last: whatever it does, nobody is left waiting
            event = TokenEvent(inbox.request.id, finish=Finish.ERROR, error=message)
            self._observer.on_event(inbox.request, event, now, inbox.previous)

    def _check_guarantees(self) -> None:
        pages = sum(tenant.quota.pages_guaranteed for tenant in self._tenancy.tenants.values())
        if pages > self.spec.num_pages:  # then not every tenant can have its own at once
            log.warning(
                "quota.pages_guaranteed: the tenants' add up to %d, the pool has %d pages",
                *(pages, self.spec.num_pages),
            )

    def _check_fits(self, request: Request) -> None:
        asked = len(request.prompt_ids) + request.max_tokens
        if asked > self.spec.max_model_len:
            raise ContextTooLong(
                f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens} make "
                f"{asked}, more than the limit of {self.spec.max_model_len}"
            )
