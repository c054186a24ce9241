"""Whether B differs from A, or only seems to: paired repeats, run in turns on one machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dynamo_serve.bench.figures import figures, more_is_better
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.repeats import MEASURED, root
from dynamo_serve.bench.spread import Estimate, mean, standard_error, within
from dynamo_serve.bench.summary import Summary, summary
from dynamo_serve.bench.words import facts
from dynamo_serve.errors import ConfigError

LEAST_PAIRS = 3
SURE = 0.05
MATTERS = 0.05
# What ought to be alike in A and B, unless it is what is being compared.
SAME = ("machine", "plan", "workload", "loop", "rate", "concurrency", "seed", "scenario")


@dataclass(frozen=True, slots=True)
class Difference:
    """B less A of one figure, over pairs. `effect` has its 95 % t-interval, `relative` the same as
    a share of A's mean (None where that is 0). `p` is of the paired t-test, adjusted for the
    number of figures. `verdict`: "better", "worse", "other" (neither is the better one), "alike"
    (less apart than matters), or "unclear": not enough runs to tell.
    """

    name: str
    a: float
    b: float
    effect: Estimate
    relative: Estimate | None
    p: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """`apart` lists what the runs say of themselves and A and B say differently; `notes` are to be
    read before the verdicts."""

    pairs: int
    matters: float
    differences: tuple[Difference, ...]
    apart: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    a: tuple[Summary, ...]
    b: tuple[Summary, ...]


def turns(repeats: int) -> Iterator[tuple[str, int]]:
    """Whose turn it is, and in which repeat: ABBA, so that what warms up or drifts over time meets
    both alike."""
    for repeat in range(repeats):
        for side in "ba" if repeat % 2 else "ab":
            yield side, repeat


def interleave(
    run_a: Callable[[int], Run], run_b: Callable[[int], Run], repeats: int
) -> tuple[list[Run], list[Run]]:
    """A and B in turns; the runs of each in the order of the repeats."""
    run, runs = {"a": run_a, "b": run_b}, {"a": list[Run](), "b": list[Run]()}
    for side, repeat in turns(repeats):
        runs[side].append(run[side](repeat))
    return runs["a"], runs["b"]


def compare(runs_a: Sequence[Run], runs_b: Sequence[Run], matters: float = MATTERS) -> Comparison:
    """Each figure of repeat n of A against that of repeat n of B: the paired t-test (Student 1908),
    adjusted after Benjamini and Hochberg (1995) because many figures are looked at. A difference is
    real if the adjusted p is below 0.05; figures are alike if the interval lies within `matters`,
    a share of A's mean. Raises `ConfigError` if there are no pairs."""
    if not runs_a or len(runs_a) != len(runs_b):
        raise ConfigError(
            f"compare: {len(runs_a)} runs of A and {len(runs_b)} of B; "
            "allowed: at least one each, equally many, in the order in which they were run"
        )
    a, b = tuple(map(summary, runs_a)), tuple(map(summary, runs_b))
    flat = list(zip(map(figures, a), map(figures, b), strict=True))
    known = [name for name in flat[0][0] if all(name in x and name in y for x, y in flat)]
    values = {name: ([x[name] for x, _ in flat], [y[name] for _, y in flat]) for name in known}
    ps = adjusted({name: paired(*both) for name, both in values.items()})
    somewhere = {name for pair in flat for one in pair for name in one}
    apart = _apart(a[0], b[0])
    return Comparison(
        pairs=len(flat),
        matters=matters,
        differences=tuple(_difference(name, *values[name], ps[name], matters) for name in known),
        apart=apart,
        notes=tuple(_notes(a, b, apart, sorted(somewhere - set(known)))),
        a=a,
        b=b,
    )


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """How probable differences as great as these are if there is none; None: too few pairs."""
    if len(a) < LEAST_PAIRS:
        return None
    by = [after - before for before, after in zip(a, b, strict=True)]
    if not any(by):
        return 1.0
    error = standard_error(by)
    if error == 0:  # always the same difference: simulations
        return 0.0
    return 1 - within(math.fsum(by) / len(by) / error, len(by) - 1)


def adjusted(ps: dict[str, float | None]) -> dict[str, float | None]:
    """Adjusted so that of all differences called real, one in twenty is not: the figures of a run
    rise and fall together, and a stricter rule would find none of them in a few repeats."""
    known = sorted((p, name) for name, p in ps.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(ps)
    least = 1.0
    for rank in range(len(known), 0, -1):
        p, name = known[rank - 1]
        least = min(least, p * len(known) / rank)
        found[name] = least
    return found


def _difference(
    name: str, a: Sequence[float], b: Sequence[float], p: float | None, matters: float
) -> Difference:
    base = math.fsum(a) / len(a)
    effect = mean([after - before for before, after in zip(a, b, strict=True)])
    relative = _scaled(effect, base) if base else None
    return Difference(
        name=name,
        a=base,
        b=math.fsum(b) / len(b),
        effect=effect,
        relative=relative,
        p=p,
        verdict=_verdict(name, effect, relative, p, matters),
    )


def _scaled(of: Estimate, base: float) -> Estimate:
    low, high = (None if edge is None else edge / abs(base) for edge in (of.low, of.high))
    return Estimate(of.value / abs(base), low, high, of.count)


def _verdict(
    name: str, effect: Estimate, relative: Estimate | None, p: float | None, matters: float
) -> str:
    if p is None:
        return "unclear"
    if p < SURE:
        better = more_is_better(name)
        if better is None:
            return "other"
        return "better" if (effect.value > 0) == better else "worse"
    if effect.low == effect.high == 0:
        return "alike"
    edges = (relative.low, relative.high) if relative else (None, None)
    is_near = all(edge is not None and abs(edge) <= matters for edge in edges)
    return "alike" if is_near else "unclear"


def _apart(a: Summary, b: Summary) -> tuple[tuple[str, str, str], ...]:
    of_a, of_b = dict(facts(a.about)), dict(facts(b.about))
    return tuple(
        (key, of_a.get(key, ""), of_b.get(key, ""))
        for key in dict.fromkeys((*of_a, *of_b))
        if of_a.get(key) != of_b.get(key) and root(key) not in MEASURED
    )


def _notes(
    a: Sequence[Summary],
    b: Sequence[Summary],
    apart: Sequence[tuple[str, str, str]],
    unknown: Sequence[str],
) -> list[str]:
    notes = []
    if len(a) < LEAST_PAIRS:
        notes.append(f"Not enough runs to tell: {LEAST_PAIRS} of each are the least.")
    strange = [key for key, _, _ in apart if root(key) in SAME]
    if strange:
        notes.append(f"A and B differ in what should be the same: {', '.join(strange)}.")
    turns = _in_turns(a, b)
    if turns is None:
        notes.append("The runs do not all say when they began: nobody knows if A and B took turns.")
    elif not turns:
        notes.append("The runs were not made in turns: what drifted over time may look like B.")
    if unknown:
        notes.append(f"Not known in every run, so not compared: {', '.join(unknown)}.")
    for name, several in (("A", a), ("B", b)):
        for number, one in enumerate(several, 1):
            notes += [f"{name}{number}: {note}" for note in one.notes]
    return notes


def _in_turns(a: Sequence[Summary], b: Sequence[Summary]) -> bool | None:
    """Whether each pair was over before the next began; None: the runs do not say."""
    pairs = [(_start(x), _start(y)) for x, y in zip(a, b, strict=True)]
    spans = [sorted((x, y)) for x, y in pairs if x is not None and y is not None]
    if len(spans) < len(pairs):
        return None
    return all(first[1] < second[0] for first, second in pairwise(spans))


def _start(of: Summary) -> float | None:
    at = of.about.get("began_at")
    return float(at) if isinstance(at, int | float) and math.isfinite(at) else None
