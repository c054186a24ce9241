"""The verdict of a soak, on made-up series: flat is flat, and a leak is found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench.soak import BETWEEN_S, hits, quiet
from bench.soak_report import flat, judge, quarters, same_age, slope, tell

HOUR = 3600.0


def series(
    *, per_hour: float, noise: float = 0.5, seed: int = 1, seconds: float = HOUR / 2
) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [
        (at, 275.0 + per_hour * at / HOUR + rng.gauss(0.0, noise))
        for at in range(0, int(seconds), 10)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_grow_is_flat(seed: int) -> None:
    line = flat("memory", series(per_hour=0.0, seed=seed), limit=4.0)
    assert line.passed is True


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_of_ten_mib_an_hour_is_found(seed: int) -> None:
    line = flat("memory", series(per_hour=10.0, seed=seed), limit=4.0)
    assert line.passed is False


def test_what_shrinks_is_no_leak() -> None:
    assert flat("memory", series(per_hour=-50.0), limit=4.0).passed is True


def test_noise_that_hides_a_leak_is_not_called_flat() -> None:
    assert flat("memory", series(per_hour=0.0, noise=40.0), limit=4.0).passed is None


def test_a_few_samples_tell_nothing() -> None:
    assert flat("memory", series(per_hour=100.0, seconds=120.0), limit=4.0).passed is None


def test_the_interval_holds_the_slope_that_was_put_in() -> None:
    within = 0
    for seed in range(200):
        found = slope(series(per_hour=6.0, seed=seed))
        assert found is not None
        within += abs(found.mib_h - 6.0) <= found.margin
    assert within / 200 == pytest.approx(0.95, abs=0.04)


def test_a_step_between_the_quarters_is_found() -> None:
    points = series(per_hour=0.0)
    middle = len(points) // 2
    assert quarters("memory", points).passed
    stepped = points[:middle] + [(at, mib + 10.0) for at, mib in points[middle:]]
    assert not quarters("memory", stepped).passed


def test_engines_are_compared_at_the_same_age() -> None:
    def life(base: float) -> list[tuple[float, float]]:
        return [(age, base + age / 10) for age in range(0, 100, 10)]

    assert same_age({pid: life(440.0) for pid in range(4)}).passed
    assert not same_age({pid: life(440.0 + 10 * pid) for pid in range(4)}).passed
    assert same_age({1: life(440.0)}).passed is None


@pytest.mark.parametrize("minutes", [2.0, 10.0, 60.0])
def test_signals_leave_a_stretch_in_peace(minutes: float) -> None:
    seconds = 60 * minutes
    begin, end = quiet(seconds)
    planned = hits(seconds, random.Random(1))
    assert planned
    assert not [hit for hit in planned if begin <= hit.at < end]
    assert planned[-1].at < seconds
    assert planned == hits(seconds, random.Random(1))
    assert minutes < 60 or (end - begin == 600 and len(planned) > 0.6 * 3000 / BETWEEN_S)


def row(what: str, at: float, **api: float) -> dict[str, Any]:
    facts = {"rss_mib": 275.0, "pss_mib": 230.0, "anonymous_mib": 190.0, "descriptors": 9,
             "threads": 5, "cpu_s": at / 10, "pid": 1}  # fmt: skip
    names = ('pages{state="used"}', 'pages{state="cached"}', "sequences_live",
             "sequences_waiting", "sequences_parked", "engine_restarts_total")  # fmt: skip
    return {
        "what": what,
        "at": at,
        "api": {**facts, **api},
        "engine": {**facts, "pid": 2 + int(at > 1800), "age_s": at % 1800, "rss_mib": 440.0},
        "others": [],
        "client_cpu_s": at / 10,
        "numbers": {f"dserve_{name}": 0.0 for name in names},
        "requests": 100,
        "resumed": 10,
    }


def run(**last: float) -> list[dict[str, Any]]:
    begin = {"what": "begin", "at": 0.0, "seconds": HOUR, "quiet": [2000.0, 2600.0]}
    samples = [row("sample", float(at)) for at in range(0, 3600, 10)]
    return [begin, row("first", 0.0), *samples, row("last", 3700.0, **last)]


def failed(rows: list[dict[str, Any]]) -> list[str]:
    return [line.what for line in judge(rows) if not line.passed]


def test_a_run_in_which_nothing_changed_passes() -> None:
    assert failed(run()) == []


def test_what_is_left_in_the_end_is_named() -> None:
    assert failed(run(descriptors=10)) == ["descriptors of the API process"]
    assert failed(run(threads=60)) == ["threads of the API process"]
    rows = run()
    rows[-1]["numbers"]["dserve_sequences_parked"] = 1.0
    rows[-1]["others"] = [{"pid": 9, "cpu_s": 0.0}]
    assert failed(rows) == ["nothing in use in the end", "processes below it"]


def test_an_engine_that_died_by_itself_is_named() -> None:
    rows = run()
    rows[-1]["numbers"]["dserve_engine_restarts_total"] = 1.0
    assert failed(rows) == ["engines lost"]
    rows.insert(1, {"what": "hit", "at": 5.0, "target": "engine", "signal": "SIGKILL"})
    assert failed(rows) == []


def test_a_run_that_was_broken_off_still_leaves_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*run()[:-1], {"what": "bad", "at": 60.0, "why": "plain: another answer"}]
    (tmp_path / "soak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not tell(tmp_path)
    assert "another answer" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")
