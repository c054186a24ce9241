"""A summary for a terminal, and as one line of JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dynamo_serve.bench.account import Reconciled
from dynamo_serve.bench.figures import figures
from dynamo_serve.bench.groups import Group
from dynamo_serve.bench.latency import SHARES, Distribution
from dynamo_serve.bench.spread import needed
from dynamo_serve.bench.summary import Summary
from dynamo_serve.bench.words import NONE, count, facts, ms, number, percent, share, table

FORMAT, VERSION = "dynamo-serve-report", 1
LATENCIES = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2e"))
SHORT = ("model", "url", "commit", "machine")


def text(of: Summary) -> str:
    """The report for people, without its last line for machines."""
    blocks = [
        [head(of)],
        _outcomes(of),
        _latencies(of),
        _attained(of),
        _tenants(of),
        _kinds(of),
        _server(of),
        [f"note: {note}" for note in of.notes],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def line(of: Summary) -> str:
    """Everything on one line of JSON. Numbers that are none are null."""
    plain = {"format": FORMAT, "format_version": VERSION, "figures": figures(of), **asdict(of)}
    return json.dumps(clean(plain), separators=(",", ":"), allow_nan=False)


def head(of: Summary) -> str:
    """What ran, in a line."""
    told = [f"{key} {value}" for key, value in facts(of.about) if key in SHORT]
    return " · ".join((f"{number(of.seconds)} s, {'open' if of.is_open else 'closed'} loop", *told))


def clean(value: Any) -> Any:
    """The same as JSON can say it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value if isinstance(value, str | int | None) else str(value)


def _outcomes(of: Summary) -> list[str]:
    counts, rates = of.total.counts, of.total.rates
    outcomes = (
        f"{counts.ok:,} ok · {counts.refused:,} refused · {counts.failed:,} failed · "
        f"{counts.cancelled:,} cancelled"
    )
    rows = [("requests", f"{counts.all:,}: {outcomes}")]
    if of.warm_up:
        rows.append(("warm-up", f"{count(of.warm_up, 'request')} left out"))
    if counts.retries:
        rows.append(("retries", f"{counts.retries:,}"))
    if rates:
        offered = f" of {number(of.offered)} offered" if of.offered else ""
        rows.append(
            (
                "throughput",
                f"{number(rates.requests)} requests/s{offered} · {number(rates.input_tokens)} "
                f"input tokens/s · {number(rates.output_tokens)} output tokens/s",
            )
        )
        rows.append(("goodput", goodput(of.total)))
    if of.total.prompt_tokens:
        cached = f"{of.total.cached_tokens:,} of {of.total.prompt_tokens:,} prompt tokens"
        rows.append(("cached", f"{cached}, {percent(of.total.cached_share)}"))
    rows += [("error", f"{error} ({many:,} times)") for error, many in of.errors.items()]
    return [f"{name:<12}{value}" for name, value in rows]


def goodput(of: Group) -> str:
    if of.rates is None or of.rates.good is None:
        return "no targets were given"
    kept = "" if of.good_share is None else f", {percent(of.good_share)} of them"
    return f"{number(of.rates.good)} requests/s answered within all their targets{kept}"


def _latencies(of: Summary) -> list[str]:
    rows = [(name, getattr(of.total, key)) for name, key in LATENCIES]
    if of.probes:
        rows += [(f"probe {name}", getattr(of.probes, key)) for name, key in LATENCIES[:2]]
    if of.is_open and of.late.count:
        rows.append(("sent late", of.late))
    rows = [(name, one) for name, one in rows if one.count]
    if not rows:
        return []
    head = ("ms", "samples", "mean", *SHARES, "max")
    lines = table(head, [(name, *cells(one)) for name, one in rows])
    hidden = [share for share in SHARES if any(share not in one.percentiles for _, one in rows)]
    if hidden:
        least = ", ".join(f"{name} {needed(SHARES[name]):,}" for name in hidden)
        lines.append(f"{NONE}: too few samples to know; needed: {least}")
    return lines


def cells(of: Distribution) -> list[str]:
    """Samples, mean, percentiles and greatest, in milliseconds."""
    known = [ms(of.value(name)) for name in SHARES]
    return [f"{of.count:,}", ms(of.mean), *known, ms(of.most)]


def _attained(of: Summary) -> list[str]:
    groups = [one for one in of.classes if one.attainment]
    if not groups:
        return []
    rows = [
        (one.name or "(no class)", name, share(found))
        for one in groups
        for name, found in one.attainment.items()
    ]
    return table(("class", "target", "kept (95 % interval)"), rows)


def _tenants(of: Summary) -> list[str]:
    if len(of.tenants) < 2:
        return []
    head, rows = tenant_rows(of)
    return [*table(head, rows), f"Jain index of {of.fairness.basis} by weight: {jain(of)}"]


def jain(of: Summary) -> str:
    return NONE if of.fairness.jain is None else f"{of.fairness.jain:.3f}"


def tenant_rows(of: Summary) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows of what each tenant got."""
    head = (
        *("tenant", "weight", "ok", "refused", "failed", "TTFT p50 ms", "output tokens"),
        *("cached", "served", "device s", "page s"),
    )
    costs = {cost.name: cost for cost in of.fairness.tenants}
    rows = [
        [
            one.name or "(none)",
            number(costs[one.name].weight),
            *(f"{n:,}" for n in (one.counts.ok, one.counts.refused, one.counts.failed)),
            ms(one.ttft.value("p50")),
            f"{one.output_tokens:,}",
            percent(one.cached_share),
            percent(costs[one.name].share),
            number(costs[one.name].device_seconds),
            number(costs[one.name].page_seconds),
        ]
        for one in of.tenants
    ]
    return head, rows


def group_rows(groups: Sequence[Group], noun: str) -> tuple[Sequence[str], list[list[str]]]:
    """Head and rows of what became of classes or kinds."""
    head = (
        *(noun, "requests", "ok", "refused", "failed", "cancelled"),
        *("TTFT p50 ms", "TTFT p99 ms", "ITL p99 ms", "E2E p50 ms", "good/s"),
    )
    rows = []
    for one in groups:
        counts = one.counts
        numbers = (counts.all, counts.ok, counts.refused, counts.failed, counts.cancelled)
        times = (
            ms(one.ttft.value("p50")),
            ms(one.ttft.value("p99")),
            ms(one.itl.value("p99")),
            ms(one.e2e.value("p50")),
        )
        good = number(one.rates.good if one.rates else None)
        rows.append([one.name or "(none)", *(f"{n:,}" for n in numbers), *times, good])
    return head, rows


def _kinds(of: Summary) -> list[str]:
    blocks: list[str] = []
    for noun, groups in (("class", of.classes), ("kind", of.kinds)):
        if len(groups) > 1:
            blocks += [*([""] if blocks else []), *table(*group_rows(groups, noun))]
    return blocks


def _server(of: Summary) -> list[str]:
    rows = []
    if of.reconciled:
        rows.append(("TTFT", both_sides(of.reconciled)))
    if of.prefix_savings is not None:
        rows.append(("prefixes", f"{percent(of.prefix_savings)} of the tokens asked were cached"))
    if of.bound:
        at = f"a step takes {ms(of.bound.step_seconds)} ms ({of.bound.source})"
        rows.append(("bandwidth", f"{percent(of.bound.fraction)} of the machine's; {at}"))
    else:
        rows.append(("bandwidth", f"unknown: {of.unbound}"))
    rows += [(name, number(value)) for name, value in of.server.items()]
    return [f"{'server ' + name:<24}{value}" for name, value in rows]


def both_sides(of: Reconciled) -> str:
    """TTFT as client and server saw it."""
    means = f"mean {ms(of.client_mean)} ms at the client, {ms(of.server_mean)} ms at the server"
    return f"{means}: {ms(of.mean_gap)} ms between them (by {of.source}, n={of.count:,})"
