"""Exact small cases, equal runs for equal seeds, and the decisions of the real loop."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.bench.record import Record, Run
from dynamo_serve.bench.summary import summary
from dynamo_serve.config import Config
from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.tenant import CLASSES, Quota, Tenancy, Tenant
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import ConfigError
from dynamo_serve.scheduling import limits_of
from dynamo_serve.settings import from_set
from dynamo_serve.simulate import whatif
from dynamo_serve.simulate.costs import Constants, constants
from dynamo_serve.simulate.engine import VirtualEngine
from dynamo_serve.simulate.fleet import Cluster
from dynamo_serve.simulate.recording import Recording, spec_of
from dynamo_serve.simulate.replica import Replica, Setup
from dynamo_serve.simulate.whatif import Options
from dynamo_serve.trace import Arrival
from tests.core.traffic import Harness
from tests.simulate import synthetic

COST = "fixed=10ms,token=1ms"
NO_HOLDING = {**synthetic.SPEC, "holds_steps": False}
PLAIN = ("scheduler.max_queue_delay_ms=0", "scheduler.ladder=off")
MAX_TURNS = 10_000


def recording(arrivals: list[Arrival], **changed: Any) -> Recording:
    return Recording(synthetic.header(**{"spec": NO_HOLDING, **changed}), arrivals, [])


def simulated(
    recorded: Recording,
    *given: str,
    cost: str = COST,
    cluster: Cluster | None = None,
    seed: int = 0,
) -> Run:
    options = Options(cost, cluster or Cluster(), seed)
    loaded = whatif.load(recorded, [from_set(said) for said in (*PLAIN, *given)])
    return whatif.simulate(recorded, loaded, whatif.cost_of(recorded, options), options)


def ttft(record: Record) -> float:
    assert record.first is not None
    return record.first - record.due


def test_times_are_those_that_one_works_out_by_hand() -> None:
    # 0–30 ms: 20 prompt tokens of the first. 30–51: its second token and 10 prompt tokens of the
    # second. 51–63: a token of either, and both end.
    recorded = recording([Arrival(0.0, 20, 3, 3), Arrival(0.005, 10, 2, 2)])
    one, two = simulated(recorded).records
    assert ttft(one) == pytest.approx(0.030)
    assert one.gaps == pytest.approx((0.021, 0.012))
    assert ttft(two) == pytest.approx(0.046)
    assert (one.end, two.end) == pytest.approx((0.063, 0.063))
    assert [r.outcome for r in (one, two)] == ["ok", "ok"]


def test_the_settings_of_a_recording_stand_whatever_is_usual_today(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = {
        "scheduler.max_prefill_tokens": 10,
        "scheduler.max_step_ms": Config().scheduler.max_step_ms,
        "scheduler.of_long_ago": 1,
    }
    run = simulated(recording([Arrival(0.0, 20, 1, 1)], settings=told))
    assert ttft(run.records[0]) == pytest.approx(0.040)  # in two steps
    names = run.about["settings"].keys()
    assert "scheduler.max_prefill_tokens" in names and "scheduler.max_step_ms" not in names
    assert "scheduler.of_long_ago is no setting of this version" in caplog.text


def test_what_passes_between_steps_counts_for_whoever_waits() -> None:
    recorded = recording([Arrival(0.0, 20, 3, 3)])
    (one,) = simulated(recorded, cost=COST + ",between=4ms").records
    assert ttft(one) == pytest.approx(0.030)
    assert one.gaps == pytest.approx((0.015, 0.015))


def test_the_way_counts_for_the_client_and_not_for_steps() -> None:
    recorded = recording([Arrival(0.0, 20, 3, 3), Arrival(0.005, 10, 2, 2)])
    one, two = simulated(recorded, cost=COST + ",there=2ms,back=1ms").records
    assert ttft(one) == pytest.approx(0.033)
    assert one.gaps == pytest.approx((0.021, 0.012)), "as without it"
    assert ttft(two) == pytest.approx(0.049)
    assert (one.end, two.end) == pytest.approx((0.066, 0.066))
    assert two.server["queue"] == pytest.approx(0.027), "its way is part of its wait"


def test_the_second_turn_of_a_chat_finds_the_first_with_its_answer() -> None:
    first = Arrival(0.0, 40, 30, 30, pages=((0, 2),), output_pages=((2, 2),))
    second = Arrival(5.0, 90, 1, 1, pages=((0, 4), (9, 1)))
    other = Arrival(10.0, 90, 1, 1, pages=((20, 5),))
    records = simulated(recording([first, second, other])).records
    assert [record.cached_tokens for record in records] == [0, 64, 0]


def test_who_asked_for_a_vector_has_it_when_the_prompt_is_computed() -> None:
    asked = [
        Arrival(0.0, 20, 0, 0, pooling="mean", ended="stop", pages=((0, 1),)) for _ in range(2)
    ]
    one, two = simulated(recording(asked), "scheduler.max_prefill_tokens=20").records
    assert [r.outcome for r in (one, two)] == ["ok", "ok"]
    assert (one.first, two.first) == pytest.approx((0.030, 0.060)), "nothing of it from a cache"
    assert (one.output_tokens, two.cached_tokens) == (0, 0)


def test_prompts_are_cut_or_not_as_the_engine_of_the_trace_did_it() -> None:
    asked = [Arrival(0.0, 40, 0, 0, pooling="mean", ended="stop")]
    for whole, steps in ((False, 4), (True, 1)):
        spec = {**NO_HOLDING, "whole_prompts": whole}
        (one,) = simulated(recording(asked, spec=spec), "scheduler.max_prefill_tokens=10").records
        assert ttft(one) == pytest.approx(0.040 + 0.010 * steps)


def test_an_answer_stops_where_it_did() -> None:
    recorded = recording([Arrival(0.0, 20, 5, 50, ended="stop"), Arrival(0.0, 20, 7, 7)])
    one, two = simulated(recorded).records
    assert (one.output_tokens, one.finish) == (5, "stop")
    assert (two.output_tokens, two.finish) == (7, "length")


def test_who_hung_up_hangs_up_then() -> None:
    gone = Arrival(0.0, 20, 4, 400, ended="cancelled", gone_at=0.1)
    (one,) = simulated(recording([gone])).records
    assert (one.outcome, one.finish) == ("cancelled", "cancelled")
    assert one.end == pytest.approx(0.1, abs=0.012)  # when the step has ended


def test_a_deadline_ends_an_answer() -> None:
    (one,) = simulated(recording([Arrival(0.0, 20, 100, 100, deadline=0.2)])).records
    assert (one.outcome, one.finish) == ("failed", "deadline")
    # One that was its class's is what its class has now: none.
    of_class = Arrival(0.0, 20, 100, 100, deadline=0.2, has_class_deadline=True)
    assert simulated(recording([of_class])).records[0].outcome == "ok"


def limited() -> dict[str, Any]:
    quota = {**vars_of(Quota()), "requests_per_minute": 1.0}
    tenant = {**vars_of(Tenant("default")), "quota": quota}
    return {"tenants": {"default": tenant}, "classes": {"standard": {"name": "standard"}}}


def vars_of(of: object) -> dict[str, Any]:
    return {name: getattr(of, name) for name in of.__slots__}  # type: ignore[attr-defined]


def test_who_was_refused_comes_again_only_if_it_did() -> None:
    first = Arrival(0.0, 20, 1, 1, pages=((0, 1),))
    gives_up = Arrival(
        1.0, 21, 0, 1, pages=((1, 1),), ended="refused", status=429, retry_after=59.0
    )
    tries = replace(gives_up, at=2.0, pages=((2, 1),))
    again = replace(first, at=62.0, prompt_tokens=21, pages=((2, 1),))
    records = simulated(recording([first, gives_up, tries, again], tenancy=limited())).records
    assert [r.outcome for r in records] == ["ok", "refused", "ok"]
    assert [r.attempts for r in records] == [1, 1, 2]
    assert (records[1].status, records[1].output_tokens) == (429, 0)
    assert records[2].due == 2.0
    # It had waited for one second more than it was told.
    assert records[2].sent == 2.0 and (records[2].first or 0.0) > 2.0 + 1.0
    assert not any("bottleneck" in note for note in summary(Run({}, 9.0, records)).notes)


def test_whoever_is_let_in_does_not_come_again() -> None:
    tries = Arrival(2.0, 21, 0, 1, pages=((2, 1),), ended="refused", status=503, retry_after=3.0)
    again = Arrival(6.0, 21, 1, 1, pages=((2, 1),))
    (one,) = simulated(recording([tries, again])).records
    assert (one.outcome, one.attempts, one.sent) == ("ok", 1, 2.0)


def test_a_prompt_cuts_in_as_it_does_in_a_server() -> None:
    plain = {"tenants": {}, "classes": {name: vars_of(c) for name, c in CLASSES.items()}}
    plain["classes"]["interactive"] |= {"ttft": 0.15, "strict": False}
    for name, kind in (("now", "interactive"), ("later", "batch")):
        plain["tenants"][name] = {
            **vars_of(Tenant(name, class_name=kind)),
            "quota": vars_of(Quota()),
        }
    # 40 prompts of other tenants teach the step times; then a long step is held for a short prompt.
    long = [Arrival(float(i), 500, 20, 20, tenant="later") for i in range(40)]
    short = [Arrival(i + 0.05, 10, 2, 2, tenant="now") for i in range(40)]

    def wait(holds: bool) -> float:
        spec = {**synthetic.SPEC, "holds_steps": holds}
        run = simulated(
            recording([*long, *short], spec=spec, tenancy=plain), cost="fixed=10ms,token=1.5ms"
        )
        return sum(ttft(r) for r in run.records[41::2])

    assert wait(True) < 0.7 * wait(False)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    arrivals = synthetic.traffic(random.Random(3), 60, 10.0)
    cost = "fixed=5ms,token=0.2ms,noise=10%"
    runs = [simulated(recording(arrivals), cost=cost, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].records == runs[1].records
    assert runs[0].samples == runs[1].samples
    assert runs[0].records != runs[2].records


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "share_aware"])
def test_the_number_of_processes_changes_nothing(routing: str) -> None:
    recorded = recording(synthetic.traffic(random.Random(4), 80, 40.0))
    one, two = (
        simulated(
            recorded,
            cost="fixed=5ms,token=0.2ms,noise=10%",
            cluster=Cluster(3, routing, processes=processes),
        )
        for processes in (1, 2)
    )
    assert one.records == two.records


def test_more_replicas_make_waits_shorter() -> None:
    recorded = recording(synthetic.traffic(random.Random(5), 150, 60.0))
    waits = [
        sum(map(ttft, simulated(recorded, cost="fixed=20ms,token=0.5ms", cluster=cluster).records))
        for cluster in (Cluster(1), Cluster(4, "least_loaded"))
    ]
    assert waits[1] < 0.5 * waits[0]


# ── the same decisions as the real loop ──────────────────────────────────────

Plan = tuple[float, str, tuple[tuple[str, int, int, bool], ...]]


def told(now: float, batch: Batch) -> Plan:
    works = ((w.seq_id, len(w.token_ids), w.position, w.samples) for w in batch.work)
    return now, batch.phase.value, tuple(works)


class Timed(FakeEngine):
    """Tells its plans; its steps take what a constant cost says."""

    harness: Harness
    cost: Constants
    plans: list[Plan]

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.plans.append(told(self.harness.now, batch))
        self.harness.now += self.cost.predict(self.harness.scheduler.bill.planned.shape)
        return super().step(batch)


def test_its_plans_are_those_of_the_real_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "cache.num_pages=48",
        "scheduler.max_decode_sequences=6",
        "scheduler.max_mixed_tokens=64",
    )
    arrivals = [
        replace(arrival, max_tokens=arrival.output_tokens, ended="length", output_pages=())
        for arrival in synthetic.traffic(random.Random(6), 120, 25.0)
        if arrival.prompt_tokens < 500
    ]
    recorded = recording(arrivals)
    plans: list[Plan] = []

    step = VirtualEngine.step
    monkeypatch.setattr(
        VirtualEngine,
        "step",
        lambda self, batch: plans.append(told(self.clock.now, batch)) or step(self, batch),  # type: ignore[func-returns-value]
    )
    run = simulated(recorded, *given, cost="fixed=5ms,token=0.3ms,sequence=1ms")
    config = whatif.load(recorded, [from_set(said) for said in (*PLAIN, *given)]).config
    real = played(recorded, config, constants("fixed=5ms,token=0.3ms,sequence=1ms"))
    assert len(plans) > 200
    assert plans == real
    assert any(record.cached_tokens for record in run.records)
    assert any(record.server["preemptions"] for record in run.records), "pages were to be scarce"


def played(recorded: Recording, config: Config, cost: Constants) -> list[Plan]:
    """The plans of the real loop and the fake engine, under a clock that steps move on."""
    spec = spec_of(recorded.header, config.cache.num_pages, 16)
    engine = Timed(
        vocab_size=1 << 20, max_model_len=spec.max_model_len, page_size=16, num_pages=spec.num_pages
    )
    engine.plans, engine.cost = [], cost
    engine.harness = harness = Harness(engine, limits_of(config, spec))
    todo = recorded.clients()

    def arrive() -> None:
        while todo and todo[0].asked.at <= harness.now:
            client = todo.pop(0)
            promise = Tenancy().class_of("default")
            harness.commands.append(Submit(client.request(16, client.asked.at, promise)[0]))

    harness.arrive = arrive
    for _ in range(MAX_TURNS):
        if harness.scheduler.is_idle and todo:
            harness.now = max(harness.now, todo[0].asked.at)
        harness.loop.turn()
        if not todo and harness.scheduler.is_idle:
            return engine.plans
    raise AssertionError("never finished")


def test_the_books_balance_when_all_is_over() -> None:
    recorded = recording(synthetic.traffic(random.Random(7), 80, 30.0))
    config = whatif.load(recorded, [from_set("cache.num_pages=64")]).config
    setup = Setup(config, Tenancy(), spec_of(recorded.header, 64, 16), constants(COST), 16)
    replica = Replica(setup)
    for client in recorded.clients():
        replica.feed(client, client.asked.at)
    replica.run(until=2.0)
    assert replica.live
    replica.scheduler.check()
    replica.run()
    replica.scheduler.check()
    assert replica.scheduler.is_idle and replica.is_idle
    assert len(replica.done) == 80


def test_strangers_and_missing_facts_are_refused() -> None:
    with pytest.raises(ConfigError, match="tenant 'shop' of the trace is in no tenants file"):
        simulated(recording([Arrival(0.0, 20, 1, 1, tenant="shop")]))
    with pytest.raises(ConfigError, match=r"set cache\.num_pages"):
        simulated(recording([Arrival(0.0, 20, 1, 1)], spec={}))


def test_what_cannot_fit_fails_at_once() -> None:
    (one,) = simulated(recording([Arrival(0.0, 200, 10, 10)]), "cache.num_pages=4").records
    assert (one.outcome, one.status) == ("failed", 400)


def test_what_the_scheduler_is_built_from_is_taken_from_the_recording() -> None:
    recorded = recording([], settings={"cache.stale_s": 60.0, "engine.threads": 2})
    loaded = whatif.load(recorded, [])
    assert (loaded.config.cache.stale_s, loaded.config.engine.threads) == (60.0, 0)


def test_pinned_rungs_of_a_recording_need_no_settings_that_it_does_not_take() -> None:
    pins = {"scheduler.ladder_pin": ["spill", "lighter_weights"]}
    told = {**pins, "cache.disk_gib": 2.0, "model.lighter": "int8"}
    assert whatif.load(recording([], settings=told), []).config.scheduler.ladder_pin == ("spill",)
