from __future__ import annotations

import asyncio
import ctypes
import gc
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dynamo_serve import garbage
from tests.patience import PATIENCE_S

MIB = 2**20
LIBC = ctypes.CDLL(None)
HAS_TRIM = hasattr(LIBC, "malloc_trim")


def test_what_start_up_made_is_never_looked_through_again() -> None:
    threshold = gc.get_threshold()
    try:
        garbage.settle()
        assert gc.get_freeze_count() > 0
        assert gc.get_objects(generation=2) == []
        assert gc.get_threshold() == (garbage.YOUNG, garbage.ELDER, garbage.ALL)
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def leave_holes(size: int) -> int:
    """Take `size` bytes in small pieces and free all but the last, which lies at the end."""
    LIBC.malloc.restype = ctypes.c_void_p
    pieces = [LIBC.malloc(ctypes.c_size_t(1024)) for _ in range(size // 1024)]
    for piece in pieces:
        ctypes.memset(piece, 1, 1024)
    *holes, last = map(int, pieces)
    for piece in holes:
        LIBC.free(ctypes.c_void_p(piece))
    return last


def hold_and_give_back() -> tuple[int, int]:
    """What a thread's freed pieces hold of memory, in bytes, before and after it is given back."""
    left: list[int] = []
    thread = threading.Thread(target=lambda: left.append(leave_holes(32 * MIB)))
    before = resident()
    thread.start()
    thread.join()
    held = resident() - before
    assert garbage.give_back()
    return held, resident() - before


@pytest.mark.skipif(not HAS_TRIM, reason="the C library is not glibc")
def test_what_a_thread_has_freed_is_given_back() -> None:
    # in a process of its own: what other tests have left in the arenas would be used first
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        held, kept = fresh.submit(hold_and_give_back).result(timeout=PATIENCE_S)
    assert held > 24 * MIB, "nothing was kept"
    assert kept < 12 * MIB


def test_it_is_done_again_and_again_where_it_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "TIDY_SECONDS", 0.0)
    can, times = [True] * 4 + [False], iter(range(100))
    monkeypatch.setattr(garbage, "give_back", lambda: can[next(times)])
    asyncio.run(garbage.tidy())
    assert next(times) == len(can)
