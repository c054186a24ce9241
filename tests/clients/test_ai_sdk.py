"""Vercel's AI SDK, with its packages for OpenAI, for servers like it, and for Anthropic."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.clients import NODE
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge


def loop(told: Any) -> None:
    judging.own_loop(told)
    assert told["finish"] == ["tool-calls", "stop"]


def grown(told: Any) -> None:
    judging.is_mia(told["object"])
    judging.in_pieces(told["parts"])


def choice(told: Any) -> None:
    assert told in ("sunny", "rainy")


def about_a_fox(told: Any) -> None:
    assert "fox" in told


JUDGES: dict[str, Judge] = {
    "chat": judging.chat,
    "stream": judging.stream,
    "tool_loop": loop,
    "stream_tools": judging.own_loop,
    "required_tool": judging.are_calls,
    "generate_object": judging.is_mia,
    "generate_output": judging.is_mia,
    "stream_object": grown,
    "generate_choice": choice,
}


@pytest.mark.parametrize("feature", JUDGES)
def test_compatible_provider(programs: Programs, url: str, feature: str) -> None:
    programs.judge(JUDGES[feature], NODE, "ai_sdk.mjs", feature, url)


PROVIDERS: dict[str, Judge] = {
    f"{kind}_{feature}": judge
    for kind in ("responses", "chat")
    for feature, judge in {
        "text": judging.chat,
        "stream": judging.stream,
        "tool_loop": judging.own_loop,
        "output": judging.is_mia,
    }.items()
}
PROVIDERS |= {"two_turns": about_a_fox, "two_turns_unkept": about_a_fox}


@pytest.mark.parametrize("feature", PROVIDERS)
def test_other_providers(programs: Programs, url: str, feature: str) -> None:
    programs.judge(PROVIDERS[feature], NODE, "ai_sdk_providers.mjs", feature, url)
