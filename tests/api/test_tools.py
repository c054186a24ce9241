"""Tools over HTTP, with the official client and without."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from tests.api.stub import says
from tests.api.talking import (
    HERMES,
    MISTRAL,
    THINKING,
    TURNS,
    cut_short,
    one_after_another,
    talking,
)
from tests.api.test_openai_client import client_of
from tests.patience import PATIENCE_S

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 😀"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "tools": TOOLS, **fields}


def says_it(text: str) -> Any:
    return lambda tokenizer: says(tokenizer, text)


def ask(base: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(base + CHAT, json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def deltas(base: str, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream."""
    answer = httpx.post(base + CHAT, json=body(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [choice for event in data for choice in json.loads(event)["choices"]]


def put_together(choices: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a client makes of a stream: the message, and why it ended."""
    message: dict[str, Any] = {"content": "", "calls": [], "finish": None}
    for choice in (choice for choice in choices if choice["index"] == index):
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["finish"] = choice["finish_reason"] or message["finish"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert (call["index"], call["type"]) == (len(message["calls"]), "function")
                message["calls"].append({"id": call["id"], **call["function"]})
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


def test_a_call_is_streamed_as_clients_know_it() -> None:
    with talking(HERMES, says_it(f"I ask.\n{PARIS}\n{TIME}")) as (_, base):
        whole = ask(base)["choices"][0]
        choices = deltas(base)
    first, second = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "I ask."
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "Zürich 😀"}'}
    assert second["function"] == {"name": "clock", "arguments": "{}"}
    assert first["type"] == "function" and first["id"].startswith("call_")
    assert first["id"] != second["id"]

    made = put_together(choices)
    assert made["content"] == "I ask."
    assert [(c["name"], c["arguments"]) for c in made["calls"]] == [
        ("get_weather", '{"city": "Zürich 😀"}'),
        ("clock", "{}"),
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"
    beginnings = [c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"]]
    name = beginnings[0][0]
    assert list(name) == ["index", "id", "type", "function"]
    assert name["function"] == {"name": "get_weather", "arguments": ""}
    assert len(beginnings) > 6, "the arguments come in pieces"


def test_only_calls_leave_no_content() -> None:
    with talking(HERMES, says_it(PARIS)) as (_, base):
        assert ask(base)["choices"][0]["message"]["content"] is None


def test_the_template_gets_tools_and_calls_and_results() -> None:
    with talking(HERMES, says_it("Sunny.")) as (_, base):
        function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
        messages = [
            *HELLO,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "a1", "type": "function", "function": function, "index": 0}],
            },
            {"role": "tool", "tool_call_id": "a1", "content": [{"type": "text", "text": "18"}]},
            {"role": "assistant", "content": "It is 18.", "reasoning_content": "Hm."},
        ]
        made = httpx.post(
            base + CHAT, json={"messages": messages, "tools": TOOLS, "return_token_ids": True}
        ).json()
        prompt = httpx.post(f"{base}/detokenize", json={"tokens": made["prompt_token_ids"]}).json()
        assert 'CALL a1 get_weather {"city": "Rome"}' in prompt["prompt"]
        assert "<|im_start|>tool\n18 FOR a1<|im_end|>" in prompt["prompt"]
        assert "(Hm.)It is 18." in prompt["prompt"]
        shown = prompt["prompt"].split("<|im_start|>tools\n")[1].split("<|im_end|>")[0]
        clock = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
        assert json.loads(shown) == [WEATHER, {"type": "function", "function": clock}]
        none = httpx.post(base + CHAT, json=body(tool_choice="none", return_token_ids=True)).json()
        assert none["choices"][0]["message"]["content"] == "Sunny."
        assert len(none["prompt_token_ids"]) < 30, "tools that cannot be called are not shown"


def test_the_prompt_of_a_chat_can_be_looked_at() -> None:
    with talking(HERMES, says_it("Hello.")) as (_, base):
        chat = httpx.post(base + CHAT, json=body(return_token_ids=True)).json()
        shown = httpx.post(f"{base}/tokenize", json=body()).json()
        double = httpx.post(f"{base}/tokenize", json=body(tools=[CLOCK, CLOCK])).json()["error"]
        facts = httpx.get(f"{base}/v1/server").json()
        beside = httpx.post(f"{base}/tokenize", json={"prompt": "a", "tools": [CLOCK]}).json()
    assert shown["tokens"] == chat["prompt_token_ids"]
    assert double["param"] == "tools[1].function.name"
    assert beside["error"]["param"] == "tools"
    assert facts["parsers"] == {"tools": "hermes", "reasoning": None}


def test_two_steps_with_the_official_client() -> None:
    script = partial(one_after_another, answers=[PARIS, "It is sunny.", PARIS, "It is sunny."])
    with talking(HERMES, script) as (_, base), client_of(base) as client:
        for is_stream in (False, True):
            messages: list[Any] = [*HELLO]
            for _ in range(2):
                message = said(client, messages, is_stream)
                messages.append(message.model_dump(exclude_none=True))
                for call in message.tool_calls or []:
                    assert json.loads(call.function.arguments) == {"city": "Zürich 😀"}
                    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
                    messages.append(result)
            assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
            assert messages[-1]["content"] == "It is sunny."


def said(client: openai.OpenAI, messages: list[Any], is_stream: bool) -> Any:
    args: dict[str, Any] = {"model": "tiny", "messages": messages, "tools": TOOLS}
    if not is_stream:
        return client.chat.completions.create(**args).choices[0].message
    with client.chat.completions.stream(**args) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0].message


def test_each_choice_has_its_own_calls() -> None:
    with talking(HERMES, says_it(PARIS)) as (_, base):
        whole = ask(base, n=2)["choices"]
        choices = deltas(base, n=2)
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in whole]
    ids += [put_together(choices, i)["calls"][0]["id"] for i in range(2)]
    assert len(set(ids)) == 4


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    with talking(HERMES, says_it(PARIS + TIME)) as (service, base):
        choice = ask(base, parallel_tool_calls=False)["choices"][0]
        assert service.ended.get(timeout=PATIENCE_S)
        made = put_together(deltas(base, parallel_tool_calls=False))
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert choice["finish_reason"] == made["finish"] == "tool_calls"
    assert len(made["calls"]) == 1 and json.loads(made["calls"][0]["arguments"])


def test_what_is_held_back_comes_at_the_end() -> None:
    for text, content, num_calls in (
        ('Hm <tool_call>{"name": "get_w', 'Hm <tool_call>{"name": "get_w', 0),
        ('<tool_call>{"name": "clock", "arguments": {"a', "", 1),
    ):
        with talking(HERMES, partial(cut_short, text=text)) as (_, base):
            made = put_together(deltas(base))
            whole = ask(base)["choices"][0]
        assert (made["content"], made["finish"]) == (content, "length")
        assert len(made["calls"]) == num_calls
        assert (whole["message"]["content"] or "", whole["finish_reason"]) == (content, "length")


def test_a_stop_string_cuts_a_call_like_any_text() -> None:
    with talking(HERMES, says_it(PARIS)) as (_, base):
        choice = ask(base, stop="rich")["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Zü'


def test_log_probabilities_cover_calls() -> None:
    with talking(HERMES, says_it(PARIS)) as (_, base):
        choice = ask(base, logprobs=True, return_token_ids=True)["choices"][0]
        choices = deltas(base, logprobs=True)
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert len(tokens) == len(choice["token_ids"]) - 1
    streamed = [e["token"] for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert streamed == tokens


def test_marks_are_seen_although_they_are_special_tokens() -> None:
    with talking(MISTRAL, says_it('[TOOL_CALLS]clock[ARGS]{"a": 1}<think>')) as (_, base):
        message = ask(base)["choices"][0]["message"]
        plain = httpx.post(base + CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "clock", "arguments": '{"a": 1}'}
    assert len(call["id"]) == 9 and call["id"].isalnum()
    assert plain["content"] == 'clock{"a": 1}', "without tools they are left out as ever"


def test_without_tools_nothing_is_looked_for() -> None:
    with talking(HERMES, says_it(PARIS)) as (_, base):
        without: list[dict[str, Any]] = [{"tools": []}, {"tool_choice": "none"}]
        for fields in without:
            message = ask(base, **fields)["choices"][0]["message"]
            assert (message["content"], "tool_calls" in message) == (PARIS, False)


def test_the_operator_may_name_the_form() -> None:
    text = '{"name": "clock", "arguments": {}}'
    with talking(HERMES, says_it(text), tool_parser="json") as (_, base):
        assert ask(base)["choices"][0]["message"]["tool_calls"]
    with talking(HERMES, says_it(text), tool_parser="none") as (_, base):
        refused = httpx.post(base + CHAT, json=body())
    assert refused.json()["error"]["param"] == "tools"
    assert "model.tool_parser" in refused.json()["error"]["message"]


NAMED = {"type": "function", "function": {"name": "clock"}}
STRICT = {"type": "function", "function": {"name": "clock", "strict": True}}
CALL = {"id": "a", "function": {"name": "clock", "arguments": "{}"}}


def said_by(role: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": 7}, "tools", "list"),
        ({"tools": [7]}, "tools[0]", "an object"),
        ({"tools": [{}]}, "tools[0].type", "required"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
        ({"tools": [{**CLOCK, "colour": 1}]}, "tools[0].colour", "Unknown"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "pattern",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
            "an object",
        ),
        ({"tools": [CLOCK] * 2}, "tools[1].function.name", "two tools called 'clock'"),
        ({"tools": [CLOCK] * 1000}, "tools", "at most 128"),
        ({"tools": [STRICT]}, "tools[0].function.strict", "engine follows no grammar"),
        ({"tool_choice": "required"}, "tool_choice", "engine follows no grammar"),
        ({"tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tool_choice": 7}, "tool_choice", "'required'"),
        ({"tool_choice": {}}, "tool_choice.type", "required"),
        ({"tool_choice": {**NAMED, "x": 1}}, "tool_choice.x", "Unknown"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "nobody"}}},
            "tool_choice.function.name",
            "none of 'tools'",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
        (said_by("tool"), "messages[0].tool_call_id", "required"),
        (said_by("tool", tool_call_id=""), "messages[0].tool_call_id", "required"),
        (said_by("tool", tool_call_id=7), "messages[0].tool_call_id", "string"),
        (said_by("user", tool_call_id="a"), "messages[0].tool_call_id", "role 'tool'"),
        (said_by("user", tool_calls=[CALL]), "messages[0].tool_calls", "role 'assistant'"),
        (said_by("user", reasoning_content="a"), "messages[0].reasoning_content", "'assistant'"),
        (said_by("assistant", tool_calls=[{}]), "messages[0].tool_calls[0].id", "required"),
        (
            said_by("assistant", tool_calls=[{**CALL, "id": ""}]),
            "messages[0].tool_calls[0].id",
            "at least 1",
        ),
        (
            said_by("assistant", tool_calls=[{"id": "a", "function": {"name": "a"}}]),
            "messages[0].tool_calls[0].function.arguments",
            "required",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named(
    strict_base: str, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = httpx.post(strict_base + CHAT, json=body(**fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def strict_base() -> Any:
    with talking(HERMES, says_it("Hello.")) as (_, base):
        yield base


@pytest.mark.parametrize(
    "arguments", ["", "not json", '{"a": "\\ud800"}', '{"a":' * 500 + "1" + "}" * 500, "[1]"]
)
def test_odd_arguments_of_earlier_calls_harm_nobody(strict_base: str, arguments: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    answer = httpx.post(strict_base + CHAT, json=body(messages=messages, max_tokens=8))
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_template_without_tools_refuses_them_by_name() -> None:
    template = TURNS.replace("tools", "others")
    with talking(template, says_it("Hello.")) as (_, base):
        tools = httpx.post(base + CHAT, json=body()).json()["error"]
        result = {"role": "tool", "tool_call_id": "a", "content": "18"}
        told = httpx.post(base + CHAT, json={"messages": [*HELLO, result]}).json()["error"]
    assert (tools["param"], tools["code"]) == ("tools", "unsupported_parameter")
    assert (told["param"], told["code"]) == ("messages[1].role", "unsupported_parameter")


def test_thoughts_and_calls_come_apart() -> None:
    with talking(THINKING, says_it(f"<think>Which?</think>\n{PARIS}")) as (_, base):
        message = ask(base)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Which?", None)
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"
