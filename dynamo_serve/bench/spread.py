"""How sure a figure is: quantiles, intervals, shares, fairness; the standard library only.

All intervals are of 95 %. Sources:
quantiles: Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996), definition 7, which
numpy and with it most bench suites use. Their interval: from ranks of the sorted samples and the
binomial distribution, free of any assumed shape (Conover, "Practical Nonparametric Statistics",
3.2). Shares: Wilson (1927). Means over runs: Student's t; its probabilities for whole degrees of
freedom are finite sums (Abramowitz and Stegun, 26.7.3 and 26.7.4). Fairness: Jain, Chiu and
Hawe (1984).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

TAIL = 0.025  # on either side of an interval
HALVINGS = 200


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and between what it lies, as far as `count` samples tell; None: they don't."""

    value: float
    low: float | None
    high: float | None
    count: int


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, at least one; between two ranks it is interpolated."""
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    low, high = ordered[below], ordered[above]
    return low if low == high else low + (high - low) * (rank - below)


def percentile(values: Iterable[float], share: float) -> float:
    """The same of values in any order; 0 of none."""
    ordered = sorted(values)
    return quantile(ordered, share) if ordered else 0.0


def estimate(ordered: Sequence[float], share: float) -> Estimate | None:
    """A quantile with its interval. None if there are too few samples: the greatest of them might
    then be less than the quantile, so nobody knows how large it is (see `needed`)."""
    ranks = rank_interval(len(ordered), share)
    if ranks is None:
        return None
    low, high = ranks
    return Estimate(quantile(ordered, share), ordered[low], ordered[high], len(ordered))


@lru_cache(maxsize=256)
def rank_interval(count: int, share: float) -> tuple[int, int] | None:
    """Ranks from 0 between which the quantile lies in 95 % of all samples of that size."""
    mean, deviation = count * share, math.sqrt(count * share * (1 - share))
    first = max(0, math.floor(mean - 12 * deviation))  # beyond it is nothing that counts
    last = min(count - 1, math.ceil(mean + 12 * deviation))
    cumulated, low, high = 0.0, None, None
    for below in range(first, last + 1):  # so many samples lie below the quantile
        cumulated += math.exp(_log_binomial(below, count, share))
        if cumulated <= TAIL:
            low = below
        if cumulated >= 1 - TAIL:
            high = below
            break
    return None if low is None or high is None else (low, high)


def _log_binomial(hits: int, count: int, share: float) -> float:
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return ways + hits * math.log(share) + (count - hits) * math.log(1 - share)


def needed(share: float) -> int:
    """How many samples it takes for a quantile above the median to be known."""
    return math.ceil(math.log(TAIL) / math.log(share))


def wilson(hits: int, count: int) -> Estimate:
    """A share of `count`, at least 1, with its interval."""
    z = 1.959964
    share, room = hits / count, z * z / count
    centre = (share + room / 2) / (1 + room)
    reach = z * math.sqrt(share * (1 - share) / count + room / (4 * count)) / (1 + room)
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach), count)


def jain(values: Sequence[float]) -> float | None:
    """1 if all have the same, 1/n if one has everything; None where nobody has anything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares > 0 else None


def within(t: float, freedom: int) -> float:
    """How probable it is that |T| <= t for Student's T of so many degrees of freedom."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cos2 = math.cos(angle) ** 2
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if not is_odd or freedom > 1 else 0.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


@lru_cache(maxsize=256)
def student(freedom: int) -> float:
    """How many standard errors an interval reaches to either side."""
    low, high = 0.0, 1000.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < 1 - 2 * TAIL else (low, middle)
    return high


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def mean(values: Sequence[float]) -> Estimate:
    """The mean of at least one value with its t-interval; one alone has none."""
    value = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(value, None, None, 1)
    reach = student(len(values) - 1) * standard_error(values)
    return Estimate(value, value - reach, value + reach, len(values))
