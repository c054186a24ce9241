"""The exposition: what is declared is there, counters never fall, buckets resolve a millisecond."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_serve.core.request import Finish, Refusal, Request, Summary, TokenEvent
from dynamo_serve.core.stats import Stats, StepStats
from dynamo_serve.endpoint_counts import Counts
from dynamo_serve.metrics import Metrics
from dynamo_serve.metrics_declared import ALIASES, COUNTED, DECLARED, FORWARDED, SCRAPED
from dynamo_serve.metrics_histogram import SECONDS
from dynamo_serve.metrics_scraped import read
from dynamo_serve.observer import Vitals
from dynamo_serve.scrape import Scrape, Scraper

REQUEST = Request(id="r", prompt_ids=(1, 2), max_tokens=9, arrival=100.0)
REFUSAL = Refusal("queue_length", "too many", is_own=True, retry_after=2.0)


def metrics() -> Metrics:
    return Metrics(model="tiny", version="1.2.3")


def scrape(source: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(source.render()[0].decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(source: Metrics, name: str, labels: Mapping[str, str] | None = None) -> float:
    return scrape(source)[name, frozenset((labels or {}).items())]


def report(counter: str, count: int) -> Stats:
    counts: dict[str, Any] = {counter: count}
    return Stats(**counts)


def test_every_declared_metric_is_exposed_before_any_traffic() -> None:
    scraper = Scraper({"a:1": "a:2"}, 1.0)
    counted = 'nv_inference_count{model="m"} 1\nnv_inference_exec_count{model="m"} 1'
    scraper.last["a:1"] = Scrape(read(counted), 0.1)
    source = Metrics(model="tiny", version="1", endpoints=["a:1"], scraper=scraper)
    # What has a tenant's label appears with the first tenant.
    source.on_costs({"tenants": {"acme": {"promises": {"chat": {}}}}})
    source.on_event(REQUEST, TokenEvent("r", refusal=REFUSAL), 101.0, None)
    names = {name for name, _ in scrape(source)}
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    every = [*DECLARED.values(), *ALIASES.values(), *FORWARDED.values(), *SCRAPED.values()]
    for declared in every:
        assert declared.name + suffix[declared.kind] in names
    expected = {declared.name for declared in every}
    expected |= {"nv_inference", "nv_inference_exec"}  # less the suffix
    stems = {name.removesuffix("_bucket").removesuffix("_count") for name in names}
    stems = {name.removesuffix("_sum").removesuffix("_total") for name in stems}
    assert stems == expected, "something is exposed that is not declared"


def test_names_carry_their_unit_and_prefix() -> None:
    for declared in (*DECLARED.values(), *FORWARDED.values(), *SCRAPED.values()):
        assert declared.name.startswith("dserve_")
        if declared.kind == "histogram":
            assert declared.name.endswith(("_seconds", "_tokens", "_ratio"))


def test_first_tokens_are_ttft_and_later_ones_are_gaps() -> None:
    source = metrics()
    source.on_event(REQUEST, TokenEvent("r", (5,)), 100.25, None)
    source.on_event(REQUEST, TokenEvent("r", (6, 7)), 100.254, 100.25)
    assert value(source, "dserve_ttft_seconds_sum") == pytest.approx(0.25)
    assert value(source, "dserve_ttft_seconds_count") == 1
    assert value(source, "dserve_itl_seconds_sum") == pytest.approx(0.004)
    assert value(source, "dserve_itl_seconds_bucket", {"le": "0.003"}) == 0
    assert value(source, "dserve_itl_seconds_bucket", {"le": "0.005"}) == 1


def test_a_vector_is_a_first_token() -> None:
    source = metrics()
    source.on_event(REQUEST, TokenEvent("r", (), artifact=b"1234"), 100.25, None)
    assert value(source, "dserve_ttft_seconds_count") == 1


def test_a_value_on_a_bound_falls_in_that_bucket() -> None:
    source = metrics()
    source.on_event(REQUEST, TokenEvent("r", (5,)), 101.0, None)
    assert value(source, "dserve_ttft_seconds_bucket", {"le": "0.75"}) == 0
    assert value(source, "dserve_ttft_seconds_bucket", {"le": "1.0"}) == 1


@pytest.mark.parametrize("finish", list(Finish))
def test_every_finish_is_counted_and_only_whole_answers_have_a_latency(finish: Finish) -> None:
    source = metrics()
    summary = Summary(0.5, 0.1, 0.2, 0, 0)
    source.on_event(REQUEST, TokenEvent("r", finish=finish, summary=summary), 102.0, None)
    assert value(source, "dserve_finishes_total", {"finish": finish.value}) == 1
    ran_to_its_end = finish in (Finish.STOP, Finish.LENGTH)
    assert value(source, "dserve_e2e_seconds_count") == ran_to_its_end
    assert value(source, "dserve_queue_seconds_sum") == 0.5
    assert value(source, "dserve_ttft_seconds_count") == 0


def test_steps_are_kept_apart_by_phase() -> None:
    source = metrics()
    source.on_stats(Stats(step=StepStats("prefill", 0.03, 128, 2)))
    source.on_stats(Stats(step=StepStats("decode", 0.002, 32, 32)))
    assert value(source, "dserve_step_seconds_sum", {"phase": "prefill"}) == pytest.approx(0.03)
    assert value(source, "dserve_step_seconds_sum", {"phase": "decode"}) == pytest.approx(0.002)
    assert value(source, "dserve_batch_tokens_sum", {"phase": "prefill"}) == 128
    assert value(source, "dserve_batch_tokens_sum", {"phase": "decode"}) == 32


def test_a_report_without_a_step_adds_none() -> None:
    source = metrics()
    source.on_stats(Stats(num_waiting=3))
    assert value(source, "dserve_step_seconds_count", {"phase": "decode"}) == 0
    assert value(source, "dserve_sequences_waiting") == 3


def test_pages_and_usage_follow_the_pool() -> None:
    source = metrics()
    source.on_stats(Stats(pages_used=3, pages_cached=2, pages_free=5))
    pages = {state: value(source, "dserve_pages", {"state": state}) for state in ("used", "free")}
    assert pages == {"used": 3, "free": 5}
    assert value(source, "dserve_pages", {"state": "cached"}) == 2
    assert value(source, "vllm:kv_cache_usage_perc", {"model_name": "tiny"}) == 0.3


def test_usage_of_a_pool_not_yet_known_is_zero() -> None:
    assert value(metrics(), "vllm:kv_cache_usage_perc", {"model_name": "tiny"}) == 0


def test_aliases_show_the_same_numbers() -> None:
    source = metrics()
    source.on_stats(Stats(*range(1, 13)))
    for key, alias in ALIASES.items():
        if key == "usage":
            continue
        suffix = "_total" if alias.kind == "counter" else ""
        ours = value(source, DECLARED[key].name + suffix)
        assert value(source, alias.name + suffix, {"model_name": "tiny"}) == ours > 0


def test_counters_go_on_when_the_service_reports_the_loss_of_its_engine() -> None:
    source = metrics()
    source.on_stats(Stats(output_tokens_total=10))
    source.on_stats(Stats())  # what Service reports then
    assert value(source, "dserve_output_tokens_total") == 10
    # More than before the loss: without the zeros it could pass for the same engine's.
    source.on_stats(Stats(output_tokens_total=12))
    assert value(source, "dserve_output_tokens_total") == 22


def test_restarts_are_read_when_scraped() -> None:
    restarts = 0
    source = Metrics(model="tiny", version="1.2.3", vitals=lambda: Vitals(restarts))
    assert value(source, "dserve_engine_restarts_total") == 0
    restarts = 3
    assert value(source, "dserve_engine_restarts_total") == 3


@pytest.mark.parametrize("name", COUNTED)
def test_a_counter_that_falls_shows_a_restart_and_never_goes_backwards(name: str) -> None:
    cause = re.fullmatch(r"evicted_(own|others|stale)_total", name)
    counter = DECLARED["evicted" if cause else name].name + "_total"
    labels = {"cause": cause[1]} if cause else {}
    source = metrics()
    source.on_stats(report(name, 7))
    source.on_stats(report(name, 2))
    source.on_stats(report(name, 3))
    assert value(source, counter, labels) == 10
    source.on_stats(report(name, 1))
    assert value(source, counter, labels) == 11


def test_instances_share_nothing() -> None:
    one, other = metrics(), metrics()
    one.on_event(REQUEST, TokenEvent("r", (5,)), 101.0, None)
    one.on_stats(Stats(output_tokens_total=1))
    assert value(one, "dserve_ttft_seconds_count") == 1
    assert scrape(other) == scrape(metrics())


def test_buckets_start_at_a_millisecond_and_reach_minutes() -> None:
    assert SECONDS[0] == 0.001
    assert SECONDS[-1] >= 300
    assert list(SECONDS) == sorted(set(SECONDS))


def test_build_info_names_version_and_model() -> None:
    labels = {"version": "1.2.3", "model": "tiny"}
    assert value(metrics(), "dserve_build_info", labels) == 1


def test_content_type_is_prometheus_text() -> None:
    assert metrics().render()[1].startswith("text/plain; version=")


def refuse(source: Metrics, *tenants: str) -> None:
    for tenant in tenants:
        request = replace(REQUEST, tenant=tenant)
        source.on_event(request, TokenEvent("r", refusal=REFUSAL), 101.0, None)


def test_refusals_are_counted_by_tenant_and_reason() -> None:
    source = metrics()
    refuse(source, "acme", "acme", "beta")
    labels = {"tenant": "acme", "reason": "queue_length"}
    assert value(source, "dserve_tenant_refusals_total", labels) == 2
    assert value(source, "dserve_refusals_total", {"reason": "queue_length"}) == 3
    assert value(source, "dserve_ttft_seconds_count") == 0


def test_a_prediction_is_judged_by_the_real_duration() -> None:
    source = metrics()
    source.on_stats(Stats(step=StepStats("decode", 0.1, 4, 4, 0.12)))
    source.on_stats(Stats(step=StepStats("decode", 0.1, 4, 4, 0.05)))
    source.on_stats(Stats(step=StepStats("decode", 0.1, 4, 4)))
    assert value(source, "dserve_step_prediction_error_ratio_sum") == pytest.approx(0.7)
    assert value(source, "dserve_step_prediction_error_ratio_count") == 2


def costs(**tenants: dict[str, Any]) -> dict[str, Any]:
    return {"whole": {}, "tenants": tenants}


def test_costs_of_a_tenant_go_on_with_another_engine() -> None:
    source = metrics()
    labels = {"tenant": "acme"}
    name = "dserve_tenant_device_seconds_total"
    source.on_costs(costs(acme={"device_seconds": 5.0, "live": 2, "saved_tokens": 7}))
    source.on_costs(costs(acme={"device_seconds": 1.0}))  # falls: another engine
    assert value(source, name, labels) == 6.0
    assert value(source, "dserve_tenant_saved_tokens_total", labels) == 7
    assert value(source, "dserve_tenant_sequences", {**labels, "state": "live"}) == 0
    source.on_stats(Stats(output_tokens_total=3))
    source.on_stats(Stats())  # the service lost its engine
    source.on_costs(costs(acme={"device_seconds": 4.0}))  # more than before, but of a third one
    assert value(source, name, labels) == 10.0


def test_promises_are_counted_by_outcome_and_go_on_with_another_engine() -> None:
    source = metrics()
    labels = {"tenant": "acme", "class": "chat", "promise": "ttft", "outcome": "kept"}
    for kept in (5, 7, 2):  # the third is of another engine
        source.on_costs(costs(acme={"promises": {"chat": {"ttft_kept": kept, "itl_late": 1}}}))
    name = "dserve_tenant_promises_total"
    assert value(source, name, labels) == 9
    assert value(source, name, {**labels, "promise": "itl", "outcome": "late"}) == 2
    assert value(source, name, {**labels, "outcome": "never"}) == 0


def test_a_tenant_that_is_gone_keeps_its_costs_and_is_idle() -> None:
    source = metrics()
    source.on_costs(costs(acme={"page_seconds": 5.0, "waiting": 2}))
    source.on_costs(costs(beta={}))
    assert value(source, "dserve_tenant_page_seconds_total", {"tenant": "acme"}) == 5.0
    labels = {"tenant": "acme", "state": "waiting"}
    assert value(source, "dserve_tenant_sequences", labels) == 0


def test_a_page_without_tenants_has_all_else_and_names_none() -> None:
    source = metrics()
    source.on_costs(costs(acme={"device_seconds": 5.0, "live": 2}, beta={}))
    source.on_stats(Stats(output_tokens_total=10, num_running=2))
    refuse(source, "acme", "beta")
    page = source.render(tenants=False)[0].decode()
    assert "acme" not in page and "beta" not in page and "tenant=" not in page
    open_names, all_names = (
        {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        for text in (page, source.render()[0].decode())
    )
    assert {name for name in all_names if not name.startswith("dserve_tenant_")} == open_names
    assert 'dserve_refusals_total{reason="queue_length"} 2.0' in page.splitlines()
    families = {family.name for family in text_string_to_metric_families(page)}
    assert "dserve_refusals" in families and "dserve_tenant_device_seconds" not in families


def test_changes_of_the_ladder_go_on_where_another_engine_begins() -> None:
    source, name = metrics(), "dserve_ladder_changes_total"
    up = {"rung": "cap_batch", "direction": "up"}
    down = {"rung": "cap_batch", "direction": "down"}
    for count in (1, 2):
        changes = ((0, 0), (0, 0), (count, 1), *[(0, 0)] * 4)
        source.on_stats(Stats(rungs=(0, 0, count - 1, 0, 0, 0, 0), rung_changes=changes))
    assert value(source, "dserve_ladder_rung", {"rung": "cap_batch"}) == 1
    source.on_stats(Stats())
    assert value(source, "dserve_ladder_rung", {"rung": "cap_batch"}) == 0
    going_on, anew = ((3, 1), (3, 1)), ((2, 0), (5, 1))  # what an engine counts, and the total
    for told, total in (going_on, anew):
        changes = ((0, 0), (0, 0), told, *[(0, 0)] * 4)
        source.on_stats(Stats(rungs=(0, 0, 2, 0, 0, 0, 0), rung_changes=changes))
        assert (value(source, name, up), value(source, name, down)) == total


def told(began: str, done: int, ejections: int = 0) -> dict[str, Any]:
    counts = Counts()
    counts.outcomes["done"], counts.ejections = done, ejections
    counts.ttft.observe(0.25)
    return {
        "began": began,
        "endpoints": {"a:1": {**counts.told(), "in_flight": 3, "is_open": True}},
    }


def test_what_servers_have_done_goes_on_with_another_engine() -> None:
    answers = [told("one", 5, 1), told("one", 7, 1), told("two", 9), told("two", 2)]

    async def ask(what: str, seconds: float) -> Any:
        return answers.pop(0) if what == "endpoints" else {}

    async def refresh() -> list[float]:
        shown = []
        while answers:
            await source.refresh(ask)
            labels = {"endpoint": "a:1", "outcome": "done"}
            shown.append(value(source, "dserve_triton_requests_total", labels))
        return shown

    source = Metrics(model="tiny", version="1", endpoints=["a:1"])
    assert asyncio.run(refresh()) == [5, 7, 16, 9]
    assert value(source, "dserve_triton_ejections_total", {"endpoint": "a:1"}) == 1
    assert value(source, "dserve_triton_ttft_seconds_count", {"endpoint": "a:1"}) == 2
    assert value(source, "dserve_triton_in_flight", {"endpoint": "a:1"}) == 3
