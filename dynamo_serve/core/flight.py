"""What the loop is doing right now, in memory that outlives its process.

The loop writes it, the API process reads it without asking: how long the step in flight has taken
against what was predicted, and, after a crash, which sequences were in that step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct("<QIIQdd")  # version, activity, length of the ids, taken, since, predicted
BYTES_PER_ID = 64
MAX_TRIES = 100  # to read what is being written


class Activity(IntEnum):
    STARTING = 0
    WAITING = 1  # for commands, with nothing to run
    TURNING = 2  # between two steps
    STEPPING = 3


Doing = tuple[Activity, float, float, bytes]  # since when, for how long, and the ids


class InFlight(NamedTuple):
    """A look at the loop. `since` is a reading of the monotonic clock: when it began what it does;
    `predicted` is how many seconds it should take. `num_taken` commands have arrived so far.
    `seq_ids` are those of the step."""

    activity: Activity
    num_taken: int
    since: float
    predicted: float
    seq_ids: tuple[str, ...]


def num_bytes(max_sequences: int) -> int:
    """What a recorder needs for steps of so many sequences; of longer ones it knows a part."""
    return HEADER.size + BYTES_PER_ID * max_sequences


class FlightRecorder:
    """Writes and reads one buffer; the version is odd while it is being written."""

    def __init__(self, buffer: memoryview | bytearray) -> None:
        self._buffer = memoryview(buffer)
        self._room = len(self._buffer) - HEADER.size
        self._version = 0
        self._num_taken = 0
        self._now: Doing = (Activity.STARTING, 0.0, 0.0, b"")
        self._seen: InFlight | None = None  # by who reads

    # ── the loop ─────────────────────────────────────────────────────────────

    def waits(self, now: float) -> None:
        self._write(Activity.WAITING, now, 0.0, b"")

    def turns(self, now: float) -> None:
        self._write(Activity.TURNING, now, 0.0, b"")

    def took(self, count: int) -> None:
        """So many commands have arrived."""
        self._num_taken += count
        self._write(*self._now)

    def steps(self, seq_ids: Iterable[str], now: float, predicted: float) -> Doing:
        """A step begins. Returns what was going on before, for `goes_on`."""
        before = self._now
        ids = "\n".join(seq_ids).encode()
        self._write(Activity.STEPPING, now, predicted, ids[: self._room])
        return before

    def goes_on(self, before: Doing, held: float) -> None:
        """The step that was held for `held` seconds goes on."""
        activity, since, predicted, ids = before
        self._write(activity, since + held, predicted, ids)

    def _write(self, activity: Activity, since: float, predicted: float, ids: bytes) -> None:
        self._now = (activity, since, predicted, ids)
        version = self._version + 1
        HEADER.pack_into(
            self._buffer, 0, version, activity, len(ids), self._num_taken, since, predicted
        )
        self._buffer[HEADER.size : HEADER.size + len(ids)] = ids
        self._version = version + 1
        struct.pack_into("<Q", self._buffer, 0, self._version)

    # ── whoever watches ──────────────────────────────────────────────────────

    def read(self) -> InFlight:
        """The latest state; of a writer that died while writing, what it got down. `struct` clears
        what it is going to write, so zeros say that somebody is writing, perhaps for long where
        others have the processor: then it is as it was."""
        for _ in range(MAX_TRIES):
            version, activity, length, taken, since, predicted = HEADER.unpack_from(self._buffer)
            ids = bytes(self._buffer[HEADER.size : HEADER.size + length])
            (after,) = struct.unpack_from("<Q", self._buffer, 0)
            is_whole = version == after and version % 2 == 0 and version > 0
            if is_whole:
                break
        seq_ids = tuple(ids.decode(errors="replace").split("\n")) if ids else ()
        if is_whole or since or self._seen is None:
            self._seen = InFlight(Activity(activity), taken, since, predicted, seq_ids)
        return self._seen
