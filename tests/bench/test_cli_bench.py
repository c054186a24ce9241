"""`dynamo-serve bench run` as its user sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.stub_server import Delays, Stub, serving
from dynamo_serve import cli
from dynamo_serve.bench import record, scenario
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.bench.sweep import sweep
from dynamo_serve.bench.targets import verdicts
from tests.architecture.source import ROOT

UNSEEN = ("x", "--rate", "1", "--requests", "1", "--set", "stream=false")
GATEWAY = ROOT / "bench" / "scenarios" / "gateway.yaml"
SHIPPED = sorted((ROOT / "bench" / "scenarios").glob("*.yaml"))


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub(delays=Delays(0.002, 0.001))) as found:
        yield found


def bench(*words: str) -> int:
    return cli.main(["bench", "run", *words])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_run_is_written_and_told(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.jsonl"
    flags = ("--workload", "chat", "--concurrency", "4", "--requests", "12", "--out", str(out))
    assert bench(stub.url, *flags, "--set", "shape.think=0", "--set", "shape.output=3") == 0
    told = capsys.readouterr().out
    assert "12: 12 ok" in told
    assert "TTFT" in told
    found = record.read(out)
    assert len(found.records) == 12
    assert found.about["model"] == "stub"
    assert found.about["plan"]["texts"] == {
        "made_of": "words",
        "tokens_per_word": 1.0,
        "exact": False,
    }


@pytest.mark.parametrize(("limit", "code"), [("100000", 0), ("0.001", 1)])
def test_a_target_that_is_missed_is_the_exit_code(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, code: int
) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(
        "workload: plain\nrate: 200\nrequests: 10\nshape: {output: 3}\n"
        f"targets: {{ttft_p99_ms: {limit}, failed: 0}}\n"
    )
    out = str(tmp_path / "run.jsonl")
    assert bench(stub.url, "--scenario", str(path), "--out", out, "--json") == code
    told = last_line(capsys)["targets"]
    assert (told["ttft_p99_ms"]["met"], told["failed"]["met"]) == (code == 0, True)


def test_a_run_of_which_nothing_was_answered_has_failed(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--workload", "plain", "--rate", "200", "--requests", "5", "--set", "shape.output=2")
    more = ("--set", "extra.stub.status=500", "--prompts", "words")
    assert bench(stub.url, *words, "--out", str(tmp_path / "run.jsonl"), *more) == 2
    assert "a first short request failed" in capsys.readouterr().err
    more = ("--set", "extra.stub.fail_after=0", "--bandwidth", "100")  # only streams fail so
    assert bench(stub.url, *words, "--out", str(tmp_path / "run.jsonl"), *more) == 1
    told = capsys.readouterr()
    assert "error: none of 5 requests was answered; most often: broke" in told.err
    assert "unknown: the server does not say how many bytes" in told.out


def test_a_dry_run_needs_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("http://127.0.0.1:1", "--workload", "rag", "--rate", "3", "--requests", "50")
    assert bench(*words, "--dry-run") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["calls"], told["sessions"], told["kinds"]) == (50, 50, {"rag": 50})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("http://127.0.0.1:1", "--rate", "1", "--requests", "1"), "start a server with"),
        (("http://127.0.0.1:1", "--requests", "1"), "how much load"),
        (("ftp://x", "--rate", "1", "--requests", "1"), "an address is like"),
        (("x", "--rate", "1", "--requests", "1", "--scenario", "no-such"), "no-such"),
        (("x", "--rate", "1", "--requests", "1", "--out", "no/such/run"), "no folder"),
        (("x", "--rate", "1", "--requests", "1", "--out", "."), "cannot be written"),
        (("x", "--rate", "1", "--requests", "1", "--set", "seed"), "must be KEY=VALUE"),
        (("x", "--concurrency", "2", "--duration", "1", "--processes", "2"), "give requests"),
        (("x", "--scenario", str(GATEWAY), "--workload", "rag"), "has its own workload"),
        (("x", "--scenario", str(GATEWAY), "--api-key", "k"), "has its own key"),
        (
            (*UNSEEN, "--set", "promises.ttft_ms=5"),
            "only e2e_ms",
        ),
    ],
)
def test_a_fault_of_the_callers_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert bench(*words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_ids_are_sent_as_ids_only_where_their_number_is_known(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--workload", "plain", "--rate", "9", "--requests", "1", "--prompts", "ids")
    assert bench(stub.url, *words, "--out", str(tmp_path / "run.jsonl")) == 2
    assert "use words" in capsys.readouterr().err


def test_a_sweep_writes_each_level_and_tells_of_the_best(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.jsonl"
    words = ("--workload", "plain", "--requests", "8", "--out", str(out), "--sweep")
    keys = ("sweep.first=100", "sweep.factor=4", "sweep.most=500", "shape.output=2")
    assert bench(stub.url, *words, *(w for key in keys for w in ("--set", key))) == 0
    assert Path(last_line(capsys)["out"]).is_file()
    rates = [record.read(path).about["plan"]["rate"] for path in sorted(tmp_path.iterdir())]
    assert rates == [100.0, 400.0]


def made(rate: float, served: float) -> Run:
    """A second at `rate`, of which the server has served so many."""
    count = min(rate, served)
    records = [
        Record(n, n / rate, n / rate, outcome="ok" if n < count else "refused", first=0.1, end=1.0)
        for n in range(round(rate))
    ]
    return Run({}, 1.0, records)


def test_a_sweep_ends_where_no_more_is_served() -> None:
    levels = sweep({"first": 10, "factor": 2}, lambda _, rate: made(rate, 70.0))
    assert [(level.rate, level.good) for level in levels] == [
        *((10, 10), (20, 20), (40, 40), (80, 70), (160, 70)),
    ]


def test_a_sweep_ends_where_nothing_is_served_at_all() -> None:
    levels = sweep({"first": 10, "factor": 2}, lambda _, rate: made(rate, 0.0))
    assert [(level.rate, level.good) for level in levels] == [(10, 0), (20, 0)]


def test_a_sweep_goes_on_where_chance_brings_fewer_requests_and_all_are_served() -> None:
    came = {10: 14, 20: 11, 40: 45, 80: 80, 160: 160}
    levels = sweep({"first": 10, "factor": 2}, lambda _, rate: made(came[round(rate)], 70.0))
    assert [level.good for level in levels] == [14, 11, 45, 70, 70]


def test_targets_are_of_whom_they_name() -> None:
    records = [
        Record(0, 0.0, 0.0, kind="a", first=0.1, end=1.0, gaps=(0.01, 0.3), output_tokens=3,
               targets={"ttft": 0.2}),
        Record(1, 0.0, 0.0, kind="b", tenant="web", first=0.4, end=2.0, output_tokens=1,
               targets={"ttft": 0.2}),
        Record(2, 0.0, 0.0, kind="b", outcome="failed"),
        Record(3, 0.0, 0.0, kind="probe", first=9.0, end=9.0),
        Record(4, 0.0, 0.0, kind="a", outcome="failed", is_warm_up=True),
    ]  # fmt: skip
    wanted = {
        **{"failed": 0, "a.failed": 0, "ttft_p99_ms": 500, "a.ttft_p99_ms": 50, "good_share": 0.3},
        **{
            "web.good_share": 0.5,
            "good_requests_per_s": 0.5,
            "ttft_p50_ms": 250,
            "probe.e2e_p50_ms": 1e4,
            "nobody.failed": 0,
            "itl_p99.9_ms": 300,
        },
    }
    found = {v.name: (v.found, v.is_met) for v in verdicts(Run({}, 2.0, records), wanted)}
    assert found == {
        "failed": (1.0, False),
        "a.failed": (0.0, True),
        "ttft_p99_ms": (pytest.approx(397.0), True),
        "a.ttft_p99_ms": (100.0, False),
        "good_share": (1 / 3, True),
        "web.good_share": (0.0, False),
        "good_requests_per_s": (0.5, True),
        "ttft_p50_ms": (250.0, True),
        "probe.e2e_p50_ms": (9000.0, True),
        "nobody.failed": (None, False),
        "itl_p99.9_ms": (pytest.approx(299.71), True),
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_scenarios_are_valid_and_have_targets(path: Path) -> None:
    wanted = scenario.scenario_of(scenario.read(path))
    assert wanted.targets
    assert wanted.name == path.stem
