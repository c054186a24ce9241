"""Whether steps take longer than steps like them did before, in the life of this engine.

A cost model of its own learns from the first steps of a kind, and from those that have more of
something than any before; with it the others are compared. It does not learn from these, as the
prices that plan steps do: a process that becomes slower by and by shall be seen. What there was
never as much of says nothing, so no comparison is beyond what was measured.
"""

from __future__ import annotations

from collections import Counter, deque
from math import inf
from operator import gt
from statistics import median

from dynamo_serve.core.step_cost import StepCost, StepShape

FIRST = 256  # steps of a kind that are learned from
RECENT = 60.0  # seconds looked back on
APART = 0.1  # seconds between two steps that are looked at
LEAST = 20  # of them; fewer tell nothing
STEADY = 1.5  # times the usual: what takes longer is not learned as if it were usual


class Wear:
    """Compares steps with earlier ones: with prompt tokens, with drafts, or with neither."""

    def __init__(self) -> None:
        self._cost = StepCost()
        self._num_learned: Counter[tuple[bool, bool]] = Counter()
        self._most: dict[tuple[bool, bool], StepShape] = {}
        self._recent: deque[tuple[float, float]] = deque()  # when, and how many times the usual

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        """A step has run, at the first try."""
        kind = bool(shape.prefill_tokens), bool(shape.draft_tokens)
        most = self._most.setdefault(kind, shape)
        at, latest = self._recent[-1] if self._recent else (-inf, 1.0)
        times, is_new = seconds / self._cost.predict(shape), self._num_learned[kind] < FIRST
        if is_new or any(map(gt, shape, most)):
            if (latest if is_new else times) < STEADY:
                self._num_learned[kind] += 1
                self._most[kind] = StepShape._make(map(max, shape, most))
                self._cost.observe(shape, seconds)
        elif now - at >= APART:
            self._recent.append((now, times))

    def factor(self, now: float) -> float | None:
        """How many times as long as before the steps of the last minute take, by their median; None
        if too few of them can be compared."""
        while self._recent and self._recent[0][0] < now - RECENT:
            self._recent.popleft()
        times = [times for _, times in self._recent]
        return median(times) if len(times) >= LEAST else None
