"""Whether a run kept what a scenario demands of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynamo_serve.bench.about import percentile
from dynamo_serve.bench.latency import e2e, tpot, ttft
from dynamo_serve.bench.promises import is_good
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.errors import ConfigError

LATENCY = re.compile(r"(ttft|itl|tpot|e2e)_p(\d{1,2}(?:\.\d+)?)_ms")
COUNTS = ("failed", "refused", "cancelled")
AT_LEAST = ("goodput", "output_tokens_per_s", "requests_per_s", "cached_share")
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
    records = [r for r in run.records if not r.is_warm_up and _is_of(r, whose)]
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
    """What was measured; None if there is nothing to say."""
    if measure in COUNTS:
        outcome = measure
        return float(sum(r.outcome == outcome for r in records))
    served = [r for r in records if r.outcome == "ok"]
    if found := LATENCY.fullmatch(measure):
        values = [v for r in served for v in LATENCIES[found[1]](r, is_open) if v is not None]
        return percentile(values, float(found[2]) / 100) * 1e3 if values else None
    if measure == "goodput":
        counted = [r for r in records if r.outcome != "cancelled"]
        return sum(is_good(r, is_open) for r in counted) / len(counted) if counted else None
    if measure == "cached_share":
        prompts = sum(r.prompt_tokens for r in served)
        return sum(r.cached_tokens for r in served) / prompts if prompts else None
    amount = len(served) if measure == "requests_per_s" else sum(r.output_tokens for r in served)
    return amount / seconds if seconds else None


LATENCIES: dict[str, Callable[[Record, bool], Sequence[float | None]]] = {
    "ttft": lambda r, is_open: [ttft(r, is_open)],
    "itl": lambda r, _: r.gaps,
    "tpot": lambda r, _: [tpot(r)],
    "e2e": lambda r, is_open: [e2e(r, is_open)],
}
