"""Two ways to reach an engine: in a process of its own, or in a thread of this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from dynamo_serve import wire
from dynamo_serve.building import Progress
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import FlightRecorder, num_bytes
from dynamo_serve.core.loop import Command, Stop
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.stats import Standing, Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import EngineStartError
from dynamo_serve.process import (
    EngineProcess,
    describe_exit,
    exit_code,
    is_stopped,
)
from dynamo_serve.start import Template, start_engine

log = logging.getLogger(__name__)

RECEIVE_BYTES = 1 << 20
ENGINE_SECTIONS = ("model", "engine", "cache", "scheduler", "log", "record", "triton")
AFRESH = Standing()  # no rung was taken before


class Loss(NamedTuple):
    """The end of an engine. `seq_ids` were in its last step; `is_own`: it crashed or hung in that
    step, and was not ended from outside as far as one can tell. `is_planned`: it was ended in
    order, for another one, and nobody is to blame."""

    reason: str
    seq_ids: tuple[str, ...] = ()
    is_own: bool = True
    is_planned: bool = False


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a link calls, always on the event loop.

    `on_step` once per publish; `on_lost` once, when a started engine is gone without having been
    closed; `on_answer` with the ticket of an `Inspect` and its answer.
    """

    on_step: Callable[[list[TokenEvent], Stats], None]
    on_lost: Callable[[Loss], None]
    on_answer: Callable[[int, Any], None]
    progress: Progress


class Link(Protocol):
    async def start(self) -> EngineSpec:
        """Raises `EngineStartError` if the engine cannot start."""
        ...

    flight: FlightRecorder  # what the engine is doing
    began_at: float  # when its process or thread was there, after what only a first one waits for

    @property
    def is_stopped(self) -> bool:
        """Whether its process stands still for a signal: then nothing is foreseen of it."""
        ...

    def send(self, command: Command) -> None: ...

    def kill(self, reason: str) -> bool:
        """End an engine that hangs; `on_lost` follows. False where that is impossible."""
        ...

    async def close(self) -> None:
        """Stop the engine; returns when it is gone."""
        ...


class ProcessLink:
    """An engine process, and the socket to it."""

    def __init__(
        self,
        config: Config,
        model_path: str,
        hooks: Hooks,
        tenancy: Tenancy,
        standing: Standing = AFRESH,
        template: Template | None = None,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._hooks = hooks
        self._tenancy = tenancy
        self._template = template
        self._standing = standing
        self._is_closing = False
        self._is_up = False
        self._failure: str | None = None
        self._is_own: bool | None = None  # its end, where the exit code does not tell
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.process: EngineProcess | None = None

    async def start(self) -> EngineSpec:
        self._ready: asyncio.Future[EngineSpec] = asyncio.get_running_loop().create_future()
        size = self._record_bytes
        threads = self._config.engine.threads
        self.process, ours, memory = await start_engine(self._template, threads, size)
        self.flight = FlightRecorder(memory)
        self.began_at = time.monotonic()
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            sections = {name: asdict(getattr(self._config, name)) for name in ENGINE_SECTIONS}
            facts = self._model_path, asdict(self._tenancy), self._standing
            self._writer.write(wire.pack("configure", sections, *facts))
            self._reading = asyncio.create_task(self._read(reader, self.process))
            spec = await self._ready
            self._is_up = True
            return spec
        except BaseException:
            if self._writer is None:
                ours.close()
            await self.close()
            raise

    def send(self, command: Command) -> None:
        if self._writer and not self._writer.is_closing():
            self._writer.write(wire.pack_command(command))

    @property
    def is_stopped(self) -> bool:
        return self.process is not None and is_stopped(self.process.pid)

    def kill(self, reason: str) -> bool:
        if self.process and self._failure is None:
            self._failure, self._is_own = reason, not is_stopped(self.process.pid)
            self.process.kill()
        return True

    async def close(self) -> None:
        self._is_closing = True
        self.send(Stop())
        if self.process:
            if not self._is_up:  # still loading: nothing is in flight
                self.process.kill()
            await exit_code(self.process)
        if self._reading:  # what the step in flight has brought
            await asyncio.wait([self._reading])
        if self._writer:
            self._writer.close()

    @property
    def _record_bytes(self) -> int:
        return num_bytes(self._config.scheduler.max_decode_sequences)

    async def _read(self, reader: asyncio.StreamReader, process: EngineProcess) -> None:
        frames = wire.Frames()
        try:
            while self._failure is None and (data := await reader.read(RECEIVE_BYTES)):
                for message in frames.feed(data):
                    self._take(message)
        except ConnectionError as error:  # the process is gone; what follows says how
            error.with_traceback(None)  # the reader keeps it: neither is to hold this frame
        except Exception as error:  # with nobody reading, every request would wait for ever
            log.exception("a message of the engine could not be taken in")
            self._failure = f"{type(error).__name__}: {error}"
        if self._writer:
            self._writer.close()
        code = await exit_code(process)
        reason = self._failure or describe_exit(code)
        is_own = code != -signal.SIGKILL if self._is_own is None else self._is_own
        in_step = self.flight.read().seq_ids
        # Nothing is in flight any more, and its memory is a descriptor that the collector of
        # cycles would find much later.
        self.flight = FlightRecorder(bytearray(self._record_bytes))
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(reason))
        elif not self._is_closing:
            try:
                self._hooks.on_lost(Loss(reason, in_step, is_own))
            except Exception:  # said now: of a task that failed, asyncio tells when it is collected
                log.exception("the loss of the engine could not be taken in")

    def _take(self, message: list[Any]) -> None:
        match message[0]:
            case "step":
                self._hooks.on_step(*wire.step_of(message))
            case "answer":
                self._hooks.on_answer(message[1], message[2])
            case "progress":
                with contextlib.suppress(OSError):  # the terminal has gone: nobody misses the bar
                    self._hooks.progress(message[1], message[2])
            case "ready":
                if not self._ready.done():  # cancelled while it was loading
                    self._ready.set_result(wire.spec_of(message))
            case "failed":
                self._failure, self._is_own = message[2], True
