"""A difference that is there is found, one that is not is not, and too few runs say nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dynamo_serve.bench import compare_text
from dynamo_serve.bench.compare import Difference, adjusted, compare, interleave, paired
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.errors import ConfigError
from tests.bench.synthetic import made_run


def run_of(first: float, began_at: float = 0.0) -> Run:
    records = [Record(n, 0.0, 0.0, first=first, end=first + 1) for n in range(10)]
    return Run({"loop": "open", "began_at": began_at}, 10.0, records)


def pairs_of(a: list[float], b: list[float]) -> tuple[list[Run], list[Run]]:
    return (
        [run_of(value, n * 10) for n, value in enumerate(a)],
        [run_of(value, n * 10 + 5) for n, value in enumerate(b)],
    )


def ttft(a: list[float], b: list[float]) -> Difference:
    found = compare(*pairs_of(a, b))
    return next(one for one in found.differences if one.name == "ttft_p50_ms")


def test_runs_take_turns_and_who_goes_first_changes() -> None:
    order: list[str] = []

    def side(name: str, repeat: int) -> Run:
        order.append(f"{name}{repeat}")
        return run_of(float(repeat))

    a, b = interleave(lambda n: side("a", n), lambda n: side("b", n), 3)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [run.records[0].first for run in a] == [run.records[0].first for run in b] == [0, 1, 2]


def test_the_paired_test_is_students() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / √3) = 3.4641 with 2 degrees of freedom, p = 0.0742.
    assert paired([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert paired([1.0, 2.0], [2.0, 3.0]) is None
    assert paired([1.0] * 3, [1.0] * 3) == 1.0
    assert paired([1.0] * 3, [2.0] * 3) == 0.0


def test_many_figures_are_adjusted_for() -> None:
    found = adjusted({"a": 0.01, "b": 0.02, "c": 0.9, "d": None})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.03), "c": 0.9, "d": None}


def test_a_slower_first_token_is_worse_and_a_sooner_one_better() -> None:
    a = [1.00, 1.01, 0.99, 1.02, 1.00]
    b = [1.20, 1.22, 1.19, 1.21, 1.20]
    worse = ttft(a, b)
    assert worse.verdict == "worse"
    assert worse.relative is not None and worse.relative.value == pytest.approx(0.2, abs=0.01)
    assert worse.relative.low is not None and worse.relative.low > 0.15
    assert ttft(b, a).verdict == "better"


def test_figures_that_hardly_differ_are_alike() -> None:
    assert ttft([1.00, 1.01, 0.99, 1.00], [1.01, 1.00, 1.00, 0.99]).verdict == "alike"
    assert ttft([1.0] * 3, [1.0] * 3).verdict == "alike"


def test_a_difference_may_be_real_and_little() -> None:
    little = ttft([1.0, 1.001, 0.999, 1.0], [1.01, 1.011, 1.0091, 1.01])
    assert little.verdict == "worse"
    assert compare_text.verdict(little, 0.05) == "B is worse, by less than 5%"
    assert compare_text.verdict(little, 0.001) == "B is worse"


def test_noise_is_not_a_difference() -> None:
    assert ttft([1.0, 2.0, 0.5, 1.5], [1.8, 1.0, 1.1, 0.7]).verdict == "unclear"


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_runs_say_so_however_great_the_difference(count: int) -> None:
    found = compare(*pairs_of([1.0] * count, [9.0] * count))
    assert {one.verdict for one in found.differences} == {"unclear"}
    assert "Not enough runs to tell" in compare_text.text(found)


def test_equal_servers_are_seldom_called_different() -> None:
    rng = random.Random(3)
    alarms = 0
    for _ in range(40):
        values = [[1 + rng.gauss(0, 0.1) for _ in range(5)] for _ in range(2)]
        alarms += ttft(*values).verdict in ("better", "worse")
    assert alarms <= 5  # of 40, 2 are expected at most


def test_pairs_need_as_many_runs_of_both() -> None:
    a, b = pairs_of([1.0, 1.0], [1.0])
    with pytest.raises(ConfigError, match="2 runs of A and 1 of B"):
        compare(a, b)
    with pytest.raises(ConfigError, match="0 runs"):
        compare([], [])


def test_what_should_be_the_same_and_is_not_is_noted() -> None:
    a = [made_run(seed=n, seconds=5) for n in range(3)]
    b = [replace(run, about={**run.about, "machine": "another"}) for run in a]
    notes = " ".join(compare(a, b).notes)
    assert "machine" in notes
    assert ("machine.cpu", "example", "") in compare(a, b).apart


def test_runs_that_did_not_take_turns_are_noted() -> None:
    a, b = pairs_of([1.0] * 3, [1.0] * 3)
    assert not any("turns" in note for note in compare(a, b).notes)
    later = [replace(run, about={**run.about, "began_at": 1000 + n}) for n, run in enumerate(b)]
    assert any("not made in turns" in note for note in compare(a, later).notes)
    silent = [replace(run, about={"loop": "open"}) for run in b]
    assert any("nobody knows" in note for note in compare(a, silent).notes)
