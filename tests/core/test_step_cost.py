"""The step-time model against machines whose times are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import isfinite
from statistics import median

import pytest

from dynamo_serve.core.step_cost import (
    DAMPING,
    FIRST_REACH,
    FORGET,
    SMOOTHING,
    Item,
    StepCost,
    StepShape,
    _Fit,
)
from dynamo_serve.core.step_shape import CURVE, NEAR_WIDTHS, features_of

Machine = Callable[[StepShape], float]
"""Seconds that a step takes."""


def linear(shape: StepShape) -> float:
    """A small GPU: a step costs 4 ms, and something for everything in it."""
    launch = 0.004 if shape.prefill_tokens else 0.002
    per_token = 2e-5 * shape.prefill_tokens + 5e-5 * shape.decode_sequences
    return launch + per_token + 1e-9 * shape.prefill_context + 1e-8 * shape.decode_context


def cpu(shape: StepShape) -> float:
    """Weights are read in 87 ms, whatever is computed meanwhile; then computing takes over."""
    tokens = shape.prefill_tokens + shape.decode_sequences
    attention = 2e-7 * shape.prefill_context + 3e-6 * shape.decode_context
    return max(0.087, 0.0028 * tokens if tokens < 64 else 0.13 + 0.00075 * tokens) + attention


def stairs(shape: StepShape) -> float:
    """As measured with bfloat16 on two cores: the 33rd token costs as much as the next hundred."""
    tokens = shape.prefill_tokens + shape.decode_sequences
    rows = 0.18 + 0.001 * tokens + (0.05 if tokens > 16 else 0) + (0.17 if tokens > 32 else 0)
    return rows + 7e-5 * (shape.decode_context + shape.prefill_reads)


def scaled(machine: Machine, factor: float) -> Machine:
    return lambda shape: factor * machine(shape)


def noise(rng: random.Random, spread: float = 0.05) -> float:
    return rng.gauss(1.0, spread)


def some_works(rng: random.Random) -> list[Item]:
    """Decoding sequences, chunks, or both."""
    kind = rng.choice(["decode", "prefill", "mixed"])
    works: list[Item] = []
    if kind != "prefill":
        works += [(1, rng.randint(50, 1000), False) for _ in range(rng.choice([1, 4, 8, 16, 32]))]
    if kind != "decode":
        for _ in range(rng.choice([1, 1, 2])):
            works.append((int(4 * 128 ** rng.random()), rng.randint(0, 1500), True))
    return works


def taught(machine: Machine, steps: int, *, seed: int = 1) -> tuple[StepCost, list[float]]:
    """A model that has seen mixed traffic, and its relative errors on the way."""
    rng = random.Random(seed)
    cost = StepCost()
    return cost, teach(cost, machine, steps, rng)


def teach(cost: StepCost, machine: Machine, steps: int, rng: random.Random) -> list[float]:
    errors = []
    for _ in range(steps):
        shape = StepShape.of(some_works(rng))
        seconds = machine(shape) * noise(rng)
        errors.append(abs(cost.predict(shape) - seconds) / seconds)
        cost.observe(shape, seconds)
    return errors


def exact_error(cost: StepCost, machine: Machine) -> float:
    """Median relative error on shapes of the usual kind, without noise."""
    rng = random.Random(99)
    shapes = [StepShape.of(some_works(rng)) for _ in range(200)]
    return median(abs(cost.predict(s) / machine(s) - 1) for s in shapes)


# ── learning ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("machine", [linear, cpu, stairs])
@pytest.mark.parametrize("seed", range(3))
def test_a_machine_is_learned_in_a_hundred_steps(machine: Machine, seed: int) -> None:
    cost, errors = taught(machine, 400, seed=seed)
    assert median(errors[100:]) < 0.08
    assert exact_error(cost, machine) < 0.06


def test_the_first_observation_sets_the_scale() -> None:
    cost = StepCost(step_s=10.0, token_s=0.2, sequence_s=1.0)
    shape = StepShape.of([(64, 0, True)])
    cost.observe(shape, 0.02)
    assert cost.predict(shape) == pytest.approx(0.02, rel=0.3)
    assert cost.predict(StepShape.of([(1, 10, False)])) < 0.1


def test_a_kind_that_comes_late_is_scaled_like_the_first() -> None:
    cost = StepCost()
    decode, prefill = StepShape.of([(1, 300, False)]), StepShape.of([(64, 0, True)])
    for i in range(100):
        cost.observe(decode, 0.1 if i < 90 else 0.2)
    cost.observe(prefill, 0.5)
    assert cost.predict(prefill) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("machine", [linear, cpu])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_slower_or_faster_machine_is_noticed_in_twenty_steps(
    machine: Machine, factor: float
) -> None:
    cost, errors = taught(machine, 300)
    rng = random.Random(2)
    for speed in (factor, 1.0, factor, 1.0):
        errors = teach(cost, scaled(machine, speed), 80, rng)
        assert median(errors[20:]) < 0.1
    assert exact_error(cost, machine) < 0.1


@pytest.mark.parametrize("machine", [linear, cpu])
def test_outliers_do_not_spoil_it(machine: Machine) -> None:
    cost, _ = taught(machine, 300)
    rng = random.Random(3)
    for _ in range(10):
        teach(cost, scaled(machine, 20), 1, rng)
        teach(cost, machine, 9, rng)
    assert exact_error(cost, machine) < 0.1


def test_a_row_of_outliers_is_got_over() -> None:
    cost, _ = taught(cpu, 300)
    rng = random.Random(4)
    teach(cost, scaled(cpu, 20), 10, rng)
    assert median(teach(cost, cpu, 60, rng)[20:]) < 0.1


def test_thousands_of_equal_steps_do_no_harm() -> None:
    cost, _ = taught(cpu, 200)
    rng = random.Random(5)
    decode = StepShape.of([(1, 300, False)] * 4)
    for i in range(5000):
        cost.observe(decode, cpu(decode) * noise(rng) * (2 if 2000 < i < 3000 else 1))
    for count in (1, 16, 64, 512):
        shape = StepShape.of([(count, 200, True)] + [(1, 300, False)] * 4)
        assert 0.5 * cpu(shape) < cost.predict(shape) < 2 * cpu(shape)
    assert median(teach(cost, cpu, 60, rng)[20:]) < 0.1


def test_equal_steps_from_the_start_leave_sane_guesses() -> None:
    cost = StepCost()
    for _ in range(3000):
        cost.observe(StepShape.of([(1, 300, False)]), 0.087)
    for works in ([(1, 300, False)] * 64, [(512, 0, True)], [(8, 30_000, True)]):
        assert isfinite(cost.predict(StepShape.of(works)))
        assert 0.02 < cost.predict(StepShape.of(works)) < 20


class Dense:
    """What `_Fit` learns, of all features at every step."""

    def __init__(self, prior: list[float]) -> None:
        self.prices = list(prior)
        self.information = [[0.0] * len(prior) for _ in prior]
        self.pull = [0.0] * len(prior)

    def learn(self, features: list[float], predicted: float, error: float) -> None:
        row = [x / predicted for x in features]
        kept = [FORGET if x else 1.0 for x in row]
        self.pull = [k * p + error * x for p, k, x in zip(self.pull, kept, row, strict=True)]
        for i, line in enumerate(self.information):
            for j, known in enumerate(line):
                line[j] = (kept[i] * kept[j]) * known + row[i] * row[j]
            belief, pull = line[i] + DAMPING * row[i] * row[i], self.pull[i]
            if i >= CURVE:
                likeness = SMOOTHING * (NEAR_WIDTHS[i - CURVE] / predicted) ** 2
                near = self.prices[max(i - 1, CURVE)]
                if i + 1 < len(self.prices):
                    near = (near + self.prices[i + 1]) / 2
                belief += likeness
                pull += likeness * (near - self.prices[i])
            change = max(pull / belief, -self.prices[i]) if belief else 0.0
            self.prices[i] += change
            self.pull = [p - change * a for p, a in zip(self.pull, line, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_leaving_out_what_no_step_had_changes_no_price(seed: int) -> None:
    rng = random.Random(seed)
    prior = [0.01, 0.0, 0.001, *[0.0] * (CURVE - 3), *[0.0002] * len(NEAR_WIDTHS)]
    sparse, dense = _Fit(prior), Dense(prior)
    for step in range(200):
        works = some_works(rng) if step > 50 else [(1, 100 + step, False)] * 3
        shape = StepShape.of(works)
        features = features_of(shape, bool(shape.prefill_tokens))
        told = features, sparse(features), rng.gauss(0.0, 0.2)
        sparse.learn(*told)
        dense.learn(*told)
        assert sparse.prices == dense.prices, step


def test_a_step_without_length_teaches_nothing() -> None:
    cost = StepCost()
    before = cost.predict(StepShape(64))
    cost.observe(StepShape(64), 0.0)
    assert cost.predict(StepShape(64)) == before and cost.error == 0.0


def test_equal_observations_give_equal_predictions() -> None:
    one, _ = taught(cpu, 100)
    two, _ = taught(cpu, 100)
    shape = StepShape.of([(77, 5, True)])
    assert one.predict(shape) == two.predict(shape)


def test_the_error_is_the_median_of_what_was_predicted_before() -> None:
    cost, errors = taught(cpu, 300)
    assert cost.error == median(errors[-256:])


# ── more work never costs less ───────────────────────────────────────────────


@pytest.mark.parametrize("steps", [0, 3, 30, 300])
def test_predictions_rise_with_work(steps: int) -> None:
    rng = random.Random(steps)
    cost = StepCost()
    teach(cost, lambda shape: cpu(shape) * rng.choice([0.3, 1, 3]), steps, rng)
    for _ in range(100):
        works = some_works(rng)
        shape = StepShape.of(works)
        assert cost.predict(shape) > 0
        if shape.prefill_tokens:
            assert cost.predict(shape.with_chunk(rng.randint(1, 600), 0)) >= cost.predict(shape)
        more = StepShape.of([*works, (1, rng.randint(0, 900), False)])
        assert cost.predict(more) >= cost.predict(shape)


def test_a_chunk_costs_time_beside_decoding_sequences() -> None:
    cost = StepCost()
    rng = random.Random(6)
    decode = StepShape.of([(1, 400, False)] * 32)
    for _ in range(50):  # chunks have been seen alone only
        cost.observe(decode, cpu(decode) * noise(rng))
        alone = StepShape.of([(rng.randint(8, 64), 0, True)])
        cost.observe(alone, cpu(alone) * noise(rng))
    assert cost.predict(decode.with_chunk(1, 0)) >= cost.predict(decode)


# ── sizing chunks ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("machine", [linear, cpu, stairs])
def test_a_chunk_fits_its_budget(machine: Machine) -> None:
    cost, _ = taught(machine, 400)
    rng = random.Random(7)
    sized = 0
    for _ in range(200):
        base = StepShape.of([(1, rng.randint(50, 1000), False)] * rng.choice([1, 4, 8]))
        position, budget = rng.randint(0, 1500), machine(base) * rng.uniform(1.1, 4)
        count = cost.largest_chunk(base, position, budget, 512)
        if count:
            sized += 1
            assert machine(base.with_chunk(count, position)) <= 1.1 * budget
    assert sized > 100


def test_the_chunk_is_the_largest_that_is_predicted_to_fit() -> None:
    cost, _ = taught(cpu, 200)
    rng = random.Random(8)
    for _ in range(300):
        base = StepShape.of(some_works(rng)) if rng.random() < 0.8 else StepShape()
        position, budget = rng.randint(0, 1500), rng.uniform(0.05, 1.0)
        count = cost.largest_chunk(base, position, budget, 400)
        assert 0 <= count <= 400
        if count:
            assert cost.predict(base.with_chunk(count, position)) <= budget * (1 + 1e-9)
        if count < min(400, cost.reach - base.prefill_tokens):
            assert cost.predict(base.with_chunk(count + 1, position)) > budget * (1 - 1e-9)


def test_a_chunk_is_at_most_twice_what_was_seen() -> None:
    cost = StepCost()
    assert cost.largest_chunk(StepShape(), 0, 1e9, 10_000) == FIRST_REACH
    cost.observe(StepShape.of([(100, 0, True)]), 0.1)
    assert cost.largest_chunk(StepShape(), 0, 1e9, 10_000) == 200
    assert cost.largest_chunk(StepShape.of([(150, 0, True)]), 0, 1e9, 10_000) == 50
    assert cost.largest_chunk(StepShape.of([(250, 0, True)]), 0, 1e9, 10_000) == 0
    assert cost.largest_chunk(StepShape(), 0, 1e9, 7) == 7
    assert cost.largest_chunk(StepShape(), 0, 0.0, 7) == 0


def test_one_quick_step_proves_nothing_and_some_in_a_row_do() -> None:
    """On a machine whose steps vary the next one takes as long as ever: too long for a promise."""
    cost, shape = StepCost(), StepShape().with_chunk(64, 0)
    for _ in range(200):
        for count in (32, 64, 128):
            cost.observe(StepShape().with_chunk(count, 0), count / 64)
    fits = []
    for _ in range(4):
        fits.append(cost.largest_chunk(StepShape(), 0, 1.0, 2048))
        cost.observe(shape, 0.25)
    assert fits[0] == 64
    assert max(fits[:3]) < 1.2 * 64, "the machine seems to be less busy"
    assert fits[3] == 90, "twice the pairs of tokens"
    cost.observe(shape, 1.0)
    assert cost.largest_chunk(StepShape(), 0, 1.0, 2048) < 80


# ── who pays ─────────────────────────────────────────────────────────────────


def test_shares_add_up_and_grow_with_work() -> None:
    cost, _ = taught(cpu, 200)
    rng = random.Random(9)
    for _ in range(50):
        works = some_works(rng)
        shares = cost.shares(works)
        assert sum(shares) == pytest.approx(1.0) and min(shares) > 0
    small, large, far = cost.shares([(16, 0, True), (160, 0, True), (160, 1000, True)])
    assert 5 * small < large < far
    here, there = cost.shares([(1, 50, False), (1, 5000, False)])
    assert here < there


def test_shares_exist_before_anything_is_known() -> None:
    assert StepCost(0.0, 0.0, 0.0).shares([(1, 5, False), (1, 9, False)]) == [0.5, 0.5]


def test_a_shape_adds_up_its_works() -> None:
    shape = StepShape.of([(10, 100, True), (1, 50, False), (4, 0, True), (1, 9, False)])
    assert shape == StepShape(14, 10 * 105 + 4 * 2, 2, 51 + 10, 110 + 4)
    assert StepShape.of([(10, 100, True)]).with_chunk(4, 0) == StepShape(14, 1058, 0, 0, 114)
