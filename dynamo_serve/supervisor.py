"""Keeps an engine running: starts it, watches whether it gets on, and starts it again."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynamo_serve.building import Progress
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import Activity
from dynamo_serve.core.loop import Command, Configure, Declare, Steer
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.stats import Standing, Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import EngineStartError
from dynamo_serve.ladder import Ladder
from dynamo_serve.link import Hooks, Link, Loss, ProcessLink
from dynamo_serve.stall import Stall
from dynamo_serve.start import Template
from dynamo_serve.thread_link import ThreadLink

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
STABLE_SECONDS = 60.0  # an engine that lived so long, or brought tokens, is restarted at once
WATCH_SECONDS = 0.25
LAPSE_SECONDS = 1.0  # a watcher that comes so late stood still itself: nobody is to blame for that
HOPELESS_DEATHS = 5  # quick ones in a row: then the server calls itself unhealthy
MOST_INCIDENTS = 100
MIN_START_SECONDS = 60.0  # that another start may take …
START_FACTOR = 10.0  # … or so many times what the last one took


@dataclass(frozen=True, slots=True)
class Watcher:
    """What a supervisor calls, on the event loop; `on_up` after every start but the first."""

    on_step: Callable[[list[TokenEvent], Stats], None]
    on_answer: Callable[[int, Any], None]
    on_lost: Callable[[Loss], None]
    on_up: Callable[[], None]
    progress: Progress


class Supervisor:
    """One engine after the other. `is_up`: there is one, and it takes commands."""

    def __init__(self, config: Config, model_path: str, watcher: Watcher) -> None:
        self.is_up = False
        self.num_restarts = 0
        self.lost_reason: str | None = None
        self.start_seconds = 1.0
        self.incidents: deque[dict[str, Any]] = deque(maxlen=MOST_INCIDENTS)
        self.tenancy = Tenancy()
        self.shared_keys: list[bytes] = []  # of pages that tenants share, with every engine
        self._ladder = Ladder(config)
        self._config = config
        self._model_path = model_path
        self._watcher = watcher
        self._hooks = Hooks(self._on_step, self._on_lost, watcher.on_answer, watcher.progress)
        self._link: Link | None = None
        engine = config.engine  # the fake one imports next to nothing
        has_template = engine.process and engine.kind != "fake"
        self._template = Template(engine.threads) if has_template else None
        self._restarting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_closed = False
        self._started_at = 0.0
        self._num_losses = 0
        self._num_quick_deaths = 0
        self._is_productive = False
        self._num_sent = self._num_taken = 0  # commands
        self._asked_at = 0.0  # since when some of them are not taken
        self._awake_since = 0.0
        self._still_since: float | None = None

    async def start(self) -> None:
        """Start an engine and wait until it is ready. Raises `EngineStartError`."""
        num_losses = self._num_losses
        config, standing = self._ladder.next_engine()
        tenancy, modes = self.tenancy, self._ladder.modes
        self._link = self._new_link(config, standing)
        self._num_sent = self._num_taken = 0
        self._is_productive = False
        self.spec: EngineSpec = await self._link.start()
        if self._num_losses > num_losses:  # it was ready, and gone before we got to know
            raise EngineStartError(self.lost_reason or "the engine was lost")
        self.is_up = True
        if self.shared_keys:
            self.send(Declare(self.shared_keys))
        if self.tenancy is not tenancy:  # reloaded while the engine was starting
            self.send(Configure(self.tenancy))
        if self._ladder.modes is not modes:
            self.send(Steer(self._ladder.modes))
        self._started_at = time.monotonic()
        self.start_seconds = self._started_at - self._link.began_at
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def _new_link(self, config: Config, standing: Standing) -> Link:
        wishes = (config, self._model_path, self._hooks, self.tenancy, standing)
        return (
            ProcessLink(*wishes, self._template) if config.engine.process else ThreadLink(*wishes)
        )

    def send(self, command: Command) -> None:
        """Raises what sending raises; of an engine that is not there, AssertionError."""
        assert self._link, "there is no engine"
        self._link.send(command)
        if self._num_sent == self._num_taken:
            self._asked_at = time.monotonic()
        self._num_sent += 1

    def configure(self, tenancy: Tenancy) -> None:
        """Other tenants, for this engine and those after it."""
        if self.is_up:  # else the start will
            self.send(Configure(tenancy))
        self.tenancy = tenancy  # last: what cannot be sent must not stop the next engine

    def steer(self, rung: str, mode: str) -> None:
        """Pin, forbid or release a rung of the ladder, for this engine and those after it. Raises
        `InvalidRequest`."""
        self._ladder.steer(rung, mode)
        if self.is_up:
            self.send(Steer({rung: mode}))

    async def close(self) -> None:
        self._is_closed, self.is_up = True, False
        tasks = [task for task in (self._restarting, self._watching) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link:
            await self._link.close()
        if self._template:
            await self._template.close()

    # ── progress ─────────────────────────────────────────────────────────────

    def stall(self, now: float) -> Stall | None:
        """What the engine has been at, with nothing to show for it yet. Asks it nothing."""
        if self._link is None:
            return None
        if not self.is_up:
            since = self._still_since
            return None if since is None else Stall("starting, stopped", now - since, 0.0)
        look = self._link.flight.read()
        if look.num_taken != self._num_taken:
            self._num_taken, self._asked_at = look.num_taken, now
        since, what = look.since, "between two steps"
        match look.activity:
            case Activity.STEPPING:
                what = f"a step of {len(look.seq_ids)}"
            case Activity.STARTING | Activity.WAITING:
                if self._num_sent <= self._num_taken:
                    return None
                since = max(since, self._asked_at)
                what = f"{self._num_sent - self._num_taken} commands are not taken"
        predicted = 0.0 if self._link.is_stopped else look.predicted
        return Stall(what, now - max(since, self._awake_since), predicted)

    async def _watch(self) -> None:
        """End an engine that hangs; it is started again as if it had crashed."""
        seen, ended = time.monotonic(), None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if now - seen > WATCH_SECONDS + LAPSE_SECONDS:
                self._awake_since = now
            seen = now
            self._still_since = self._standing_still(now)
            stall = self.stall(now)
            if not (stall and stall.is_lost(self._config.engine.stall_timeout_s)):
                continue
            if self._link and self._link is not ended:  # of one that stays a line is enough
                ended = self._link
                can_end = ended.kill(str(stall))
                log.error("%s; %s", stall, "it is ended" if can_end else "a thread cannot be ended")

    def _standing_still(self, now: float) -> float | None:
        """Since when an engine that is starting stands still for a signal."""
        if self.is_up or self._link is None or not self._link.is_stopped:
            return None
        return now if self._still_since is None else self._still_since

    def trouble(self) -> str | None:
        """Why requests had better go elsewhere for now; None if all is well."""
        if not self.is_up:
            return f"the engine is being restarted ({self.lost_reason})"
        stall = self.stall(time.monotonic())
        return str(stall) if stall and stall.is_red else None

    @property
    def is_hopeless(self) -> bool:
        """Whether it has died so often, each time soon, that somebody should look."""
        return not self.is_up and self._num_quick_deaths >= HOPELESS_DEATHS

    # ── restarts ─────────────────────────────────────────────────────────────

    @property
    def start_limit(self) -> float:
        """Seconds that another start may take."""
        return max(MIN_START_SECONDS, START_FACTOR * self.start_seconds)

    @property
    def restart_seconds(self) -> float:
        """How long it takes until there is an engine again, as far as one can tell."""
        return math.ceil(self._backoff() + self.start_seconds)

    def _on_step(self, events: list[TokenEvent], stats: Stats) -> None:
        self._is_productive = self._is_productive or bool(events)
        self._watcher.on_step(events, stats)
        if stats.ladder is not None:
            self._ladder.take(stats.ladder)
            self._follow()

    def _follow(self) -> None:
        """Start another engine if the ladder wants one."""
        if self.is_up and (wish := self._ladder.wish):
            self.is_up = False  # at once: what comes from now on is for the next engine
            self._restarting = asyncio.create_task(self._change(wish))

    async def _change(self, why: str) -> None:
        """End an engine of which nothing is wrong, with all that it has still to tell, and start
        the next. That is no loss, nor an incident."""
        assert self._link, "there is no engine"
        log.warning("the engine is ended: %s", why)
        self.lost_reason, since = why, time.monotonic()
        await self._link.close()
        self._watcher.on_lost(Loss(why, is_own=False, is_planned=True))
        await self._restart(since)

    def _on_lost(self, loss: Loss) -> None:
        log.error("engine lost: %s", loss.reason)
        self.lost_reason = loss.reason
        self._num_losses += 1
        lived = time.monotonic() - self._started_at
        was_good = self._is_productive or lived > STABLE_SECONDS
        self._num_quick_deaths = 0 if was_good else self._num_quick_deaths + 1
        if loss.is_own and not was_good:
            self._ladder.doubt(loss.reason)
        was_up, self.is_up = self.is_up, False
        self.incidents.append(
            {
                "at": time.time(),
                "reason": loss.reason,
                "crashed": loss.is_own,
                "lived_s": round(lived, 3),
                "in_step": list(loss.seq_ids),
                "down_s": None,
                "failed": [],
            }
        )
        if was_up:  # otherwise whoever is starting it deals with the loss
            incident = self.incidents[-1]
            self._restarting = asyncio.create_task(self._restart(time.monotonic(), incident))
            self._watcher.on_lost(loss)

    async def _restart(self, since: float, incident: dict[str, Any] | None = None) -> None:
        """Start the engine again, with growing pauses, until it lives or the server closes."""
        await asyncio.sleep(self._backoff())
        while not (self._is_closed or self.is_up):
            try:
                limit = self.start_limit
                async with asyncio.timeout(limit):
                    await self.start()
            except TimeoutError:
                self._failed_start(f"it was not up after {limit:.0f} s")
            except Exception as error:  # an end of this task would be an end of all restarts
                self._failed_start(str(error) or type(error).__name__)
            if not self.is_up:
                await asyncio.sleep(self._backoff())
        self.num_restarts += 1
        down = time.monotonic() - since
        if incident:
            incident["down_s"] = round(down, 3)
        log.warning("engine restarted after %.1f s", down)
        self._watcher.on_up()
        self._follow()  # what was said while it was starting

    def _failed_start(self, reason: str) -> None:
        self._num_quick_deaths += 1
        self.lost_reason = reason
        log.error("the engine does not start: %s", reason)
        self._ladder.doubt(reason)

    def _backoff(self) -> float:
        """Seconds to pause before the next start: none after the first engine in a row that died
        without having brought anything, then 1, 2, 4, …"""
        if self._num_quick_deaths <= 1:
            return 0.0
        doublings = min(self._num_quick_deaths - 2, 10)  # a float overflows after a night of them
        return min(MAX_BACKOFF_SECONDS, 2.0**doublings)
