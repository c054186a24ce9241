"""Tells cluster routers what becomes of KV pages, as they know it from vLLM: KV events over ZeroMQ.

A message is three frames: the topic; its number, 8 bytes, big-endian; and in msgpack a batch
`[time, [event, …], 0]`, where an event is a map with its "type". Whoever subscribes is told of
everything that there is first. Whoever has missed numbers can ask the replay socket for them: it
takes the first number wanted and answers with messages of number and batch, and then -1.

Every subscriber is told everything: while the buffers of one are full, all wait, and if that lasts
its connection is cut.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack

from dynamo_serve.config import CacheSection
from dynamo_serve.core.page_events import Cleared, Event, PageEvents, Removed, Stored
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.tiers import DEVICE, DISK, HOST
from dynamo_serve.errors import EngineStartError

log = logging.getLogger(__name__)

MEDIUM = {DEVICE: "GPU", HOST: "CPU_PINNED", DISK: "DISK"}  # words that routers know
NUMBER_BYTES = 8
END = (-1).to_bytes(NUMBER_BYTES, signed=True)
SUBSCRIBES = b"\x01"  # the first byte of what a socket says that wants a topic
GATHER_MS = 20  # events of so long go together
MAX_BATCH = 256  # pages
MAX_HEARD = 1000  # messages of subscribers that are read in a row
MOST_UNREAD = 1000  # batches that may wait for one subscriber
MOST_KEPT, MOST_KEPT_BYTES = 10_000, 1 << 26  # batches for the replay socket
STUCK_SECONDS = 10.0  # a subscriber may take nothing for so long
ANEW_SECONDS = 1.0  # at least, between telling everything because somebody has come
BIND_SECONDS = 0.5
MAX_ASKED_BYTES = 4096  # nobody has more to say to us


def block_hash(key: bytes) -> int:
    """What routers take for a hash: a signed integer of 64 bits."""
    return int.from_bytes(key[:8], signed=True)


def maps_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events as routers read them. What follows each other in a chain becomes one."""
    maps: list[dict[str, Any]] = []
    ends: dict[int, tuple[bytes, dict[str, Any]]] = {}  # of chains that may go on, by tier
    for event in events:
        match event:
            case Stored(key, parent, token_ids, tier):
                end, chain = ends.get(tier, (None, {}))
                if parent is None or end != parent:
                    chain = {
                        "type": "BlockStored",
                        "block_hashes": [],
                        "parent_block_hash": None if parent is None else block_hash(parent),
                        "token_ids": [],
                        "block_size": len(token_ids),
                        "lora_id": None,
                        "medium": MEDIUM[tier],
                        "lora_name": None,
                    }
                    maps.append(chain)
                chain["block_hashes"].append(block_hash(key))
                chain["token_ids"] += token_ids
                ends[tier] = key, chain
            case Removed(key, tier):
                ends.clear()
                gone = {"type": "BlockRemoved", "block_hashes": [], "medium": MEDIUM[tier]}
                if not maps or {**maps[-1], "block_hashes": []} != gone:
                    maps.append(gone)
                maps[-1]["block_hashes"].append(block_hash(key))
            case Cleared():
                ends.clear()
                maps.append({"type": "AllBlocksCleared"})
    return maps


def pack(events: Iterable[Event], now: float) -> bytes:
    batch: bytes = msgpack.packb([now, maps_of(events), 0])  # rank 0 of one: no data parallelism
    return batch


class Publisher:
    """Two sockets, and the thread that owns them once it `follow`s a scheduler."""

    def __init__(
        self,
        endpoint: str,
        *,
        replay: str = "",
        topic: str = "",
        max_events: int = 10_000,
        stuck_seconds: float = STUCK_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            self._zmq: Any = importlib.import_module("zmq")
        except ImportError as error:
            remedy = "pip install 'dynamo-serve[events]'"
            raise EngineStartError(f"cache.kv_events: {error}; {remedy}") from None
        self._topic = topic.encode()
        self._max_events = max_events
        self._clock = clock
        self._untold: deque[Event] = deque()
        self._message: tuple[bytes, bytes, bytes] | None = None  # that nobody has room for yet
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=MOST_KEPT)
        self._num_kept_bytes = 0
        # Of the next batch. Beyond any of an engine before this one: routers drop lower numbers.
        self._number = int(clock() * 1e6)
        self._somebody_came = False
        self._may_begin_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._context = self._zmq.Context()
        self._pub = self._socket("XPUB", MOST_UNREAD)
        self._pub.setsockopt(self._zmq.XPUB_VERBOSE, 1)  # tell of everybody who comes
        self._pub.setsockopt(self._zmq.XPUB_NODROP, 1)  # and drop nothing unseen
        self._pub.setsockopt(self._zmq.TCP_MAXRT, int(stuck_seconds * 1000))
        self._router = self._socket("ROUTER", MOST_KEPT + 1)
        self._unbound = [("kv_events", self._pub, endpoint)]
        if replay:
            self._unbound.append(("kv_events_replay", self._router, replay))
        self._bind_at = 0.0
        self._bind()

    def _socket(self, kind: str, most_unread: int) -> Any:
        socket = self._context.socket(getattr(self._zmq, kind))
        socket.setsockopt(self._zmq.LINGER, 0)
        socket.setsockopt(self._zmq.SNDHWM, most_unread)
        socket.setsockopt(self._zmq.MAXMSGSIZE, MAX_ASKED_BYTES)
        return socket

    @property
    def endpoints(self) -> tuple[str, str]:
        """Where it listens: what a wildcard became."""
        last = self._zmq.LAST_ENDPOINT
        ends = (s.getsockopt(last).decode().rstrip("\0") for s in (self._pub, self._router))
        return next(ends), next(ends)

    def follow(self, scheduler: Scheduler) -> None:
        """Publish what becomes of its pages, from now on."""
        tiers = {tier.number: tier for tier in scheduler.spill.tiers}
        pool = scheduler.pool
        self._events = PageEvents(
            {DEVICE: pool.index.pages, **tiers}, pool.page_size, self._max_events
        )
        pool.events = self._events
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._context.destroy(linger=0)

    # ── in its thread ────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        except Exception:
            log.exception("KV events are not published any more")

    def _turn(self) -> None:
        self._bind()
        if self._pub.poll(GATHER_MS):
            self._hear()
        while self._router.poll(0) and not self._stop.is_set():
            self._replay()
        if self._somebody_came and time.monotonic() >= self._may_begin_at:
            self._somebody_came = False
            self._may_begin_at = time.monotonic() + ANEW_SECONDS
            self._events.begin_anew()
        if self._events.begins_anew:
            self._untold.clear()
        if not self._untold:
            self._untold.extend(self._events.take())
        self._tell()

    def _bind(self) -> None:
        """An address that is in use becomes free when the server before this one has handed over;
        until then events wait. Anything else that is wrong with it raises `EngineStartError`."""
        if not self._unbound or time.monotonic() < self._bind_at:
            return
        self._bind_at, is_first = time.monotonic() + BIND_SECONDS, not self._bind_at
        for name, socket, endpoint in self._unbound[:]:
            try:
                socket.setsockopt(self._zmq.IPV6, int("[" in endpoint))
                socket.bind(endpoint)
            except self._zmq.ZMQError as error:
                fault = f"cache.{name} = {endpoint!r}: {os.strerror(error.errno)}"
                if error.errno != errno.EADDRINUSE:
                    self._context.destroy(linger=0)
                    raise EngineStartError(f"{fault}; choose an address of this machine") from None
                if is_first:
                    log.warning("%s; events wait until it is free, or choose another", fault)
            else:
                self._unbound.remove((name, socket, endpoint))

    def _hear(self) -> None:
        """Who has come."""
        for _ in range(MAX_HEARD):
            try:
                said = self._pub.recv(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            if said[:1] == SUBSCRIBES and self._topic.startswith(said[1:]):
                self._somebody_came = True

    def _tell(self) -> None:
        while not self._stop.is_set() and (self._message or self._untold):
            if self._message is None:
                number = self._number.to_bytes(NUMBER_BYTES)
                events = [self._untold.popleft() for _ in range(min(MAX_BATCH, len(self._untold)))]
                self._message = self._topic, number, pack(events, self._clock())
                self._number += 1
                self._keep(*self._message[1:])
            try:
                self._pub.send_multipart(self._message, self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            self._message = None

    def _keep(self, number: bytes, batch: bytes) -> None:
        self._kept.append((number, batch))
        self._num_kept_bytes += len(batch)
        while self._num_kept_bytes > MOST_KEPT_BYTES or len(self._kept) >= MOST_KEPT:
            self._num_kept_bytes -= len(self._kept.popleft()[1])

    def _replay(self) -> None:
        asked = self._router.recv_multipart()
        if len(asked) != 3 or len(asked[2]) != NUMBER_BYTES:
            log.warning("the replay socket was asked something else than a number of 8 bytes")
            return
        for number, batch in [kept for kept in self._kept if kept[0] >= asked[2]]:
            self._router.send_multipart([*asked[:2], number, batch])
        self._router.send_multipart([*asked[:2], END, b""])


@contextmanager
def opened(cache: CacheSection) -> Iterator[Publisher | None]:
    """The publisher that the settings ask for, closed at the end; None if they ask for none."""
    if not cache.kv_events:
        yield None
        return
    publisher = Publisher(
        cache.kv_events,
        replay=cache.kv_events_replay,
        topic=cache.kv_events_topic,
        max_events=cache.kv_events_buffer,
    )
    try:
        yield publisher
    finally:
        publisher.close()
