"""Which pages go down to the tiers below, which come back, and what became of the copies.

Cold pages are copied down in the background when few pages are left that could be had without a
loss; nothing waits for that. A head that a request needs and that lies below is *restored* where
that is predicted to take less time than computing it: the request waits for its pages, and nobody
else does. A page that is corrupt, gone or slow is computed like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamo_serve.core.flights import Flight, Flights
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.sequence import Restoring
from dynamo_serve.core.sequence import Sequence as Seq
from dynamo_serve.core.step_cost import StepCost, StepShape
from dynamo_serve.core.tiers import DEVICE, DISK, HOST, Copied, Copy, Found, Kept, Place, Tier

LOW, HIGH = 0.25, 0.5  # of a tier's pages that can be had without a loss: spilling begins, ends
MOST_DOWN = 8  # copies downwards that are under way at a time
PATIENCE = 4.0  # times what restoring should take, before it is given up …
MIN_PATIENCE = 0.25  # … and so many seconds at least
GAIN = 0.2  # of a new copy in what a page is believed to take
SAMPLE = 64  # pages, to tell what computing one takes
PROBE_SECONDS = 1.0  # between two copies into a tier that is slower than computing
MAX_REST = 60.0  # seconds without copies into a tier where they fail again and again


@dataclass(slots=True)
class Trouble:
    """Copies into a tier that failed in a row, and until when it is left alone."""

    count: int = 0
    until: float = 0.0


class Spill:
    """The copies between the pool and the tiers below it; without tiers it does nothing."""

    def __init__(self, pool: PagePool, tiers: Sequence[Tier], cost: StepCost) -> None:
        self.pool = pool
        self.tiers = list(tiers)
        self.cost = cost
        self.num_copied: Counter[tuple[int, int]] = Counter()  # by tier from and to
        self.num_failed: Counter[int] = Counter()  # by the lower tier of the two
        self.num_restored = 0  # tokens
        self.saved_seconds = 0.0
        self.num_lost = 0  # evicted on the device, and nowhere below
        self._levels: list[PagePool | Tier] = [pool, *self.tiers]
        self._trouble = {tier.number: Trouble() for tier in self.tiers}
        self._spills = [False for _ in self.tiers]  # from the level above each
        self.flights = Flights(pool, self.tiers)
        self._kept = Kept()
        self._keeps = bool(tiers) and tiers[-1].number == DISK
        self._waiting: list[Restoring] = []
        if self.tiers:
            pool.below = self

    # ── what the pool asks ───────────────────────────────────────────────────

    def __contains__(self, key: object) -> bool:
        return any(key in tier for tier in self.tiers)

    def pays(self, keys: Sequence[bytes], found: Sequence[int | None]) -> bool:
        restoring, computing = self.prices(keys, found)
        return restoring < computing

    def prices(self, keys: Sequence[bytes], found: Sequence[int | None]) -> tuple[float, float]:
        """Seconds until the pages of `keys` that `found` lacks are restored, and those that
        computing takes from the first of them on."""
        first, size = found.index(None), self.pool.page_size
        lower = [key for key, page_id in zip(keys, found, strict=False) if page_id is None]
        queue = sum(r.seconds for r in self._waiting)
        seconds = queue + sum(self._tier_of(key).page_seconds for key in lower)
        return seconds, self._computing((len(found) - first) * size, first * size)

    def evicted(self, key: bytes, *, was_clean: bool) -> None:
        self.num_lost += not was_clean

    # ── up ───────────────────────────────────────────────────────────────────

    def restore(self, seq: Seq, missing: Sequence[int], now: float) -> None:
        """Begin to fill the pages at these places of its table; it has to wait for them."""
        keys = [seq.page_keys[i] for i in missing]
        begin = missing[0] * self.pool.page_size
        seconds = sum(self._tier_of(key).page_seconds for key in keys)
        patience = max(MIN_PATIENCE, PATIENCE * (seconds + sum(r.seconds for r in self._waiting)))
        restoring = seq.restoring = Restoring(
            seq,
            dict(zip(keys, missing, strict=True)),
            seconds,
            now + patience,
            saves=self._computing(seq.num_computed - begin, begin),
            num_pages=len(missing),
        )
        self._waiting.append(restoring)
        for key, i in zip(keys, missing, strict=True):
            source = self._tier_of(key).place(key)
            target = Place(DEVICE, seq.page_table[i])
            self.flights.take_off(key, source, target, restoring=restoring)

    def asked(self, keys: Iterable[bytes]) -> None:
        """Pages that were computed once and are used again: the lowest tier shall have them, for
        after a restart, and those that have them keep them longest."""
        if not self.tiers:
            return
        for key in keys:
            for tier in self.tiers:
                if key in tier:
                    tier.use(key)
            if self._keeps and key not in self.tiers[-1]:
                self._kept.add(key)

    # ── down ─────────────────────────────────────────────────────────────────

    def plan(self, now: float, *, is_idle: bool) -> None:
        """Begin copies downwards, if there is a reason to: few pages are left, or nothing else is
        to be done and it costs nobody anything."""
        for i, tier in enumerate(self.tiers):
            upper = self._levels[i]
            size = upper.num_pages if isinstance(upper, PagePool) else upper.num_slots
            if upper.num_ready < LOW * size or (is_idle and tier.number == HOST):
                self._spills[i] = True
            elif upper.num_ready >= HIGH * size:
                self._spills[i] = False
            while self._spills[i] and self._may_go_down(tier, now):
                key = upper.oldest_not_clean(self.flights.going_down)
                if key is None or tier.next_to_go in upper or not self._sink(key, i, now):
                    break  # what would have to go for it is above, too: the tier is too small
        self._sink_kept(now)

    def _sink_kept(self, now: float) -> None:
        """Copy down what is to be kept, pressure or none."""
        for key in self._kept.first(MOST_DOWN + len(self.flights.going_down)):
            if len(self.flights.going_down) >= MOST_DOWN:
                break
            if key in self.flights.going_down:
                continue  # a copy on its way to another tier, perhaps
            level = next((i for i, tier in enumerate(self.tiers) if key not in tier), None)
            if level is not None:
                if not self._may_go_down(self.tiers[level], now):
                    break
                self._sink(key, level, now, is_kept=True)
            self._kept.remove(key)

    def _may_go_down(self, tier: Tier, now: float) -> bool:
        trouble = self._trouble[tier.number]
        if len(self.flights.going_down) >= MOST_DOWN or now < trouble.until:
            return False
        if SAMPLE * tier.page_seconds >= self._computing(SAMPLE * self.pool.page_size, 0):
            trouble.until = now + PROBE_SECONDS  # one now and then tells whether it is still slow
        return True

    def _sink(self, key: bytes, level: int, now: float, *, is_kept: bool = False) -> bool:
        """Copy a page from the level above into a tier; False if that is not possible now."""
        upper, tier = self._levels[level], self.tiers[level]
        if key in self.flights.going_down or key not in upper:
            return False
        source = upper.place(key)
        reserved = tier.reserve()
        if reserved is None:
            return False
        place, gone = reserved
        if gone is not None:
            self._is_gone(gone)
        self.pool.tree.lose_to(key, now)
        self.flights.take_off(key, source, place, is_kept=is_kept)
        return True

    # ── copies ───────────────────────────────────────────────────────────────

    def settle(self, ended: Iterable[Copied | Found], now: float) -> list[Restoring]:
        """Take in what the engine says of its copies; whose waiting is over, in vain if anything is
        `left`."""
        for result in ended:
            if isinstance(result, Found):
                self._adopt(result)
                continue
            flight = self.flights.land(result.ticket)
            ways = flight.copy.source.tier, flight.copy.target.tier
            self.num_copied[ways] += not result.error
            self.num_failed[max(ways)] += bool(result.error)
            if flight.restoring:
                self._restored(flight.copy, flight.restoring, result, now)
            else:
                self._stored(flight, result, now)
            self.flights.let_go(flight.copy)
        over: list[Restoring] = []
        for restoring in [r for r in self._waiting if r.is_over or now > r.until]:
            self._waiting.remove(restoring)
            seq = restoring.seq
            if seq.restoring is not restoring:
                continue  # cancelled or preempted meanwhile
            over.append(restoring)
            if restoring.left:
                if not restoring.error:
                    self._slow_down(restoring)
                continue
            seq.restoring = None
            self.num_restored += restoring.num_pages * self.pool.page_size
            self.saved_seconds += max(0.0, restoring.saves - restoring.seconds)
        return over

    def _restored(self, copy: Copy, restoring: Restoring, result: Copied, now: float) -> None:
        """A copy onto the device has ended."""
        tier = self._tier(copy.source.tier)
        if not result.error:
            place = restoring.left.pop(copy.key)
            self.pool.seal(copy.target.slot, copy.key)
            if self.pool.events is not None:
                seq = restoring.seq
                self.pool.events.sealed(seq.page_keys, seq.tokens, [place])
            tier.page_seconds += GAIN * (result.seconds - tier.page_seconds)
            if tier is not self.tiers[0]:  # it is wanted: from now on nearer by
                self._kept.add(copy.key)
            return
        restoring.error = result.error
        if copy.key in tier and tier.place(copy.key) == copy.source:
            tier.forget(copy.key)
            self._is_gone(copy.key)
            self.pool.tree.blame(frozenset(), now)

    def _slow_down(self, restoring: Restoring) -> None:
        """What did not come in time would not come in time for the next one either."""
        took = max(MIN_PATIENCE, PATIENCE * restoring.seconds) / restoring.num_pages  # at least
        for tier in {self._tier_of(key) for key in restoring.left if key in self}:
            tier.page_seconds = max(tier.page_seconds, took)

    def _stored(self, flight: Flight, result: Copied, now: float) -> None:
        """A copy downwards has ended."""
        copy = flight.copy
        tier, key, trouble = self._tier(copy.target.tier), copy.key, self._trouble[copy.target.tier]
        if result.error:
            tier.give_back(copy.target.slot)
            trouble.count += 1
            trouble.until = now + min(MAX_REST, 2.0 ** min(trouble.count, 10) / 8)
            if flight.is_kept:
                self._kept.add(key)
            return
        trouble.count = 0
        tier.settle(key, copy.target.slot)
        self._is_listed(key)
        # Of a tier that was slow once nothing would be restored again: this says how it is now.
        tier.page_seconds += GAIN * min(0.0, result.seconds - tier.page_seconds)
        if flight.is_kept and tier is not self.tiers[-1]:
            self._kept.add(key)

    # ── books ────────────────────────────────────────────────────────────────

    def _adopt(self, found: Found) -> None:
        tier = self._tier(found.tier)
        tier.adopt(found.pages)
        for key, _ in found.pages:
            if key in tier:
                self._is_listed(key)

    def _is_listed(self, key: bytes) -> None:
        """A tier has a page more: whoever has it above it is clean now."""
        for level, upper in enumerate(self._levels):
            if any(key in tier for tier in self.tiers[level:]):
                upper.clean(key)
        if self.pool.events is not None:
            self.pool.events.changed(key)

    def _is_gone(self, key: bytes) -> None:
        for level, upper in enumerate(self._levels):
            if not any(key in tier for tier in self.tiers[level:]):
                upper.soil(key)
        if self.pool.events is not None:
            self.pool.events.changed(key)
        if not any(key in level for level in self._levels):
            self.pool.tree.lose(key)

    def _tier(self, number: int) -> Tier:
        return next(tier for tier in self.tiers if tier.number == number)

    def _tier_of(self, key: bytes) -> Tier:
        """The highest tier that has a page."""
        return next(tier for tier in self.tiers if key in tier)

    def _computing(self, tokens: int, position: int) -> float:
        """Seconds that a prompt takes longer if so many of its tokens are computed, too."""
        rest, size = StepShape(), self.pool.page_size
        whole = self.cost.predict(rest.with_chunk(tokens + size, position))
        return whole - self.cost.predict(rest.with_chunk(size, position + tokens))

    def check(self) -> None:
        """Raise AssertionError if the books of a tier do not balance."""
        self.flights.check()
        self.pool.tree.check(self._levels)
        for tier in self.tiers:
            tier.check()
        if self.pool.events is not None:
            self.pool.events.check()
