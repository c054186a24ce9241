"""A run comes back from its file as it was; a file that is none is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.bench.record import Run, read, write
from dynamo_serve.errors import ConfigError
from tests.bench.synthetic import made_run

HEAD = {"format": "dynamo-serve-run", "format_version": 1, "seconds": 1.0, "about": {}}


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    run = made_run(seconds=5)
    write(run, tmp_path / "run.jsonl")
    assert read(tmp_path / "run.jsonl") == run


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ({"number": 0, "due": 0.0}, "sent"),
        ({"number": 0, "due": "now", "sent": 0.0}, "due"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "gaps": 3}, "int"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "gaps": ["x"]}, "gaps"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "first": []}, "first"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "targets": {"ttft": "fast"}}, "targets"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "is_warm_up": 1}, "is_warm_up"),
        ({"number": True, "due": 0.0, "sent": 0.0}, "number"),
        ({"number": 0, "due": 0.0, "sent": 0.0, "colour": "red"}, "colour"),
        ({"at": 0.0, "values": {"a": None}}, "values"),
        ({"something": "else"}, "something"),
    ],
)
def test_what_cannot_be_a_line_of_a_run_is_named(
    tmp_path: Path, line: dict[str, Any], word: str
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"{json.dumps(HEAD)}\n{json.dumps(line)}\n")
    with pytest.raises(ConfigError, match=rf"line 2: .*{word}"):
        read(path)


@pytest.mark.parametrize("gone", ["about", "seconds"])
def test_a_header_says_what_ran_and_how_long(tmp_path: Path, gone: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({key: value for key, value in HEAD.items() if key != gone}))
    with pytest.raises(ConfigError, match=f"line 1.*{gone}"):
        read(path)


def test_an_empty_run_is_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(HEAD))
    assert read(path) == Run({}, 1.0, [])
