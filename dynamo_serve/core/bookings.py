"""Places kept for requests that were refused and told when to come again."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

GRACE = 3.0  # seconds that a place is kept after its time
MOST = 2000  # beyond it nothing is kept, and a time is only an estimate
EARLY = 0.05  # seconds; clocks and networks are not exact


class Booking(NamedTuple):
    """`seconds` of work, expected from `due` on; `known` is how the request is recognised."""

    due: float
    seconds: float
    known: int


class Bookings:
    """One tenant's, in the order of their times.

    "Come again in 5 s" is worth something only if there is a place in 5 s. So what a refused
    request will need is booked, and newcomers see a server that has that much less to give. A
    request is recognised by its prompt: a client has nothing to do but to send it again.
    """

    def __init__(self) -> None:
        self._queue: deque[Booking] = deque()

    def redeem(self, known: int, now: float) -> Booking | None:
        """The booking of a request that comes at its time, which it then has used."""
        self._forget(now)
        for booking in self._queue:
            if booking.due > now + EARLY:
                break
            if booking.known == known:
                self._queue.remove(booking)
                return booking
        return None

    def promised(self, until: float) -> float:
        """Seconds of work that may come by then."""
        total = 0.0
        for booking in self._queue:
            if booking.due > until:
                break
            total += booking.seconds
        return total

    def book(self, earliest: float, seconds: float, known: int) -> float:
        """Keep a place, behind all others; when it is. Who asks again too early keeps his."""
        for booking in self._queue:
            if booking.known == known:
                return booking.due
        due = earliest
        if self._queue:
            last = self._queue[-1]
            due = max(earliest, last.due + last.seconds)
        if len(self._queue) < MOST:
            self._queue.append(Booking(due, seconds, known))
        return due

    def _forget(self, now: float) -> None:
        while self._queue and self._queue[0].due + GRACE < now:
            self._queue.popleft()
