"""A run in a few numbers, beside those of another or of the recording it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from dynamo_serve.bench.latency import samples
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.spread import quantile
from dynamo_serve.trace import Step

Figures = dict[str, float]

UNITS = {"s": (1000.0, "ms", 1), "share": (100.0, "%", 1), "": (1.0, "", 0), "/s": (1.0, "/s", 2)}
NAMES = {  # and the unit of each
    "requests": "",
    "refused": "",
    "failed": "",
    "cancelled": "",
    "requests per second": "/s",
    "output tokens per second": "/s",
    "TTFT p50": "s",
    "TTFT p99": "s",
    "ITL p50": "s",
    "ITL p99": "s",
    "TPOT p50": "s",
    "E2E p50": "s",
    "E2E p99": "s",
    "cached prompt tokens": "share",
}
ALL_THERE = 0.8  # of the steps: if fewer follow each other, the others were not recorded


def figures(run: Run) -> Figures:
    """What there is no value for is left out; each is what reports call so."""
    done = [record for record in run.records if record.outcome == "ok" and record.first is not None]
    found: Figures = {"requests": len(run.records)}
    for outcome in ("refused", "failed", "cancelled"):
        found[outcome] = sum(record.outcome == outcome for record in run.records)
    if run.seconds > 0:
        found["requests per second"] = len(done) / run.seconds
        tokens = sum(record.output_tokens for record in run.records)
        found["output tokens per second"] = tokens / run.seconds
    prompts = sum(record.prompt_tokens for record in done)
    if prompts:
        found["cached prompt tokens"] = sum(record.cached_tokens for record in done) / prompts
    for record_name, values in {
        "TTFT": samples("ttft", run.records, is_open=True),
        "ITL": samples("itl", run.records, is_open=True),
        "TPOT": [  # not by the gaps between tokens: a recording has none
            (r.end - r.first) / (r.output_tokens - 1)
            for r in done
            if r.end is not None and r.first is not None and r.output_tokens > 1
        ],
        "E2E": samples("e2e", run.records, is_open=True),
    }.items():
        found |= _percentiles(record_name, values)
    return found


def _percentiles(name: str, values: Iterable[float]) -> Figures:
    ordered = sorted(values)
    wanted = {f"{name} p{part}": part / 100 for part in (50, 99)}
    return {
        key: quantile(ordered, part) for key, part in wanted.items() if ordered and key in NAMES
    }


def itl_of_steps(steps: Sequence[Step]) -> Figures:
    """ITL as the server saw it: from the end of one step to that of the next, for each sequence
    that decodes in it; nothing if not all steps were recorded."""
    gaps: list[tuple[float, int]] = []
    longest = median(step.seconds for step in steps) / 2 if steps else 0.0
    pairs = followed = 0
    for earlier, later in pairwise(steps):
        if earlier.shape[2] and later.shape[2]:
            pairs += 1
            between = later.at - earlier.at - earlier.seconds
            followed += abs(between) < longest
            gaps.append(
                (later.at + later.seconds - earlier.at - earlier.seconds, int(later.shape[2]))
            )
    if not gaps or followed < ALL_THERE * pairs:
        return {}
    return _percentiles("ITL", [gap for gap, sequences in gaps for _ in range(sequences)])


def differences(one: Mapping[str, float], other: Mapping[str, float]) -> Figures:
    """By how much the second differs from the first: relatively, but for shares in points."""
    found = {}
    for name, unit in NAMES.items():
        if name not in one or name not in other:
            continue
        if unit == "share":
            found[name] = other[name] - one[name]
        elif one[name]:
            found[name] = other[name] / one[name] - 1
    return found


def table(first: str, one: Figures, second: str = "", other: Figures | None = None) -> str:
    """For people: what is known of either, and by how much the second differs."""
    rows = [["", first, *([second, "difference"] if other else [])]]
    change = differences(one, other) if other else {}
    for name, unit in NAMES.items():
        if name in one or (other and name in other):
            row = [name, _shown(name, one)]
            if other:
                sign = change.get(name)
                points = " points" if unit == "share" else " %"
                row += [
                    _shown(name, other),
                    f"{100 * sign:+.1f}{points}" if sign is not None else "",
                ]
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _shown(name: str, found: Mapping[str, float]) -> str:
    if name not in found:
        return "-"
    factor, unit, digits = UNITS[NAMES[name]]
    return f"{factor * found[name]:,.{digits}f} {unit}".rstrip()
