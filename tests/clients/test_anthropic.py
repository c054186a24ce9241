"""The official client of Anthropic, and LangChain's package for it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def chat(told: Any) -> None:
    judging.chat({**told, "finish": {"end_turn": "stop"}.get(told["finish"])})


def loop(told: Any) -> None:
    assert told["call"] == judging.PARIS
    assert told["finish"] == ["tool_use", "end_turn"]
    judging.tells_the_weather(told["text"])


def equal_counts(told: Any) -> None:
    counted, used = told
    assert counted == used > 10


def stopped(told: Any) -> None:
    assert told == ["stop_sequence", "42"]


def refused(told: Any) -> None:
    assert told == "invalid_request_error"


ANTHROPIC: dict[str, Judge] = {
    "models": lambda told: judging.one_model(told),
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
