"""A comparison for a terminal, and as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from dynamo_serve.bench.compare import Comparison, Difference
from dynamo_serve.bench.figures import figures, unit
from dynamo_serve.bench.spread import Estimate
from dynamo_serve.bench.text import clean
from dynamo_serve.bench.words import NONE, number, table

FORMAT, VERSION = "dynamo-serve-comparison", 1
VERDICTS = {
    "better": "B is better",
    "worse": "B is worse",
    "other": "B is different",
    "alike": "no difference that matters",
    "unclear": "not enough runs to tell",
}
HEAD = ("figure", "unit", "A", "B", "B − A", "95 % interval", "p", "verdict")


def text(of: Comparison) -> str:
    lines = [f"{of.pairs} pairs of runs; differences under {of.matters:.0%} do not matter", ""]
    lines += table(HEAD, rows(of))
    lines.append(
        "p: paired t-test, adjusted after Benjamini and Hochberg for the number of figures"
    )
    if of.apart:
        lines += ["", *table(("what differs", "A", "B"), of.apart)]
    if of.notes:
        lines += ["", *(f"note: {note}" for note in of.notes)]
    return "\n".join(lines)


def line(of: Comparison) -> str:
    plain = {
        "format": FORMAT,
        "format_version": VERSION,
        "pairs": of.pairs,
        "matters": of.matters,
        "differences": {one.name: asdict(one) for one in of.differences},
        "apart": of.apart,
        "notes": of.notes,
        "a": [figures(one) for one in of.a],
        "b": [figures(one) for one in of.b],
    }
    return json.dumps(clean(plain), separators=(",", ":"), allow_nan=False)


def rows(of: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            one.name,
            unit(one.name),
            number(one.a),
            number(one.b),
            change(one),
            interval(one.relative or one.effect, one.relative is not None),
            NONE if one.p is None else "<0.001" if one.p < 0.001 else f"{one.p:.3f}",
            verdict(one, of.matters),
        )
        for one in of.differences
    ]


def verdict(of: Difference, matters: float) -> str:
    """In words; a difference may be real and still be little."""
    edges = (of.relative.low, of.relative.high) if of.relative else (None, None)
    is_little = all(edge is not None and abs(edge) <= matters for edge in edges)
    is_real = of.verdict in ("better", "worse", "other")
    return VERDICTS[of.verdict] + (f", by less than {matters:.0%}" if is_real and is_little else "")


def change(of: Difference) -> str:
    return f"{of.relative.value:+.1%}" if of.relative else number(of.effect.value)


def interval(of: Estimate, is_relative: bool) -> str:
    if of.low is None or of.high is None:
        return NONE
    if is_relative:
        return f"{of.low:+.1%} to {of.high:+.1%}"
    return f"{number(of.low)} to {number(of.high)}"
