"""The official clients of OpenAI, for Python and for Node."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import clients
from scripts.clients import Kit
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def parsed_call(told: Any) -> None:
    name, arguments = told
    assert name == "GetWeather"
    assert list(arguments) == ["city"] and isinstance(arguments["city"], str)


def folded_call(told: Any) -> None:
    """Out of the events of a stream, the arguments told as done."""
    assert told["call"] == judging.PARIS
    assert any("arguments.done" in kind for kind in told["kinds"])


JUDGES: dict[str, Judge] = {
    "models": judging.one_model,
    "chat": judging.chat,
    "stream": judging.stream,
    "stream_helper": folded_call,
    "parse": judging.is_mia,
    "parse_tool": parsed_call,
    "tool_loop": judging.tool_loop,
    "logprobs": judging.logprobs,
    "completion": judging.completion,
    "refusal": judging.refusal,
}
PYTHON = {**JUDGES, "several_at_once": judging.sums_are_right}
NODE = {
    **JUDGES,
    "run_tools": judging.own_loop,
    "responses": judging.stream,
    "responses_parse": judging.is_mia,
    "embeddings": judging.two_vectors,
}


@pytest.mark.parametrize("kit", [clients.PYTHON, clients.PYTHON_OPENAI_2], ids=["3", "2"])
@pytest.mark.parametrize("feature", PYTHON)
def test_python(programs: Programs, url: str, kit: Kit, feature: str) -> None:
    programs.judge(PYTHON[feature], kit, "openai_client.py", feature, url)


@pytest.mark.parametrize("feature", NODE)
def test_node(programs: Programs, url: str, feature: str) -> None:
    programs.judge(NODE[feature], clients.NODE, "openai_client.mjs", feature, url)
