"""`bench compare` of two servers: runs in turns, servers that are started and stopped for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.stub_server import Delays, Stub, serving
from dynamo_serve import cli, cli_compare
from dynamo_serve.bench import own_server, record
from dynamo_serve.bench.plan import Planned
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.run import Options, execute
from dynamo_serve.bench.scenario import Scenario
from tests.api.conftest import model_folder as model_folder  # noqa: PLC0414 - a fixture
from tests.api.conftest import tokenizer as tokenizer  # noqa: PLC0414
from tests.architecture.source import ROOT
from tests.patience import PATIENCE_S

LOAD = ("--workload", "plain", "--rate", "100", "--requests", "16", "--set", "shape.output=4")
SOON, LATE = Delays(0.002, 0.001, 0.1), Delays(0.12, 0.001, 0.1)


@pytest.fixture
def pair() -> Iterator[tuple[Stub, Stub]]:
    with serving(Stub(delays=SOON)) as a, serving(Stub(delays=LATE)) as b:
        yield a, b


def compare(*words: str) -> int:
    return cli.main(["bench", "compare", *words])


def urls(pair: tuple[Stub, Stub]) -> tuple[str, ...]:
    return ("--url-a", pair[0].url, "--url-b", pair[1].url)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def prompts(stub: Stub) -> dict[int, list[str]]:
    """Those of the load, by run: calibration asks for one token."""
    asked = [body["prompt"] for _, body in stub.seen if body["max_tokens"] > 1]
    runs: dict[int, list[str]] = defaultdict(list)
    for number, prompt in enumerate(asked):
        runs[number // 16].append(prompt)
    return {number: sorted(run) for number, run in runs.items()}


def test_two_servers_are_asked_the_same_in_turns(
    pair: tuple[Stub, Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert compare(*urls(pair), *LOAD, "--repeat", "3", "--out", str(folder), "--json") == 0
    found = last_line(capsys)
    assert found["pairs"] == 3
    assert found["differences"]["ttft_p50_ms"]["effect"]["value"] > 30  # B's first tokens are late
    assert not any("turns" in note for note in found["notes"])
    assert [key for key, _, _ in found["apart"]] == ["url"]
    a, b = map(prompts, pair)
    assert a == b  # the same plan within a pair …
    assert len({tuple(run) for run in a.values()}) == 3  # … and another one in the next
    names = {f"{side}-{repeat}.jsonl" for side in "ab" for repeat in (1, 2, 3)}
    assert {path.name for path in folder.iterdir()} == names
    began = {path.stem: record.read(path).about["began_at"] for path in folder.iterdir()}
    assert sorted(began, key=lambda name: began[name]) == ["a-1", "b-1", "b-2", "a-2", "a-3", "b-3"]
    # What was written is compared again from files, with the same result.
    files = [[str(folder / f"{side}-{n}.jsonl") for n in (1, 2, 3)] for side in "ab"]
    assert compare(*files[0], "--against", *files[1], "--json") == 0
    assert last_line(capsys)["differences"] == found["differences"]


def test_an_interruption_compares_what_is_complete(
    pair: tuple[Stub, Stub],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Run] = []

    def third_is_cut(plan: Iterator[Planned], options: Options) -> Run:
        made.append(execute(plan, options))
        if len(made) == 3:
            made[-1].about["interrupted"] = True
        return made[-1]

    monkeypatch.setattr(cli_compare, "execute", third_is_cut)
    folder = tmp_path / "out"
    assert compare(*urls(pair), *LOAD, "--out", str(folder), "--json") == 130
    assert last_line(capsys)["pairs"] == 1
    assert {path.name for path in folder.iterdir()} == {"a-1.jsonl", "b-1.jsonl", "b-2.jsonl"}


def test_runs_of_which_nothing_was_answered_and_targets_that_were_missed_are_told(
    pair: tuple[Stub, Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = (*LOAD, "--repeat", "1")
    words = (*urls(pair), *short, "--set", "targets.ttft_p50_ms=100", "--out", str(tmp_path / "1"))
    assert compare(*words) == 1
    error = capsys.readouterr().err
    assert "B1: MISSED: ttft_p50_ms" in error and "A1: MISSED" not in error
    pair[1].wish["status"] = 500
    assert compare(*urls(pair), *short, "--prompts", "words", "--out", str(tmp_path / "2")) == 2
    assert "a first short request failed: as wished" in capsys.readouterr().err


def test_a_smaller_context_is_that_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = [{"limits": {"max_model_len": size, "vocab_size": 99}} for size in (4096, 200)]
    with serving(Stub(delays=SOON, facts=facts[0])) as a, serving(Stub(facts=facts[1])) as b:
        folder = tmp_path / "out"
        words = ("--workload", "chat", "--concurrency", "4", "--requests", "8", "--repeat", "1")
        quick = ("--set", "shape.output=3", "--set", "shape.think=0", "--bandwidth", "100")
        assert compare(*urls((a, b)), *words, *quick, "--out", str(folder), "--json") == 0
    for name in ("a-1.jsonl", "b-1.jsonl"):
        about = record.read(folder / name).about
        assert (about["plan"]["max_context"], about["bandwidth"]) == (200, 100e9)


def test_a_dry_run_says_whose_turn_it_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--serve-set-b", "scheduler.speculation=off", "--repeat", "2", "--dry-run", "--json")
    assert compare(*LOAD, *words, "--set-b", "class=batch") == 0
    told = last_line(capsys)
    assert told["turns"] == ["A1", "B1", "B2", "A2"]
    assert told["a"]["serve"] == "serve" and told["a"]["calls"] == 16
    assert told["b"]["serve"] == "serve --set scheduler.speculation=off"
    assert (told["b"]["class_name"], "class_name" in told["a"]) == ("batch", False)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "what is compared?"),
        (("--url-a", "x"), "what is compared?"),
        (("--url-a", "x", "--url-b", "y", "--serve-set", "engine.kind=fake"), "leave out --serve"),
        (("--url-a", "x", "--url-b", "y", "--start-timeout", "9"), "--start-timeout: only"),
        (("--serve-set-b", "engine.kind=wrong"), "engine.kind"),
        (("--serve-set-a", "server.port=80"), "listen where they are told"),
        (("--url-a", "x", "--url-b", "y", "--set", "sweep.first=1"), "at one load"),
        (("--url-a", "x", "--url-b", "y", "--repeat", "0"), "--repeat 0"),
        (("--url-a", "x", "--url-b", "y", "--out", "OLD"), "of an earlier comparison"),
        (("--url-a", "x", "--url-b", "y", "--html", "no/such"), "no folder"),
        (("OLD/a-1.jsonl", "--against", "OLD/a-1.jsonl", "--rate", "2"), "--rate: only to measure"),
        (("OLD/a-1.jsonl", "--against", "OLD/a-1.jsonl", "--repeat", "0"), "--repeat: only to"),
        (("--serve-set-b", "engine.kind=fake", "--start-timeout", "0"), "--start-timeout 0"),
        (("OLD/a-1.jsonl",), "1 runs of A and 0 of B"),
    ],
)
def test_a_fault_of_the_callers_is_told_before_anything_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], fault: str
) -> None:
    record.write(Run({}, 1.0, []), tmp_path / "a-1.jsonl")
    load: tuple[str, ...] = () if "OLD/a-1.jsonl" in words else LOAD
    if "sweep.first=1" in words:
        load = ("--workload", "plain", "--requests", "2")
    assert compare(*(word.replace("OLD", str(tmp_path)) for word in words), *load) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1


# --- servers of our own


def test_each_turn_has_a_server_of_its_own_that_is_stopped(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    both = ("engine.kind=fake", "engine.process=false", f"model.path={model_folder}")
    fake = [word for setting in both for word in ("--serve-set", setting)]
    sides = ("--serve-set-b", "engine.fake_step_ms=20")
    words = ("--repeat", "1", "--prompts", "ids", "--ignore-eos", "--out", str(folder))
    assert compare(*fake, *sides, *LOAD, *words) == 0
    told = capsys.readouterr()
    assert "Not enough runs to tell" in told.out
    assert "A1: starting" in told.err and "B1: 16 records" in told.err
    a, b = (record.read(folder / f"{side}-1.jsonl") for side in "ab")
    assert {r.outcome for r in (*a.records, *b.records)} == {"ok"}
    assert "url" not in told.out and "engine.fake_step_ms=20" in b.about["serve"]
    assert a.about["settings"]["engine"]["architecture"] == "fake"
    assert min((r.end or 0.0) - r.sent for r in b.records) > 4 * 0.02  # a prefill, three decodes
    for side in "ab":
        assert "draining" in (folder / f"{side}-1.log").read_text()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(own_server.ServerError, match=r"did not start \(exit code 2.*nowhere"),
        own_server.running(["--model", "/nowhere"], log, PATIENCE_S, lambda waited: None),
    ):
        pass


def test_an_interruption_stops_the_server_that_was_started(
    model_folder: str, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "dynamo_serve.cli", "bench", "compare", *LOAD]
    words += ["--serve-set", "engine.kind=fake", "--serve-set", f"model.path={model_folder}"]
    words += ["--rate", "1", "--requests", "5000", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(words, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None and child.stderr.readline().startswith("A1: starting")
        server = children_of(child.pid)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) == 130
        assert "no pair of runs is complete" in child.stderr.read()
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in server)


def children_of(pid: int) -> list[int]:
    """Those that it has, once it has any."""
    for _ in range(100_000):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found:
            return [int(word) for word in found]
        os.sched_yield()
    raise AssertionError("it has started nothing")


def test_keys_are_not_written_down() -> None:
    side = cli_compare.Side("a", Scenario(), "", ("server.api_keys=secret",))
    assert side.told() == {"serve": "serve --set server.api_keys=…"}
