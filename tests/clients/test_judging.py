"""A stream that came in one piece is asked for again; what is wrong is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.clients import PYTHON, Kit
from tests.clients import judging
from tests.clients.conftest import Programs


class Scripted(Programs):
    """Its programs come to one thing after the other."""

    def __init__(self, folder: Path, answers: Iterator[dict[str, Any]]) -> None:
        super().__init__(folder)
        self.answers = answers

    def _run(self, kit: Kit, program: str, url: str) -> dict[str, Any]:
        return {"stream": {"value": next(self.answers)}}


def stream(pieces: int, text: str = "a fox") -> dict[str, Any]:
    return {"text": text, "whole": "a fox", "pieces": pieces, "tokens": [9]}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.clients.conftest.skip_without", lambda kit: None)


def judge(folder: Path, *answers: dict[str, Any]) -> None:
    programs = Scripted(folder, iter(answers))
    programs.judge(judging.stream, PYTHON, "any.py", "stream", "")
    assert next(programs.answers, None) is None


def test_one_that_was_late_is_asked_for_again(tmp_path: Path) -> None:
    judge(tmp_path, stream(1), stream(1), stream(5))


def test_one_that_never_comes_in_pieces_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="times not in pieces"):
        judge(tmp_path, *[stream(1)] * 50)


def test_wrong_words_fail_at_once(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        judge(tmp_path, stream(5, "a hen"))
