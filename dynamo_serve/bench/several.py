"""Several runs for a terminal, and as one line of JSON: repeats with intervals, loads in a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from dynamo_serve.bench.figures import Repeats, figures, summaries, unit
from dynamo_serve.bench.plots import load
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.repeats import grouped
from dynamo_serve.bench.text import FORMAT, VERSION, clean
from dynamo_serve.bench.words import count, number, table

COLUMNS = {
    "requests_per_s": "requests/s",
    "good_requests_per_s": "good/s",
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
    "itl_p50_ms": "ITL p50 ms",
    "itl_p99_ms": "ITL p99 ms",
    "e2e_p50_ms": "E2E p50 ms",
}


def text(runs: Sequence[Run]) -> str:
    """One table of all loads, if they are several; one of each that was repeated."""
    groups = [(name, summaries(group)) for name, group in grouped(runs)]
    blocks = ["\n".join(_loads(groups))] if len(groups) > 1 else []
    blocks += [_repeats(name, of) for name, of in groups if len(of.summaries) > 1]
    notes = [
        f"note: run {n} of {name}: {note}"
        for name, of in groups
        for n, one in enumerate(of.summaries, 1)
        for note in one.notes
    ]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def line(runs: Sequence[Run]) -> str:
    told = [
        {
            "name": name,
            "repeats": len(of.summaries),
            "figures": {figure: asdict(one) for figure, one in of.figures.items()},
            "missing": of.missing,
            "about": [one.about for one in of.summaries],
            "runs": [figures(one) for one in of.summaries],
            "notes": [one.notes for one in of.summaries],
        }
        for name, group in grouped(runs)
        for of in [summaries(group)]
    ]
    plain = {"format": FORMAT, "format_version": VERSION, "groups": told}
    return json.dumps(clean(plain), separators=(",", ":"), allow_nan=False)


def _loads(groups: Sequence[tuple[str, Repeats]]) -> list[str]:
    rows = []
    for name, of in groups:
        known = of.figures
        cells = (number(known[key].value if key in known else None) for key in COLUMNS)
        rows.append((name, number(load(of.summaries[0])), f"{len(of.summaries)}", *cells))
    return table(("run", "load", "repeats", *COLUMNS.values()), rows)


def _repeats(name: str, of: Repeats) -> str:
    rows = [
        (name, unit(name), number(e.value), f"{number(e.low)} to {number(e.high)}")
        for name, e in of.figures.items()
    ]
    runs = count(len(of.summaries), "repeat")
    lines = [f"{runs} of {name}: mean, and 95 % interval by Student's t", ""]
    lines += table(("figure", "unit", "mean", "interval"), rows)
    if of.missing:
        lines += ["", f"not known in every run, so left out: {', '.join(of.missing)}"]
    return "\n".join(lines)
