"""Places kept for requests that were refused and told when to come again."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

GRACE = 3.0  # seconds that a place is kept after its time
HORIZON = 120.0  # seconds; nothing is kept for later than that
EARLY = 0.05  # seconds; clocks and networks are not exact
MEMORY = 0.9  # of how many came back, for each that did or did not


class Booking(NamedTuple):
    """So much of something that is scarce, expected from `due` on; `known` is how the request is
    recognised."""

    due: float
    amount: float
    known: int


class Bookings:
    """Of one tenant and one thing that is scarce, in the order of their times.

    "Come again in 5 s" is worth something only if there is a place in 5 s. So what a refused
    request will need is booked, and newcomers see that much less. A request is recognised by its
    prompt: a client has nothing to do but to send it again. Many clients never do: what is booked
    counts as far as bookings have been used before.
    """

    def __init__(self) -> None:
        self._queue: deque[Booking] = deque()
        self._return_rate = 0.9  # what would be fair to those who obey; others soon lower it

    def redeem(self, known: int, now: float) -> bool:
        """Whether a request comes at its time; its booking is then used up."""
        self._forget(now)
        for booking in self._queue:
            if booking.due > now + EARLY:
                break
            if booking.known == known:
                self._queue.remove(booking)
                self._learn(True)
                return True
        return False

    def promised(self, until: float) -> float:
        """How much will probably be asked for by then."""
        total = 0.0
        for booking in self._queue:
            if booking.due > until:
                break
            total += booking.amount
        return total * self._return_rate

    def book(self, earliest: float, amount: float, seconds: float, known: int, now: float) -> float:
        """Keep a place, `seconds` behind the last one; when it is."""
        due = earliest
        if self._queue:
            due = max(earliest, self._queue[-1].due + seconds * self._return_rate)
        if due <= now + HORIZON:
            self._queue.append(Booking(due, amount, known))
        return due

    def _forget(self, now: float) -> None:
        while self._queue and self._queue[0].due + GRACE < now:
            self._queue.popleft()
            self._learn(False)

    def _learn(self, came: bool) -> None:
        self._return_rate += (1 - MEMORY) * (came - self._return_rate)
