"""Figures of small runs, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_serve.bench import memory_speed
from dynamo_serve.bench.account import prefix_savings
from dynamo_serve.bench.figures import figures, summaries
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.scenario import scenario_of
from dynamo_serve.bench.summary import summary
from dynamo_serve.bench.text import text
from dynamo_serve.errors import ConfigError

OPEN = {"loop": "open"}


def answered(number: int, due: float = 0.0, **rest: Any) -> Record:
    """Sent 0.1 s late, first token after 0.5 s more, then two gaps."""
    given: dict[str, Any] = {
        "prompt_tokens": 10,
        "output_tokens": 3,
        "first": due + 0.6,
        "gaps": (0.2, 0.4),
        "end": due + 1.3,
        **rest,
    }
    return Record(number, due, due + 0.1, **given)


def test_latencies_count_from_when_a_request_was_due_in_an_open_loop() -> None:
    found = summary(Run(OPEN, 10.0, [answered(0)]))
    assert found.total.ttft.mean == pytest.approx(0.6)
    assert found.total.e2e.mean == pytest.approx(1.3)
    assert found.late.mean == pytest.approx(0.1)


def test_latencies_count_from_when_a_request_was_sent_in_a_closed_loop() -> None:
    found = summary(Run({"loop": "closed"}, 10.0, [answered(0)]))
    assert found.total.ttft.mean == pytest.approx(0.5)
    assert found.total.e2e.mean == pytest.approx(1.2)
    assert found.late.count == 0 and found.offered is None


def test_tpot_is_a_mean_over_tokens_and_itl_a_gap_between_reads() -> None:
    found = summary(Run(OPEN, 10.0, [answered(0, output_tokens=4)])).total
    assert found.tpot.mean == pytest.approx(0.6 / 3)
    assert found.itl.count == 2 and found.itl.mean == pytest.approx(0.3)


@pytest.mark.parametrize("rest", [{"output_tokens": 1, "gaps": ()}, {"gaps": ()}])
def test_an_answer_in_one_read_has_no_tpot(rest: dict[str, Any]) -> None:
    assert summary(Run(OPEN, 10.0, [answered(0, **rest)])).total.tpot.count == 0


def test_rates_are_per_second_of_the_run() -> None:
    lost = answered(2, outcome="failed", output_tokens=2, gaps=(0.1,))
    refused = Record(3, 0.0, 0.0, "refused", 429, prompt_tokens=10, end=0.1)
    rates = summary(Run(OPEN, 4.0, [answered(0), answered(1), lost, refused])).total.rates
    assert rates is not None
    assert rates.requests == 0.5
    assert rates.input_tokens == 7.5  # what was refused was not computed
    assert rates.output_tokens == 2.0
    assert rates.good is None


def test_percentiles_are_left_out_where_samples_are_too_few() -> None:
    few = summary(Run(OPEN, 10.0, [answered(n) for n in range(50)])).total.ttft
    assert set(few.percentiles) == {"p50", "p90"}
    many = summary(Run(OPEN, 10.0, [answered(n, n / 100) for n in range(368)])).total.ttft
    assert set(many.percentiles) == {"p50", "p90", "p95", "p99"}
    assert few.most == pytest.approx(0.6)
    words = text(summary(Run(OPEN, 10.0, [answered(n) for n in range(50)])))
    assert "too few samples to know; needed: p95 72, p99 368, p99.9 3,688" in words


def test_a_good_request_kept_every_target_and_the_others_missed_theirs() -> None:
    targets = {"ttft": 0.6, "itl": 0.4}
    records = [
        answered(0, targets=targets),
        answered(1, targets=targets, first=0.7),
        answered(2, targets=targets, gaps=(0.2, 0.5)),
        Record(3, 0.0, 0.0, "refused", 429, end=0.1, targets=targets),
    ]
    found = summary(Run(OPEN, 2.0, records)).total
    assert found.rates is not None and found.rates.good == 0.5
    assert found.attainment["ttft"].value == 0.5
    assert found.attainment["itl"].value == 0.5
    assert found.attainment["itl"].count == 4


def test_of_a_cancelled_request_only_what_was_certain_counts() -> None:
    targets = {"ttft": 1.0, "e2e": 5.0}
    waited = Record(0, 0.0, 0.0, "cancelled", end=2.0, targets=targets)  # missed TTFT, E2E open
    left = Record(1, 0.0, 0.0, "cancelled", end=0.5, targets=targets)  # both open
    found = summary(Run(OPEN, 2.0, [waited, left])).total
    assert (found.attainment["ttft"].value, found.attainment["ttft"].count) == (0.0, 1)
    assert "e2e" not in found.attainment
    assert found.counts.unserved == 2


def test_warm_up_and_probes_are_apart() -> None:
    records = [
        answered(0, is_warm_up=True),
        answered(1, kind="probe", first=0.2, gaps=()),
        answered(2),
    ]
    found = summary(Run(OPEN, 10.0, records))
    assert (found.warm_up, found.total.counts.all) == (1, 1)
    assert found.probes is not None and found.probes.ttft.mean == pytest.approx(0.2)
    assert [group.name for group in found.kinds] == [""]


def test_shares_of_tenants_are_their_device_seconds_by_weight() -> None:
    records = [answered(0, tenant="a"), answered(1, tenant="b")]
    name = 'dserve_tenant_device_seconds_total{tenant="%s"}'
    samples = [Sample(0.0, {name % "a": 10.0, name % "b": 5.0})]
    samples.append(Sample(9.0, {name % "a": 14.0, name % "b": 7.0}))
    found = summary(Run({**OPEN, "weights": {"a": 2}}, 10.0, records, samples)).fairness
    assert found.basis == "device seconds"
    assert [(t.name, t.weight, t.device_seconds) for t in found.tenants] == [
        ("a", 2.0, 4.0),
        ("b", 1.0, 2.0),
    ]
    assert [t.share for t in found.tenants] == pytest.approx([2 / 3, 1 / 3])
    assert found.jain == pytest.approx(1.0)


def test_without_samples_tenants_are_compared_by_tokens_not_cached() -> None:
    records = [answered(0, tenant="a", cached_tokens=9), answered(1, tenant="b")]
    found = summary(Run(OPEN, 10.0, records)).fairness
    assert found.basis == "tokens"
    assert [t.share for t in found.tenants] == pytest.approx([4 / 17, 13 / 17])
    assert found.jain == pytest.approx(17**2 / (2 * (16 + 169)))


def test_one_tenant_alone_is_neither_fair_nor_unfair() -> None:
    assert summary(Run(OPEN, 10.0, [answered(0, tenant="a")])).fairness.jain is None


def test_ttft_is_reconciled_request_by_request_where_the_server_tells_it() -> None:
    found = summary(Run(OPEN, 10.0, [answered(0, server={"ttft": 0.4})])).reconciled
    assert found is not None and found.source == "requests"
    assert found.mean_gap == pytest.approx(0.2)


def test_else_ttft_is_reconciled_with_the_servers_histogram() -> None:
    def sample(at: float, *counts: float) -> Sample:
        bucket = 'dserve_ttft_seconds_bucket{le="%s"}'
        bounds = zip(("0.2", "0.4", "+Inf"), counts, strict=True)
        values = {bucket % bound: count for bound, count in bounds}
        values |= {"dserve_ttft_seconds_sum": 0.3 * counts[-1]}
        return Sample(at, {**values, "dserve_ttft_seconds_count": counts[-1]})

    samples = [sample(0.0, 1, 2, 2), Sample(1.0, {}), sample(2.0, 2, 6, 6)]
    found = summary(Run(OPEN, 10.0, [answered(0)], samples)).reconciled
    assert found is not None and (found.source, found.count) == ("histogram", 4)
    assert found.server_mean == pytest.approx(0.3)
    assert found.server_p50 == pytest.approx(0.2 + 0.2 / 3)  # the second of 1 + 3
    assert found.mean_gap == pytest.approx(0.3)


def test_counters_that_began_anew_and_warm_up_are_not_counted_twice() -> None:
    name = "dserve_preemptions_total"
    samples = [Sample(float(at), {name: value}) for at, value in enumerate([5.0, 9.0, 10.0, 3.0])]
    records = [answered(0, is_warm_up=True), answered(1, due=1.5)]
    found = summary(Run(OPEN, 10.0, records, samples))
    assert found.server["preemptions"] == 1.0 + 3.0


def test_the_bound_is_given_only_where_the_run_says_bytes_and_bandwidth() -> None:
    about = {**OPEN, "bytes_per_step": 1e9, "bandwidth": 1e11}  # 10 ms a step at best
    records = [answered(n, gaps=(0.02, 0.02)) for n in range(6)]
    found = summary(Run(about, 10.0, records))
    assert found.bound is not None and found.bound.fraction == pytest.approx(0.5)
    assert found.bound.source == "ITL p50, by the client"
    assert summary(Run(OPEN, 10.0, records)).bound is None
    assert "unknown: nobody said how fast the memory is" in text(summary(Run(OPEN, 10.0, records)))


def test_what_a_step_reads_follows_from_weights_and_contexts() -> None:
    facts = {"engine": {"weights_read_bytes": 1_000_000, "kv_bytes_per_token": 100}}
    about = {**OPEN, "bandwidth": 1e9, "settings": facts}
    fed, steps = "dserve_batch_tokens", "dserve_step_seconds"
    at_first = {f'{name}_{end}{{phase="decode"}}': 0.0
                for name in (fed, steps) for end in ("sum", "count")}  # fmt: skip
    later = dict(zip(at_first, (50.0, 10.0, 0.04, 10.0), strict=True))  # 5 tokens, 4 ms each step
    later["dserve_draft_tokens_total"] = 10.0  # one of the five
    samples = [Sample(0.0, {**at_first, "dserve_draft_tokens_total": 0.0}), Sample(9.0, later)]
    records = [answered(n, prompt_tokens=200, output_tokens=100) for n in range(6)]
    found = summary(Run(about, 10.0, records, samples)).bound
    assert found is not None and found.bytes_per_step == 1_000_000 + 4 * 250 * 100
    assert found.fraction == pytest.approx(0.0011 / 0.004)
    two = [answered(0, prompt_tokens=200, output_tokens=100, choices=2)]  # fifty of each
    found = summary(Run(about, 10.0, two, samples)).bound
    assert found is not None and found.bytes_per_step == 1_000_000 + 4 * 225 * 100
    for told, lacks in (
        ({**about, "settings": {}}, "does not say how many bytes"),
        (about, "tell of no decode step"),
    ):
        assert lacks in summary(Run(told, 10.0, records)).unbound


def test_what_reads_memory_is_asked_only_where_the_server_is() -> None:
    assert memory_speed.measured(size=1 << 22, repeats=2) > 1e6
    wanted = scenario_of({"rate": 1, "requests": 1, "measure_bandwidth": True})
    with pytest.raises(ConfigError, match="is another one"):
        memory_speed.of_server("http://192.0.2.1:8000", wanted, {})
    with pytest.raises(ConfigError, match="runs on cuda:0"):
        on_gpu = {"engine": {"device": "cuda:0 (a GPU)"}}
        memory_speed.of_server("http://127.0.0.1:1", wanted, on_gpu)
    given = scenario_of({"rate": 1, "requests": 1, "bandwidth": 200})
    assert memory_speed.of_server("http://192.0.2.1:8000", given, {}) == 200e9
    with pytest.raises(ConfigError, match="leave out one of them"):
        scenario_of({"rate": 1, "requests": 1, "bandwidth": 200, "measure_bandwidth": True})


def test_prefix_savings_are_what_the_server_counted() -> None:
    asked, hit = "dserve_prefix_asked_tokens_total", "dserve_prefix_hit_tokens_total"
    samples = [Sample(0.0, {asked: 100.0, hit: 50.0}), Sample(1.0, {asked: 300.0, hit: 100.0})]
    records = [answered(0, cached_tokens=5)]
    found = summary(Run(OPEN, 10.0, records, samples))
    assert found.prefix_savings == 0.25
    assert found.total.cached_share == 0.5


def test_more_found_than_asked_for_is_no_share() -> None:
    told = {"dserve_prefix_asked_tokens_total": 1e-92, "dserve_prefix_hit_tokens_total": 1e215}
    assert prefix_savings([Sample(0.0, {}), Sample(1.0, told)]) is None


def test_a_client_that_falls_behind_is_called_the_bottleneck() -> None:
    late = [Record(n, 0.0, 0.02, first=0.1, end=0.2) for n in range(3)]
    assert any("bottleneck" in note for note in summary(Run(OPEN, 1.0, late)).notes)
    on_time = [Record(n, 0.0, 0.001, first=0.1, end=0.2) for n in range(3)]
    assert not any("bottleneck" in note for note in summary(Run(OPEN, 1.0, on_time)).notes)


def test_a_run_that_was_interrupted_says_so_and_so_does_its_client() -> None:
    about = {**OPEN, "interrupted": True, "client": {"warning": "it was too slow"}}
    notes = " ".join(summary(Run(about, 1.0, [answered(0)])).notes)
    assert "interrupted" in notes and "it was too slow" in notes


def test_repeats_give_the_mean_of_each_figure_that_all_know() -> None:
    runs = [Run(OPEN, 10.0, [answered(n) for n in range(count)]) for count in (6, 10, 40)]
    found = summaries(runs)
    assert found.figures["requests_per_s"].value == pytest.approx((0.6 + 1.0 + 4.0) / 3)
    assert found.figures["ttft_p50_ms"].value == pytest.approx(600.0)
    assert "ttft_p90_ms" in found.missing  # only the last has samples enough
    assert figures(found.summaries[0]).keys() <= {*found.figures, *found.missing}


def test_who_says_that_it_kept_up_is_not_called_the_bottleneck() -> None:
    late = [Record(n, 0.0, 1.0, first=1.1, end=1.2) for n in range(9)]  # no place was free before
    told = {**OPEN, "client": {"warning": ""}}
    assert not any("bottleneck" in note for note in summary(Run(told, 1.0, late)).notes)


def test_what_is_offered_does_not_depend_on_how_long_the_server_takes() -> None:
    records = [Record(n, n / 10, n / 10, first=30.0, end=40.0) for n in range(101)]
    assert summary(Run(OPEN, 40.0, records)).offered == pytest.approx(10)


def test_what_was_cached_is_told_by_answers_that_came_to_their_end() -> None:
    whole = Record(0, 0.0, 0.0, first=0.1, end=1.0, prompt_tokens=100, cached_tokens=50)
    left = Record(1, 0.0, 0.0, first=0.1, end=0.2, prompt_tokens=100, outcome="cancelled")
    assert summary(Run(OPEN, 1.0, [whole, left])).total.cached_share == 0.5


def test_who_was_cut_off_after_missing_a_target_was_not_served_well() -> None:
    targets = {"ttft": 0.5}
    good = Record(0, 0.0, 0.0, first=0.1, end=1.0, targets=targets)
    hung = Record(1, 0.0, 0.0, end=60.0, outcome="cancelled", targets=targets)
    left = Record(2, 0.0, 0.0, end=0.2, outcome="cancelled", targets=targets)
    assert summary(Run(OPEN, 60.0, [good, hung, left])).total.good_share == 0.5
