"""The tiers below the device: how full, and what was copied."""

from __future__ import annotations

from dynamo_serve.core.stats import Stats, TierStats
from dynamo_serve.core.tiers import NAMES

LOWER = NAMES[1:]
COUNTS = ("stored", "restored", "failed", "lost")


class TierCounts:
    """Totals go on when an engine begins to count anew."""

    def __init__(self) -> None:
        self._tiers: tuple[TierStats, ...] = ()
        self._last: dict[tuple[str, ...], int] = {}
        self._copies: dict[tuple[str, ...], float] = {
            (name, what): 0 for name in LOWER for what in COUNTS
        }

    def take(self, stats: Stats) -> None:
        """The engine's newest report; without an engine there is no tier."""
        if stats.tiers == self._tiers:
            return
        self._tiers = stats.tiers
        for tier in stats.tiers:
            for what in COUNTS:
                key, now = (tier.name, what), getattr(tier, what)
                before = self._last.get(key, 0)
                self._copies[key] += now - before if now >= before else now
                self._last[key] = now

    def numbers(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Metric → label values → value."""
        pages = {tier.name: (tier.num_pages, tier.num_slots) for tier in self._tiers}
        return {
            "tier_pages": {(name,): pages.get(name, (0, 0))[0] for name in LOWER},
            "tier_slots": {(name,): pages.get(name, (0, 0))[1] for name in LOWER},
            "tier_copies": self._copies,
        }
