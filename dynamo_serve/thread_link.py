"""The way to an engine in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable

from dynamo_serve.building import Ends, Given, run_engine
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import FlightRecorder, num_bytes
from dynamo_serve.core.loop import Command, Stop
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.stats import Standing, Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.link import AFRESH, Hooks, Loss


class ThreadLink:
    """The engine in a thread of this process: for tests and notebooks."""

    def __init__(
        self,
        config: Config,
        model_path: str,
        hooks: Hooks,
        tenancy: Tenancy,
        standing: Standing = AFRESH,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._hooks = hooks
        self._tenancy = tenancy
        self._standing = standing
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._is_closing = False
        size = num_bytes(config.scheduler.max_decode_sequences)
        self.flight = FlightRecorder(bytearray(size))

    async def start(self) -> EngineSpec:
        self._loop = asyncio.get_running_loop()
        self.began_at = time.monotonic()
        self._ready: asyncio.Future[EngineSpec] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return await self._ready

    def send(self, command: Command) -> None:
        self._commands.put(command)

    is_stopped = False

    def kill(self, reason: str) -> bool:
        return False  # a thread cannot be ended from outside

    async def close(self) -> None:
        self._is_closing = True
        self.send(Stop())
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        def progress(stage: str, fraction: float) -> None:
            self._call(self._hooks.progress, stage, fraction)

        def publish(events: list[TokenEvent], stats: Stats) -> None:
            self._call(self._hooks.on_step, events, stats)

        def reply(ticket: int, answer: object) -> None:
            self._call(self._hooks.on_answer, ticket, answer)

        def ready(spec: EngineSpec) -> None:
            self._call(self._succeed, spec)

        given = Given(self._config, self._model_path, self._tenancy, self._standing)
        try:
            run_engine(given, Ends(ready, progress, self._receive, publish, reply, self.flight))
        except Exception as error:
            self._call(self._fail, error)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Run `function` on the event loop, if that still runs."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _succeed(self, spec: EngineSpec) -> None:
        if not self._ready.done():  # cancelled while it was loading
            self._ready.set_result(spec)

    def _fail(self, error: Exception) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
        elif not (self._is_closing or self._ready.cancelled()):
            reason = f"{type(error).__name__}: {error}"
            self._hooks.on_lost(Loss(reason, self.flight.read().seq_ids))

    def _receive(self, patience: float | None) -> list[Command]:
        commands: list[Command] = []
        try:
            if patience != 0.0:
                commands.append(self._commands.get(timeout=patience))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands
