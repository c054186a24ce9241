"""Beside the latencies: who got how much, and what the server says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamo_serve.bench.latency import Distribution, distribution, ttft
from dynamo_serve.bench.record import Record, Sample
from dynamo_serve.bench.served import by_tenant, growth, histogram
from dynamo_serve.bench.spread import jain


@dataclass(frozen=True, slots=True)
class TenantCost:
    """What a tenant was served. `share` is its part of all that was served, by `Fairness.basis`;
    the seconds are None where no sample tells them."""

    name: str
    share: float
    weight: float
    device_seconds: float | None
    page_seconds: float | None
    saved_tokens: float | None


@dataclass(frozen=True, slots=True)
class Fairness:
    """`jain` is over cost by weight. `basis`: "device seconds" as the server measured them, or
    "tokens": computed prompt tokens and generated ones."""

    jain: float | None
    basis: str
    tenants: tuple[TenantCost, ...]


@dataclass(frozen=True, slots=True)
class Reconciled:
    """TTFT on both sides of the wire, in seconds. `source`: "requests" (the server's account of
    each; `gap` is then a distribution) or "histogram" (all that the server answered meanwhile).
    `server` percentiles of a histogram are no better than its buckets."""

    source: str
    count: int
    client_mean: float
    server_mean: float
    server_p50: float | None
    server_p99: float | None
    gap: Distribution | None

    @property
    def mean_gap(self) -> float:
        return self.client_mean - self.server_mean


def fairness(
    records: Sequence[Record], samples: list[Sample], weights: Mapping[str, float]
) -> Fairness:
    """Over the tenants that asked for something."""
    names = sorted({record.tenant for record in records})
    device = by_tenant(samples, "dserve_tenant_device_seconds_total")
    pages = by_tenant(samples, "dserve_tenant_page_seconds_total")
    saved = by_tenant(samples, "dserve_tenant_saved_tokens_total")
    is_measured = bool(names) and all(name in device for name in names)
    costs = {name: device[name] for name in names} if is_measured else _tokens(records)
    whole = math.fsum(costs.values())
    tenants = tuple(
        TenantCost(
            name,
            share=costs[name] / whole if whole > 0 else 0.0,
            weight=weights.get(name, 1.0),
            device_seconds=device.get(name),
            page_seconds=pages.get(name),
            saved_tokens=saved.get(name),
        )
        for name in names
    )
    by_weight = [costs[tenant.name] / tenant.weight for tenant in tenants]
    fair = jain(by_weight) if len(tenants) > 1 else None  # nobody to be fair to
    return Fairness(fair, "device seconds" if is_measured else "tokens", tenants)


def _tokens(records: Sequence[Record]) -> dict[str, float]:
    costs: dict[str, float] = {}
    for record in records:
        got = record.output_tokens
        if record.first is not None or record.outcome == "ok":
            got += max(0, record.prompt_tokens - record.cached_tokens)
        costs[record.tenant] = costs.get(record.tenant, 0.0) + got
    return costs


def reconcile(records: Sequence[Record], samples: list[Sample], is_open: bool) -> Reconciled | None:
    """None where the server told no TTFT."""
    pairs = [
        (mine, record.server["ttft"])
        for record in records
        if "ttft" in record.server and (mine := ttft(record, is_open)) is not None
    ]
    if pairs:
        theirs = distribution(server for _, server in pairs)
        return Reconciled(
            source="requests",
            count=len(pairs),
            client_mean=math.fsum(mine for mine, _ in pairs) / len(pairs),
            server_mean=theirs.mean or 0.0,
            server_p50=theirs.value("p50"),
            server_p99=theirs.value("p99"),
            gap=distribution(mine - server for mine, server in pairs),
        )
    found = histogram(samples, "dserve_ttft_seconds")
    waits = [wait for record in records if (wait := ttft(record, is_open)) is not None]
    if found is None or not waits:
        return None
    return Reconciled(
        source="histogram",
        count=int(found.count),
        client_mean=math.fsum(waits) / len(waits),
        server_mean=found.total / found.count,
        server_p50=found.quantile(0.5),
        server_p99=found.quantile(0.99),
        gap=None,
    )


def prefix_savings(samples: list[Sample]) -> float | None:
    """The share of prompt tokens that the server found in its cache, by its own counters."""
    asked = growth(samples, "dserve_prefix_asked_tokens_total")
    hit = growth(samples, "dserve_prefix_hit_tokens_total")
    return hit / asked if asked and hit is not None and hit <= asked else None
