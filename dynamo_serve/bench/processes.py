"""A run in several processes, for loads that one event loop cannot send."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from dynamo_serve.bench.meter import COUNTS, Meter, note
from dynamo_serve.errors import ConfigError, DynamoServeError

if TYPE_CHECKING:
    from dynamo_serve.bench.run import Options, Part

LEAD_S = 0.2  # for the word to reach everybody
DRAW_EVERY_S = 0.25
Work = Callable[[int, Meter, Callable[[], float]], "Part"]


class ProcessLost(DynamoServeError):
    """A process of the load generator ended without a result."""


def share_of(options: Options, index: int) -> Options:
    """Its share of the places. Raises `ConfigError` if there is none."""
    places, count = options.driving.concurrency, options.processes
    if places is None:
        return options
    if places < count:
        raise ConfigError(f"{count} processes cannot share {places} places; use fewer")
    own = places // count + (index < places % count)
    return replace(options, driving=replace(options.driving, concurrency=own))


def without_extras(options: Options) -> Options:
    return replace(options, probes=(), metrics_every=None)


def run(work: Work, options: Options) -> list[Part]:
    """`work` in each process, all from the same time 0. Raises `ProcessLost`."""
    share_of(options, 0)
    context = multiprocessing.get_context("fork")  # the plan is inherited, not sent
    children: list[tuple[Any, Connection]] = []
    counts: list[MutableSequence[int]] = []
    for index in range(options.processes):
        ours, theirs = context.Pipe()
        shared: Any = context.Array(ctypes.c_longlong, COUNTS, lock=False)
        child = context.Process(target=_child, args=(work, index, theirs, shared, options))
        child.start()
        theirs.close()
        children.append((child, ours))
        counts.append(shared)
    try:
        return _gather(children, counts, options)
    finally:
        for child, _ in children:
            if child.is_alive():
                child.kill()
            child.join()


def _child(
    work: Work, index: int, pipe: Connection, shared: MutableSequence[int], options: Options
) -> None:
    os.setpgrp()  # a Ctrl-C goes to the parent, who passes it on: once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    meter = Meter(options.total, options.driving.duration, None, shared)

    def start() -> float:
        pipe.send(None)  # ready
        began: float = pipe.recv()
        return began

    try:
        result: object = work(index, meter, start)
    except Exception as error:
        result = error
    pipe.send(result)
    sys.stderr.flush()
    os._exit(0)  # what the parent had open is not this one's to close


def _gather(
    children: Sequence[tuple[Any, Connection]], counts: list[MutableSequence[int]], options: Options
) -> list[Part]:
    for _, pipe in children:
        _received(pipe)
    began = time.monotonic() + LEAD_S
    for _, pipe in children:
        pipe.send(began)
    parts: dict[int, Part] = {}
    meter = Meter(options.total, options.driving.duration, options.progress)
    with _passed_on([child.pid for child, _ in children]):
        while len(parts) < len(children):
            waiting = [pipe for index, (_, pipe) in enumerate(children) if index not in parts]
            for ready in wait(waiting, DRAW_EVERY_S):
                index = next(i for i, (_, pipe) in enumerate(children) if pipe is ready)
                parts[index] = _received(children[index][1])
            _draw(meter, counts, time.monotonic() - began, len(parts) == len(children))
    return [parts[index] for index in sorted(parts)]


def _received(pipe: Connection) -> Any:
    try:
        result = pipe.recv()
    except EOFError:
        raise ProcessLost("a process of the load generator died; use fewer, or look why") from None
    if isinstance(result, Exception):
        raise result
    return result


def _draw(meter: Meter, counts: list[MutableSequence[int]], now: float, is_over: bool) -> None:
    if meter.progress is not None:
        begun, ended, failed, refused = (sum(column) for column in zip(*counts, strict=True))
        fraction = 1.0 if is_over else meter.fraction(now, ended)
        meter.progress(fraction, note(begun, ended, failed, refused))


@contextmanager
def _passed_on(pids: list[int]) -> Iterator[None]:
    """Signals that are meant to end the run reach those who run it."""

    def pass_on(number: int, _: object) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
