"""Memory that is used no more, in a process that is to serve without pauses, and to stay small.

Python's collector of reference cycles, and what the C library keeps for itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc

YOUNG = 10_000  # objects more than at the last look: a step of a large batch alone makes hundreds
# Looks at the young before one at those that outlived a look, and of these before one at all. A
# connection that stands still outlives some, and its rest is found by no look at the young.
ELDER, ALL = 5, 2
TIDY_SECONDS = 10.0
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # once: a library is a cycle of classes


def settle() -> None:
    """Call once start-up is over: what it made stays, and is never looked through again.

    A look at all that torch and transformers bring takes tens of milliseconds, every time. New
    objects are still looked at, in larger lots.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # forgets how many there were: Python looks at all when a quarter has come to them
    gc.set_threshold(YOUNG, ELDER, ALL)


def give_back() -> bool:
    """Give free memory of the C library back to the system; False where it has no way to.

    glibc does that by itself only for what lies at the end of an arena, and each thread has one:
    a few long prompts leave 20 MiB in every thread that has encoded one. Takes 5 ms then, and 0.1
    if there is nothing to give.
    """
    if TRIM is not None:
        TRIM(ctypes.c_size_t(0))
    return TRIM is not None


async def tidy() -> None:
    """Do so every few seconds, beside the event loop; for ever, where that is possible."""
    while await asyncio.to_thread(give_back):
        await asyncio.sleep(TIDY_SECONDS)
