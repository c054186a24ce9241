"""LlamaIndex, with its packages for servers that are like OpenAI's."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.clients import PYTHON_OPENAI_2
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def chat(told: Any) -> None:
    judging.sum_is_right(told["text"])
    assert told["tokens"] > 10


def stream(told: Any) -> None:
    assert told["text"] == told["whole"]
    assert "fox" in told["text"]
    judging.in_pieces(told["pieces"])


def some_text(told: Any) -> None:
    assert isinstance(told, str) and told


JUDGES: dict[str, Judge] = {
    "chat": chat,
    "complete": judging.sum_is_right,
    "stream": stream,
    "plain_completions": some_text,
    "tool_call": lambda told: judging.are_calls([told]),
    "agent": judging.own_loop,
    "structured_predict": judging.is_mia,
    "structured_output": judging.is_mia,
}


@pytest.mark.parametrize("feature", JUDGES)
def test_llm(programs: Programs, url: str, feature: str) -> None:
    programs.judge(JUDGES[feature], PYTHON_OPENAI_2, "llamaindex_client.py", feature, url)
