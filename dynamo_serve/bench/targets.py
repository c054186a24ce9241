"""Whether a run kept what a scenario demands of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamo_serve.bench.groups import group
from dynamo_serve.bench.latency import is_sound, samples
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.bench.spread import percentile
from dynamo_serve.errors import ConfigError

LATENCY = re.compile(r"(ttft|itl|tpot|e2e)_p(\d{1,2}(?:\.\d+)?)_ms")
COUNTS = ("failed", "refused", "cancelled")
RATES = {
    "requests_per_s": "requests",
    "good_requests_per_s": "good",
    "output_tokens_per_s": "output_tokens",
}
AT_LEAST = ("good_share", "cached_share", *RATES)
FORMS = (
    f"{', '.join((*COUNTS, *AT_LEAST))}, and {{ttft,itl,tpot,e2e}}_pNN_ms; each may have a class, "
    "tenant or kind and a dot before it"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    wanted: float
    found: float | None
    is_met: bool

    def __str__(self) -> str:
        sign = "at least" if self.name.rpartition(".")[2] in AT_LEAST else "at most"
        found = "nothing to measure" if self.found is None else f"{self.found:.4g}"
        return (
            f"{'kept' if self.is_met else 'MISSED'}: {self.name} {found} ({sign} {self.wanted:g})"
        )


def checked(targets: Mapping[str, object]) -> dict[str, float]:
    """Targets as they may be given. Raises `ConfigError`."""
    found: dict[str, float] = {}
    for name, value in targets.items():
        _, measure = _split(name)
        if measure not in (*COUNTS, *AT_LEAST) and not LATENCY.fullmatch(measure):
            raise ConfigError(f"targets: unknown {name!r}; allowed: {FORMS}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"targets: {name} is {value!r}; allowed: numbers")
        found[name] = float(value)
    return found


def verdicts(run: Run, targets: Mapping[str, float]) -> list[Verdict]:
    return [_verdict(run, name, wanted) for name, wanted in targets.items()]


def _split(name: str) -> tuple[str, str]:
    """Whom a target is about, and what is measured; percentiles may have a dot themselves."""
    found = re.fullmatch(r"(?:(.+)\.)?([a-z]\w*(?:_p\d+\.\d+_ms)?)", name)
    return (found[1] or "", found[2]) if found else ("", name)


def _verdict(run: Run, name: str, wanted: float) -> Verdict:
    whose, measure = _split(name)
    counted = [r for r in run.records if not r.is_warm_up and is_sound(r)]
    records = [r for r in counted if _is_of(r, whose)]
    is_open = run.about.get("loop") != "closed"
    found = value(records, measure, run.seconds, is_open) if records else None
    if found is None:
        return Verdict(name, wanted, None, is_met=False)
    return Verdict(name, wanted, found, found >= wanted if measure in AT_LEAST else found <= wanted)


def _is_of(record: Record, whose: str) -> bool:
    if not whose:
        return record.kind != "probe"
    return whose in (record.kind, record.tenant, record.class_name)


def value(records: Sequence[Record], measure: str, seconds: float, is_open: bool) -> float | None:
    """What was measured, as the reports define it; None if there is nothing to say."""
    if found := LATENCY.fullmatch(measure):
        values = samples(found[1], records, is_open)
        return percentile(values, float(found[2]) / 100) * 1e3 if values else None
    of = group("", records, is_open, seconds)
    if measure in COUNTS:
        return float(getattr(of.counts, measure))
    if measure in ("good_share", "cached_share"):
        share: float | None = getattr(of, measure)
        return share
    rate: float | None = getattr(of.rates, RATES[measure]) if of.rates else None
    return rate
