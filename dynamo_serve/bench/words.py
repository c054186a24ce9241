"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_serve.bench.spread import Estimate

NONE = "–"
ABOUT = (
    *("command", "scenario", "plan", "workload", "loop", "load", "rate", "concurrency", "url"),
    *("model", "settings", "versions", "version", "commit", "machine", "seed"),
)


def number(value: float | None) -> str:
    """Three digits that count, more before the point where there are."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits > 6:
        return f"{value:.2g}"
    return f"{value:,.{max(0, digits)}f}" if value != int(value) or digits < 0 else f"{value:,.0f}"


def ms(seconds: float | None) -> str:
    return NONE if seconds is None else number(seconds * 1000)


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.1f} %"


def share(of: Estimate | None) -> str:
    """With its interval."""
    if of is None:
        return NONE
    low, high = (of.low or 0.0) * 100, (1.0 if of.high is None else of.high) * 100
    return f"{percent(of.value)} ({low:.1f} to {high:.1f}, n={of.count:,})"


def count(many: int, noun: str) -> str:
    return f"{many:,} {noun}" if many == 1 else f"{many:,} {noun}s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `about` says, the important first, nested keys with dots."""
    first = [key for key in ABOUT if key in about]
    rest = sorted(str(key) for key in about if key not in ABOUT)
    return [pair for key in (*first, *rest) for pair in _flat(key, about[key])]


def _flat(key: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for name in value for pair in _flat(f"{key}.{name}", value[name])]
    if isinstance(value, list | tuple):
        return [(key, " ".join(told for one in value for _, told in _flat(key, one)))]
    if isinstance(value, float) and not math.isfinite(value):
        return [(key, NONE)]
    return [(key, str(value))] if value not in (None, "") else []
