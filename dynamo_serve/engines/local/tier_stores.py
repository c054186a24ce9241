"""Where pages lie below the device: rows of host memory, slots of a file; each with a checksum."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from ctypes import memmove
from pathlib import Path
from typing import Protocol

import torch

from dynamo_serve.engines.local.malloc import zeros_on_huge_pages
from dynamo_serve.errors import EngineStartError

FORMAT = 2
# Magic, what has to be the same for a page to mean the same, key, checksum, order of writing.
HEADER = struct.Struct("<8s8s16sIQ")
MAGIC = b"dserveKV"
SECTOR = 4096  # a header takes one, so that pages begin at a boundary of the file system's
KEY_BYTES = 16


class PageLost(Exception):
    """What a slot holds is not what was put there; the message says how one can tell."""


class Store(Protocol):
    """The slots of a tier. Each method may raise `PageLost` or `OSError`."""

    def write(self, slot: int, key: bytes, row: torch.Tensor) -> None: ...

    def read(self, slot: int, key: bytes, row: torch.Tensor) -> None:
        """Fill `row`, and look whether it is what `key` was written with."""
        ...

    def close(self) -> None: ...


class HostStore:
    """Host memory, page-locked where a CUDA device copies from it."""

    def __init__(self, num_slots: int, page_bytes: int, device: torch.device) -> None:
        shape = (num_slots, page_bytes)
        if device.type == "cuda":
            self._rows = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        else:
            self._rows = zeros_on_huge_pages(shape, torch.uint8)
        self._sums: list[tuple[bytes, int]] = [(b"", 0)] * num_slots

    def write(self, slot: int, key: bytes, row: torch.Tensor) -> None:
        memmove(self._rows[slot].data_ptr(), row.data_ptr(), row.numel())
        self._sums[slot] = (key, checksum(row))

    def read(self, slot: int, key: bytes, row: torch.Tensor) -> None:
        memmove(row.data_ptr(), self._rows[slot].data_ptr(), row.numel())
        if self._sums[slot] != (key, checksum(row)):
            raise PageLost(f"slot {slot} of host memory: the checksum is wrong")

    def close(self) -> None:
        del self._rows


class DiskStore:
    """One file of slots in a folder that says which model they are of; for one process at a time.

    Every page says for itself what it is of. Nothing is flushed on purpose: a page that was half
    written when the power went has a wrong checksum, and is computed again.
    """

    def __init__(self, folder: Path, num_slots: int, page_bytes: int, facts: Mapping[str, str]):
        self._folder = folder
        self._num_slots = num_slots
        self._page_bytes = page_bytes
        self._stride = SECTOR + -(-page_bytes // SECTOR) * SECTOR
        self._facts = {"format": str(FORMAT), **facts, "page_bytes": str(page_bytes)}
        told = json.dumps(self._facts, sort_keys=True).encode()
        self._kind = hashlib.blake2b(told, digest_size=8).digest()
        self._order = 0
        self._fd = self._lock = -1
        self._compare()

    def open(self) -> list[tuple[bytes, int]] | None:
        """What it holds, as (key, slot), the oldest first; None while another process uses it.

        Raises `OSError` if the folder cannot be used, `EngineStartError` if it must not be.
        """
        for folder in (*reversed(self._folder.parents), self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)  # `parents` would leave those above to others
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            return None
        self._compare()
        self._sign()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._folder / "pages", flags, 0o600)  # it is what people wrote
        if os.fstat(self._fd).st_size > self._num_slots * self._stride:
            os.ftruncate(self._fd, self._num_slots * self._stride)
        return self._scan()

    def write(self, slot: int, key: bytes, row: torch.Tensor) -> None:
        self._order += 1
        head = HEADER.pack(MAGIC, self._kind, key, checksum(row), self._order)
        head = head.ljust(SECTOR, b"\0")
        self._whole(os.pwritev(self._fd, [head, memoryview(row.numpy())], slot * self._stride))

    def read(self, slot: int, key: bytes, row: torch.Tensor) -> None:
        head = bytearray(SECTOR)
        self._whole(os.preadv(self._fd, [head, memoryview(row.numpy())], slot * self._stride))
        found = HEADER.unpack_from(head)[:4]
        if found != (MAGIC, self._kind, key, checksum(row)):
            raise PageLost(f"slot {slot} of {self._folder}: the checksum is wrong")

    def close(self) -> None:
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def _whole(self, num_bytes: int) -> None:
        if num_bytes != SECTOR + self._page_bytes:
            raise PageLost(f"{self._folder}: only {num_bytes} bytes of a page")

    def _compare(self) -> None:
        """Raises `EngineStartError` if the folder holds pages that would be wrong here."""
        theirs = self._signature()
        if theirs is None:
            return
        for name, ours in self._facts.items():
            if theirs.get(name) != ours:
                raise EngineStartError(
                    f"cache.disk_path: {self._folder} holds pages with {name} "
                    f"{theirs.get(name)}, and here it is {ours}; choose another folder, or remove "
                    "this one"
                )

    def _signature(self) -> dict[str, object] | None:
        """What `model.json` says; None where there is none that can be read, after a loss of power,
        say: then the pages tell for themselves."""
        try:
            told = json.loads((self._folder / "model.json").read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return told if isinstance(told, dict) else None

    def _sign(self) -> None:
        """Write `model.json`, whole or not at all."""
        if self._signature() == self._facts:
            return
        new = self._folder / "model.json.new"
        new.write_text(json.dumps(self._facts, indent=1) + "\n")
        new.replace(self._folder / "model.json")

    def _scan(self) -> list[tuple[bytes, int]]:
        found = []
        for slot in range(-(-os.fstat(self._fd).st_size // self._stride)):
            head = os.pread(self._fd, HEADER.size, slot * self._stride)
            if len(head) == HEADER.size and head.startswith(MAGIC + self._kind):
                _, _, key, _, order = HEADER.unpack(head)
                found.append((order, key, slot))
        found.sort()
        self._order = found[-1][0] if found else 0
        newest = {key: slot for _, key, slot in found}
        return [(key, slot) for _, key, slot in found if newest[key] == slot]


def checksum(row: torch.Tensor) -> int:
    """CRC-32 of the bytes (zlib): 2.4 GB/s on one core, and the interpreter is not held."""
    return zlib.crc32(memoryview(row.numpy()))
