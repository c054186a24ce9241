"""Models of steps: constants as people write them, and fits that know a device again."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.errors import ConfigError
from dynamo_serve.simulate.costs import Constants, Way, constants
from dynamo_serve.simulate.fit import Draws, fit, solve, way_of
from dynamo_serve.trace import Arrival, Step
from tests.simulate import synthetic


def test_constants_add_up() -> None:
    cost = constants("fixed=2ms, token=20us,sequence=1e-3,read=10ns,pair=1ns")
    wanted = Constants(0.002, 2e-5, 1e-3, 1e-8, 1e-9)
    assert list(cost.told().values()) == pytest.approx(list(wanted.told().values()))
    shape = StepShape(100, 5000.0, 4, 1000, 200)
    assert cost.predict(shape) == pytest.approx(0.002 + 104 * 2e-5 + 4e-3 + 1200e-8 + 5000e-9)


def test_a_file_of_constants_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "device.yaml"
    path.write_text("fixed: 2ms\ntoken: 20us\nnoise: 5%\n")
    assert constants(str(path)) == constants("fixed=2ms,token=20us,noise=0.05")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("fixed=2ms,tokens=1", "'tokens' is no cost; allowed: fixed, token"),
        ("fixed=fast", "fixed = 'fast'; allowed: numbers such as 2ms"),
        ("fixed=5%", "fixed = '5%'"),
        ("noise=5%", "a step has to take time"),
        ("no-such.yaml", "cannot read this file"),
    ],
)
def test_wrong_constants_are_named(said: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        constants(said)


def test_a_device_is_known_again_from_its_steps() -> None:
    fitted = fit(synthetic.steps(random.Random(1), 1500, between=0.0007))
    for error in fitted.errors.values():
        assert error.p90 < 0.005
    assert fitted.between == pytest.approx(0.0007)
    for shape in (StepShape(0, 0.0, 10, 5000), StepShape(200, 200 * 150.0, 20, 8000, 250)):
        assert fitted.predict(shape) == pytest.approx(synthetic.seconds(shape), rel=0.02)


def test_outliers_are_drawn_again_but_do_not_spoil_the_prices() -> None:
    rng = random.Random(2)
    steps = synthetic.steps(rng, 1500, noise=0.03)
    slow = [
        s.__class__(s.at, s.seconds * (10 if i % 50 == 0 else 1), s.shape)
        for i, s in enumerate(steps)
    ]
    fitted = fit(slow)
    shape = StepShape(0, 0.0, 10, 5000)
    assert fitted.predict(shape) == pytest.approx(synthetic.seconds(shape), rel=0.05)
    times = fitted.times(random.Random(0))
    drawn = [times.step(shape) / synthetic.seconds(shape) for _ in range(2000)]
    assert 0.01 < sum(ratio > 5 for ratio in drawn) / len(drawn) < 0.03


def test_a_pause_is_no_longer_in_a_long_step_than_in_a_short_one() -> None:
    rng, pause = random.Random(6), 0.05
    steps = [
        s.__class__(s.at, s.seconds + (pause if rng.random() < 0.05 else 0.0), s.shape)
        for s in synthetic.steps(rng, 4000, noise=0.03)
    ]
    times = fit(steps).times(random.Random(0))
    for shape in (StepShape(0, 0.0, 2, 100), StepShape(256, 256 * 128.0, 20, 8000, 0)):
        usual = synthetic.seconds(shape)
        drawn = sorted(times.step(shape) - usual for _ in range(4000))
        assert abs(drawn[len(drawn) // 2]) < 0.1 * usual
        late = [seconds for seconds in drawn if seconds > pause / 2]
        assert 0.02 < len(late) / len(drawn) < 0.1
        assert max(late) < 3 * pause, "in proportion it would be many times as long"


def test_the_first_steps_of_a_server_are_not_drawn() -> None:
    steps = synthetic.steps(random.Random(7), 1500)
    cold = [s.__class__(s.at, 100 * s.seconds, s.shape) for s in steps[:5]] + steps[5:]
    times, shape = fit(cold).times(random.Random(0)), StepShape(0, 0.0, 10, 5000)
    assert max(times.step(shape) for _ in range(3000)) < 1.1 * synthetic.seconds(shape)


def test_more_than_was_ever_recorded_is_not_for_nothing() -> None:
    fitted = fit(synthetic.steps(random.Random(3), 1500))
    most, more = (StepShape().with_chunk(count, 0) for count in (256, 2048))
    assert fitted.predict(more) > 4 * fitted.predict(most)


def test_the_error_is_that_of_steps_that_were_not_fitted() -> None:
    fitted = fit(synthetic.steps(random.Random(4), 3000, noise=0.1))
    error = fitted.errors["decode"]
    # Of a normal distribution half is within 0.674 standard deviations, nine tenths within 1.645.
    assert error.median == pytest.approx(0.0674, rel=0.15)
    assert error.p90 == pytest.approx(0.1645, rel=0.15)


def test_too_few_steps_make_no_model() -> None:
    with pytest.raises(ConfigError, match="the trace has 0 steps with prompt tokens"):
        fit([])


def test_no_price_is_below_zero() -> None:
    rows = [[1.0, x, 2 - x] for x in (0.0, 0.5, 1.0, 1.5)]
    prices = solve(rows, [1.0] * 4, [0.0] * 3)
    assert min(prices) >= 0.0
    assert all(
        sum(p * x for p, x in zip(prices, row, strict=True)) == pytest.approx(1) for row in rows
    )


def test_draws_follow_each_other_as_they_were() -> None:
    draws = Draws(list(range(1000)), random.Random(5))
    drawn = [draws.next() for _ in range(320)]
    followed = sum(b - a in (1, -999) for a, b in pairwise(drawn))
    assert followed >= 300


def test_the_way_is_what_neither_queue_nor_engine_took() -> None:
    def asked(transit: float | None, waited: float, prefill: float | None, first: float) -> Arrival:
        times = {"transit": transit, "waited": waited, "prefill": prefill, "first_token": first}
        return Arrival(0.0, 1, 1, 1, **times)  # type: ignore[arg-type]

    arrivals = [
        asked(0.001, 0.003, 0.010, 0.0135),
        asked(0.002, 0.002, 0.100, 0.1027),
        asked(0.050, 0.050, 0.010, 0.0609),
        asked(None, 0.5, None, 0.9),  # recorded before these were
    ]
    assert way_of(arrivals) == pytest.approx(Way(0.002, 0.0007))
    assert way_of(arrivals[3:]) == Way()


def test_who_came_during_a_step_tells_nothing_of_the_way() -> None:
    steps = [Step(at, 0.1, (0, 0.0, 1, 10, 0, 0)) for at in (0.0, 0.1, 0.2, 0.5)]
    during = [Arrival(at, 1, 1, 1, transit=0.002 + 0.1 - at) for at in (0.01, 0.05, 0.09)]
    beside = [Arrival(at, 1, 1, 1, transit=0.002) for at in (0.31, 0.497)]
    assert way_of([*during, *beside], steps).there == pytest.approx(0.002)
    assert way_of(during, steps).there == pytest.approx(0.012), "the least, where all did"
