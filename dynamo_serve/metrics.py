"""Every Prometheus metric, fed from the core's Stats and TokenEvents."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from dynamo_serve.core.batch import Phase
from dynamo_serve.core.eviction import Cause
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.errors import Unavailable
from dynamo_serve.metrics_declared import (
    ALIASES,
    COUNTED,
    DECLARED,
    FORWARDED,
    RATIOS,
    SCRAPED,
    TOKENS,
    Declared,
)
from dynamo_serve.metrics_endpoints import EndpointCounts
from dynamo_serve.metrics_histogram import SECONDS, Histogram
from dynamo_serve.metrics_ladder import LadderCounts
from dynamo_serve.metrics_scraped import Page, mean_batches, written
from dynamo_serve.metrics_tenants import LEFT_OUT, Nameless, TenantCosts
from dynamo_serve.metrics_tiers import TierCounts
from dynamo_serve.observer import STREAMS, Vitals

if TYPE_CHECKING:
    from dynamo_serve.scrape import Scraper

_KINDS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


ASK_SECONDS = 1.0  # a scraper gives up after ten, and a step may take long
_NAMED = {declared.name for declared in DECLARED.values() if "tenant" in declared.labels}

# What a page of ours may call something.
_OURS = {
    declared.name + suffix
    for declared in (*DECLARED.values(), *ALIASES.values(), *FORWARDED.values(), *SCRAPED.values())
    for suffix in ("", "_total", "_bucket", "_sum", "_count", "_created")
}

Samples = Mapping[tuple[str, ...], Any]  # label values → Histogram or number
Ask = Callable[[str, float], Awaitable[Any]]  # the engine, something, for so many seconds


class Metrics:
    """Implements `observer.Observer`; each instance has its own registry and shares nothing.

    All calls come from one event loop, so nothing is locked.
    """

    def __init__(
        self,
        *,
        model: str,
        version: str,
        vitals: Callable[[], Vitals] = Vitals,
        endpoints: Sequence[str] = (),
        scraper: Scraper | None = None,
    ) -> None:
        self._endpoints = EndpointCounts(endpoints) if endpoints else None
        self._scraper = scraper
        self._model, self._version = model, version
        self._stats = Stats()
        self._before_restart: dict[str, float] = dict.fromkeys(COUNTED, 0)
        self._vitals = vitals
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
        self._streams = dict.fromkeys(STREAMS, 0)
        self._costs = TenantCosts()
        self._ladder = LadderCounts()
        self._tiers = TierCounts()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        """Count one event of a request; `previous` is when its last tokens came, if any did."""
        if event.token_ids or event.artifact is not None:
            if previous is None:
                self._ttft.observe(now - request.arrival)
            else:
                self._itl.observe(now - previous)
        if event.finish is not None:
            self._on_finish(request, event, now)
        if event.refusal is not None:
            self._refusals[request.tenant, event.refusal.reason] += 1

    def on_end(self, delivery: object, now: float) -> None:
        pass  # its last event has told

    def on_turned_away(self, request: Request, error: object) -> None:
        pass

    def on_stream(self, what: str) -> None:
        self._streams[what] += 1

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
        self._tiers.take(stats)
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

    async def refresh(self, ask: Ask, *, tenants: bool = True) -> None:
        """Ask for what is not known here. Of an engine that does not answer, what was known last is
        shown."""

        async def take(what: str, took: Callable[[Any], None]) -> None:
            with contextlib.suppress(Unavailable):
                took(await ask(what, ASK_SECONDS))

        questions: list[Awaitable[None]] = []
        if tenants:
            questions.append(take("costs", self.on_costs))
        if self._endpoints is not None:
            questions.append(take("endpoints", self._endpoints.take))
        if self._scraper is not None:
            questions.append(self._scraper.look())
        await asyncio.gather(*questions)

    def render(self, *, tenants: bool = True) -> tuple[bytes, str]:
        """The exposition for a scrape, and its content type; without `tenants` it names none."""
        theirs = written(self._pages(), _OURS)
        if tenants:
            return generate_latest(self._registry) + theirs, CONTENT_TYPE_LATEST
        return generate_latest(Nameless(self, _NAMED)) + theirs + LEFT_OUT, CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """Called by the registry on every scrape."""
        numbers = self._numbers()
        for key, declared in DECLARED.items():
            samples: Samples = self._histograms[key] if key in self._histograms else numbers[key]
            yield _family(declared, samples)
        for key, declared in (FORWARDED if self._endpoints else {}).items():
            yield _family(declared, numbers[key])
        for key, declared in (SCRAPED if self._scraper else {}).items():
            yield _family(declared, numbers[key])
        for key, alias in ALIASES.items():
            yield _family(alias, {(self._model,): numbers[key][()]})

    def _numbers(self) -> dict[str, Samples]:
        """Everything that is not a histogram, by key and label values."""
        stats = self._stats
        states, causes = ("used", "cached", "free"), [cause.value for cause in Cause]
        counted = {key: self._before_restart[key] + getattr(stats, key) for key in COUNTED}
        return {
            **{key: {(): number} for key, number in counted.items()},
            "evicted": {(cause,): counted[f"evicted_{cause}_total"] for cause in causes},
            "num_running": {(): stats.num_running},
            "num_waiting": {(): stats.num_waiting},
            "pages": {(state,): getattr(stats, f"pages_{state}") for state in states},
            "pages_pinned": {(): stats.pages_pinned},
            "usage": {(): self._usage()},
            "finishes": {(finish.value,): count for finish, count in self._finishes.items()},
            "refusals": self._refusals_by_reason(),
            "tenant_refusals": self._refusals,
            **self._costs.numbers(),
            **{key: {(): value} for key, value in self._vitals()._asdict().items()},
            "streams": {(what,): count for what, count in self._streams.items()},
            **self._ladder.numbers(),
            **self._tiers.numbers(),
            **(self._endpoints.numbers() if self._endpoints else {}),
            **self._scraped(),
            "build": {(self._version, self._model): 1},
        }

    def _pages(self) -> dict[str, Page]:
        last = self._scraper.last if self._scraper else {}
        return {endpoint: scrape.page for endpoint, scrape in last.items()}

    def _scraped(self) -> dict[str, Samples]:
        last = self._scraper.last if self._scraper else {}
        return {
            "scrape_ok": {(endpoint,): int(not each.error) for endpoint, each in last.items()},
            "scrape_seconds": {(endpoint,): each.seconds for endpoint, each in last.items()},
            "mean_batch": {
                (endpoint, *model): mean
                for endpoint, page in self._pages().items()
                for model, mean in mean_batches(page).items()
            },
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
