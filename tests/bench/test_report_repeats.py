"""Repeats are found among runs by what these say of themselves."""

from __future__ import annotations

from typing import Any

from dynamo_serve.bench.record import Run
from dynamo_serve.bench.repeats import grouped, label

PLAN = {"workload": "chat", "rate": 2.0, "texts": {"made_of": "words"}}


def run_of(**about: Any) -> Run:
    return Run({"plan": PLAN, "seed": 1, "model": "m", **about}, 1.0, [])


def test_runs_that_differ_in_seed_address_and_what_was_measured_are_repeats() -> None:
    runs = [run_of(), run_of(seed=2, url="http://b"), run_of(began_at=5.0, client={"busy": 0.3})]
    assert [(name, len(group)) for name, group in grouped(runs)] == [("workload chat, rate 2.0", 3)]


def test_runs_of_another_plan_setting_or_commit_are_not() -> None:
    others: list[dict[str, Any]] = [
        {"plan": {**PLAN, "rate": 3.0}},
        {"settings": {"a": 1}},
        {"commit": "b"},
    ]
    runs = [run_of(), *(run_of(**other) for other in others)]
    assert [group for _, group in grouped(runs)] == [[run] for run in runs]


def test_a_label_says_what_tells_runs_apart() -> None:
    assert label(run_of().about) == "workload chat, rate 2.0, seed 1"
    assert label({}) == "one that does not say what it was"
