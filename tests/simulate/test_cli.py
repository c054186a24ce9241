"""The command: what it prints and writes, and faults in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dynamo_serve import cli
from dynamo_serve.bench import record
from dynamo_serve.trace import Arrival, Line
from tests.simulate import synthetic


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = random.Random(1)
    lines: list[Line] = [*synthetic.traffic(rng, 40, 20.0), *synthetic.steps(rng, 300, noise=0.05)]
    return synthetic.write(tmp_path / "trace.jsonl", lines)


def test_it_prints_errors_of_the_fit_and_a_line_for_machines(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trace.with_name("run.jsonl")
    assert cli.main(["simulate", str(trace), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "decode steps" in told and "(p90)" in told
    assert "recorded  simulated  difference" in told
    plain = json.loads(told.splitlines()[-1])
    assert plain["simulated"]["requests"] == 40
    assert "error" in plain
    run = record.read(out)
    assert len(run.records) == 40 and run.samples
    assert run.about["command"] == "simulate"


def test_two_settings_are_compared(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    less = "scheduler.max_decode_sequences=1"
    assert cli.main(["simulate", str(trace), "--cost", "fixed=10ms", "--diff-set", less]) == 0
    told = capsys.readouterr().out
    assert "with --diff-set" in told
    plain = json.loads(told.splitlines()[-1])
    assert plain["other_settings"] == {"scheduler.max_decode_sequences": 1}
    assert plain["changed"]["TTFT p50"] > 1


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--set", "scheduler.max_prefil=1"], "scheduler.max_prefil: unknown key; did you mean"),
        (["--set", "engine.threads=2"], "engine.threads: not simulated"),
        (["--diff-set", "scheduler.speculation=off"], "scheduler.speculation: not simulated"),
        (["--set", "scheduler.max_mixed_tokens=0"], "scheduler.max_mixed_tokens"),
        (["--cost", "fixed=soon"], "--cost: fixed = 'soon'"),
        (["--routing", "best"], "--routing best: no such policy"),
        (["--replicas", "0"], "--replicas 0: allowed: 1 or more"),
        (["--look", "0"], "--look 0: allowed"),
        (["--diff-out", "x.jsonl"], "--diff-out: there is nothing to write"),
        (["--out", "/no/such/folder/x.jsonl"], "there is no folder"),
    ],
)
def test_a_fault_is_one_line(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fault: str
) -> None:
    assert cli.main(["simulate", str(trace), *arguments]) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], "nobody asks for anything"),
        ([Arrival(0.0, 20, 1, 1, pages=((0, 2),))], "has 2 full pages in 20 prompt tokens"),
        ([Arrival(0.0, 20, 1, 1, pages=((-1, 1),))], "page number below 0"),
        ([Arrival(0.0, 20, 1, 1)], "record for longer, or say what steps take with --cost"),
    ],
)
def test_a_bad_trace_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Arrival], fault: str
) -> None:
    path = synthetic.write(tmp_path / "t.jsonl", lines)
    assert cli.main(["simulate", str(path)]) == 2
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1


def test_a_missing_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read this file" in capsys.readouterr().err
