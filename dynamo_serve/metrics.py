"""Every Prometheus metric, declared once and fed from the core's Stats and TokenEvents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from dynamo_serve.core.batch import Phase
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.metrics_histogram import Histogram
from dynamo_serve.metrics_ladder import LadderCounts
from dynamo_serve.metrics_tenants import LEFT_OUT, Nameless, TenantCosts

# A small model on a fast device decodes in 2 to 5 ms and an overloaded one queues for minutes:
# one scale has to resolve both.
SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5),
    *(10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKENS = tuple(float(2**power) for power in range(15))
RATIOS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Declared(NamedTuple):
    """One metric: `kind` is counter, gauge or histogram."""

    kind: str
    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def wire_name(self) -> str:
        return self.name + "_total" if self.kind == "counter" else self.name


# The key is the attribute of Stats it reads, or the name this module knows it by.
DECLARED = {
    "ttft": Declared("histogram", "dserve_ttft_seconds", "Arrival to first token."),
    "itl": Declared("histogram", "dserve_itl_seconds", "Gap between events that carry tokens."),
    "e2e": Declared(
        "histogram", "dserve_e2e_seconds", "Arrival to finish, of requests that ran to their end."
    ),
    "queue": Declared("histogram", "dserve_queue_seconds", "Arrival to first admission."),
    "step": Declared("histogram", "dserve_step_seconds", "Duration of an engine step.", ("phase",)),
    "batch": Declared("histogram", "dserve_batch_tokens", "Tokens run in one step.", ("phase",)),
    "num_running": Declared("gauge", "dserve_sequences_live", "Admitted, unfinished sequences."),
    "num_waiting": Declared("gauge", "dserve_sequences_waiting", "Sequences not yet admitted."),
    "pages": Declared(
        "gauge",
        "dserve_pages",
        "KV pages: used by live sequences, cached for reuse, or free.",
        ("state",),
    ),
    "prefix_asked_tokens_total": Declared(
        "counter", "dserve_prefix_asked_tokens", "Prompt tokens looked up in the prefix cache."
    ),
    "prefix_hit_tokens_total": Declared(
        "counter", "dserve_prefix_hit_tokens", "Prompt tokens found in the prefix cache."
    ),
    "preemptions_total": Declared(
        "counter", "dserve_preemptions", "Sequences that lost their pages and were recomputed."
    ),
    "prompt_tokens_total": Declared(
        "counter", "dserve_prompt_tokens", "Prompt tokens of admitted requests."
    ),
    "output_tokens_total": Declared("counter", "dserve_output_tokens", "Tokens generated."),
    "draft_tokens_total": Declared(
        "counter", "dserve_draft_tokens", "Guessed tokens verified beside the next one."
    ),
    "draft_accepted_tokens_total": Declared(
        "counter", "dserve_draft_accepted_tokens", "Guessed tokens that were right."
    ),
    "finishes": Declared("counter", "dserve_finishes", "Requests by how they ended.", ("finish",)),
    "refusals": Declared(
        "counter",
        "dserve_refusals",
        "Requests refused on arrival instead of queued.",
        ("reason",),
    ),
    "prediction": Declared(
        "histogram",
        "dserve_step_prediction_error_ratio",
        "How far a step's predicted duration was off, as a share of the real one.",
    ),
    "tenant_device_seconds": Declared(
        "counter", "dserve_tenant_device_seconds", "A tenant's share of the steps.", ("tenant",)
    ),
    "tenant_page_seconds": Declared(
        "counter", "dserve_tenant_page_seconds", "KV pages times how long held.", ("tenant",)
    ),
    "tenant_saved_tokens": Declared(
        "counter", "dserve_tenant_saved_tokens", "Prompt tokens found in the cache.", ("tenant",)
    ),
    "tenant_output_tokens": Declared(
        "counter", "dserve_tenant_output_tokens", "Tokens generated.", ("tenant",)
    ),
    "tenant_sequences": Declared(
        "gauge",
        "dserve_tenant_sequences",
        "Sequences: live (admitted) or waiting.",
        ("tenant", "state"),
    ),
    "tenant_refusals": Declared(
        "counter",
        "dserve_tenant_refusals",
        "Of each tenant: requests refused on arrival.",
        ("tenant", "reason"),
    ),
    "rung": Declared(
        "gauge", "dserve_ladder_rung", "Level of a rung of the ladder; 0: not taken.", ("rung",)
    ),
    "rung_changes": Declared(
        "counter",
        "dserve_ladder_changes",
        "Rungs taken (up) and undone (down), level by level.",
        ("rung", "direction"),
    ),
    "restarts": Declared("counter", "dserve_engine_restarts", "Starts of another engine."),
    "build": Declared("gauge", "dserve_build_info", "Always 1.", ("version", "model")),
}


def _alias(key: str, name: str) -> Declared:
    original = DECLARED[key]
    return Declared(original.kind, name, f"Same as {original.name}.", ("model_name",))


# What gateways and dashboards made for vLLM scrape: the same numbers under the names they know.
ALIASES = {
    "num_running": _alias("num_running", "vllm:num_requests_running"),
    "num_waiting": _alias("num_waiting", "vllm:num_requests_waiting"),
    "usage": Declared(
        "gauge",
        "vllm:kv_cache_usage_perc",
        "Share of the KV pages held by live sequences; 1 is full.",
        ("model_name",),
    ),
    "prefix_asked_tokens_total": _alias("prefix_asked_tokens_total", "vllm:prefix_cache_queries"),
    "prefix_hit_tokens_total": _alias("prefix_hit_tokens_total", "vllm:prefix_cache_hits"),
    "prompt_tokens_total": _alias("prompt_tokens_total", "vllm:prompt_tokens"),
    "output_tokens_total": _alias("output_tokens_total", "vllm:generation_tokens"),
}
COUNTED = tuple(field for field in Stats._fields if field.endswith("_total"))
_KINDS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


_NAMED = {declared.name for declared in DECLARED.values() if "tenant" in declared.labels}

Samples = Mapping[tuple[str, ...], Any]  # label values → Histogram or number


class Metrics:
    """Implements `observer.Observer`; each instance has its own registry and shares nothing.

    All calls come from one event loop, so nothing is locked.
    """

    def __init__(
        self, *, model: str, version: str, num_restarts: Callable[[], int] = lambda: 0
    ) -> None:
        self._model, self._version = model, version
        self._stats = Stats()
        self._before_restart = dict.fromkeys(COUNTED, 0)
        self._num_restarts = num_restarts
        self._histograms: dict[str, Samples] = {
            **{key: {(): Histogram(SECONDS)} for key in ("ttft", "itl", "e2e", "queue")},
            "prediction": {(): Histogram(RATIOS)},
            "step": {(phase.value,): Histogram(SECONDS) for phase in Phase},
            "batch": {(phase.value,): Histogram(TOKENS) for phase in Phase},
        }
        self._ttft = self._histograms["ttft"][()]  # bound here: looked up for every token
        self._itl = self._histograms["itl"][()]
        self._finishes = dict.fromkeys(Finish, 0)
        self._refusals: Counter[tuple[str, ...]] = Counter()
        self._costs = TenantCosts()
        self._ladder = LadderCounts()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        """Count one event of a request; `previous` is when its last tokens came, if any did."""
        if event.token_ids:
            if previous is None:
                self._ttft.observe(now - request.arrival)
            else:
                self._itl.observe(now - previous)
        if event.finish is not None:
            self._on_finish(request, event, now)
        if event.refusal is not None:
            self._refusals[request.tenant, event.refusal.reason] += 1

    def _on_finish(self, request: Request, event: TokenEvent, now: float) -> None:
        assert event.finish is not None
        self._finishes[event.finish] += 1
        if event.finish in (Finish.STOP, Finish.LENGTH):
            self._histograms["e2e"][()].observe(now - request.arrival)
        if event.summary is not None:
            self._histograms["queue"][()].observe(event.summary.queue_seconds)

    def on_stats(self, stats: Stats) -> None:
        """Take the engine's newest report.

        An engine counts from its own start; the service reports zeros when it loses one. Where a
        counter falls, another engine is counting: what the last one counted is kept.
        """
        if any(getattr(stats, name) < getattr(self._stats, name) for name in COUNTED):
            for name in COUNTED:
                self._before_restart[name] += getattr(self._stats, name)
            self._costs.restart()
        self._stats = stats
        self._ladder.take(stats)
        step = stats.step
        if step is not None:
            self._histograms["step"][(step.phase,)].observe(step.seconds)
            self._histograms["batch"][(step.phase,)].observe(step.num_tokens)
            if step.predicted_seconds is not None and step.seconds > 0:
                error = abs(step.predicted_seconds - step.seconds) / step.seconds
                self._histograms["prediction"][()].observe(error)

    def on_costs(self, costs: Mapping[str, Any]) -> None:
        """Take the scheduler's answer about costs (`core.views`)."""
        self._costs.take(costs)

    def render(self, *, tenants: bool = True) -> tuple[bytes, str]:
        """The exposition for a scrape, and its content type; without `tenants` it names none."""
        if tenants:
            return generate_latest(self._registry), CONTENT_TYPE_LATEST
        return generate_latest(Nameless(self, _NAMED)) + LEFT_OUT, CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """Called by the registry on every scrape."""
        numbers = self._numbers()
        for key, declared in DECLARED.items():
            samples: Samples = self._histograms[key] if key in self._histograms else numbers[key]
            yield _family(declared, samples)
        for key, alias in ALIASES.items():
            yield _family(alias, {(self._model,): numbers[key][()]})

    def _numbers(self) -> dict[str, Samples]:
        """Everything that is not a histogram, by key and label values."""
        stats = self._stats
        states = ("used", "cached", "free")
        return {
            **{key: {(): self._before_restart[key] + getattr(stats, key)} for key in COUNTED},
            "num_running": {(): stats.num_running},
            "num_waiting": {(): stats.num_waiting},
            "pages": {(state,): getattr(stats, f"pages_{state}") for state in states},
            "usage": {(): self._usage()},
            "finishes": {(finish.value,): count for finish, count in self._finishes.items()},
            "refusals": self._refusals_by_reason(),
            "tenant_refusals": self._refusals,
            **self._costs.numbers(),
            **self._ladder.numbers(),
            "restarts": {(): self._num_restarts()},
            "build": {(self._version, self._model): 1},
        }

    def _refusals_by_reason(self) -> Counter[tuple[str, ...]]:
        total: Counter[tuple[str, ...]] = Counter()
        for (_, reason), count in self._refusals.items():
            total[reason,] += count
        return total

    def _usage(self) -> float:
        """Share of the pool held by live sequences, 0 to 1."""
        stats = self._stats
        pages = stats.pages_used + stats.pages_cached + stats.pages_free
        return stats.pages_used / pages if pages else 0.0


def _family(declared: Declared, samples: Samples) -> Metric:
    family = _KINDS[declared.kind](declared.name, declared.help, labels=declared.labels)
    for labels, value in samples.items():
        if isinstance(value, Histogram):
            family.add_metric(labels, value.buckets(), value.total)
        else:
            family.add_metric(labels, value)
    assert isinstance(family, Metric)
    return family
