"""A real server with the bundled model: a shared head that does not end with a page is found."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.test_cli import ready, serving, wait_for

HEAD = list(range(300, 320))  # a page and four tokens


def complete(url: str, prompt: list[int]) -> tuple[int, str]:
    """How many tokens of it were found, and how it goes on."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    told: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).json()
    return told["usage"]["prompt_tokens_details"]["cached_tokens"], told["choices"][0]["text"]


PROMPTS = [[*HEAD, *range(first, first + 13)] for first in (400, 500, 600)] + [HEAD[:10]]


@pytest.fixture(scope="module")
def computed() -> list[str]:
    """The answers where nothing is ever found."""
    with serving("--set", "engine.kind=local", "--set", "cache.prefix_sharing=false") as server:
        wait_for(lambda: ready(server.url))
        return [complete(server.url, prompt)[1] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("partial", "cached"), [("true", [0, 20, 20, 9]), ("false", [0, 16, 16, 0])]
)
def test_a_short_shared_head_is_found_to_the_token(
    partial: str, cached: list[int], computed: list[str]
) -> None:
    settings = ("--set", "engine.kind=local", "--set", f"cache.partial_pages={partial}")
    with serving(*settings) as server:
        wait_for(lambda: ready(server.url))
        answers = [complete(server.url, prompt) for prompt in PROMPTS]
        metrics = httpx.get(server.url + "/metrics").text
    assert [found for found, _ in answers] == cached
    assert [text for _, text in answers] == computed
    copied = sum(found % 16 for found in cached)
    assert f"dserve_prefix_copied_tokens_total {copied}.0" in metrics
