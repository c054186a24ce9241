"""Which rungs of the ladder are taken, and how often they were taken and undone."""

from __future__ import annotations

from dynamo_serve.core.ladder import NAMES
from dynamo_serve.core.stats import Stats

DIRECTIONS = ("up", "down")
UNCHANGED = tuple((0, 0) for _ in NAMES)


class LadderCounts:
    """Totals go on also where an engine begins to count anew: it was lost before it told any."""

    def __init__(self) -> None:
        self._levels: tuple[int, ...] = (0,) * len(NAMES)
        self._last = UNCHANGED
        self._changes: dict[tuple[str, ...], float] = {
            (name, way): 0 for name in NAMES for way in DIRECTIONS
        }

    def take(self, stats: Stats) -> None:
        """The engine's newest report; without an engine no rung is taken."""
        self._levels = stats.rungs or (0,) * len(NAMES)
        counts = stats.rung_changes or self._last  # the next engine goes on where this one was
        if counts == self._last:
            return
        pairs = list(zip(NAMES, counts, self._last, strict=True))
        is_anew = any(new[0] < old[0] or new[1] < old[1] for _, new, old in pairs)
        for name, new, old in pairs:
            for way, now, before in zip(DIRECTIONS, new, old, strict=True):
                self._changes[name, way] += now if is_anew else now - before
        self._last = counts

    def numbers(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Metric → label values → value."""
        levels = zip(NAMES, self._levels, strict=True)
        return {
            "rung": {(name,): level for name, level in levels},
            "rung_changes": self._changes,
        }
