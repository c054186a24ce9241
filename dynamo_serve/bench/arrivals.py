"""When requests come: endless, seeded streams of seconds since the run began."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence


def constant(rate: float) -> Iterator[float]:
    """Evenly, `rate` a second, the first at once."""
    return (number / rate for number in itertools.count())


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    return itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())


def gamma(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Gaps from a gamma distribution. Burstiness, its shape, is as in other suites: 1 is Poisson,
    less comes in bursts, more is more even."""
    scale = 1 / (rate * burstiness)
    return itertools.accumulate(rng.gammavariate(burstiness, scale) for _ in itertools.count())


def ramp(levels: Sequence[float], rng: random.Random) -> Iterator[float]:
    """Poisson, with a rate that goes from one to another over some seconds, and stays there.

    `levels` are these three.
    """
    first, last, seconds = levels
    slope, whole = (last - first) / seconds, (first + last) / 2 * seconds

    def time(count: float) -> float:
        if count >= whole:
            return seconds + (count - whole) / last if last else math.inf
        # The root of first·t + slope·t²/2 = count, in a form that is exact for small slopes, too.
        return 2 * count / (first + math.sqrt(max(0.0, first * first + 2 * slope * count)))

    return _warped(rng, time)


def steps(levels: Sequence[tuple[float, float]], rng: random.Random) -> Iterator[float]:
    """Poisson, at each `rate` for so many `seconds`; it ends with the last of them."""
    starts = list(itertools.accumulate((seconds for _, seconds in levels), initial=0.0))
    counts = list(itertools.accumulate((rate * seconds for rate, seconds in levels), initial=0.0))

    def time(count: float) -> float:
        for index, (rate, _) in enumerate(levels):
            if count < counts[index + 1]:
                return starts[index] + (count - counts[index]) / rate
        return math.inf

    return _warped(rng, time)


def _warped(rng: random.Random, time: Callable[[float], float]) -> Iterator[float]:
    """A Poisson process of rate 1, stretched to where `time` has so many arrivals."""
    for count in itertools.accumulate(rng.expovariate(1.0) for _ in itertools.count()):
        at = time(count)
        if math.isinf(at):
            return
        yield at


def timestamps(times: Iterable[float], speed: float = 1.0) -> Iterator[float]:
    """Those of a trace, the first as 0, `speed` times as fast."""
    first: float | None = None
    for at in times:
        first = at if first is None else first
        yield (at - first) / speed
