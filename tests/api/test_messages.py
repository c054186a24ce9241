"""Anthropic's Messages API over plain HTTP: what the model gets to see, and what comes back."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest

from dynamo_serve.core.request import Finish
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.stub import CACHED, says
from tests.api.talking import GRADED, HERMES, THINKING, cut_short, talking
from tests.api.test_tools import PARIS, TIME, says_it
from tests.patience import PATIENCE_S

MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [TOOL, CLOCK]
THOUGHT = "<think>\nHm, 你好.\n</think>\n\nHello."
Event = tuple[str, dict[str, Any]]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 500, "messages": HELLO, **fields}


def ask(base: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(base + MESSAGES, json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def streamed(base: str, **fields: Any) -> list[Event]:
    """The events, by name."""
    answer = httpx.post(base + MESSAGES, json=body(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    return events_of(answer.text)


def events_of(text: str) -> list[Event]:
    *events, rest = text.split("\n\n")
    assert rest == ""
    told = []
    for event in events:
        lines = dict(line.split(": ", 1) for line in event.split("\n"))
        data = json.loads(lines["data"])
        assert data["type"] == lines["event"]
        told.append((lines["event"], data))
    return told


def put_together(events: list[Event]) -> dict[str, Any]:
    """The message that a client makes of a stream; asserts the order of events."""
    (name, start), *rest, (delta_name, delta), (last, _) = events
    assert (name, delta_name, last) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = start["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    open_at: int | None = None
    for name, data in rest:
        if name == "content_block_start":
            assert open_at is None and data["index"] == len(message["content"])
            open_at = data["index"]
            block = data["content_block"]
            message["content"].append({**block, "input": ""} if "input" in block else block)
            continue
        assert data["index"] == open_at
        if name == "content_block_stop":
            open_at = None
            if "input" in message["content"][-1]:
                given = message["content"][-1]["input"] or "{}"
                message["content"][-1]["input"] = json.loads(given)
            continue
        piece = data["delta"]
        field = {
            "text_delta": "text",
            "thinking_delta": "thinking",
            "signature_delta": "signature",
            "input_json_delta": "partial_json",
        }[piece["type"]]
        kept = "input" if field == "partial_json" else field
        message["content"][-1][kept] += piece[field]
    assert open_at is None
    return {**message, **delta["delta"], "usage": {**message["usage"], **delta["usage"]}}


def test_an_answer_is_a_message_with_counts() -> None:
    with talking(HERMES, says_it("Hello 你好.")) as (_, base):
        answer = httpx.post(base + MESSAGES, json=body())
    told = answer.json()
    assert told["id"].startswith("msg_")
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    expected = {
        "id": told["id"],
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "Hello 你好."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": told["usage"],
    }
    assert told == expected
    assert told["usage"]["cache_read_input_tokens"] == CACHED
    assert told["usage"]["cache_creation_input_tokens"] == 0
    assert set(told["usage"]) == {
        *("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
        "output_tokens",
    }


def test_a_stream_letter_by_letter() -> None:
    with talking(HERMES, says_it("a你")) as (_, base):
        answer = httpx.post(base + MESSAGES, json=body(stream=True))
        counted = httpx.post(base + f"{MESSAGES}/count_tokens", json={"messages": HELLO}).json()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    start, *events = events_of(answer.text)
    usage = start[1]["message"]["usage"]
    assert usage["input_tokens"] + CACHED == counted["input_tokens"]
    num_tokens = events[-2][1]["usage"]["output_tokens"]
    assert num_tokens > 2
    assert [(name, {k: v for k, v in data.items() if k != "type"}) for name, data in events] == [
        ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "a"}}),
        ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "你"}}),
        ("content_block_stop", {"index": 0}),
        (
            "message_delta",
            {
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {**usage, "output_tokens": num_tokens},
            },
        ),
        ("message_stop", {}),
    ]


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": (HERMES, "Hello.", {}),
    "nothing": (HERMES, "", {}),
    "a call": (HERMES, PARIS, {"tools": TOOLS}),
    "calls and text": (HERMES, f"I ask.\n{PARIS}\nAnd\n{TIME}\nDone.", {"tools": TOOLS}),
    "two calls": (HERMES, PARIS + TIME, {"tools": TOOLS}),
    "thoughts": (THINKING, THOUGHT, {}),
    "thoughts and a call": (THINKING, f"<think>Which?</think>\n{PARIS}", {"tools": TOOLS}),
    "a stop sequence": (HERMES, "One, two, three", {"stop_sequences": ["six", " two"]}),
    "what only looks like a call": (HERMES, '<tool_call>{"name": "nobody"', {"tools": TOOLS}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_says_what_the_whole_answer_says(case: str) -> None:
    template, text, fields = CASES[case]
    with talking(template, says_it(text)) as (_, base):
        whole, made = ask(base, **fields), put_together(streamed(base, **fields))
    for message in (whole, made):
        for block in message["content"]:
            block.pop("id", None)
        message.pop("id")
    assert made == whole


def test_calls_are_blocks_in_the_order_of_the_text() -> None:
    template, text, fields = CASES["calls and text"]
    with talking(template, says_it(text)) as (_, base):
        message = ask(base, **fields)
        events = streamed(base, **fields)
    kinds = [block["type"] for block in message["content"]]
    assert kinds == ["text", "tool_use", "text", "tool_use", "text"]
    first, second = message["content"][1], message["content"][3]
    assert first["input"] == {"city": "Zürich 😀"} and second["input"] == {}
    assert first["id"] != second["id"]
    assert message["stop_reason"] == "tool_use"
    pieces = [d["delta"]["partial_json"] for _, d in events if "partial_json" in d.get("delta", {})]
    assert len(pieces) > 6, "the arguments come in pieces"


def test_thoughts_have_a_signature_that_names_them() -> None:
    with talking(THINKING, says_it(THOUGHT)) as (_, base):
        one, other = ask(base), ask(base)
        turns = [*HELLO, {"role": "assistant", "content": one["content"]}, *HELLO]
        again = ask(base, messages=turns)
    (thinking, text) = one["content"]
    assert (thinking["thinking"], text["text"]) == ("Hm, 你好.", "Hello.")
    assert thinking["signature"] == other["content"][0]["signature"] != ""
    assert one["usage"]["output_tokens_details"]["thinking_tokens"] > 8
    assert again["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({}, "Hello.", "end_turn", None),
        ({"stop_sequences": ["l", "o"]}, "Hello.", "stop_sequence", "l"),
        ({"stop_sequences": ["rich"], "tools": TOOLS}, PARIS, "stop_sequence", "rich"),
        ({"tools": TOOLS}, PARIS, "tool_use", None),
    ],
)
def test_why_an_answer_ended(
    fields: dict[str, Any], text: str, reason: str, sequence: str | None
) -> None:
    with talking(HERMES, says_it(text)) as (_, base):
        message = ask(base, **fields)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


def test_a_deadline_is_a_reason_of_ours() -> None:
    late = partial(says, text="Hel", finish=Finish.DEADLINE)
    with talking(HERMES, late) as (_, base):
        message = ask(base, deadline_ms=50)
    assert (message["stop_reason"], message["content"][0]["text"]) == ("deadline", "Hel")


def test_a_call_that_broke_off_is_not_thrown_away() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a": [1,'
    with talking(HERMES, partial(cut_short, text=text)) as (_, base):
        message = ask(base, tools=TOOLS)
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"INVALID_JSON": '{"a": [1,'}


def seen(template: str, **fields: Any) -> str:
    """What the model is shown of a request."""
    with talking(template, says_it("a")) as (service, base):
        ask(base, **fields)
        ids = service.seen.get(timeout=PATIENCE_S).prompt_ids
        shown = httpx.post(f"{base}/detokenize", json={"tokens": list(ids)}).json()
    return str(shown["prompt"])


def test_the_template_gets_the_conversation() -> None:
    turns = [
        {"role": "user", "content": "What is"},
        {"role": "user", "content": [{"type": "text", "text": "the weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Rome.", "signature": "x"},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "a1", "name": "get_weather", "input": {"city": "Ä"}},
                {"type": "tool_use", "id": "a2", "name": "clock", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "a2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no clock"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    system = [
        {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    assert seen(HERMES, messages=turns, system=system) == (
        "<|im_start|>system\nBe kind.\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is\nthe weather?<|im_end|>\n"
        "<|im_start|>assistant\n(Rome.)I ask."
        'CALL a1 get_weather {"city": "Ä"}CALL a2 clock {}<|im_end|>\n'
        "<|im_start|>tool\nsunny FOR a1<|im_end|>\n"
        "<|im_start|>tool\nError: no clock FOR a2<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation_costs_the_same_as_a_chat_and_finds_its_pages(url: str) -> None:
    """One prompt, whichever endpoint it comes to."""
    text = "the stop word is here " * 8
    chat = {"messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": text}]}
    first = httpx.post(f"{url}/v1/chat/completions", json={**chat, "max_tokens": 2}).json()
    turns = [{"role": "user", "content": text}]
    usage = ask(url, system="Hm.", messages=turns, max_tokens=2)["usage"]
    counted = httpx.post(
        f"{url}{MESSAGES}/count_tokens", json={"system": "Hm.", "messages": turns}
    ).json()
    total = first["usage"]["prompt_tokens"]
    assert counted == {"input_tokens": total}
    assert usage["cache_read_input_tokens"] >= 16
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == total
    assert usage["output_tokens"] == 2


def test_what_is_asked_of_sampling_arrives() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 33, "priority": 3}
    with talking(HERMES, says_it("a")) as (service, base):
        ask(base, **fields)
        request = service.seen.get(timeout=PATIENCE_S)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (request.max_tokens, request.priority) == (33, 3)


def test_more_tokens_than_there_is_room_for(url: str) -> None:
    answer = ask(url, max_tokens=100_000, stop_sequences=["\x00no such text"])
    counted = httpx.post(f"{url}{MESSAGES}/count_tokens", json={"messages": HELLO}).json()
    usage = answer["usage"]
    if answer["stop_reason"] == "model_context_window_exceeded":
        assert counted["input_tokens"] + usage["output_tokens"] == 256
    else:
        assert answer["stop_reason"] == "end_turn"
    exact = ask(url, max_tokens=3)
    assert exact["stop_reason"] == "max_tokens" and exact["usage"]["output_tokens"] == 3
    long = [{"role": "user", "content": "word " * 400}]
    refused = httpx.post(url + MESSAGES, json=body(messages=long))
    assert refused.status_code == 400
    assert refused.json()["error"]["details"]["error_code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("template", "thinking", "ending"),
    [
        (THINKING, {"type": "enabled", "budget_tokens": 1024}, "assistant\n<think>\n"),
        (THINKING, {"type": "adaptive"}, "assistant\n<think>\n"),
        (THINKING, {"type": "disabled"}, "</think>\n\n"),
        (THINKING, None, "assistant\n"),
        (GRADED, {"type": "enabled", "budget_tokens": 64}, " 64"),
        (GRADED, {"type": "disabled"}, "none "),
        (HERMES, {"type": "disabled"}, "assistant\n"),
    ],
)
def test_the_template_is_told_how_to_think(
    template: str, thinking: dict[str, Any] | None, ending: str
) -> None:
    assert seen(template, thinking=thinking).endswith(ending)


def test_effort_is_told_to_templates_that_take_one() -> None:
    assert seen(GRADED, output_config={"effort": "xhigh"}).endswith("xhigh ")


def test_tools_are_shown_and_hidden() -> None:
    shown = seen(HERMES, tools=TOOLS)
    assert '"name": "get_weather"' in shown and '"city"' in shown
    assert "get_weather" not in seen(HERMES, tools=TOOLS, tool_choice={"type": "none"})


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    with talking(HERMES, says_it(PARIS + TIME)) as (_, base):
        message = ask(base, tools=TOOLS, tool_choice=choice)
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["stop_reason"] == "tool_use"


def test_fields_without_effect_are_taken(tokenizer: Tokenizer) -> None:
    """Bookkeeping, and values that ask for what happens anyway."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "citations": None, **cached}]},
        {
            "role": "assistant",
            "content": [
                {
                    **{"type": "tool_use", "id": "a1", "name": "clock", "input": {}},
                    **{"caller": {"type": "direct"}, **cached},
                }
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a1", **cached}]},
    ]
    tool = {**CLOCK, "type": "custom", "allowed_callers": ["direct"], "defer_loading": False}
    fields = {
        **cached,
        "messages": turns,
        "metadata": {"user_id": "x"},
        "service_tier": "auto",
        "speed": "standard",
        "tools": [{**tool, "eager_input_streaming": True, **cached}],
        "thinking": {"type": "disabled"},
    }
    with talking(HERMES, lambda made: says(made, "a")) as (_, base):
        assert ask(base, **fields)["stop_reason"] == "end_turn"
