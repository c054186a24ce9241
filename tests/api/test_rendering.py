"""Prompts as token ids: those that would be run, and nothing is."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.talking import HERMES, talking
from tests.api.test_tools import HELLO, TOOLS, says_it
from tests.patience import PATIENCE_S

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def test_a_chat_s_prompt_is_the_one_that_is_run() -> None:
    body = {"messages": HELLO, "tools": TOOLS, "max_tokens": 3, "temperature": 0.5}
    with talking(HERMES, says_it("a")) as (service, base):
        told = httpx.post(f"{base}{CHAT}/render", json=body)
        assert service.seen.empty(), "nothing is generated"
        httpx.post(base + CHAT, json=body)
        ids = service.seen.get(timeout=PATIENCE_S).prompt_ids
    assert told.json() == {
        "request_id": told.headers["x-request-id"],
        "model": "tiny",
        "count": len(ids),
        "token_ids": list(ids),
    }


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("hello there", 1), (["one", "two words"], 2), ([5, 6, 7], 1), ([[5], [6, 7]], 2)],
)
def test_a_completion_has_an_entry_for_each_prompt(
    url: str, tokenizer: Tokenizer, prompt: Any, num_prompts: int
) -> None:
    entries = httpx.post(f"{url}{TEXT}/render", json={"prompt": prompt, "model": "tiny"}).json()
    answer = httpx.post(
        url + TEXT, json={"prompt": prompt, "max_tokens": 1, "return_token_ids": True}
    ).json()
    assert len(entries) == num_prompts
    assert [entry["token_ids"] for entry in entries] == [
        choice["prompt_token_ids"] for choice in answer["choices"]
    ]
    assert [entry["count"] for entry in entries] == [len(e["token_ids"]) for e in entries]


def test_a_long_prompt_is_rendered_as_well(url: str) -> None:
    ids = [i % 90 for i in range(20_000)]
    (entry,) = httpx.post(f"{url}{TEXT}/render", json={"prompt": ids}).json()
    assert entry["token_ids"] == ids, "also one that is too long to be run"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": HELLO, "colour": 1}, "colour"),
        (CHAT, {"messages": HELLO, "model": "nobody"}, "model"),
        (TEXT, {"prompt": [99_999]}, "prompt[0]"),
    ],
)
def test_what_is_wrong_is_named(url: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}{path}/render", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
