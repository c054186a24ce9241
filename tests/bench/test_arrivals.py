"""Arrivals: the rates and the burstiness that were asked for, and the same for the same seed."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator

import pytest

from dynamo_serve.bench import arrivals

COUNT = 20_000


def taken(times: Iterator[float], count: int = COUNT) -> list[float]:
    return list(itertools.islice(times, count))


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(times)]


def variation(values: list[float]) -> float:
    """Standard deviation by mean: 1 for Poisson."""
    return statistics.stdev(values) / statistics.mean(values)


def test_constant_arrivals_are_even_and_do_not_drift() -> None:
    times = taken(arrivals.constant(500.0))
    assert times[0] == 0.0
    assert times[-1] == pytest.approx((COUNT - 1) / 500, rel=1e-12)


def test_poisson_arrivals_have_the_rate_and_the_variation_of_poisson() -> None:
    found = gaps(taken(arrivals.poisson(8.0, random.Random(1))))
    assert statistics.mean(found) == pytest.approx(1 / 8, rel=0.02)
    assert variation(found) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_arrivals_keep_the_rate_and_come_in_bursts(burstiness: float) -> None:
    found = gaps(taken(arrivals.gamma(5.0, burstiness, random.Random(2))))
    assert statistics.mean(found) == pytest.approx(1 / 5, rel=0.04)
    assert variation(found) == pytest.approx(burstiness**-0.5, rel=0.03)


@pytest.mark.parametrize(("first", "last"), [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0), (0.0, 8.0)])
def test_a_ramp_goes_from_one_rate_to_the_other_and_stays_there(first: float, last: float) -> None:
    def between(times: list[float], low: float, high: float) -> int:
        return sum(low <= at < high for at in times)

    runs = [
        list(
            itertools.takewhile(
                lambda at: at < 300, arrivals.ramp((first, last, 200.0), random.Random(seed))
            )
        )
        for seed in range(20)
    ]
    expected = {
        (0, 200): (first + last) / 2 * 200,
        (0, 50): (first + (last - first) / 8) * 50,
        (200, 300): last * 100,
    }
    for (low, high), count in expected.items():
        found = statistics.mean(between(times, low, high) for times in runs)
        assert found == pytest.approx(count, abs=4 * (count / len(runs)) ** 0.5)


def test_a_ramp_down_to_nothing_ends() -> None:
    times = list(arrivals.ramp((10.0, 0.0, 10.0), random.Random(3)))
    assert times == sorted(times)
    assert times[-1] <= 10.0


def test_steps_have_each_its_rate_and_end_with_the_last() -> None:
    times = list(arrivals.steps([(2.0, 500.0), (0.0, 100.0), (20.0, 100.0)], random.Random(4)))
    assert sum(at < 500 for at in times) == pytest.approx(1000, rel=0.1)
    assert not any(500 <= at < 600 for at in times)
    assert sum(at >= 600 for at in times) == pytest.approx(2000, rel=0.1)
    assert times[-1] < 700


def test_the_same_seed_gives_the_same_times() -> None:
    first, again, other = (taken(arrivals.poisson(3.0, random.Random(s)), 50) for s in (5, 5, 6))
    assert first == again != other
