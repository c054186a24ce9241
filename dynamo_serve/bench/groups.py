"""What became of a set of requests: all of them, one tenant's, one class's, one kind's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynamo_serve.bench.latency import LATENCIES, Distribution, distribution, samples
from dynamo_serve.bench.promises import attainment, good_share, is_good
from dynamo_serve.bench.record import Record
from dynamo_serve.bench.spread import Estimate


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests by outcome; `retries` are attempts beyond the first, `unserved` cancelled ones that
    had not seen a token."""

    all: int
    ok: int
    refused: int
    failed: int
    cancelled: int
    unserved: int
    retries: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second. Requests are those answered to their end, tokens those of every request that
    got at least one; good requests are `promises.is_good`, None where nobody had a target."""

    requests: float
    input_tokens: float
    output_tokens: float
    good: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Latencies are `latency.samples`. Prompt and cached tokens are of requests answered to their
    end, for only these say what was cached. `rates` are None where the run measured no time."""

    name: str
    counts: Counts
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    rates: Rates | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    attainment: dict[str, Estimate]
    good_share: float | None

    @property
    def cached_share(self) -> float | None:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


def group(name: str, records: Sequence[Record], is_open: bool, seconds: float) -> Group:
    served = [record for record in records if record.first is not None or record.outcome == "ok"]
    done = [record for record in records if record.outcome == "ok"]
    of = {name: distribution(samples(name, records, is_open)) for name in LATENCIES}
    return Group(
        name=name,
        counts=_counts(records),
        **of,
        rates=_rates(records, served, is_open, seconds) if seconds > 0 else None,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=sum(record.output_tokens for record in served),
        cached_tokens=sum(record.cached_tokens for record in done),
        attainment=attainment(records, is_open),
        good_share=good_share(records, is_open),
    )


def by(
    key: Callable[[Record], str], records: Sequence[Record], is_open: bool, seconds: float
) -> tuple[Group, ...]:
    """One group for each value of `key`, by name."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(key(record), []).append(record)
    return tuple(group(name, parts[name], is_open, seconds) for name in sorted(parts))


def _counts(records: Sequence[Record]) -> Counts:
    outcomes = Counter(record.outcome for record in records)
    return Counts(
        all=len(records),
        ok=outcomes["ok"],
        refused=outcomes["refused"],
        failed=outcomes["failed"],
        cancelled=outcomes["cancelled"],
        unserved=sum(r.outcome == "cancelled" and r.first is None for r in records),
        retries=sum(max(0, record.attempts - 1) for record in records),
    )


def _rates(
    records: Sequence[Record], served: Sequence[Record], is_open: bool, seconds: float
) -> Rates:
    have_targets = any(record.targets for record in records)
    return Rates(
        requests=sum(record.outcome == "ok" for record in records) / seconds,
        input_tokens=sum(record.prompt_tokens for record in served) / seconds,
        output_tokens=sum(record.output_tokens for record in served) / seconds,
        good=sum(is_good(record, is_open) for record in records) / seconds
        if have_targets
        else None,
    )
