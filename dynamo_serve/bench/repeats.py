"""Which runs are the same thing done again, by what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_serve.bench.record import Run
from dynamo_serve.bench.words import facts

# What differs between repeats, and does not make them runs of something else.
MEASURED = ("bandwidth", "began_at", "client", "interrupted", "repeat")
VOLATILE = (*MEASURED, "command", "seed", "url")
NAMED = ("scenario", "plan", "workload", "arrivals", "rate", "concurrency", "seed")


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Repeats together, in the order in which each first came, with their label."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        same = tuple(pair for pair in facts(run.about) if root(pair[0]) not in VOLATILE)
        groups.setdefault(same, []).append(run)
    return [(label(group[0].about, is_group=True), group) for group in groups.values()]


def label(about: Mapping[str, Any], *, is_group: bool = False) -> str:
    """What tells a run from others, in a few words; what it says deeper inside than in its plan
    does not."""
    told = [
        f"{key.removeprefix('plan.')} {value}"
        for key, value in facts(about)
        if key.removeprefix("plan.") in NAMED and not (is_group and key == "seed")
    ]
    return ", ".join(told) or "one that does not say what it was"


def root(key: str) -> str:
    return key.partition(".")[0]
