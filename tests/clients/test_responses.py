"""The Responses API, with the official client and with LangChain."""

from __future__ import annotations

import pytest

from scripts.clients import PYTHON
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge

JUDGES: dict[str, Judge] = {
    "chat": judging.chat,
    "stream": judging.stream,
    "parse": judging.is_mia,
    "tool_loop": judging.called_and_told,
    "previous_response": judging.tells_the_weather,
    "langchain_chat": judging.chat,
    "langchain_stream": judging.stream,
    "langchain_tool_loop": judging.called_and_told,
    "langchain_structured_output": judging.is_mia,
}


@pytest.mark.parametrize("feature", JUDGES)
def test_responses(programs: Programs, url: str, feature: str) -> None:
    programs.judge(JUDGES[feature], PYTHON, "responses_client.py", feature, url)
