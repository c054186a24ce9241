"""A model of steps from recorded ones: prices by non-negative least squares, and how they scatter.

The features are those of `core.step_shape`, and steps with prompt tokens, with drafts, and with
neither have prices of their own. Steps weigh the same, short or long; outliers count less
(P. J. Huber, 1964), but come again when step times are drawn: each is a prediction times how far a
recorded step of about its length was from its own, taken in the order of the recording for a while,
because a machine that is slow stays slow for some steps (block bootstrap: H. R. Künsch, "The
jackknife and the bootstrap for general stationary observations", 1989). Of about its length,
because a pause of some milliseconds is ten times a short step, and little of a long one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import fmean, median
from typing import Any, NamedTuple

from dynamo_serve.core.step_shape import CURVE, StepShape, features_of
from dynamo_serve.errors import ConfigError
from dynamo_serve.simulate.costs import Times, Way
from dynamo_serve.trace import Arrival, Step

COLD = 16  # first steps of a recording, which are not fitted: pages are touched for the first time
LEAST = 32  # steps of a kind; fewer make no model
SUPPORT = 8  # steps with a feature; fewer tell no price of it
MOST = 20_000  # steps of a kind that are fitted; of more, every second, third, …
HELD_OUT = 5  # every fifth step tells the error, and is not fitted while it does
ROUNDS, SWEEPS = 4, 4000
HUBER = 2.0  # median errors; what is further out counts as this much
MOST_SIZES, LEAST_OF_SIZE = 8, 64  # groups of steps of about one length, and steps in each
BLOCK = 32  # steps that are drawn as they followed each other
PAUSE = 0.5  # usual steps: a longer gap is a pause, or a step in it was not recorded
KINDS = ("prefill", "decode", "drafts")
NONE = Way()  # known


class Error(NamedTuple):
    """|actual / predicted - 1| of steps that were not fitted."""

    median: float
    p90: float
    steps: int


def kind_of(shape: StepShape) -> str:
    return "prefill" if shape.prefill_tokens else "drafts" if shape.draft_tokens else "decode"


class Scatter(NamedTuple):
    """How far steps were from their predictions: actual / predicted in their order, of those whose
    prediction is up to each of the `bounds`, in seconds, and of the longer ones."""

    bounds: list[float]
    ratios: list[list[float]]

    @classmethod
    def of(cls, predicted: Sequence[float], seconds: Sequence[float]) -> Scatter:
        ordered = sorted(predicted)
        sizes = max(1, min(MOST_SIZES, len(ordered) // LEAST_OF_SIZE))
        bounds = sorted({ordered[i * len(ordered) // sizes - 1] for i in range(1, sizes)})
        ratios: list[list[float]] = [[] for _ in range(len(bounds) + 1)]
        for foreseen, took in zip(predicted, seconds, strict=True):
            ratios[bisect_left(bounds, foreseen)].append(took / foreseen)
        if not ratios[-1]:  # many are as long as the longest
            del bounds[-1], ratios[-1]
        return cls(bounds, ratios)


@dataclass
class Prices:
    """Of one kind of steps. `fold`: the place whose price is paid for each feature, because there
    were too few steps to tell its own."""

    fold: list[int]
    prices: list[float]
    scatter: Scatter = field(default_factory=lambda: Scatter([], [[]]))

    def predict(self, shape: StepShape) -> float:
        features = features_of(shape, bool(shape.prefill_tokens))
        return sum(self.prices[at] * x for at, x in zip(self.fold, features, strict=True))


@dataclass
class Fitted:
    """The model of one recording."""

    kinds: dict[str, Prices]
    between: float  # two steps, without a pause
    errors: dict[str, Error]
    way: Way = NONE

    def predict(self, shape: StepShape) -> float:
        return self.kinds[self.kind_of(shape)].predict(shape)

    def kind_of(self, shape: StepShape) -> str:
        """The kind whose prices there are for it: drafts may not have been recorded."""
        kind = kind_of(shape)
        return kind if kind in self.kinds else "decode"

    def times(self, rng: Random) -> Times:
        return _FittedTimes(self, rng)

    def told(self) -> dict[str, Any]:
        return {
            "fitted": {name: error._asdict() for name, error in self.errors.items()},
            "between": self.between,
            **self.way._asdict(),
        }


class _FittedTimes:
    def __init__(self, fitted: Fitted, rng: Random) -> None:
        self._fitted = fitted
        self._draws = {
            name: [Draws(ratios, rng) for ratios in kind.scatter.ratios]
            for name, kind in fitted.kinds.items()
        }

    def step(self, shape: StepShape) -> float:
        name = self._fitted.kind_of(shape)
        prices = self._fitted.kinds[name]
        foreseen = prices.predict(shape)
        return foreseen * self._draws[name][bisect_left(prices.scatter.bounds, foreseen)].next()

    def between(self, num_sequences: int) -> float:
        return self._fitted.between


class Draws:
    """Values of a list in blocks, each from a random place on."""

    def __init__(self, values: Sequence[float], rng: Random) -> None:
        self._values = values
        self._rng = rng
        self._at = self._left = 0

    def next(self) -> float:
        if not self._left:
            self._at, self._left = self._rng.randrange(len(self._values)), BLOCK
        self._left -= 1
        self._at = (self._at + 1) % len(self._values)
        return self._values[self._at]


def fit(steps: Sequence[Step], arrivals: Sequence[Arrival] = ()) -> Fitted:
    """Raises `ConfigError` if there are too few steps."""
    by_kind: dict[str, list[tuple[StepShape, float]]] = {name: [] for name in KINDS}
    for step in sorted(steps, key=lambda step: step.at)[COLD:]:
        if step.seconds > 0:
            shape = StepShape(*step.shape)  # type: ignore[arg-type]
            by_kind[kind_of(shape)].append((shape, step.seconds))
    for name in ("prefill", "decode"):
        if len(by_kind[name]) < LEAST:
            count = len(by_kind[name])
            what = "with prompt tokens" if name == "prefill" else "that only decode"
            raise ConfigError(
                f"the trace has {count} steps {what}, a model needs {LEAST}; record for longer, "
                "or say what steps take with --cost"
            )
    kinds, errors = {}, {}
    for name, all_seen in by_kind.items():
        if len(all_seen) >= LEAST:
            seen = all_seen[:: 1 + len(all_seen) // MOST]
            errors[name] = _held_out(seen)
            kinds[name] = prices_of(seen)
    return Fitted(kinds, _between(steps), errors, way_of(arrivals, steps))


def way_of(arrivals: Sequence[Arrival], steps: Sequence[Step] = ()) -> Way:
    """The medians of what requests took to the scheduler, and first tokens from the engine; nothing
    for recordings that do not tell.

    Who came during a step waited for its end, too, and does so in a simulation: not counted, or
    the least of all where nobody else came.
    """
    ordered = sorted((step.at, step.at + step.seconds) for step in steps)
    there: list[float] = []
    delayed: list[float] = []
    back: list[float] = []
    for asked in arrivals:
        if asked.transit is not None:
            before = bisect_left(ordered, (asked.at + asked.transit,))
            is_free = not before or ordered[before - 1][1] <= asked.at
            (there if is_free else delayed).append(asked.transit)
        if asked.first_token is None or asked.waited is None or asked.prefill is None:
            continue
        if not asked.preemptions:
            back.append(max(0.0, asked.first_token - asked.waited - asked.prefill))
    least = min(delayed, default=0.0)
    return Way(median(there) if there else least, median(back) if back else 0.0)


def _held_out(seen: list[tuple[StepShape, float]]) -> Error:
    prices = prices_of([step for i, step in enumerate(seen) if i % HELD_OUT])
    tests = seen[::HELD_OUT]
    found = sorted(abs(seconds / prices.predict(shape) - 1) for shape, seconds in tests)
    return Error(median(found), found[int(0.9 * (len(found) - 1))], len(found))


def prices_of(seen: list[tuple[StepShape, float]]) -> Prices:
    rows = [features_of(shape, bool(shape.prefill_tokens)) for shape, _ in seen]
    fold = _fold(rows)
    rows = [_folded(row, fold, 1 / seconds) for row, (_, seconds) in zip(rows, seen, strict=True)]
    weights = [1.0] * len(rows)
    prices = [0.0] * len(fold)
    for _ in range(ROUNDS):
        prices = solve(rows, weights, prices)
        wrong = [abs(_dot(prices, row) - 1) for row in rows]
        bound = HUBER * max(median(wrong), 1e-6)
        weights = [min(1.0, bound / max(error, 1e-12)) for error in wrong]
    made = Prices(fold, prices)
    predicted = [made.predict(shape) for shape, _ in seen]
    made.scatter = Scatter.of(predicted, [seconds for _, seconds in seen])
    return made


def _fold(rows: list[list[float]]) -> list[int]:
    """A feature that hardly any step had is paid for like the one before it on the curve: what is
    larger than anything recorded is not for nothing."""
    fold = list(range(len(rows[0])))
    for at in range(CURVE + 1, len(fold)):
        if sum(row[at] > 0 for row in rows) < SUPPORT:
            fold[at] = fold[at - 1]
    return fold


def _folded(row: list[float], fold: list[int], factor: float) -> list[float]:
    folded = [0.0] * len(row)
    for at, value in zip(fold, row, strict=True):
        folded[at] += factor * value
    return folded


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def solve(
    rows: Sequence[Sequence[float]], weights: Sequence[float], start: Sequence[float]
) -> list[float]:
    """The prices, none below zero, with which the weighted squares of `row · prices - 1` are least:
    one after the other, the others being as they are (Franc, Hlaváč, Navara, 2005)."""
    size = len(start)
    matrix = [[0.0] * size for _ in range(size)]
    target = [0.0] * size
    for row, weight in zip(rows, weights, strict=True):
        used = [(i, x) for i, x in enumerate(row) if x]
        for i, x in used:
            target[i] += weight * x
            line = matrix[i]
            for j, y in used:
                line[j] += weight * x * y
    prices = list(start)
    for _ in range(SWEEPS):
        largest = 0.0
        for i, line in enumerate(matrix):
            if line[i]:
                change = max((target[i] - _dot(line, prices)) / line[i], -prices[i])
                prices[i] += change
                largest = max(largest, abs(change) * line[i] ** 0.5)
        if largest < 1e-9 * len(rows) ** 0.5:
            break
    return prices


def _between(steps: Sequence[Step]) -> float:
    """Mean seconds from the end of a step to the beginning of the next, while there was work. Their
    times scatter by more than that: some gaps are below zero, and count."""
    ordered = sorted(steps, key=lambda step: step.at)
    longest = PAUSE * median(step.seconds for step in steps)
    gaps = []
    for earlier, later in pairwise(ordered):
        gap = later.at - earlier.at - earlier.seconds
        if abs(gap) < longest and earlier.shape[2] and later.shape[2]:
            gaps.append(gap)
    return max(0.0, fmean(gaps)) if gaps else 0.0
