"""Python's collector of reference cycles, in a process that is to serve without pauses."""

from __future__ import annotations

import gc

YOUNG = 10_000  # objects more than at the last look: a step of a large batch alone makes hundreds


def settle() -> None:
    """Call once start-up is over: what it made stays, and is never looked through again.

    A look at all that torch and transformers bring takes tens of milliseconds, every time. New
    objects are still looked at, in larger lots.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)
