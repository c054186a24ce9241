"""Streams, stop strings, counts: what an answer is, whoever computes it."""

from __future__ import annotations

import pytest

from tests.conformance.subjects import Json, Subject
from tests.tries import sooner_or_later

PROMPT = "one two three four five six seven eight nine ten eleven twelve thirteen"
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
LENGTH = 10


def joined(chunks: list[Json]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_a_stream_says_what_the_whole_answer_says_and_in_parts(subject: Subject) -> None:
    whole = subject.text(PROMPT, max_tokens=LENGTH)
    apart = PROMPT + subject.slowly.replace("=100", "=30")  # else what comes together is one part

    def in_parts() -> bool | None:
        chunks = subject.streamed("/v1/completions", prompt=apart, temperature=0, max_tokens=LENGTH)
        assert joined(chunks) == whole != ""
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])
        assert len({chunk["id"] for chunk in chunks}) == 1
        return sum(bool(chunk["choices"][0]["text"]) for chunk in chunks) > 1 or None

    assert sooner_or_later(in_parts, "in parts")


def test_so_does_a_chat(subject: Subject) -> None:
    body = {**CHAT, "max_tokens": LENGTH}
    whole = subject.client.post("/v1/chat/completions", json=body).json()
    message = whole["choices"][0]["message"]
    chunks = subject.streamed("/v1/chat/completions", **body)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (message.get(name) or "")
    assert (message["role"], deltas[0]["role"]) == ("assistant", "assistant")


def test_choices_are_told_apart(subject: Subject) -> None:
    fields = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": LENGTH}
    whole = subject.complete(PROMPT, **fields).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2]
    chunks = subject.streamed("/v1/completions", prompt=PROMPT, **fields)
    for i in range(3):
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        assert "".join(part["text"] for part in parts) == whole[i]["text"]
        assert parts[-1]["finish_reason"] == whole[i]["finish_reason"]


@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_stop_string_ends_the_answer_before_it(subject: Subject, length: int) -> None:
    text = subject.text(PROMPT, max_tokens=40)
    stop = text[4 : 4 + length]
    expected = text[: text.index(stop)]
    fields = {"temperature": 0, "max_tokens": 40, "stop": ["never said", stop]}
    body = subject.complete(PROMPT, **fields).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (expected, "stop")
    chunks = subject.streamed("/v1/completions", prompt=PROMPT, **fields)
    assert joined(chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    subject.becomes_idle()


def test_counts_are_those_of_the_tokens(subject: Subject) -> None:
    tokens = subject.client.post("/tokenize", json={"prompt": PROMPT}).json()["count"]
    fields = {"max_tokens": 5, "temperature": 0, **subject.on}
    body = subject.complete(PROMPT, **fields).json()
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (tokens, 5)
    assert usage["total_tokens"] == tokens + 5
    assert body["choices"][0]["finish_reason"] == "length"
    assert usage.get("inferred", False) is ("usage" in subject.infers)
    is_inferred = body["choices"][0].get("finish_reason_inferred", False)
    assert is_inferred is ("finish_reason" in subject.infers)
    wish = {"stream_options": {"include_usage": True}}
    *chunks, last = subject.streamed("/v1/completions", prompt=PROMPT, **fields, **wish)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert not any(chunk.get("usage") for chunk in chunks)
