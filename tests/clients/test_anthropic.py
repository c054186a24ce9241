"""The official client of Anthropic, and the packages of LangChain and of the AI SDK for it."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.clients import NODE, PYTHON
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def chat(told: Any) -> None:
    judging.chat({**told, "finish": {"end_turn": "stop"}.get(told["finish"])})


def loop(told: Any) -> None:
    judging.called_and_told(told)
    assert told["finish"] == ["tool_use", "end_turn"]


def equal_counts(told: Any) -> None:
    counted, used = told
    assert counted == used > 10


def stopped(told: Any) -> None:
    assert told == ["stop_sequence", "42"]


def refused(told: Any) -> None:
    assert told == "invalid_request_error"


ANTHROPIC: dict[str, Judge] = {
    "models": judging.one_model,
    "chat": chat,
    "stream": judging.stream,
    "tool_loop": loop,
    "stream_tools": lambda told: judging.are_calls([told]),
    "tool_choice": judging.are_calls,
    "tool_runner": judging.own_loop,
    "parse": judging.is_mia,
    "count_tokens": equal_counts,
    "stop_sequence": stopped,
    "refusal": refused,
}
LANGCHAIN: dict[str, Judge] = {
    "chat": chat,
    "stream": judging.stream,
    "tool_loop": loop,
    "stream_tools": lambda told: judging.are_calls([told]),
    "structured_output": judging.all_are_mia,
}
AI_SDK: dict[str, Judge] = {
    "messages_text": judging.chat,
    "messages_stream": judging.stream,
    "messages_tool_loop": judging.own_loop,
    "messages_output": judging.is_mia,
}


@pytest.mark.parametrize("feature", ANTHROPIC)
def test_official(programs: Programs, url: str, feature: str) -> None:
    programs.judge(ANTHROPIC[feature], PYTHON, "anthropic_client.py", feature, url)


@pytest.mark.parametrize("feature", LANGCHAIN)
def test_langchain(programs: Programs, url: str, feature: str) -> None:
    programs.judge(LANGCHAIN[feature], PYTHON, "langchain_anthropic_client.py", feature, url)


@pytest.mark.parametrize("feature", AI_SDK)
def test_ai_sdk(programs: Programs, url: str, feature: str) -> None:
    programs.judge(AI_SDK[feature], NODE, "ai_sdk_providers.mjs", feature, url)
