"""/v1/responses over plain HTTP: the object, and the stream that it is the fold of."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from functools import partial

import httpx
import pytest

from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.errors import EngineFailure
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.responding import (
    CLOCK,
    PATH,
    WEATHER,
    Json,
    ask,
    put_together,
    same,
    stream,
    text_of,
)
from tests.api.stub import CACHED, begins_and_hangs, says
from tests.api.talking import GRADED, HERMES, MISTRAL, THINKING, cut_short, talking
from tests.api.test_tools import PARIS, TIME, says_it
from tests.patience import PATIENCE_S

TOOLS = [WEATHER, CLOCK]
PLAIN = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
ENDS = ["output_text.done", "content_part.done", "output_item.done", "completed"]


def kinds(events: list[Json]) -> list[str]:
    """The types of events in a row, each once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def test_a_text_is_answered_by_one_message(url: str) -> None:
    response = ask(url, max_output_tokens=5, temperature=0.5, metadata={"a": "b"}, user="me")
    assert response["id"].startswith("resp_")
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    [message] = response["output"]
    assert (message["type"], message["role"], message["status"]) == (
        *("message", "assistant"),
        "incomplete",
    )
    usage = response["usage"]
    assert usage["output_tokens"] == 5
    assert usage["total_tokens"] == usage["input_tokens"] + 5
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert (response["temperature"], response["metadata"], response["user"]) == (
        *(0.5, {"a": "b"}),
        "me",
    )
    assert (response["error"], response["store"], response["tools"]) == (None, False, [])


def test_it_is_the_answer_that_a_chat_gets(url: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "seed": 3}
    told = httpx.post(f"{url}/v1/chat/completions", json=chat).json()
    response = ask(url, max_output_tokens=20, seed=3)
    assert text_of(response) == told["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == told["usage"]["prompt_tokens"]


def test_a_stream_has_the_events_that_clients_expect(url: str) -> None:
    events = stream(url, max_output_tokens=20, seed=3)
    assert kinds(events) == [*PLAIN, *ENDS[:-1], "incomplete"]
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    whole = ask(url, max_output_tokens=20, seed=3)
    last = put_together(events)
    for response in (whole, last):  # what of a prompt is cached changes from one to the next
        response["usage"]["input_tokens_details"] = {}
    assert same(last) == same(whole)


def test_an_answer_that_ends_by_itself_is_completed(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "hello, hello"))
    response = ask(base)
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    assert response["completed_at"] >= response["created_at"]
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == CACHED
    events = stream(base)
    assert kinds(events) == [*PLAIN, *ENDS]
    assert text_of(put_together(events)) == "hello, hello"


def test_an_answer_of_nothing_is_an_empty_message(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, ""))
    assert ask(base)["output"][0]["content"][0]["text"] == ""
    assert put_together(stream(base))["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("finish", [Finish.LENGTH, Finish.DEADLINE])
def test_an_answer_that_is_cut_says_by_what(
    stubbed: Stubbed, tokenizer: Tokenizer, finish: Finish
) -> None:
    _, base = stubbed(says(tokenizer, "hello", finish=finish))
    reason = {Finish.LENGTH: "max_output_tokens", Finish.DEADLINE: "deadline"}[finish]
    for response in (ask(base), put_together(stream(base))):
        assert response["incomplete_details"] == {"reason": reason}
        assert response["output"][0]["status"] == "incomplete"


def test_calls_are_items_with_their_arguments_in_pieces() -> None:
    with talking(HERMES, says_it(f"I ask.\n{PARIS}\n{TIME}")) as (_, base):
        whole = ask(base, tools=TOOLS)
        events = stream(base, tools=TOOLS)
    assert same(put_together(events)) == same(whole)
    said, first, second = whole["output"]
    assert said["content"][0]["text"] == "I ask."
    assert (first["name"], json.loads(first["arguments"])) == ("get_weather", {"city": "Zürich 😀"})
    assert (second["name"], second["arguments"]) == ("clock", "{}")
    assert first["call_id"].startswith("call_") and first["call_id"] != second["call_id"]
    assert {item["status"] for item in whole["output"]} == {"completed"}
    assert whole["status"] == "completed"
    assert whole["tools"][0] == {**WEATHER, "strict": False}
    begun = [e for e in events if e["type"] == "response.output_item.added"]
    assert [e["item"].get("arguments") for e in begun] == [None, "", ""]
    pieces = [e for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert len(pieces) > 6, "the arguments come in pieces"


def test_text_behind_a_call_is_a_message_of_its_own() -> None:
    with talking(HERMES, says_it(f"One.{PARIS}Two.{TIME}Three.")) as (_, base):
        whole = ask(base, tools=TOOLS)
        streamed = put_together(stream(base, tools=TOOLS))
    types = ["message", "function_call", "message", "function_call", "message"]
    assert [item["type"] for item in whole["output"]] == types
    assert text_of(whole) == "One.Two.Three."
    assert same(streamed) == same(whole)


def test_short_ids_stay_short() -> None:
    with talking(MISTRAL, says_it('[TOOL_CALLS]clock[ARGS]{"a": 1}')) as (_, base):
        [call] = ask(base, tools=TOOLS)["output"]
    assert len(call["call_id"]) == 9


def test_a_call_that_breaks_off_is_incomplete() -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a'
    with talking(HERMES, partial(cut_short, text=text)) as (_, base):
        for response in (ask(base, tools=TOOLS), put_together(stream(base, tools=TOOLS))):
            assert response["status"] == "incomplete"
            assert response["output"][0]["status"] == "incomplete"


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    with talking(HERMES, says_it(PARIS + TIME)) as (_, base):
        response = ask(base, tools=TOOLS, parallel_tool_calls=False)
    assert [item["name"] for item in response["output"]] == ["get_weather"]
    assert response["status"] == "completed" and response["parallel_tool_calls"] is False


def test_thoughts_are_an_item_before_the_answer() -> None:
    with talking(THINKING, says_it(f"<think>Which, 你好?</think>\nHm.{PARIS}")) as (_, base):
        whole = ask(base, tools=TOOLS)
        events = stream(base, tools=TOOLS)
    thought, said, call = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Which, 你好?"}]
    assert thought["summary"] == []
    assert said["content"][0]["text"] == "Hm."
    assert call["type"] == "function_call"
    assert same(put_together(events)) == same(whole)
    assert kinds(events)[4:6] == ["reasoning_text.delta", "reasoning_text.done"]
    num_thought = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert 0 < num_thought < whole["usage"]["output_tokens"]


def test_an_answer_cut_while_it_thinks_has_no_message() -> None:
    with talking(THINKING, partial(cut_short, text="<think>Hm")) as (_, base):
        [thought] = ask(base)["output"]
    assert (thought["type"], thought["status"]) == ("reasoning", "incomplete")


def test_log_probabilities_come_with_the_text(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    _, base = stubbed(says(tokenizer, "hello, 你好"))
    asked: Json = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [part] = ask(base, **asked)["output"][0]["content"]
    assert len(part["logprobs"]) == len(tokenizer.encode("hello, 你好"))
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    told = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"])
    assert told.decode() == "hello, 你好"
    events = stream(base, **asked)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [entry for e in deltas for entry in e["logprobs"]] == part["logprobs"]
    assert put_together(events)["output"][0]["content"] == [part]
    assert ask(base)["output"][0]["content"][0]["logprobs"] == []


def test_log_probabilities_of_thoughts_and_calls_are_left_out() -> None:
    text = f"<think>Which?</think>\nHm.{PARIS}"
    with talking(THINKING, says_it(text)) as (_, base):
        response = ask(base, tools=TOOLS, include=["message.output_text.logprobs"])
    scores = response["output"][1]["content"][0]["logprobs"]
    assert "Hm." in "".join(entry["token"] for entry in scores)
    assert len(scores) <= 6, "a letter is about a token here"


CONVERSATION: list[Json] = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
    {
        "type": "reasoning",
        "id": "rs_2",
        "content": [{"type": "reasoning_text", "text": "Hm."}],
        "status": "completed",
        "encrypted_content": None,
    },
    {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Two.", "annotations": [], "logprobs": []}],
    },
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "a1",
        "name": "clock",
        "arguments": '{"zone": "UTC"}',
        "status": "completed",
        "parsed_arguments": None,
    },
    {"type": "function_call", "call_id": "a2", "name": "clock", "arguments": ""},
    {"type": "function_call_output", "call_id": "a1", "output": "12:00"},
    {
        "type": "function_call_output",
        "call_id": "a2",
        "output": [{"type": "input_text", "text": "13"}, {"type": "input_text", "text": ":00"}],
    },
    {"role": "assistant", "content": "Noon."},
    {"role": "assistant", "content": "Or one."},
    {"role": "user", "content": "Thanks."},
]


def test_items_become_the_messages_that_templates_know() -> None:
    with talking(HERMES, says_it("Yes.")) as (service, base):
        ask(base, input=CONVERSATION, instructions="Be kind.", tools=TOOLS)
        prompt_ids = service.seen.get(timeout=PATIENCE_S).prompt_ids
        prompt = httpx.post(f"{base}/detokenize", json={"tokens": prompt_ids}).json()["prompt"]
        counted = httpx.post(
            f"{base}{PATH}/input_tokens",
            json={"input": CONVERSATION, "instructions": "Be kind.", "tools": TOOLS},
        ).json()
        wrong = [
            httpx.post(f"{base}{PATH}/input_tokens", json={"input": "a", **fields}).status_code
            for fields in ({"model": "nobody's"}, {"store": True})
        ]
    assert wrong == [404, 400]
    assert counted == {"object": "response.input_tokens", "input_tokens": len(prompt_ids)}
    turns = prompt.split("<|im_start|>")[2:]
    assert turns == [
        "system\nBe kind.<|im_end|>\n",
        "system\nBe brief.<|im_end|>\n",
        "user\naa<|im_end|>\n",
        'assistant\n(Hm.)Two.CALL a1 clock {"zone": "UTC"}CALL a2 clock {}<|im_end|>\n',
        "tool\n12:00 FOR a1<|im_end|>\n",
        "tool\n13:00 FOR a2<|im_end|>\n",
        "assistant\nNoon.<|im_end|>\n",
        "assistant\nOr one.<|im_end|>\n",
        "user\nThanks.<|im_end|>\n",
        "assistant\n",
    ]


def test_the_template_is_told_how_much_to_think() -> None:
    with talking(GRADED, says_it("a")) as (service, base):
        response = ask(base, reasoning={"effort": "low", "summary": "auto"})
        prompt_ids = service.seen.get(timeout=PATIENCE_S).prompt_ids
        prompt = httpx.post(f"{base}/detokenize", json={"tokens": prompt_ids}).json()["prompt"]
    assert prompt.rstrip().endswith("low")
    assert response["reasoning"] == {"effort": "low", "summary": None}


def test_a_failure_in_a_stream_is_an_event(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    async def fails(request: Request) -> AsyncGenerator[TokenEvent, None]:
        yield TokenEvent(request.id, tuple(tokenizer.encode("hello")))
        raise EngineFailure("The engine failed.")

    _, base = stubbed(fails)
    events = stream(base)
    assert kinds(events)[-2:] == ["output_item.done", "failed"]
    last = put_together(events)
    assert (last["status"], last["output"][0]["status"]) == ("failed", "incomplete")
    assert last["error"] == {"code": "server_error", "message": "The engine failed."}
    answer = httpx.post(base + PATH, json={"input": "hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")


async def fails_at_once(request: Request) -> AsyncGenerator[TokenEvent, None]:
    raise EngineFailure("The engine failed.")
    yield TokenEvent(request.id)


def test_a_failure_before_the_first_token_is_a_status(stubbed: Stubbed) -> None:
    _, base = stubbed(fails_at_once)
    answer = httpx.post(base + PATH, json={"input": "hello", "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")


def test_hanging_up_cancels(stubbed: Stubbed) -> None:
    service, base = stubbed(begins_and_hangs)
    body = {"input": "hello", "stream": True}
    with httpx.stream("POST", base + PATH, json=body) as answer:
        assert next(answer.iter_lines()) == "event: response.created"
    assert service.cancelled.get(timeout=PATIENCE_S).startswith("resp_")


def test_streams_say_that_they_are_not_gone_on_with(url: str) -> None:
    headers = {"Last-Event-ID": "resp_1:2"}
    answer = httpx.post(url + PATH, json={"input": "hello"}, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Last-Event-ID"
    id = ask(url, max_output_tokens=2)["id"]
    assert httpx.get(f"{url}/v1/streams/{id}").status_code == 404


def test_scheduling_is_asked_for_as_in_a_chat(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    service, base = stubbed(says(tokenizer, "a b c"))
    asked: Json = {"priority": 3, "seed": 5, "stop": "b", "top_k": 4, "explain": True}
    response = ask(base, prompt_cache_key="k", **asked)
    request = service.seen.get(timeout=PATIENCE_S)
    assert (request.priority, request.sampling.seed, request.sampling.top_k) == (3, 5, 4)
    assert request.group == response["prompt_cache_key"] == "k"
    assert text_of(response) == "a " and response["status"] == "completed"
    assert "explain" in response
