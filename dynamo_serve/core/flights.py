"""Copies between the device and the tiers below it that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.sequence import Restoring
from dynamo_serve.core.tiers import DEVICE, Copy, Place, Tier


class Flight(NamedTuple):
    """A copy that is under way, and who waits for it; one to be kept goes on to the lowest tier."""

    copy: Copy
    restoring: Restoring | None = None
    is_kept: bool = False


class Flights:
    """Holds the pages and slots that copies read and write, until these have ended."""

    def __init__(self, pool: PagePool, tiers: Sequence[Tier]) -> None:
        self.pool = pool
        self.going_down: set[bytes] = set()
        self._tiers = {tier.number: tier for tier in tiers}
        self._flights: dict[int, Flight] = {}
        self._new: list[Copy] = []
        self._num_copies = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._flights)

    def take(self) -> list[Copy]:
        """Copies for the engine to begin; asking twice gives nothing."""
        new, self._new = self._new, []
        return new

    def take_off(
        self,
        key: bytes,
        source: Place,
        target: Place,
        *,
        restoring: Restoring | None = None,
        is_kept: bool = False,
    ) -> None:
        for place in source, target:
            self._books(place).hold(place.slot)
        self._num_copies += 1
        copy = Copy(self._num_copies, key, source, target)
        self._flights[copy.ticket] = Flight(copy, restoring, is_kept)
        self._new.append(copy)
        if target.tier != DEVICE:
            self.going_down.add(key)

    def land(self, ticket: int) -> Flight:
        """A copy has ended; what it held is let go by `let_go`, when it has been taken in."""
        flight = self._flights.pop(ticket)
        if flight.copy.target.tier != DEVICE:
            self.going_down.remove(flight.copy.key)
        return flight

    def let_go(self, copy: Copy) -> None:
        for place in copy.source, copy.target:
            self._books(place).let_go(place.slot)

    def _books(self, place: Place) -> PagePool | Tier:
        return self.pool if place.tier == DEVICE else self._tiers[place.tier]

    @property
    def held_pages(self) -> list[list[int]]:
        """Pages of the device that copies hold, as page tables."""
        places = (p for f in self._flights.values() for p in (f.copy.source, f.copy.target))
        return [[place.slot] for place in places if place.tier == DEVICE]

    def check(self) -> None:
        copies = [flight.copy for flight in self._flights.values()]
        down = [copy.key for copy in copies if copy.target.tier != DEVICE]
        assert set(down) == self.going_down, "a copy that goes down is not known"
        assert len(down) == len(self.going_down), "a page goes down twice"
