"""A recording is predicted from its own steps: traffic, steps and all that follows from them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dynamo_serve.bench.record import Run
from dynamo_serve.bench.summary import summary
from dynamo_serve.settings import from_set
from dynamo_serve.simulate import whatif
from dynamo_serve.simulate.engine import VirtualEngine
from dynamo_serve.simulate.figures import differences, figures, itl_of_steps, table
from dynamo_serve.simulate.fleet import Cluster
from dynamo_serve.simulate.recording import Recording
from dynamo_serve.simulate.whatif import Options
from dynamo_serve.trace import Step
from tests.simulate import synthetic

DEVICE = "fixed=8ms,token=0.15ms,read=200ns,sequence=0.3ms,between=0.6ms,noise=8%"


def run(recorded: Recording, cost: str, *, seed: int) -> Run:
    options = Options(cost, Cluster(), seed)
    return whatif.simulate(recorded, LOADED, whatif.cost_of(recorded, options), options)


HEADER = synthetic.header(spec={**synthetic.SPEC, "holds_steps": False})
LOADED = whatif.load(Recording(HEADER, [], []), [from_set("scheduler.ladder=off")])


def test_a_run_is_predicted_from_what_was_recorded_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = synthetic.traffic(random.Random(2), 300, 18.0)
    steps: list[Step] = []
    pass_by = VirtualEngine._run

    def noted(engine: VirtualEngine, seconds: float) -> None:
        steps.append(Step(engine.clock.now, seconds, tuple(engine.shape())))
        pass_by(engine, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(VirtualEngine, "_run", noted)
        real = figures(run(Recording(HEADER, arrivals, []), DEVICE, seed=5))
    predicted = figures(run(Recording(HEADER, arrivals, steps), "", seed=1))
    off = differences(real, predicted)
    assert abs(off["output tokens per second"]) < 0.03
    assert abs(off["TTFT p50"]) < 0.15 and abs(off["TTFT p99"]) < 0.2
    assert abs(off["ITL p50"]) < 0.1 and abs(off["ITL p99"]) < 0.1
    assert abs(off["cached prompt tokens"]) < 0.02
    seen = itl_of_steps(steps)
    assert seen["ITL p50"] == pytest.approx(real["ITL p50"], rel=0.02)
    assert seen["ITL p99"] == pytest.approx(real["ITL p99"], rel=0.1)


def test_steps_that_are_not_all_there_tell_no_itl() -> None:
    steps = synthetic.steps(random.Random(1), 300)
    assert itl_of_steps(steps)
    assert itl_of_steps(steps[::3]) == itl_of_steps([]) == {}


def test_figures_are_those_of_reports() -> None:
    arrivals = synthetic.traffic(random.Random(4), 60, 18.0)
    arrivals[7] = replace(arrivals[7], ended="cancelled", gone_at=0.4)
    made = run(Recording(HEADER, arrivals, []), DEVICE, seed=5)
    mine, reported = figures(made), summary(made)
    assert mine["TTFT p50"] == reported.total.ttft.value("p50")
    assert mine["E2E p50"] == reported.total.e2e.value("p50")
    assert mine["cached prompt tokens"] == reported.total.cached_share
    assert reported.total.rates is not None
    assert mine["output tokens per second"] == reported.total.rates.output_tokens


def test_differences_are_relative_but_for_shares() -> None:
    one = {"TTFT p50": 0.1, "cached prompt tokens": 0.5, "refused": 0.0}
    other = {"TTFT p50": 0.15, "cached prompt tokens": 0.6, "refused": 3.0}
    assert differences(one, other) == pytest.approx({"TTFT p50": 0.5, "cached prompt tokens": 0.1})
    told = table("a", one, "b", other)
    assert "+50.0 %" in told and "+10.0 points" in told
