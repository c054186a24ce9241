"""LangChain, with its package for OpenAI."""

from __future__ import annotations

import pytest

from scripts.clients import PYTHON
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge

JUDGES: dict[str, Judge] = {
    "chat": judging.chat,
    "chain": judging.sum_is_right,
    "stream": judging.stream,
    "batch": judging.sums_are_right,
    "asynchronous": judging.sum_is_right,
    "tool_loop": judging.tool_loop,
    "stream_tools": lambda told: judging.are_calls([told]),
    "tool_choice": judging.are_calls,
    "strict_tools": judging.is_call,
    "structured_output": judging.all_are_mia,
    "stream_structured_output": judging.is_mia,
    "logprobs": judging.logprobs,
}


@pytest.mark.parametrize("feature", JUDGES)
def test_chat_model(programs: Programs, url: str, feature: str) -> None:
    programs.judge(JUDGES[feature], PYTHON, "langchain_client.py", feature, url)
