"""Records traffic as a trace: who asked when, for how much, and what became of it.

The event loop only puts things into a queue, and drops them, counted, when that is full; a thread
makes lines of them. See docs/traces.md.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from dynamo_serve import __version__, trace
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.eviction import ALL
from dynamo_serve.core.prefix_index import NOTHING
from dynamo_serve.core.request import Request
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.delivery import Delivery
from dynamo_serve.errors import RequestError, TryLater
from dynamo_serve.observer import Observer
from dynamo_serve.recording_files import PageNumbers, TraceFiles, check_folder
from dynamo_serve.recording_lines import Lines, promises, wishes
from dynamo_serve.trace import Header, Line

log = logging.getLogger(__name__)

MOST_QUEUED = 16_384  # things
MOST_QUEUED_TOKENS = 1 << 21  # of prompts and answers in the queue
LOOK_SECONDS = 0.2  # between two looks of the thread into the queue
TURN_SECONDS = 0.0005  # of work, before the event loop may have its turn
BATCH = 256  # lines that are written at once
CLOSE_SECONDS = 10.0  # for what is left, at the end


class TurnedAway(NamedTuple):
    request: Request
    error: RequestError


class Recorder:
    """Watches what passes through the service, tells `inner` everything, and keeps a record.

    `decode` gives the text of a prompt, for those who have asked for it. A disk that is full ends
    the recording, with a line in the log and `trouble`, and nothing else.
    """

    def __init__(
        self, config: Config, inner: Observer, decode: Callable[[Sequence[int]], str], model: str
    ) -> None:
        self._section = config.record
        self._folder = check_folder(config.record.path)
        self._header = Header(
            began_at=time.time(), model=model, settings=wishes(config), version=__version__
        )
        self._began = time.monotonic()
        self._decode = decode
        self._inner = inner
        self.on_event = inner.on_event  # as they are: these are called for every token
        self.on_stream = inner.on_stream
        self._queue: deque[tuple[Any, float]] = deque()
        self._put_tokens = self._taken_tokens = 0  # the first by the loop, the second by the thread
        self._may_step_at = -inf
        self._step_seconds = 1 / config.record.steps if config.record.steps else inf
        self._overflown = self._failed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.num_lines = 0
        self.trouble = ""

    def begin(self, spec: EngineSpec, tenancy: Tenancy, shared: frozenset[bytes] = NOTHING) -> None:
        """The engine is up: what was seen before is written, too. `shared`: keys of the pages that
        tenants have in common."""
        facts = {"facts": dict(spec.facts), "tiers": [tier._asdict() for tier in spec.tiers]}
        told = {name: getattr(spec, name) for name in EngineSpec.__slots__ if name not in facts}
        self._header = replace(
            self._header,
            page_size=spec.page_size,
            spec={**told, **facts},
            tenancy=promises(tenancy),
        )
        decode = self._decode if self._section.text else None
        self._lines = Lines(self._began, PageNumbers(spec.page_size, shared), decode)
        self._files = TraceFiles(
            self._folder,
            self._head,
            max_bytes=int(self._section.max_mib * 2**20),
            keep=self._section.keep,
        )
        self._thread.start()
        log.info("traffic is recorded%s", ", prompts as text" if self._section.text else "")

    def close(self) -> None:
        """Write what is there, and end. It blocks for that long."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS)

    def facts(self) -> dict[str, Any]:
        """For /v1/server: whether it records, still, and whether texts."""
        state = "stopped" if self.trouble else "on"
        told = {"state": state, "text": self._section.text}
        return {"recording": {**told, "trouble": self.trouble} if self.trouble else told}

    @property
    def num_dropped(self) -> int:
        return self._overflown + self._failed

    # ── on the event loop ────────────────────────────────────────────────────

    def on_stats(self, stats: Stats) -> None:
        self._inner.on_stats(stats)
        step = stats.step
        if step is not None and step.shape:
            now = time.monotonic()
            if now >= self._may_step_at:
                # Behind by up to a second it catches up: steps come in bursts.
                self._may_step_at = max(self._may_step_at, now - 1.0) + self._step_seconds
                self._put(step, now, 0)

    def on_end(self, delivery: Delivery, now: float) -> None:
        self._inner.on_end(delivery, now)
        if delivery.request.tenant == ALL[1]:
            return  # nobody has asked: the server computes what tenants share
        self._put(delivery, now, len(delivery.request.prompt_ids) + len(delivery.tokens))

    def on_turned_away(self, request: Request, error: TryLater) -> None:
        self._inner.on_turned_away(request, error)
        self._put(TurnedAway(request, error), time.monotonic(), len(request.prompt_ids))

    def _put(self, thing: Any, now: float, num_tokens: int) -> None:
        waiting = self._put_tokens - self._taken_tokens + num_tokens
        if self.trouble or len(self._queue) >= MOST_QUEUED or waiting > MOST_QUEUED_TOKENS:
            self._overflown += 1
            return
        self._put_tokens += num_tokens
        self._queue.append((thing, now))

    # ── in its thread ────────────────────────────────────────────────────────

    def _head(self, part: int) -> str:
        return trace.dump(replace(self._header, part=part))

    def _run(self) -> None:
        try:
            self._files.write([])
            while not self._stop.wait(LOOK_SECONDS):
                self._drain()
            self._drain()
            self._files.close()
        except OSError as error:
            self._end(error.strerror or str(error))
            log.error("recording has ended: %s; requests go on", self.trouble)
        except Exception as error:
            self._end(f"{type(error).__name__} in the recorder")
            log.exception("recording has ended; requests go on")

    def _end(self, why: str) -> None:
        self.trouble = why
        self._failed += len(self._queue)
        self._queue.clear()
        with contextlib.suppress(OSError):
            self._files.close()

    def _drain(self) -> None:
        lines: list[str] = []
        may_go_on = time.monotonic() + TURN_SECONDS
        try:
            while self._queue:
                lines.append(trace.dump(self._line(*self._queue.popleft())))
                if len(lines) == BATCH:
                    self._write(lines)
                    lines = []
                if time.monotonic() > may_go_on:
                    time.sleep(0)  # the event loop needs the interpreter, too
                    may_go_on = time.monotonic() + TURN_SECONDS
            if lines:
                self._write(lines)
        except BaseException:
            self._failed += len(lines)
            raise

    def _write(self, lines: list[str]) -> None:
        self._files.write(lines)
        self.num_lines += len(lines)

    def _line(self, thing: Any, now: float) -> Line:
        match thing:
            case Delivery():
                self._taken_tokens += len(thing.request.prompt_ids) + len(thing.tokens)
                return self._lines.of_delivery(thing, now)
            case TurnedAway(request, error):
                self._taken_tokens += len(request.prompt_ids)
                return self._lines.of_turned_away(request, error)
        return self._lines.of_step(thing, now)


def recorder_of(
    config: Config, inner: Observer, decode: Callable[[Sequence[int]], str], model: str
) -> Recorder | None:
    """None where nothing is to be recorded. Raises `ConfigError`."""
    return Recorder(config, inner, decode, model) if config.record.path else None


def counts(recorder: Recorder | None) -> dict[str, int]:
    """For `Vitals`."""
    if recorder is None:
        return {}
    return {"recorded": recorder.num_lines, "record_dropped": recorder.num_dropped}
