"""The engine process: builds the engine, then turns the loop until the API process is gone."""

from __future__ import annotations

import json
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamo_serve import garbage, wire
from dynamo_serve.config import (
    CacheSection,
    Config,
    EngineSection,
    LogSection,
    ModelSection,
    SchedulerSection,
)
from dynamo_serve.core.engine import Engine, EngineSpec
from dynamo_serve.core.flight import FlightRecorder
from dynamo_serve.core.ladder import modes_of
from dynamo_serve.core.loop import Command, Inbox, Loop, Publish, Reply, Stop
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.scheduler import Limits, Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.core.tiers import DISK, HOST
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import EngineStartError

Progress = Callable[[str, float], None]
"""Called with a stage ("weights", "warm-up", "graphs") and how much of it is done, 0 to 1."""

RECEIVE_BYTES = 1 << 20
FAKE_TOKEN_BYTES = 1024  # what a token of the fake engine is said to take in its tiers
ORPHAN_SECONDS = 10.0  # what the engine gets to end by itself once the API process is gone


def build_engine(config: Config, model_path: str, progress: Progress) -> Engine:
    check_tiers(config.cache)
    if config.engine.kind == "fake":
        return build_fake(config, model_path)
    # torch is imported only where it is needed: this line costs seconds
    from dynamo_serve.engines.local import LocalEngine  # noqa: PLC0415

    engine: Engine = LocalEngine(
        config.model,
        config.engine,
        config.cache,
        max_decode_sequences=config.scheduler.max_decode_sequences,
        max_prefill_tokens=config.scheduler.max_prefill_tokens,
        path=model_path,
        progress=progress,
    )
    return engine


def check_tiers(cache: CacheSection) -> None:
    if bool(cache.disk_gib) != bool(cache.disk_path):
        raise EngineStartError("cache.disk_gib and cache.disk_path: set both, or neither")
    if (cache.host_gib or cache.disk_gib) and not cache.prefix_sharing:
        raise EngineStartError("cache.host_gib, cache.disk_gib: they need cache.prefix_sharing")


def build_fake(config: Config, model_path: str) -> Engine:
    """The fake engine with the vocabulary and context of the model it stands for."""
    try:
        facts = json.loads((Path(model_path) / "config.json").read_text())
    except OSError as error:
        raise EngineStartError(f"the fake engine needs {model_path}/config.json: {error}") from None
    if not {"vocab_size", "max_position_embeddings"} <= facts.keys():
        wanted = "vocab_size and max_position_embeddings"
        raise EngineStartError(f"the fake engine needs {wanted} in {model_path}/config.json")
    max_model_len = config.model.max_model_len or facts["max_position_embeddings"]
    num_pages = config.cache.num_pages or 64 * -(-max_model_len // config.cache.page_size)
    pages_per_gib = (1 << 30) // (FAKE_TOKEN_BYTES * config.cache.page_size)
    return FakeEngine(
        vocab_size=facts["vocab_size"],
        max_model_len=max_model_len,
        page_size=config.cache.page_size,
        num_pages=num_pages,
        below={
            HOST: int(config.cache.host_gib * pages_per_gib),
            DISK: int(config.cache.disk_gib * pages_per_gib),
        },
        step_seconds=config.engine.fake_step_ms / 1000,
    )


def build_loop(
    config: Config,
    engine: Engine,
    spec: EngineSpec,
    tenancy: Tenancy,
    *,
    inbox: Inbox,
    publish: Publish,
    reply: Reply,
    flight: FlightRecorder | None,
) -> Loop:
    pool = PagePool(spec.num_pages, spec.page_size, prefix_sharing=config.cache.prefix_sharing)
    drafts = spec.verifies_drafts and config.scheduler.speculation == "auto"
    limits = Limits(
        max_prefill_tokens=config.scheduler.max_prefill_tokens,
        max_mixed_tokens=config.scheduler.max_mixed_tokens,
        max_decode_sequences=config.scheduler.max_decode_sequences,
        max_queue_delay=config.scheduler.max_queue_delay_ms / 1000,
        max_waiting=config.scheduler.max_waiting,
        mix_phases=config.scheduler.mix_phases,
        fit_chunks=config.scheduler.fit_chunks,
        max_draft_tokens=config.scheduler.max_draft_tokens if drafts else 0,
        hold_steps=spec.holds_steps and config.scheduler.hold_steps,
        ladder=config.scheduler.ladder == "auto",
        ladder_max_tokens=config.scheduler.ladder_max_tokens,
    )
    scheduler = Scheduler(pool, limits, tenancy, tiers=spec.tiers)
    modes = modes_of(config.scheduler.ladder_pin, config.scheduler.ladder_forbid)
    scheduler.controller.steer(modes, time.monotonic())
    return Loop(
        scheduler,
        engine,
        inbox=inbox,
        publish=publish,
        reply=reply,
        clock=time.monotonic,
        flight=flight,
    )


class Channel:
    """The engine's end of the socket. A closed socket reads as `Stop`: no parent, no purpose."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = wire.Frames()
        self._early: list[list[Any]] = []  # what came together with the settings

    def receive(self, patience: float | None) -> list[Command]:
        if self._early:
            early, self._early = self._early, []
            return [wire.command_of(message) for message in early]
        ready, _, _ = select.select([self._sock], [], [], patience)
        if not ready:
            return []
        data = self._sock.recv(RECEIVE_BYTES)
        if not data:
            return [Stop()]
        return [wire.command_of(message) for message in self._frames.feed(data)]

    def receive_message(self) -> list[Any]:
        """The first message alone: the settings."""
        while True:
            data = self._sock.recv(RECEIVE_BYTES)
            if not data:
                raise EOFError("the API process is gone")
            if messages := self._frames.feed(data):
                first, *self._early = messages
                return first

    def publish(self, events: list[TokenEvent], stats: Stats) -> None:
        self._sock.sendall(wire.pack_step(events, stats))

    def reply(self, ticket: int, answer: object) -> None:
        self.send("answer", ticket, answer)

    def send(self, *message: object) -> None:
        self._sock.sendall(wire.pack(*message))

    def send_spec(self, spec: EngineSpec) -> None:
        self._sock.sendall(wire.pack_spec(spec))


def serve(
    channel: Channel,
    config: Config,
    model_path: str,
    tenancy: Tenancy,
    flight: FlightRecorder | None,
) -> None:
    """Start the engine and serve it over `channel` until told to stop."""
    engine = build_engine(
        config, model_path, lambda stage, fraction: channel.send("progress", stage, fraction)
    )
    try:
        spec = engine.start()
        garbage.settle()
        channel.send_spec(spec)
        loop = build_loop(
            config,
            engine,
            spec,
            tenancy,
            inbox=channel.receive,
            publish=channel.publish,
            reply=channel.reply,
            flight=flight,
        )
        loop.run()
    finally:
        engine.close()


def settings_of(message: list[Any]) -> tuple[Config, str, Tenancy]:
    """The sections the engine needs, the resolved model path, and who pays."""
    _, sections, model_path, tenancy = message
    assert isinstance(sections, dict) and isinstance(model_path, str)
    model = {**sections["model"], "served_names": tuple(sections["model"]["served_names"])}
    config = Config(
        model=ModelSection(**model),
        engine=EngineSection(**sections["engine"]),
        cache=CacheSection(**sections["cache"]),
        scheduler=SchedulerSection(**sections["scheduler"]),
        log=LogSection(**sections["log"]),
    )
    return config, model_path, Tenancy.of(tenancy)


def adopt(fd: int) -> socket.socket:
    """The inherited socket under the lowest free number, and for no child to inherit.

    Its number comes from the API process, where a thousand connections may be open, and `select`
    takes none above 1023. A child that held it too would hide this process's end from the API's.
    """
    sock = socket.socket(fileno=os.dup(fd))
    os.close(fd)
    return sock


def end_with(sock: socket.socket) -> None:
    """Wait until the other end is gone, and then end this process if it does not end by itself.

    The loop sees a closed socket between two steps only; loading takes minutes, and a device that
    hangs takes for ever.
    """
    poll = select.poll()
    poll.register(sock, 0)  # a hang-up is reported unasked
    poll.poll()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def record(fd: int | None) -> FlightRecorder | None:
    """The flight record in memory that this process was given; None if nobody watches."""
    if fd is None:
        return None
    recorder = FlightRecorder(memoryview(mmap.mmap(fd, 0)))
    os.close(fd)
    return recorder


def main(fd: int, flight_fd: int | None = None) -> int:
    # Signals of the terminal and of the service manager are the API process's to handle; it
    # ends this one by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sock = adopt(fd)
    flight = record(flight_fd)
    threading.Thread(target=end_with, args=(sock,), name="orphan", daemon=True).start()
    channel = Channel(sock)
    try:
        config, model_path, tenancy = settings_of(channel.receive_message())
        logging.basicConfig(
            level=config.log.level.upper(), format="%(asctime)s %(levelname)s engine: %(message)s"
        )
        serve(channel, config, model_path, tenancy, flight)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except EngineStartError as error:
        channel.send("failed", "start", str(error))
        return 1
    except Exception as error:
        logging.getLogger(__name__).exception("the engine stopped")
        channel.send("failed", "crash", f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
