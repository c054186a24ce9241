"""The wire format, letter by letter."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.stub import says

CHAT = {"messages": [{"role": "user", "content": "hello"}], "stream": True}

HEAD = (
    'data: {"id":"ID","object":"OBJECT","created":0,"model":"tiny","system_fingerprint":"FP",'
    '"choices":['
)
CHUNK = HEAD.replace("OBJECT", "chat.completion.chunk")
TEXT = HEAD.replace("OBJECT", "text_completion")


def transcript(base: str, path: str, body: dict[str, object]) -> list[str]:
    """The events, with what differs from run to run replaced."""
    answer = httpx.post(base + path, json=body)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    text = re.sub(r"(?m)^id: .*\n", "", answer.text)  # see test_resume
    text = re.sub(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{24}"', '"id":"ID"', text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"fp_[0-9a-f]{10}"', '"FP"', text)
    return text.split("\n\n")


def test_a_chat_stream(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "a你"))
    body = {**CHAT, "stream_options": {"include_usage": True}}
    assert transcript(base, "/v1/chat/completions", body) == [
        CHUNK + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null}],"usage":null}',
        CHUNK + '{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}],'
        '"usage":null}',
        CHUNK + '{"index":0,"delta":{"content":"你"},"logprobs":null,"finish_reason":null}],'
        '"usage":null}',
        CHUNK + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
        CHUNK + f'],"usage":{{{counts(tokenizer, "a你")},"prompt_tokens_details":'
        '{"cached_tokens":7}}}',
        "data: [DONE]",
        "",
    ]


def counts(tokenizer: Tokenizer, answer: str) -> str:
    prompt = len(tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"))
    output = len(tokenizer.encode(answer)) + 1
    total = prompt + output
    return f'"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{total}'


def test_a_completion_stream_with_ids_and_logprobs(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "ab"))
    a, b = tokenizer.encode("ab")
    body = {"prompt": [5, 6], "stream": True, "return_token_ids": True, "logprobs": 0}
    events = transcript(base, "/v1/completions", body)
    assert events[0] == TEXT + (
        '{"index":0,"text":"","logprobs":null,"finish_reason":null,"prompt_token_ids":[5,6]}]}'
    )
    assert events[2] == TEXT + (
        '{"index":0,"text":"b","logprobs":{"tokens":["b"],"token_logprobs":[-0.5],'
        '"top_logprobs":[{"b":-0.5}],"text_offset":[1]},"finish_reason":null,'
        f'"token_ids":[{b}]}}]}}'
    )
    assert events[3] == TEXT + (
        '{"index":0,"text":"","logprobs":{"tokens":[],"token_logprobs":[],"top_logprobs":[],'
        '"text_offset":[]},"finish_reason":"stop","token_ids":[2]}]}'
    )
    assert events[4:] == ["data: [DONE]", ""]
    assert f'"token_ids":[{a}]' in events[1]


def test_chat_ids_come_with_the_first_event(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "a"))
    events = transcript(base, "/v1/chat/completions", {**CHAT, "return_token_ids": True})
    first, second = (json.loads(event.removeprefix("data: ")) for event in events[:2])
    assert tokenizer.decode(first["prompt_token_ids"]).endswith("<|im_start|>assistant\n")
    assert second["choices"][0]["token_ids"] == tokenizer.encode("a")


@pytest.mark.parametrize("text", ["one\u2028two\x85three\u2029four", 'quote " and \\ and \n'])
def test_an_event_is_one_line_for_every_reader(
    stubbed: Stubbed, tokenizer: Tokenizer, text: str
) -> None:
    _, base = stubbed(says(tokenizer, text))
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=CHAT) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_a_whole_answer_is_the_fold_of_its_stream(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "the answer"))
    answer = httpx.post(f"{base}/v1/chat/completions", json={**CHAT, "stream": False}).json()
    assert list(answer) == [
        *("id", "object", "created", "model", "system_fingerprint", "choices", "usage"),
    ]
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "the answer", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
