"""Copies pages between the device and the tiers below it, beside the steps."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from dynamo_serve.core.tiers import DEVICE, DISK, NAMES, Copied, Copy, Found, Place
from dynamo_serve.engines.local.background import step_back
from dynamo_serve.engines.local.kv_cache import KVCache
from dynamo_serve.engines.local.page_bytes import PageBytes
from dynamo_serve.engines.local.tier_stores import DiskStore, PageLost, Store

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # between two tries at a folder that another process uses
CLOSE_SECONDS = 5.0
NICE = 10  # of copies downwards: for these nobody waits, and on a CPU they take a core from a step
UP, DOWN = "up", "down"
Way = tuple[int, str]


class Copier:
    """A thread for what goes up from each tier and one for what goes down to it, so that a slow
    disk holds up nobody but those who wait for it. All methods are for the engine's thread."""

    def __init__(self, stores: Mapping[int, Store], kv: KVCache) -> None:
        self._stores = stores
        self._ended: deque[Copied | Found] = deque()
        self._queues: dict[Way, queue.SimpleQueue[Copy | None]] = {}
        self._threads = []
        self._is_closing = threading.Event()
        for number, way in itertools.product(stores, (UP, DOWN)):
            self._queues[number, way] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._run, args=(number, way, PageBytes(kv)), daemon=True,
                name=f"copies-{NAMES[number]}-{way}",
            )  # fmt: skip
            thread.start()
            self._threads.append(thread)

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            way = UP if copy.target.tier == DEVICE else DOWN
            self._queues[max(copy.source.tier, copy.target.tier), way].put(copy)

    def copied(self) -> list[Copied | Found]:
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self) -> None:
        """End the threads, whatever is still waiting; idempotent."""
        self._is_closing.set()
        for waiting in self._queues.values():
            waiting.put(None)
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)
            if thread.is_alive():
                logger.warning("%s do not end: the tier hangs", thread.name)
        if DISK in self._stores and not any(thread.is_alive() for thread in self._threads):
            self._stores[DISK].close()
        self._threads = []

    def _run(self, number: int, way: str, page: PageBytes) -> None:
        row = torch.empty(page.num_bytes, dtype=torch.uint8)
        store = self._stores[number]
        if way == DOWN:
            step_back(NICE)
            if isinstance(store, DiskStore) and not self._open(store):
                return
        while (
            copy := self._queues[number, way].get()
        ) is not None and not self._is_closing.is_set():
            self._ended.append(self._carry_out(copy, page, row))

    def _open(self, store: DiskStore) -> bool:
        """Wait until the folder is ours, and tell what is in it; False if it is too late."""
        is_told = False
        while not self._is_closing.is_set():
            try:
                found = store.open()
            except Exception as error:
                logger.error("no disk tier: %s", error)
                self._fail_all(DISK, str(error))
                return False
            if found is not None:
                logger.info("%d pages found in the disk tier", len(found))
                self._ended.append(Found(DISK, tuple(found)))
                return True
            if not is_told:
                is_told = True
                logger.warning("cache.disk_path is used by another process: waiting for it")
            self._fail_waiting(DISK, "another process uses the disk tier")
            self._is_closing.wait(RETRY_SECONDS)
        return False

    def _fail_waiting(self, number: int, error: str) -> None:
        while not self._queues[number, DOWN].empty():
            copy = self._queues[number, DOWN].get()
            if copy is not None:
                self._ended.append(Copied(copy.ticket, 0.0, error))

    def _fail_all(self, number: int, error: str) -> None:
        while (copy := self._queues[number, DOWN].get()) is not None:
            self._ended.append(Copied(copy.ticket, 0.0, error))

    def _carry_out(self, copy: Copy, page: PageBytes, row: torch.Tensor) -> Copied:
        began = time.perf_counter()
        error = ""
        try:
            with torch.inference_mode():
                self._read(copy.source, copy.key, page, row)
                self._write(copy.target, copy.key, page, row)
        except (PageLost, OSError, RuntimeError) as failure:
            error = str(failure) or type(failure).__name__
            logger.warning(
                "a page could not be copied from %s to %s: %s",
                *(NAMES[copy.source.tier], NAMES[copy.target.tier], error),
            )
        return Copied(copy.ticket, time.perf_counter() - began, error)

    def _read(self, source: Place, key: bytes, page: PageBytes, row: torch.Tensor) -> None:
        if source.tier == DEVICE:
            page.gather(source.slot, row)
        else:
            self._stores[source.tier].read(source.slot, key, row)

    def _write(self, target: Place, key: bytes, page: PageBytes, row: torch.Tensor) -> None:
        if target.tier == DEVICE:
            page.scatter(row, target.slot)
        else:
            self._stores[target.tier].write(target.slot, key, row)
