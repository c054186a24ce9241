"""Which server a request goes to: pure bookkeeping, no network.

Of two servers drawn at random the one with fewer requests in flight: M. Mitzenmacher, "The Power of
Two Choices in Randomized Load Balancing", 2001.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamo_serve.endpoint_counts import Counts

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
MOST_LATE = 3
MOST_RETRIES = 100.0  # at once, after a time without any
RETRY_CREDIT = 0.2  # for each request that ends well


@dataclass(slots=True, eq=False)
class Endpoint:
    """A server. One that is ejected gets no requests until a canary has come back from it."""

    address: str
    is_open: bool = False
    in_flight: int = 0
    num_ejections: int = 0  # since it last answered a request
    num_late: int = 0  # requests in a row that it left without an answer
    counts: Counts = field(default_factory=Counts)

    def told(self) -> dict[str, Any]:
        """As plain data."""
        return {**self.counts.told(), "in_flight": self.in_flight, "is_open": self.is_open}

    def eject(self) -> float:
        """No more requests. Seconds until it is looked at again."""
        self.is_open = False
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.num_ejections, 16))
        self.num_ejections += 1
        return pause

    def answered(self) -> None:
        """Something has come from it."""
        self.num_late = 0
        if self.is_open:
            self.num_ejections = 0

    def is_silent(self) -> bool:
        """Another request got nothing in time: whether it is more than a long queue."""
        self.num_late += 1
        return self.num_late >= MOST_LATE


def pick(
    endpoints: Sequence[Endpoint], tried: Collection[Endpoint], rng: random.Random
) -> Endpoint | None:
    """One that is open, rather one that has not been tried; None if there is none."""
    is_open = [endpoint for endpoint in endpoints if endpoint.is_open]
    fresh = [endpoint for endpoint in is_open if endpoint not in tried] or is_open
    if not fresh:
        return None
    return min(rng.sample(fresh, min(2, len(fresh))), key=lambda each: each.in_flight)


class Budget:
    """Of retries: where everything fails, trying again makes it worse."""

    def __init__(self) -> None:
        self.left = MOST_RETRIES

    def spend(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True

    def earn(self) -> None:
        self.left = min(MOST_RETRIES, self.left + RETRY_CREDIT)
