"""The prompt in its answer: `echo`, and log probabilities of its tokens, as two APIs have them."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Generator
from typing import Any

import httpx
import openai
import pytest

from dynamo_serve import bundled
from dynamo_serve.api import render
from dynamo_serve.api.echo import INLINE_SCORES, Echo
from dynamo_serve.config import CacheSection, Config, EngineSection, ModelSection
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import StubService, says
from tests.api.test_openai_client import client_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "the stop word is hére"


def ask(base: str, path: str = TEXT, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 6, "seed": 1, **fields}
    answer = httpx.post(base + path, json={k: v for k, v in body.items() if v is not None})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_echo_puts_the_prompt_before_the_text(url: str) -> None:
    without = ask(url)["choices"][0]["text"]
    assert ask(url, echo=True)["choices"][0]["text"] == PROMPT + without
    two = ask(url, prompt=["one", "two"], n=2, echo=True)["choices"]
    assert [choice["text"][:3] for choice in two] == ["one", "one", "two", "two"]


def test_a_prompt_that_was_never_computed_has_an_entry_for_each_token(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode(PROMPT)
    told = Echo(ids, tokenizer, 1).before({"text": "", "logprobs": None}, ())["logprobs"]
    assert {len(values) for values in told.values()} == {len(ids)} and len(ids) > 1
    assert set(told["token_logprobs"]) == {None}


def test_echo_of_nothing_else(url: str) -> None:
    answer = ask(url, echo=True, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert answer["usage"]["completion_tokens"] == 0


def test_log_probabilities_cover_prompt_and_answer(url: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    plain = ask(url, logprobs=2)["choices"][0]["logprobs"]
    answer = ask(url, logprobs=2, echo=True)
    told, text = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
    n = len(ids)
    assert told["tokens"][:n] == [tokenizer.token_text(i) for i in ids]
    assert told["tokens"][n:] == plain["tokens"]
    assert told["token_logprobs"][n:] == plain["token_logprobs"]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in told["token_logprobs"][1:])
    for token, own, top in list(
        zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == own and len(top) <= 3
    begin = len(PROMPT)
    assert told["text_offset"][n:] == [begin + offset for offset in plain["text_offset"]]
    assert told["text_offset"][0] == 0 and sorted(told["text_offset"]) == told["text_offset"]
    for i, token, offset in zip(ids, told["tokens"], told["text_offset"], strict=False):
        if not (token.startswith("bytes:") or i in tokenizer.special_ids):
            assert text[offset:].startswith(token)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_prompt_is_computed_even_if_it_is_known(url: str) -> None:
    prompt = "again and again " * 8
    first = ask(url, prompt=prompt, echo=True, logprobs=0)
    again = ask(url, prompt=prompt, echo=True, logprobs=0)
    found = ask(url, prompt=prompt)
    assert again["choices"][0]["logprobs"] == first["choices"][0]["logprobs"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"logprobs": 1, "max_tokens": 0}])
def test_a_stream_says_what_the_whole_answer_says(url: str, fields: dict[str, Any]) -> None:
    whole = ask(url, echo=True, **fields)["choices"][0]
    answer = httpx.post(
        url + TEXT,
        json={"prompt": PROMPT, "max_tokens": 6, "seed": 1, "echo": True, "stream": True, **fields},
    )
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert choices[0]["text"] == PROMPT
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    if "logprobs" in fields:
        for key, values in whole["logprobs"].items():
            told = [c["logprobs"][key] for c in choices if c["logprobs"]]
            assert [value for part in told for value in part] == values


def test_prompt_logprobs_as_vllm_has_them(url: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    first, *rest = ask(url, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert first is None and len(rest) == len(ids) - 1
    for token_id, entry in zip(ids[1:], rest, strict=True):
        own = entry[str(token_id)]
        assert own["decoded_token"] == tokenizer.token_text(token_id)
        assert own["logprob"] == pytest.approx(own["rank"] * math.log(0.5))
        assert {1, 2} <= {each["rank"] for each in entry.values()} and len(entry) <= 3
    assert ask(url, prompt_logprobs=0)["choices"][0]["prompt_logprobs"][1].keys() == {str(ids[1])}
    assert "prompt_logprobs" not in ask(url)["choices"][0]


def test_those_of_a_chat_are_beside_its_choices(url: str) -> None:
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "prompt": None}
    answer = ask(url, CHAT, **fields, prompt_logprobs=1, n=2, return_token_ids=True)
    first, *rest = answer["prompt_logprobs"]
    ids = answer["prompt_token_ids"]
    assert first is None
    assert all(str(i) in entry for i, entry in zip(ids[1:], rest, strict=True))
    assert "prompt_logprobs" not in ask(url, CHAT, **fields)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (TEXT, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (TEXT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (TEXT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (TEXT, {"echo": "yes"}, "echo"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
    ],
)
def test_what_is_wrong_is_named(url: str, path: str, fields: dict[str, Any], param: str) -> None:
    asked: dict[str, Any] = {"prompt": "a"} if path == TEXT else {"messages": []}
    if path == CHAT:
        asked["messages"] = [{"role": "user", "content": "hello"}]
    answer = httpx.post(url + path, json={**asked, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.fixture(scope="module")
def real() -> Generator[openai.OpenAI]:
    """The bundled model."""
    path = str(bundled.path())
    settings = Config(
        engine=EngineSection(process=False, device="cpu", threads=1),
        model=ModelSection(max_model_len=512, dtype="float32"),
        cache=CacheSection(num_pages=256),
    )
    service = Service(settings, model_path=path)
    with serving(service, Tokenizer.load(path), settings) as base, client_of(base) as client:
        yield client


def test_an_answer_is_as_likely_as_it_was_when_it_was_made(real: openai.OpenAI) -> None:
    """The way evaluations ask: how likely is this text after that one?"""
    prompt: Any = "What is the weather in Paris?"
    made = real.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=12,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).choices[0]
    extra: Any = made.model_extra
    ids = [*extra["prompt_token_ids"], *extra["token_ids"]]
    told = real.completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    assert made.logprobs is not None and told.logprobs is not None
    assert made.logprobs.token_logprobs is not None and told.logprobs.token_logprobs is not None
    count = len(extra["token_ids"])
    assert told.logprobs.token_logprobs[-count:] == pytest.approx(
        made.logprobs.token_logprobs, abs=1e-3
    )


LONG = {"prompt": [5] * (INLINE_SCORES + 2), "max_tokens": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "logprobs": 5},
        {"echo": True, "logprobs": 5, "stream": True},
        {"prompt_logprobs": 5},
        {"prompt_logprobs": 5, "n": 2},
    ],
)
def test_those_of_a_long_prompt_are_rendered_beside_the_event_loop(
    url: str, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    named: list[str] = []
    token_text, encode, longest = Tokenizer.token_text, render._encode, 0

    def naming(self: Tokenizer, token_id: int) -> str:
        named.append(threading.current_thread().name)
        return token_text(self, token_id)

    def encoding(value: object) -> str:
        nonlocal longest
        if isinstance(value, list | tuple):
            longest = max(longest, len(value))
        return encode(value)

    monkeypatch.setattr(Tokenizer, "token_text", naming)
    monkeypatch.setattr(render, "_encode", encoding)
    body = {**LONG, **fields}
    answer = httpx.post(url + TEXT, json=body)
    assert answer.status_code == 200
    beside = [name for name in named if name.startswith("asyncio_")]
    # A stream tells the scores of its answer as they come, on the event loop.
    assert len(beside) >= INLINE_SCORES and len(named) - len(beside) <= 6 * bool("stream" in body)
    assert longest <= render.PIECE


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_those_of_a_long_answer_are_rendered_beside_the_event_loop(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    named: set[str] = set()
    token_text, encode, longest = Tokenizer.token_text, render._encode, 0

    def naming(self: Tokenizer, token_id: int) -> str:
        named.add(threading.current_thread().name.partition("_")[0])
        return token_text(self, token_id)

    def encoding(value: object) -> str:
        nonlocal longest
        if isinstance(value, list | tuple):
            longest = max(longest, len(value))
        return encode(value)

    monkeypatch.setattr(Tokenizer, "token_text", naming)
    monkeypatch.setattr(render, "_encode", encoding)
    wanted: dict[str, Any] = {"prompt": "a", "logprobs": 3}
    if path == CHAT:
        messages = [{"role": "user", "content": "a"}]
        wanted = {"messages": messages, "logprobs": True, "top_logprobs": 3}
    stub = StubService(says(tokenizer, "a" * (INLINE_SCORES + 10)))
    with serving(stub, tokenizer, config()) as base:
        answer = httpx.post(base + path, json={**wanted, "max_tokens": 200})
    told = answer.json()["choices"][0]["logprobs"]
    assert len(told["content" if path == CHAT else "tokens"]) == INLINE_SCORES + 10
    assert named == {"asyncio"}
    assert longest <= render.PIECE


def test_json_in_pieces_is_the_same() -> None:
    value = {
        "text": 'a"\u2028é',
        "none": [],
        "many": [{"a": (1, None, 2.5)}] * (2 * render.PIECE + 1),
        "few": [[], {}, ({"deep": list(range(100))},), True],
    }
    assert render.to_long_json(value) == render.to_json(value)
