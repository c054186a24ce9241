"""Tokens in, tokens out: accepted requests on this side, the engine on the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from enum import Enum
from typing import Any, NoReturn

from dynamo_serve.building import Progress
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.deliveries import Deliveries
from dynamo_serve.delivery import Delivery, failure, nobody, refused, stream_lag
from dynamo_serve.errors import Unavailable
from dynamo_serve.fits import check_fits, check_guarantees, check_shared
from dynamo_serve.inbox import Inbox
from dynamo_serve.link import Loss
from dynamo_serve.observer import NoObserver, Observer, Vitals
from dynamo_serve.prefixes import Head, Prefixes
from dynamo_serve.preparing import Preparing
from dynamo_serve.questions import Questions
from dynamo_serve.supervisor import Supervisor, Watcher
from dynamo_serve.timers import Timers

log = logging.getLogger(__name__)

INSPECT_SECONDS = 2.0
DRAIN_LOOK_SECONDS = 0.02
GIVE_UP = "give up"  # a timer
HOLD_SECONDS = 15.0  # a new request waits so long for an engine that is being restarted


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    CLOSED = "closed"


class Service:
    """Accepts requests and answers for them until their end; the engine may come and go."""

    def __init__(
        self,
        config: Config,
        *,
        model_path: str,
        observer: Observer | None = None,
        progress: Progress = lambda stage, fraction: None,
    ) -> None:
        self.stats = Stats()
        self._observer = observer = observer or NoObserver()
        self._questions = Questions()
        self._cache = config.cache
        self._restart_patience = config.engine.restart_patience_s
        answer, on_lost = self._questions.answer, self._on_lost
        watcher = Watcher(self._on_step, answer, on_lost, self._on_up, progress)
        credit, patience = config.server.stream_credit_bytes, config.server.reader_patience_s
        engine = self.engine = Supervisor(config, model_path, watcher)
        self.deliveries = Deliveries(engine, observer, credit=credit, patience=patience)
        self.prefixes = Prefixes(self.engine, self.generate, self.cancel)
        self.preparing = Preparing()
        self._has_started = self._is_draining = self._is_closed = False
        self._timers = Timers()
        # For the memory of this process: the scheduler refuses earlier, but is behind by what is
        # still on its way to it, so twice its queue is surely too much.
        places = config.scheduler.max_decode_sequences
        self._max_live = 2 * config.scheduler.max_waiting + places

    async def start(self) -> None:
        """Return when the engine is ready. Raises `EngineStartError`."""
        await self.engine.start()
        check_shared(len(self.prefixes.shared_keys), self._cache, self.spec)
        self._has_started = True
        self._tell(Stats(pages_free=self.spec.num_pages))
        check_guarantees(self.engine.tenancy, self.spec)
        self.prefixes.on_up()

    def declare(self, heads: Iterable[Head]) -> None:
        """Prefixes that tenants share; before the start."""
        self.prefixes.declare(heads)
        self.engine.shared_keys = sorted(self.prefixes.shared_keys)

    @property
    def spec(self) -> EngineSpec:
        """Facts of the engine, also of the last one while the next one starts."""
        return self.engine.spec

    @property
    def state(self) -> State:
        if self._is_closed:
            return State.CLOSED
        if self._is_draining:
            return State.DRAINING
        if not self._has_started:
            return State.STARTING
        return State.READY if self.engine.is_up else State.RESTARTING

    # ── requests ─────────────────────────────────────────────────────────────

    def generate(
        self,
        request: Request,
        *,
        keep_seconds: float = 0.0,
        on_stuck: Callable[[], None] = nobody,
        is_begun: bool = False,
    ) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request; the last has `finish`. Closing the generator cancels, or, with
        `keep_seconds`, parks it: so long `rejoin` can go on with it. Restarts of the engine do not
        show. Waiting events are merged for a slow reader; one who stands still has the request
        parked, and `on_stuck` called in the end. What `is_begun` belongs to a call that was
        accepted: no drain refuses it. Raises `Shed`, `ContextTooLong`, `Unavailable`, and `failure`
        for an ERROR, which is never yielded."""

        def begin() -> tuple[Delivery, Inbox]:
            try:
                if not (is_begun and self.state is State.DRAINING):
                    self.check_open()
            except Unavailable as error:
                self.turn_away(request, error)
            check_fits(request, self.spec)
            return self.deliveries.accept(request, keep_seconds, on_stuck)

        return self._read(begin)

    def rejoin(
        self, request_id: str, num_read: int, *, on_stuck: Callable[[], None] = nobody
    ) -> AsyncGenerator[TokenEvent, None]:
        """The events of a kept request after its first `num_read` tokens, as from `generate`.
        Raises `RequestNotFound`."""
        return self._read(lambda: self.deliveries.rejoin(request_id, num_read, on_stuck))

    async def _read(
        self, begin: Callable[[], tuple[Delivery, Inbox]]
    ) -> AsyncGenerator[TokenEvent, None]:
        delivery, inbox = begin()
        try:
            while True:
                event = await self.deliveries.next(delivery, inbox)
                if event.refusal is not None:
                    raise refused(event.refusal)
                if event.finish is Finish.ERROR:
                    if event.token_ids:  # they came before it, and are not lost
                        yield event._replace(finish=None)
                    raise failure(event)
                yield event
                if event.finish:
                    return
        finally:  # no await here: it may be running under cancellation
            self.deliveries.leave(delivery, inbox)

    def cancel(self, request_id: str) -> None:
        """End a request for good; its last event (CANCELLED) still comes."""
        self.deliveries.cancel(request_id)

    def tokens_of(self, request_id: str, count: int) -> TokenEvent:
        """The first `count` tokens of a known request. Raises `RequestNotFound`."""
        return self.deliveries.head(request_id, count)

    def is_known(self, request_id: str) -> bool:
        """Whether a request is live, or kept for a reader who comes back."""
        return self.deliveries.find(request_id) is not None

    def is_live(self, request_id: str) -> bool:
        """Whether a request is accepted and not finished; it may be parked."""
        delivery = self.deliveries.find(request_id)
        return delivery is not None and not delivery.is_done

    @property
    def num_live(self) -> int:
        """Requests accepted, not parked and not finished."""
        return len(self.deliveries.live)

    def vitals(self) -> Vitals:
        """What a scrape asks for."""
        lag = stream_lag(self.deliveries.all(), time.monotonic())
        num_parked = sum(d.is_parked for d in self.deliveries.kept.values())
        is_stalled = self._has_started and self.engine.trouble() is not None
        return Vitals(self.engine.num_restarts, num_parked, lag, int(is_stalled))

    # ── the engine ───────────────────────────────────────────────────────────

    def configure(self, tenancy: Tenancy) -> None:
        """Other tenants, classes and quotas, for this engine and those after it."""
        self.engine.configure(tenancy)
        if self.engine.is_up:  # else the start will
            check_guarantees(self.engine.tenancy, self.spec)

    def steer(self, rung: str, mode: str) -> None:
        """Pin, forbid or release a rung, for this engine and later ones; or `InvalidRequest`."""
        self.engine.steer(rung, mode)

    async def inspect(
        self, what: str, id: str = "", timeout: float = INSPECT_SECONDS, about: Any = ()
    ) -> Any:
        """The scheduler's answer (see `core.views`) as plain data. Raises `Unavailable` if the
        engine is not up, is lost, or takes more than `timeout` seconds."""
        if not self.engine.is_up:
            raise Unavailable("the engine is not up", retry_after=self.engine.restart_seconds)
        return await self._questions.ask(self.engine.send, what, id, about, timeout)

    def turn_away(self, request: Request, error: Unavailable) -> NoReturn:
        """Raise `error`, and tell who watches of which request."""
        self._observer.on_turned_away(request, error)
        raise error

    def check_ready(self) -> None:
        """Raise `Unavailable` (with retry_after) if requests had better go elsewhere."""
        self.check_open()
        if trouble := self.engine.trouble():
            raise Unavailable(trouble, retry_after=self.engine.restart_seconds)

    def check_alive(self) -> None:
        """Raise `Unavailable` if this server does not get on, or will not by itself."""
        if self._is_closed:
            raise Unavailable("the server is closed")
        if self.engine.is_hopeless:
            raise Unavailable(f"the engine dies again and again ({self.engine.lost_reason})")
        if self.engine.is_up and (trouble := self.engine.trouble()):
            raise Unavailable(trouble)

    def check_open(self) -> None:
        """Raise `Unavailable` (with retry_after) unless new requests are accepted."""
        match self.state:
            case State.STARTING:
                raise Unavailable("the server is starting", retry_after=2.0)
            case State.DRAINING | State.CLOSED:
                raise Unavailable("the server is shutting down", retry_after=5.0)
            case State.RESTARTING if (wait := self.engine.restart_seconds) > HOLD_SECONDS:
                raise Unavailable(self.engine.trouble() or "no engine", retry_after=wait)
        if self.num_live >= self._max_live:
            raise Unavailable(f"the server holds {self.num_live} requests, its limit")

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return when the live ones finished or `timeout` seconds passed."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout):
                while self.preparing or self.deliveries.is_read:
                    await asyncio.sleep(DRAIN_LOOK_SECONDS)
        except TimeoutError:
            num_left = self.num_live + len(self.preparing)
            log.warning("%d requests did not finish in %g s", num_left, timeout)

    async def close(self) -> None:
        """Stop the engine; whoever still waits gets `Unavailable`."""
        self._is_closed = True
        self.preparing.end()
        self._timers.stop(GIVE_UP)
        self.prefixes.close()
        self._questions.fail("the server is shutting down")
        self.deliveries.fail_all(Unavailable("the server is shutting down", retry_after=5.0))
        await self.engine.close()

    # ── what the engine reports ──────────────────────────────────────────────

    def _on_step(self, events: list[TokenEvent], stats: Stats) -> None:
        self._tell(stats)
        self.deliveries.on_events(events, time.monotonic())

    def _on_lost(self, loss: Loss) -> None:
        self._questions.fail(f"the engine is gone ({loss.reason})")
        self.prefixes.on_lost()
        failed = self.deliveries.on_lost(loss, time.monotonic())
        if failed:
            log.error("failed, for engines die with them: %s", ", ".join(failed))
            self.engine.incidents[-1]["failed"] = failed
        log.warning("%d requests wait for the next engine", self.num_live)
        if self._timers.left(GIVE_UP) is None:
            # Nobody is failed for a change that was planned, as long as it may take.
            self._wait_on(self.engine.start_limit if loss.is_planned else 0.0)
        self._tell(Stats())

    def _on_up(self) -> None:
        self._timers.stop(GIVE_UP)
        self._tell(Stats(pages_free=self.spec.num_pages))
        check_guarantees(self.engine.tenancy, self.spec)
        self.deliveries.on_up(lambda request: check_fits(request, self.spec))
        self.prefixes.on_up()

    def _give_up(self) -> None:
        """There has been no engine for too long: whoever waits had better know."""
        reason = f"the engine was lost ({self.engine.lost_reason})"
        self.deliveries.fail_all(Unavailable(reason, retry_after=self.engine.restart_seconds))
        self._wait_on(1.0)

    def _wait_on(self, least: float = 0.0) -> None:
        self._timers.start(GIVE_UP, max(least, self._restart_patience), self._give_up)

    def _tell(self, stats: Stats) -> None:
        self.stats = stats
        self._observer.on_stats(stats)
