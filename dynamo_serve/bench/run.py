"""Sends a plan to a server, and returns what became of it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo_serve.bench import about, processes
from dynamo_serve.bench.client import Client
from dynamo_serve.bench.driver import Driver, Driving, Session, sessions
from dynamo_serve.bench.later import Later
from dynamo_serve.bench.meter import Meter
from dynamo_serve.bench.plan import Planned
from dynamo_serve.bench.precise_loop import new_loop
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.sampling import Sampler

FIRST_PROBE = -1_000_000_000  # probes are counted from here, the plan's calls from 0
LEAD_S = 0.05  # from being ready to time 0
DRAW_EVERY_S = 0.25
MOST_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Options:
    """`probes` run beside the plan and end with it. `metrics_every`: seconds between samples of
    /metrics, None for none. `total`: how many calls the plan has, for the progress. `about` goes
    into the run."""

    url: str
    driving: Driving = field(default_factory=Driving)
    processes: int = 1
    probes: Iterable[Planned] = ()
    metrics_every: float | None = None
    metrics_key: str = ""
    total: int | None = None
    progress: Callable[[float, str], None] | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """What one process did."""

    records: list[Record]
    samples: list[Sample]
    late: list[float]
    lags: list[float]
    busy: float
    num_connections: int
    samples_failed: int
    is_interrupted: bool


def execute(plan: Iterable[Planned], options: Options) -> Run:
    """Send everything, and wait for it. SIGINT and SIGTERM end it early, with what there is.

    With several processes the whole plan is made first. Raises `ConfigError` for a bad address.
    """
    Client(options.url)  # whether it is an address, before anything is started
    _allow_many_connections()
    began_at = time.time()
    if options.processes > 1:
        parts = _several(list(sessions(plan)), options)
    else:
        meter = Meter(options.total, options.driving.duration, options.progress)
        groups, probes = sessions(plan), sessions(options.probes, FIRST_PROBE)
        parts = [
            _in_loop(_drive(options, groups, probes, meter, lambda: time.monotonic() + LEAD_S))
        ]
    return _merged(parts, options, began_at)


def _allow_many_connections() -> None:
    """Each is an open file, of which systems allow few unless they are asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _several(groups: list[Session], options: Options) -> list[Part]:
    """The sessions dealt out in turn; probes and samples are the first one's."""

    def work(index: int, meter: Meter, start: Callable[[], float]) -> Part:
        mine = options if index == 0 else processes.without_extras(options)
        share = processes.share_of(mine, index)
        probes = sessions(mine.probes, FIRST_PROBE)
        own = iter(groups[index :: options.processes])
        return _in_loop(_drive(share, own, probes, meter, start))

    return processes.run(work, options)


def _in_loop(driving: Coroutine[None, None, Part]) -> Part:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(driving)


async def _drive(
    options: Options,
    groups: Iterator[Session],
    probes: Iterator[Session],
    meter: Meter,
    start: Callable[[], float],
) -> Part:
    client = Client(options.url)
    driver = Driver(client, options.driving)
    driver.prepare(groups, probes)
    meter.tally = driver.tally
    interruption = _Interruption(driver)
    began = start()
    cpu = time.process_time()
    beside = [asyncio.create_task(_draw(meter, began, driver))]
    sampler = _sampler(options, driver.later)
    if sampler is not None:
        beside.append(asyncio.create_task(sampler.run(began)))
    try:
        await driver.run(began)
    finally:
        interruption.forget()
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        if sampler is not None:
            await sampler.end(began)
        await client.close()
    meter.draw(time.monotonic() - began, is_over=True)
    busy = (time.process_time() - cpu) / max(1e-9, time.monotonic() - began)
    tally, samples = driver.tally, sampler.samples if sampler else []
    return Part(
        *(driver.records, samples, tally.late, tally.lags, busy, client.num_opened),
        sampler.num_failed if sampler else 0,
        interruption.has_come,
    )


def _sampler(options: Options, later: Later) -> Sampler | None:
    if options.metrics_every is None:
        return None
    client = Client(options.url)  # of its own: no connection of the load's is taken for it
    return Sampler(client, later, options.metrics_every, options.metrics_key)


async def _draw(meter: Meter, began: float, driver: Driver) -> None:
    parent = os.getppid()
    while True:
        await asyncio.sleep(DRAW_EVERY_S)
        meter.draw(time.monotonic() - began)
        if os.getppid() != parent:
            driver.stop()  # whoever wanted the result is gone


class _Interruption:
    """The first signal ends the run; the second does what signals do."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, driver: Driver) -> None:
        self.has_come = False
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._is_set = threading.current_thread() is threading.main_thread()
        if self._is_set:
            for number in self.SIGNALS:
                self._loop.add_signal_handler(number, self._come)

    def _come(self) -> None:
        self.has_come = True
        self.forget()
        self._driver.stop()

    def forget(self) -> None:
        if self._is_set:
            self._is_set = False
            for number in self.SIGNALS:
                self._loop.remove_signal_handler(number)


def _merged(parts: list[Part], options: Options, began_at: float) -> Run:
    records = sorted((r for part in parts for r in part.records), key=lambda r: r.due)
    late = [value for part in parts for value in part.late]
    lags = [value for part in parts for value in part.lags]
    told = {
        "command": about.command(sys.argv),
        "began_at": round(began_at, 3),
        "url": options.url,
        "loop": "open" if options.driving.concurrency is None else "closed",
        "versions": about.versions(),
        "commit": about.commit(),
        "machine": about.machine(),
        "client": {
            "processes": options.processes,
            "connections": sum(part.num_connections for part in parts),
            "samples_failed": sum(part.samples_failed for part in parts),
            **about.keeping_up(late, lags, max(part.busy for part in parts)),
        },
        "interrupted": any(part.is_interrupted for part in parts),
        **options.about,
    }
    samples = [sample for part in parts for sample in part.samples]
    return Run(told, measured(records), records, samples)


def measured(records: list[Record]) -> float:
    """Seconds from when the first measured call was due to the end of the last one. Probes are
    apart: they go on beside a warm-up that is counted in calls."""
    load = [r for r in records if r.kind != "probe"]
    counted = [r for r in load or records if not r.is_warm_up]
    ends = [r.end for r in counted if r.end is not None]
    return max(0.0, max(ends) - min(r.due for r in counted)) if ends else 0.0
