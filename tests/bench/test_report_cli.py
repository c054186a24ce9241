"""`bench report` and `bench compare` on files: words for people, the last line for machines."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve import cli
from dynamo_serve.bench.record import write
from tests.bench.synthetic import made_run


def files(folder: Path, name: str, *runs: dict[str, Any]) -> list[str]:
    paths = [folder / f"{name}{n}.jsonl" for n in range(len(runs))]
    for path, told in zip(paths, runs, strict=True):
        write(made_run(seconds=10, **told), path)
    return [str(path) for path in paths]


def last_line(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def test_a_report_ends_with_a_line_for_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out.html"
    assert cli.main(["bench", "report", *files(tmp_path, "run", {}), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "TTFT" in printed and f"written: {page}" in printed
    assert last_line(printed)["format"] == "dynamo-serve-report"
    assert last_line(printed)["figures"]["refused"] >= 0
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_with_json_it_is_that_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = files(tmp_path, "run", {"seed": 1}, {"seed": 2}, {"rate": 2.0})
    assert cli.main(["bench", "report", *runs, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [group["repeats"] for group in json.loads(line)["groups"]] == [2, 1]


def test_several_runs_are_repeats_or_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = files(tmp_path, "run", {"seed": 1}, {"seed": 2}, {"rate": 2.0})
    assert cli.main(["bench", "report", *runs]) == 0
    printed = capsys.readouterr().out
    assert "plan chat, rate 2.0" in printed
    assert "2 repeats of plan chat, rate 8.0: mean, and 95 % interval" in printed


def test_two_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = files(tmp_path, "a", *({"seed": n} for n in range(3)))
    slower = ({"seed": n, "step_ms": 24.0, "began_at": n * 1000 + 1_700_000_060} for n in range(3))
    b = files(tmp_path, "b", *slower)
    page = tmp_path / "out.html"
    assert cli.main(["bench", "compare", *a, "--against", *b, "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert last_line(printed)["differences"]["itl_mean_ms"]["verdict"] == "worse"
    assert "B is worse" in printed and "B is worse" in page.read_text()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["report", "gone.jsonl"], "gone.jsonl: No such file"),
        (["report", "."], "allowed: a file of a run"),
        (["report", "RUN", "--html", "gone/out.html"], "--html gone/out.html: No such file"),
        (["compare", "RUN", "--against", "RUN", "RUN"], "1 runs of A and 2 of B"),
        (["compare", "RUN", "--against", "RUN", "--matters", "-1"], "--matters -1"),
    ],
)
def test_a_fault_of_the_callers_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], fault: str
) -> None:
    (run,) = files(tmp_path, "run", {})
    assert cli.main(["bench", *(run if word == "RUN" else word for word in words)]) == 2
    assert fault in capsys.readouterr().err


def test_pictures_need_a_browser_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = files(tmp_path, "run", {})
    assert cli.main(["bench", "report", *run, "--png", str(tmp_path / "out")]) == 2
    assert "install chromium" in capsys.readouterr().err


def stand_in(folder: Path, script: str) -> None:
    program = folder / "chromium"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_pictures_are_what_the_browser_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, 'for a; do case $a in --screenshot=*) : > "${a#*=}";; esac; done')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run = files(tmp_path, "run", {})
    assert cli.main(["bench", "report", *run, "--png", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "throughput.png").is_file()
    assert (tmp_path / "out" / "kv-pages.png").is_file()
    stand_in(tmp_path, "echo broken >&2; exit 1")
    assert cli.main(["bench", "report", *run, "--png", str(tmp_path / "out")]) == 2
    assert "drew nothing: broken" in capsys.readouterr().err
