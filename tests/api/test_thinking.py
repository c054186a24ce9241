"""Thoughts over HTTP: told apart, counted, asked for and refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.talking import GRADED, HERMES, THINKING, talking
from tests.api.test_openai_client import client_of
from tests.api.test_tools import CHAT, HELLO, says_it

ASKED: Any = {"model": "tiny", "messages": HELLO}
USAGE: Any = {"stream": True, "stream_options": {"include_usage": True}}

THOUGHT = "<think>\nHm, 你好.\n</think>\n\nHello."


def test_thoughts_are_told_apart_and_counted() -> None:
    with talking(THINKING, says_it(THOUGHT)) as (_, base), client_of(base) as client:
        whole = client.chat.completions.create(**ASKED)
        chunks = list(client.chat.completions.create(**ASKED, **USAGE))
    message = whole.choices[0].message
    assert (message.content, message.model_extra) == ("Hello.", {"reasoning_content": "Hm, 你好."})
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    thought = "".join((d.model_extra or {}).get("reasoning_content", "") for d in deltas)
    assert (thought, "".join(d.content or "" for d in deltas)) == ("Hm, 你好.", "Hello.")
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    num_thought = whole.usage.completion_tokens_details.reasoning_tokens or 0
    assert 8 < num_thought < whole.usage.completion_tokens - 2
    assert chunks[-1].usage == whole.usage


def test_a_prompt_may_open_the_thoughts() -> None:
    with talking(THINKING, says_it("Hm.</think>Hello.")) as (_, base):
        for is_on, expected in ((True, ("Hm.", "Hello.")), (False, (None, "Hm.</think>Hello."))):
            body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": is_on}}
            message = httpx.post(base + CHAT, json=body).json()["choices"][0]["message"]
            assert (message["reasoning_content"], message["content"]) == expected


def test_the_operator_may_leave_thoughts_in_the_text() -> None:
    with talking(THINKING, says_it(THOUGHT), reasoning_parser="none") as (_, base):
        answer = httpx.post(base + CHAT, json={"messages": HELLO}).json()
    message = answer["choices"][0]["message"]
    assert "reasoning_content" not in message and "</think>" in message["content"]
    assert "completion_tokens_details" not in answer["usage"]


def prompt_of(base: str, **fields: Any) -> str:
    body = {"messages": HELLO, "return_token_ids": True, **fields}
    ids = httpx.post(base + CHAT, json=body).json()["prompt_token_ids"]
    return str(httpx.post(f"{base}/detokenize", json={"tokens": ids}).json()["prompt"])


def test_the_template_is_told_how_much_to_think() -> None:
    with talking(THINKING, says_it("a")) as (_, base):
        assert prompt_of(base, reasoning_effort="none").endswith("</think>\n\n")
    with talking(GRADED, says_it("a")) as (_, base):
        asked = {"reasoning_effort": "low", "thinking_token_budget": 64}
        assert prompt_of(base, **asked).endswith("low 64")
        assert prompt_of(base).endswith("assistant\n ")


@pytest.mark.parametrize(
    ("template", "fields", "param", "message"),
    [
        (THINKING, {"reasoning_effort": "high"}, "reasoning_effort", "knows no degrees"),
        (HERMES, {"reasoning_effort": "none"}, "reasoning_effort", "no variable for thinking"),
        (THINKING, {"thinking_token_budget": 5}, "thinking_token_budget", "thinking_budget"),
        (GRADED, {"thinking_token_budget": -1}, "thinking_token_budget", "equal to 0"),
        (GRADED, {"reasoning_effort": "some"}, "reasoning_effort", "'minimal'"),
        (
            GRADED,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}},
            "reasoning_effort",
            "say the same",
        ),
        (GRADED, {"include_reasoning": False}, "include_reasoning", "not supported"),
    ],
)
def test_what_the_model_cannot_be_told_is_refused(
    template: str, fields: dict[str, Any], param: str, message: str
) -> None:
    with talking(template, says_it("a")) as (_, base):
        error = httpx.post(base + CHAT, json={"messages": HELLO, **fields}).json()["error"]
    assert error["param"] == param
    assert message in error["message"]
