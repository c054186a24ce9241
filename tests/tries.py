"""For what is sure to come only where nobody is late: it is tried again, and has to come once.

A server puts together what a reader, or its own loop, did not get to in time. On a busy machine an
answer may so come at once that else comes in parts, and that is no fault; never in parts is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

TRIES = 20

T = TypeVar("T")


def sooner_or_later(attempt: Callable[[], T | None], what: str) -> T:
    """The first thing that `attempt` brings; it may come to nothing `TRIES` times, and not more."""
    for _ in range(TRIES):
        if (found := attempt()) is not None:
            return found
    raise AssertionError(f"{TRIES} times not {what}")
