"""Was a server flat? What came of a soak, line by line, and as a picture.

    python -m bench.soak_report DIR

Memory is flat if what is held at least grows by no more than a limit, with 95 % confidence: least
squares over the second half, through the lowest of ten stretches. Between two times that unused
memory is given back a process has more, and how much depends on who is there at that moment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.plot import Bars, Lines, svg

LIMIT_MIB_H = 4.0  # 1 KiB for every one of 4,096 requests an hour
ENGINE_LIMIT_MIB_H = 40.0  # over ten minutes of one engine no more can be told from noise
DIFFERENCE_MIB = 8.0  # between quarters, and between engines of one age
POOL = min(32, (os.cpu_count() or 1) + 4)  # of `asyncio.to_thread`; it grows when first needed
LEAST_S = 450.0  # what is shorter is still warming up, or tells nothing against noise
BLOCKS, STUDENT_T = 10, 2.306  # 95 %, two-sided, 8 degrees of freedom
WARM_SHARE, WARM_S = 0.2, 300.0
AGES_S = (30, 60, 120, 300, 600)
SYMBOLS = {True: "pass", False: "FAIL", None: "cannot tell"}

Points = Sequence[tuple[float, float]]  # seconds, MiB
Row = dict[str, Any]


class Line(NamedTuple):
    what: str
    passed: bool | None
    found: str


class Slope(NamedTuple):
    """MiB per hour; the 95 % confidence interval reaches so far to both sides."""

    mib_h: float
    margin: float


def slope(points: Points) -> Slope | None:
    """None if there are too few points."""
    if len(points) < 2 * BLOCKS:
        return None
    size = len(points) / BLOCKS
    blocks = [points[round(i * size) : round((i + 1) * size)] for i in range(BLOCKS)]
    hours = [statistics.fmean(at for at, _ in block) / 3600 for block in blocks]
    values = [min(value for _, value in block) for block in blocks]
    found, base = statistics.linear_regression(hours, values)
    rest = sum((y - base - found * x) ** 2 for x, y in zip(hours, values, strict=True))
    spread = sum((x - statistics.fmean(hours)) ** 2 for x in hours)
    return Slope(found, STUDENT_T * math.sqrt(rest / (BLOCKS - 2) / spread))


def flat(what: str, points: Points, limit: float) -> Line:
    """Fails if it surely grows and may do so by more than the limit."""
    found = slope(points)
    seconds = points[-1][0] - points[0][0] if points else 0.0
    if found is None or seconds < LEAST_S:
        return Line(what, None, f"{len(points)} samples in {seconds:.0f} s are too few")
    told = f"{found.mib_h:+.2f} ± {found.margin:.2f} MiB/h (limit {limit:g})"
    if found.mib_h + found.margin <= limit:
        return Line(what, True, told)
    return Line(what, False if found.mib_h > found.margin else None, told)


def quarters(what: str, points: Points) -> Line:
    size = len(points) // 4
    seconds = points[-1][0] - points[0][0] if points else 0.0
    if not size or seconds < LEAST_S:
        return Line(what, None, f"{len(points)} samples in {seconds:.0f} s are too few")
    first = min(value for _, value in points[:size])
    last = min(value for _, value in points[-size:])
    told = f"{first:.1f} → {last:.1f} MiB at least (limit {DIFFERENCE_MIB:+g})"
    return Line(what, last - first <= DIFFERENCE_MIB, told)


def engines(samples: Sequence[Row]) -> dict[int, list[tuple[float, float]]]:
    """Age and resident MiB of every engine, in the order in which they lived."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in samples:
        if row["engine"]:
            found[row["engine"]["pid"]].append((row["engine"]["age_s"], row["engine"]["rss_mib"]))
    return dict(found)


def by_age(lives: dict[int, list[tuple[float, float]]]) -> dict[int, list[float]]:
    """What the engines had at each age that at least two of them reached, oldest first."""
    found = {}
    for age in AGES_S:
        near = [[mib for at, mib in life if abs(at - age) <= age / 4] for life in lives.values()]
        values = [statistics.median(mibs) for mibs in near if mibs]
        if len(values) > 1:
            found[age] = values
    return found


def same_age(lives: dict[int, list[tuple[float, float]]]) -> Line:
    """The later half of the engines against the earlier one, at each age that they have reached."""
    what, found = "engines of one age: later against earlier ones", by_age(lives)
    if not found:
        return Line(what, None, "no two engines have reached an age")
    rises = {
        age: statistics.median(values[len(values) // 2 :])
        - statistics.median(values[: len(values) // 2])
        for age, values in found.items()
    }
    told = ", ".join(f"{age} s: {rise:+.1f} MiB of {found[age][0]:.0f} ({len(found[age])})"
                     for age, rise in rises.items())  # fmt: skip
    return Line(what, max(rises.values()) <= DIFFERENCE_MIB, told)


def left(first: Row, last: Row, warm: Sequence[Row]) -> list[Line]:
    """What is left when nothing is live, against the beginning."""
    names = ('pages{state="used"}', "sequences_live", "sequences_waiting", "sequences_parked")
    counts = {name: last["numbers"][f"dserve_{name}"] for name in names}
    told = ", ".join(f"{name} {count:g}" for name, count in counts.items())
    before, after = first["api"], last["api"]
    # Python's thread pool grows to its bound when it is first needed, and stays.
    threads = max(row["api"]["threads"] for row in [first, *warm])
    processes = [1 + len(row["others"]) for row in (first, last)]
    return [
        Line("nothing in use in the end", not any(counts.values()), told),
        Line("descriptors of the API process", after["descriptors"] <= before["descriptors"],
             f"{before['descriptors']} → {after['descriptors']}"),
        Line("threads of the API process", after["threads"] <= max(threads, POOL),
             f"{before['threads']} → {after['threads']}, at most {threads} while it warmed up; "
             f"asyncio's pool may have {POOL}"),
        Line("processes below it", processes[1] <= processes[0],
             f"{processes[0]} → {processes[1]}"),
    ]  # fmt: skip


def judge(rows: Sequence[Row]) -> list[Line]:
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["what"]].append(row)
    (begin,), bad = kinds["begin"], kinds["bad"]
    samples = [row for row in kinds["sample"] if row["at"] <= begin["seconds"]]
    warm_s = min(WARM_S, WARM_SHARE * begin["seconds"])
    warm = [row for row in samples if row["at"] < warm_s]
    memory = [(row["at"], row["api"]["rss_mib"]) for row in samples if row["at"] >= warm_s]
    low, high = begin["quiet"]
    calm = [(row["at"], row["engine"]["rss_mib"]) for row in samples
            if row["engine"] and low + 0.2 * (high - low) <= row["at"] <= high]  # fmt: skip
    newest = (kinds["last"] or samples)[-1]
    told = f"{newest['requests']} requests, {newest['resumed']} gone on with, {len(bad)} bad"
    lines = [
        Line("answers as in the calm run", not bad and newest["requests"] > 0, told),
        flat("API process, second half", memory[len(memory) // 2 :], LIMIT_MIB_H),
        quarters("API process, first and last quarter", memory),
        flat("engine that nobody killed", calm, ENGINE_LIMIT_MIB_H),
        same_age(engines(samples)),
    ]
    if not kinds["last"]:
        return [*lines, Line("the end", False, "broken off: it is not known what would be left")]
    hurt = sum(row["target"] == "engine" for row in kinds["hit"])
    restarts = newest["numbers"]["dserve_engine_restarts_total"]
    more = Line("engines lost", restarts == hurt, f"{restarts:g}, of which {hurt} by our signals")
    if warm_s < 60:
        warm = samples  # too short for a thread pool to have grown to its bound
    return [*lines, more, *left(kinds["first"][0], newest, warm)]


def busy(samples: Sequence[Row]) -> dict[str, float]:
    """Cores kept busy, on average. An engine's time between its last sample and its end is lost."""
    seconds = samples[-1]["at"] - samples[0]["at"] or 1.0
    used: dict[int, list[float]] = defaultdict(list)
    for row in samples:
        for process in filter(None, (row["engine"], *row["others"])):
            used[process["pid"]].append(process["cpu_s"])
    first, last = samples[0], samples[-1]
    below = sum(times[-1] for times in used.values()) - (used[first["engine"]["pid"]][0]
                                                         if first["engine"] else 0.0)  # fmt: skip
    return {
        "api": (last["api"]["cpu_s"] - first["api"]["cpu_s"]) / seconds,
        "engines": below / seconds,
        "clients": (last["client_cpu_s"] - first["client_cpu_s"]) / seconds,
    }


def picture(rows: Sequence[Row]) -> str:
    samples = [row for row in rows if row["what"] in ("sample", "first", "last")]
    (begin,) = (row for row in rows if row["what"] == "begin")
    end = max(row["at"] for row in samples)
    least = min(row["api"]["rss_mib"] for row in samples)

    def number(name: str) -> Points:
        return [(row["at"], row["numbers"][f"dserve_{name}"]) for row in samples]

    def api(name: str, base: float = 0.0) -> Points:
        return [(row["at"], row["api"][name] - base) for row in samples]

    engine = [(row["at"], row["engine"]["rss_mib"]) for row in samples if row["engine"]]
    pages = {state: number(f'pages{{state="{state}"}}') for state in ("used", "cached")}
    states = {state: number(f"sequences_{state}") for state in ("live", "waiting", "parked")}
    hits: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for row in rows:
        if row["what"] == "hit":
            hits[f"{row['signal']} {row['target']}"].append((row["at"], row["at"] + end / 300, 2))
    panels: list[Lines | Bars] = [
        Lines(f"API process: resident MiB above {least:.1f}", {"rss": api("rss_mib", least)}),
        Lines("API process: MiB", {n: api(f"{n}_mib") for n in ("rss", "pss", "anonymous")}),
        Lines("engine: resident MiB", {"rss": engine}),
        Lines("API process", {n: api(n) for n in ("descriptors", "threads")}),
        Lines("pages", pages),
        Lines("sequences", states),
        Bars("signals", hits),
    ]
    return svg("A soak; shaded: no signals", panels, end, tuple(begin["quiet"]))


def tell(folder: Path) -> bool:
    """Print the table and the JSON line, draw the picture; whether nothing has failed."""
    rows = [json.loads(line) for line in (folder / "soak.jsonl").read_text().splitlines()]
    if not any(row["what"] == "sample" for row in rows):
        print(f"{folder}: the run ended before its first sample")
        return False
    lines = judge(rows)
    (folder / "soak.svg").write_text(picture(rows))
    for line in lines:
        print(f"{SYMBOLS[line.passed]:11} | {line.what:46} | {line.found}")
    samples = [row for row in rows if row["what"] == "sample"]
    whole = {
        "seconds": samples[-1]["at"],
        "busy_cores": {name: round(cores, 3) for name, cores in busy(samples).items()},
        "files": {row["when"]: row["files"] for row in rows if row["what"] == "files"},
        "first_bad": [row["why"] for row in rows if row["what"] == "bad"][:5],
        "lines": [line._asdict() for line in lines],
    }
    print(json.dumps(whole))
    return all(line.passed is not False for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    sys.exit(int(not tell(parser.parse_args().folder)))
