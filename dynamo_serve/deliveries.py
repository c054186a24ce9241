"""Every accepted request: submitted, parked while nobody reads, submitted again, kept for a while.

Each submission ends in exactly one finish from the engine, or with the engine. So a request can
be taken from one (its finish is then `CANCELLED`) and given to it or another with its tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from math import inf

from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.delivery import Delivery
from dynamo_serve.errors import EngineFailure, RequestError, RequestNotFound, Unavailable
from dynamo_serve.inbox import Inbox
from dynamo_serve.link import Loss
from dynamo_serve.observer import Observer
from dynamo_serve.supervisor import Supervisor
from dynamo_serve.timers import Timers

log = logging.getLogger(__name__)

SLOW_SECONDS = 0.25  # a reader is not slow as long as nothing has waited longer for it
MAX_KEPT = 4096  # requests without a reader; beyond that the oldest are forgotten


class Deliveries:
    """`live` are those that are to go on, `kept` those that are parked or done, by id. `credit` is
    about how many bytes may wait for a reader before its request is parked, `patience` how many
    seconds it then has to come back."""

    def __init__(
        self, engine: Supervisor, observer: Observer, *, credit: int, patience: float
    ) -> None:
        self.live: dict[str, Delivery] = {}
        self.kept: dict[str, Delivery] = {}
        self._engine = engine
        self._observer = observer
        self._credit = credit
        self._patience = patience
        self.timers = Timers()

    # ── readers ──────────────────────────────────────────────────────────────

    def accept(
        self, request: Request, keep_seconds: float, on_stuck: Callable[[], None]
    ) -> tuple[Delivery, Inbox]:
        """From here on it has exactly one finish, or one refusal."""
        delivery = Delivery(request, keep_seconds, on_stuck)
        if self._engine.is_up:
            self._submit(delivery)  # first: what cannot be sent must not count as live
        self.live[request.id] = delivery
        if not self._engine.is_up:
            self._watch_deadline(delivery)
        return delivery, delivery.attach(0)

    def rejoin(
        self, request_id: str, num_read: int, on_stuck: Callable[[], None]
    ) -> tuple[Delivery, Inbox]:
        """Go on reading after so many tokens. Raises `RequestNotFound`."""
        delivery = self._known(request_id, num_read)
        if delivery.inbox is not None:
            delivery.inbox.fail(Unavailable("The stream goes on over another connection."))
        self.timers.stop(request_id)
        delivery.on_stuck = on_stuck
        inbox = delivery.attach(num_read)
        self._observer.on_stream("resumed")
        self._want(delivery)
        if not (self._engine.is_up or delivery.is_done):
            self._watch_deadline(delivery)
        return delivery, inbox

    @property
    def is_read(self) -> bool:
        """Whether somebody is there for whom something goes on, or will."""
        return bool(self.live) or any(d.inbox and not d.is_done for d in self.kept.values())

    def all(self) -> list[Delivery]:
        return [*self.live.values(), *self.kept.values()]

    def find(self, request_id: str) -> Delivery | None:
        return self.live.get(request_id) or self.kept.get(request_id)

    def head(self, request_id: str, count: int) -> TokenEvent:
        """The first `count` tokens, as one event. Raises `RequestNotFound`."""
        return self._known(request_id, count).head(count)

    def _known(self, request_id: str, count: int) -> Delivery:
        delivery = self.find(request_id)
        if delivery is None or count > len(delivery.tokens):
            raise RequestNotFound("There is no such stream, or it is not kept any more.")
        return delivery

    async def next(self, delivery: Delivery, inbox: Inbox) -> TokenEvent:
        """The next event for a reader, who has delivered all before it."""
        if not delivery.is_wanted and delivery.inbox is inbox and not inbox.has_failed:
            self.timers.stop(delivery.request.id)
            self._want(delivery)
        return delivery.read(await inbox.take())

    def leave(self, delivery: Delivery, inbox: Inbox) -> None:
        """A reader has gone. Nothing here waits: it may be running under cancellation."""
        if delivery.inbox is not inbox:
            return  # somebody else reads on
        delivery.leave(time.monotonic())
        request_id = delivery.request.id
        if delivery.keep_seconds and self.find(request_id) is delivery:
            if delivery.is_wanted and not (delivery.is_done or delivery.is_cancelled):
                self.park(delivery, "reader_gone")
            self._keep_on(delivery)
        elif not delivery.is_done:
            self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """End a request early, for good; its last event (CANCELLED) still comes."""
        delivery = self.find(request_id)
        if delivery is None or delivery.is_done or delivery.is_cancelled:
            return
        was_parked = delivery.is_parked
        delivery.is_cancelled = True
        if not delivery.is_submitted:
            self.end(delivery, Finish.CANCELLED)
        elif not was_parked:  # else its engine knows
            self._engine.send(Cancel(request_id))

    # ── submitted and parked ─────────────────────────────────────────────────

    def _submit(self, delivery: Delivery) -> None:
        self._engine.send(Submit(delivery.request, delivery.done()))
        delivery.is_submitted = delivery.has_begun = True
        self.timers.stop(delivery.request.id)  # of a deadline: its engine watches it now

    def park(self, delivery: Delivery, why: str) -> None:
        """Take it from its engine until somebody reads again."""
        request_id = delivery.request.id
        delivery.is_wanted = False
        del self.live[request_id]
        self.keep(delivery)
        if delivery.is_submitted:
            self._engine.send(Cancel(request_id))
        self._observer.on_stream(why)

    def _want(self, delivery: Delivery) -> None:
        """It is to go on, if it is not done."""
        if delivery.is_done or delivery.is_cancelled or delivery.is_wanted or delivery.is_leaving:
            return
        request_id = delivery.request.id
        delivery.is_wanted = True
        del self.kept[request_id]
        self.live[request_id] = delivery
        if not self._engine.is_up:
            self._watch_deadline(delivery)
        elif not delivery.is_submitted:  # else when its last finish is here
            self._submit(delivery)

    def keep(self, delivery: Delivery) -> None:
        self.kept[delivery.request.id] = delivery
        if len(self.kept) > MAX_KEPT:
            oldest = (d for d in self.kept.values() if d.keep_seconds and not d.inbox)
            self.forget(next(oldest, delivery))

    def _keep_on(self, delivery: Delivery) -> None:
        """For a reader who comes back; as long as that is possible for any choice of its call."""

        def ring() -> None:
            is_needed = delivery.is_needed_by(self.all(), time.monotonic())
            (self._keep_on if is_needed else self.forget)(delivery)

        self.timers.start(delivery.request.id, delivery.keep_seconds, ring)

    def forget(self, delivery: Delivery) -> None:
        """Its time is over: nobody has come back for it."""
        self.timers.stop(delivery.request.id)
        delivery.keep_seconds = 0.0
        if delivery.is_done:
            self.kept.pop(delivery.request.id, None)
        else:  # it stays until its engine has told the end
            self._observer.on_stream("forgotten")
            self.cancel(delivery.request.id)

    def _give_up(self, delivery: Delivery) -> None:
        """Its reader has stood still for too long."""
        log.warning("request %s: its reader takes nothing; given up", delivery.request.id)
        self._observer.on_stream("given_up")
        if delivery.inbox is not None:
            delivery.inbox.fail(delivery.given_up())
        delivery.on_stuck()

    # ── what the engine reports ──────────────────────────────────────────────

    def on_events(self, events: list[TokenEvent], now: float) -> None:
        for event in events:
            delivery = self.find(event.request_id)
            if delivery is None or not delivery.is_submitted:
                continue  # of an engine that was declared lost since
            if event.finish is Finish.CANCELLED and not delivery.is_cancelled:
                self._on_parked(delivery, event, now)
                continue
            if event.finish or event.refusal:
                self._on_last(delivery, event, now)
                continue
            self._observe(delivery, event, now)
            delivery.take(event, now)
            if delivery.inbox and delivery.inbox.num_bytes > self._credit:
                self._on_slow(delivery, delivery.inbox, now)

    def _on_last(self, delivery: Delivery, event: TokenEvent, now: float) -> None:
        whole = delivery.whole(event)
        self._observe(delivery, whole, now)
        delivery.take(whole, now)
        self._on_end(delivery)

    def _on_parked(self, delivery: Delivery, event: TokenEvent, now: float) -> None:
        delivery.is_submitted = False
        if event.token_ids:
            self._observe(delivery, event._replace(finish=None), now)
        delivery.park(event, now)
        if delivery.is_wanted and self._engine.is_up:
            self._submit(delivery)

    def _on_slow(self, delivery: Delivery, inbox: Inbox, now: float) -> None:
        """Unless it is we who have not let the reader run."""
        if delivery.is_wanted and inbox.since is not None and now - inbox.since > SLOW_SECONDS:
            self.park(delivery, "reader_slow")
            request = delivery.request
            promise = self._engine.tenancy.class_of(request.tenant, request.class_name)
            delivery.slow(now, promise.reader_patience or self._patience)
            self.timers.start(request.id, delivery.patience, lambda: self._give_up(delivery))

    def _on_end(self, delivery: Delivery) -> None:
        """Nothing more comes of it; what there is may be wanted again."""
        delivery.is_submitted = False
        self._observer.on_end(delivery, time.monotonic())
        request_id = delivery.request.id
        self.live.pop(request_id, None)
        self.kept.pop(request_id, None)
        self.timers.stop(request_id)
        if delivery.keep_seconds:
            self.keep(delivery)
            if delivery.inbox is None:
                self._keep_on(delivery)

    def on_lost(self, loss: Loss, now: float) -> list[str]:
        """An engine is gone. The ids of the requests that are failed for it."""
        failed = []
        for delivery in self.all():
            if not delivery.is_submitted:
                continue
            if delivery.lose(now, loss.seq_ids, loss.is_own, loss.is_planned):
                failed.append(delivery.request.id)
                self.end(delivery, Finish.ERROR, EngineFailure(delivery.blamed(loss.reason)))
            elif delivery.is_cancelled:
                self.end(delivery, Finish.CANCELLED)
            elif delivery.is_wanted:
                self._watch_deadline(delivery)
        return failed

    def on_up(self, check_fits: Callable[[Request], None]) -> None:
        """There is an engine again: everybody goes on, in the order in which they came, but for
        whom it has no room: it may have found less memory than the one before."""
        for delivery in sorted(self.live.values(), key=lambda d: d.request.arrival):
            if delivery.is_submitted:
                continue
            try:
                check_fits(delivery.request)
                self._submit(delivery)
            except RequestError as error:
                self.end(delivery, Finish.ERROR, error)

    def fail_all(self, error: RequestError) -> None:
        for delivery in list(self.live.values()):
            self.end(delivery, Finish.ERROR, error)

    # ── the end, without an engine ───────────────────────────────────────────

    def end(self, delivery: Delivery, finish: Finish, error: RequestError | None = None) -> None:
        now, event = time.monotonic(), delivery.ended(finish, error)
        if error is None:
            delivery.take(event, now)
        else:
            delivery.fail(error)
        self._on_end(delivery)
        self._observe(delivery, event, now)

    def _watch_deadline(self, delivery: Delivery) -> None:
        """While no engine does."""
        if delivery.request.deadline < inf:
            seconds = max(0.0, delivery.request.deadline - time.monotonic())
            expire = partial(self.end, delivery, Finish.DEADLINE)
            self.timers.start(delivery.request.id, seconds, expire)

    def _observe(self, delivery: Delivery, event: TokenEvent, now: float) -> None:
        try:
            self._observer.on_event(delivery.request, event, now, delivery.previous)
        except Exception:  # whatever is wrong with it, requests go on
            log.exception("the observer failed")
