"""The engine process: builds the engine, then turns the loop until the API process is gone."""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from dynamo_serve import building, garbage, wire
from dynamo_serve.building import Ends, Given
from dynamo_serve.config import (
    CacheSection,
    Config,
    EngineSection,
    LogSection,
    ModelSection,
    RecordSection,
    SchedulerSection,
    TritonSection,
)
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import FlightRecorder
from dynamo_serve.core.loop import Command, Stop
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.stats import Standing, Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import EngineStartError

RECEIVE_BYTES = 1 << 20
ORPHAN_SECONDS = 10.0  # what the engine gets to end by itself once the API process is gone


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


def serve(channel: Channel, given: Given, flight: FlightRecorder | None) -> None:
    """Start the engine and serve it over `channel` until told to stop."""

    def ready(spec: EngineSpec) -> None:
        garbage.settle()
        channel.send_spec(spec)

    def progress(stage: str, fraction: float) -> None:
        channel.send("progress", stage, fraction)

    building.run_engine(
        given,
        Ends(ready, progress, channel.receive, channel.publish, channel.reply, flight),
    )


def settings_of(message: list[Any]) -> Given:
    """The sections the engine needs, the resolved model path, who pays, and how the ladder stood in
    the engine before."""
    _, sections, model_path, tenancy, standing = message
    assert isinstance(sections, dict) and isinstance(model_path, str)
    model = {**sections["model"], "served_names": tuple(sections["model"]["served_names"])}
    triton: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in sections["triton"].items()
    }
    config = Config(
        model=ModelSection(**model),
        engine=EngineSection(**sections["engine"]),
        cache=CacheSection(**sections["cache"]),
        scheduler=SchedulerSection(**sections["scheduler"]),
        log=LogSection(**sections["log"]),
        record=RecordSection(**sections["record"]),
        triton=TritonSection(**triton),
    )
    return Given(config, model_path, Tenancy.of(tenancy), Standing(*standing))


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
        given = settings_of(channel.receive_message())
        level = given.config.log.level.upper()
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s engine: %(message)s")
        serve(channel, given, flight)
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
