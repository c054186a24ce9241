"""instructor: an object of a class, whichever way it asks for one."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.clients import PYTHON_OPENAI_2
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def person_and_tokens(told: Any) -> None:
    judging.is_mia(told["person"])
    assert told["tokens"] > 10


def people(told: Any) -> None:
    assert told
    assert all(sorted(person) == ["age", "name"] for person in told)


JUDGES: dict[str, Judge] = {
    "tools": judging.is_mia,
    "tools_strict": judging.is_mia,
    "json_schema": judging.is_mia,
    "json": judging.is_mia,
    "partial": judging.is_mia,
    "iterable": people,
    "with_completion": person_and_tokens,
}


@pytest.mark.parametrize("feature", JUDGES)
def test_instructor(programs: Programs, url: str, feature: str) -> None:
    programs.judge(JUDGES[feature], PYTHON_OPENAI_2, "instructor_client.py", feature, url)
