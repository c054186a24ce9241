"""Statistics against tables, and against counting them out."""

from __future__ import annotations

import math
import random

import pytest

from dynamo_serve.bench import spread


def test_quantiles_lie_between_two_ranks() -> None:
    ordered = [1.0, 2.0, 3.0, 4.0]
    assert spread.quantile(ordered, 0.5) == 2.5
    assert spread.quantile(ordered, 0.9) == pytest.approx(3.7)
    assert spread.quantile([7.0], 0.99) == 7.0


def test_a_median_of_ten_lies_between_the_second_and_the_ninth() -> None:
    # Conover, table A3: with n = 10 these ranks hold the median in 97.9 % of all samples.
    assert spread.rank_interval(10, 0.5) == (1, 8)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [6, 37, 368, 1000])
def test_ranks_are_those_that_counting_out_the_binomial_gives(count: int, share: float) -> None:
    chances = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count)]
    below = [math.fsum(chances[: k + 1]) for k in range(count)]
    low = [k for k in range(count) if below[k] <= 0.025]
    high = [k for k in range(count) if below[k] >= 0.975]
    expected = (low[-1], high[0]) if low and high else None
    assert spread.rank_interval(count, share) == expected


@pytest.mark.parametrize(
    ("share", "least"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.999, 3688)]
)
def test_a_percentile_is_known_from_so_many_samples_on(share: float, least: int) -> None:
    assert spread.needed(share) == least
    assert spread.estimate([1.0] * (least - 1), share) is None
    assert spread.estimate([1.0] * least, share) is not None


def test_an_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    rng = random.Random(5)
    hits = 0
    for _ in range(400):
        found = spread.estimate(sorted(rng.random() for _ in range(40)), 0.5)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 0.5 <= found.high
    assert hits >= 370  # 95 % of 400 are 380, give or take four


@pytest.mark.parametrize(
    ("freedom", "reach"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (30, 2.04227)],
)
def test_student_is_as_in_the_tables(freedom: int, reach: float) -> None:
    assert spread.student(freedom) == pytest.approx(reach, abs=6e-6 * reach)
    assert spread.within(reach, freedom) == pytest.approx(0.95, abs=1e-6)


def test_student_with_many_degrees_of_freedom_is_nearly_normal() -> None:
    assert spread.student(100_000) == pytest.approx(1.95999, abs=1e-4)


def test_a_mean_over_runs_has_a_t_interval() -> None:
    found = spread.mean([1.0, 2.0, 3.0])  # s = 1, s / √3 = 0.57735, times 4.30265
    assert found.value == 2.0 and found.count == 3
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.48414, abs=1e-4)
    assert spread.mean([4.0]) == spread.Estimate(4.0, None, None, 1)


def test_a_share_has_wilsons_interval() -> None:
    found = spread.wilson(8, 10)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4901, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert spread.wilson(0, 5).low == 0.0
    assert spread.wilson(5, 5).high == pytest.approx(1.0)


def test_jains_index_is_one_for_equals_and_one_over_n_for_one_who_has_it_all() -> None:
    assert spread.jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert spread.jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert spread.jain([4.0, 2.0]) == pytest.approx(0.9)
    assert spread.jain([]) is None
    assert spread.jain([0.0, 0.0]) is None
