"""Targets: which of them a request kept, and how many requests were worth their work.

A request is good if it was answered to its end and kept every target it had. One that was
refused or failed missed all of them. Of one that its client cancelled, only what was certain by
then counts: a target that had been missed was missed, one that was still open is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from dynamo_serve.bench.latency import began, e2e, tpot, ttft
from dynamo_serve.bench.record import Record
from dynamo_serve.bench.spread import Estimate, wilson

TARGETS = ("ttft", "itl", "tpot", "e2e")


def kept(record: Record, name: str, is_open: bool) -> bool | None:
    """Whether it kept one of its targets; None: nobody can say."""
    target = record.targets[name]
    if record.outcome in ("refused", "failed"):
        return False
    if name == "itl":  # each further token within it
        if record.outcome == "ok" or any(gap > target for gap in record.gaps):
            return all(gap <= target for gap in record.gaps)
        return None
    if record.outcome == "cancelled" and (name == "e2e" or record.first is None):
        waited = None if record.end is None else record.end - began(record, is_open)
        return False if waited is not None and waited > target else None
    measures: dict[str, Callable[[], float | None]] = {
        "ttft": lambda: ttft(record, is_open),
        "tpot": lambda: tpot(record),
        "e2e": lambda: e2e(record, is_open),
    }
    value = measures[name]()
    if value is None:  # of an answer of one token there is no TPOT to be missed
        return True if name == "tpot" else None
    return value <= target


def is_good(record: Record, is_open: bool) -> bool:
    known = [name for name in record.targets if name in TARGETS]
    return record.outcome == "ok" and all(kept(record, name, is_open) is True for name in known)


def good_share(records: Iterable[Record], is_open: bool) -> float | None:
    """The share of requests that were good. One that its client cancelled was not if it had missed
    a target by then, else it is left out. None where nobody had a target."""
    good = counted = 0
    have_targets = False
    for record in records:
        known = [name for name in record.targets if name in TARGETS]
        have_targets = have_targets or bool(known)
        if record.outcome == "cancelled":
            counted += any(kept(record, name, is_open) is False for name in known)
        else:
            counted += 1
            good += is_good(record, is_open)
    return good / counted if counted and have_targets else None


def attainment(records: Iterable[Record], is_open: bool) -> dict[str, Estimate]:
    """By target: the share of requests that kept it, with its interval."""
    hits: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for record in records:
        for name in record.targets:
            verdict = kept(record, name, is_open) if name in TARGETS else None
            if verdict is not None:
                counts[name] += 1
                hits[name] += verdict
    return {name: wilson(hits[name], counts[name]) for name in TARGETS if counts[name]}
