"""Responses that are kept: who finds them, how long, and how many."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dynamo_serve.api.responses_store import ResponseStore
from dynamo_serve.config import ResponsesSection
from dynamo_serve.errors import InvalidRequest, PreviousNotFound, ResponseNotFound
from tests.api.live import config, serving
from tests.api.responding import PATH, WEATHER, Json, ask, keeping, stream
from tests.api.stub import StubService, says
from tests.api.talking import HERMES, tokenizer_of
from tests.api.test_tenants import KEYS, tenants
from tests.api.test_tools import PARIS, says_it
from tests.patience import PATIENCE_S


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def store_of(**fields: Any) -> tuple[ResponseStore, Clock]:
    clock = Clock()
    return ResponseStore(ResponsesSection(store="asked", **fields), clock), clock


def response(size: int = 0) -> Json:
    return {"output": [{"id": "rs_a_0", "type": "reasoning", "text": "x" * size}]}


def size_of(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")))


SIZE = size_of(response(2000)) + size_of(response(2000)["output"])


def test_an_answer_is_gone_when_its_time_is_over() -> None:
    store, clock = store_of(ttl_s=10)
    assert store.keep("a", "resp_1", [], response())
    clock.now += 5
    assert store.keep("a", "resp_2", [{"id": "msg_b_in0"}], response())
    clock.now += 4.9
    assert json.loads(store.response("a", "resp_1")) == response()
    clock.now += 0.2
    with pytest.raises(ResponseNotFound):
        store.response("a", "resp_1")
    assert store.conversation("a", "resp_2") == [{"id": "msg_b_in0"}, *response()["output"]]
    clock.now += 5
    with pytest.raises(PreviousNotFound) as gone:
        store.conversation("a", "resp_2")
    assert gone.value.param == "previous_response_id"
    assert store.num_bytes == 0


def test_the_oldest_of_a_tenant_makes_room_for_its_next() -> None:
    store, _ = store_of(max_tenant_bytes=2 * SIZE, max_bytes=10 * SIZE)
    assert store.keep("b", "resp_b", [], response(2000))
    for i in range(3):
        assert store.keep("a", f"resp_{i}", [], response(2000))
    assert store.num_bytes == 3 * SIZE
    with pytest.raises(ResponseNotFound):
        store.response("a", "resp_0")
    for tenant, id in (("a", "resp_1"), ("a", "resp_2"), ("b", "resp_b")):
        assert store.response(tenant, id)


def test_who_holds_most_makes_room_for_others() -> None:
    store, _ = store_of(max_tenant_bytes=3 * SIZE, max_bytes=3 * SIZE)
    assert store.keep("b", "resp_b", [], response(2000))
    assert store.keep("a", "resp_0", [], response(2000))
    assert store.keep("a", "resp_1", [], response(2000))
    assert store.keep("b", "resp_c", [], response(2000))
    with pytest.raises(ResponseNotFound):
        store.response("a", "resp_0")
    assert store.response("b", "resp_b") and store.response("a", "resp_1")


def test_an_answer_that_is_too_large_is_not_kept_and_costs_nobody_a_place() -> None:
    store, _ = store_of(max_tenant_bytes=2 * SIZE, max_bytes=10 * SIZE)
    assert store.keep("a", "resp_1", [], response(2000))
    assert not store.keep("a", "resp_2", [], response(3 * SIZE))
    assert store.response("a", "resp_1")


def test_deleting_gives_the_bytes_back() -> None:
    store, _ = store_of()
    store.keep("a", "resp_1", [], response(2000))
    with pytest.raises(ResponseNotFound):
        store.delete("b", "resp_1")
    store.delete("a", "resp_1")
    assert store.num_bytes == 0


@pytest.mark.parametrize(
    ("setting", "by_itself"), [("none", False), ("asked", False), ("default", True)]
)
def test_who_says_what_is_kept(setting: Any, by_itself: bool) -> None:
    store = ResponseStore(ResponsesSection(store=setting))
    assert (store.wants(None), store.wants(False)) == (by_itself, False)
    if setting == "none":
        with pytest.raises(InvalidRequest, match=r"responses\.store"):
            store.wants(True)
    else:
        assert store.wants(True)


def test_without_a_store_nothing_is_kept_and_the_setting_is_named(url: str) -> None:
    assert ask(url, max_output_tokens=2)["store"] is False
    for fields, param in (
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ):
        answer = httpx.post(url + PATH, json={"input": "hello", **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert "responses.store" in answer.json()["error"]["message"]
    answer = httpx.get(f"{url}{PATH}/resp_1")
    assert answer.status_code == 404
    assert "responses.store" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def kept() -> Generator[tuple[StubService, str]]:
    with keeping(HERMES, says_it(f"I ask.{PARIS}"), store="default") as (service, base):
        yield service, base


def prompt_of(service: StubService, base: str) -> str:
    """What the last request gave the model."""
    while True:
        request = service.seen.get(timeout=PATIENCE_S)
        if service.seen.empty():
            break
    ids = request.prompt_ids
    return str(httpx.post(f"{base}/detokenize", json={"tokens": ids}).json()["prompt"])


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_conversation_goes_on_from_a_kept_answer(
    kept: tuple[StubService, str], is_stream: bool
) -> None:
    service, base = kept
    fields: Json = {"tools": [WEATHER], "instructions": "Be kind."}
    first = stream(base, **fields)[-1]["response"] if is_stream else ask(base, **fields)
    assert first["store"] is True
    output = {"type": "function_call_output", "call_id": first["output"][1]["call_id"]}
    second = ask(
        base, input=[{**output, "output": "18"}], previous_response_id=first["id"], tools=[WEATHER]
    )
    prompt = prompt_of(service, base)
    assert "Be kind" not in prompt, "instructions are not carried on"
    turns = prompt.split("<|im_start|>")[2:-1]
    id = first["output"][1]["call_id"]
    assert turns == [
        "user\nhello<|im_end|>\n",
        f'assistant\nI ask.CALL {id} get_weather {{"city": "Zürich 😀"}}<|im_end|>\n',
        f"tool\n18 FOR {id}<|im_end|>\n",
    ]
    assert second["previous_response_id"] == first["id"]
    third = ask(base, input="more", previous_response_id=second["id"])
    assert httpx.delete(f"{base}{PATH}/{first['id']}").json()["deleted"] is True
    assert prompt_of(service, base).count("<|im_start|>user") == 2
    again = ask(base, input="more", previous_response_id=third["id"])
    assert prompt_of(service, base).count("<|im_start|>user") == 3, "what went before is kept too"
    items = httpx.get(f"{base}{PATH}/{again['id']}/input_items?order=asc&limit=3").json()
    assert [item["type"] for item in items["data"]] == ["message", "message", "function_call"]
    assert items["has_more"] is True and items["last_id"] == items["data"][-1]["id"]
    rest = f"{base}{PATH}/{again['id']}/input_items?order=asc&after={items['last_id']}"
    assert httpx.get(rest).json()["data"][0]["type"] == "function_call_output"
    newest = httpx.get(f"{base}{PATH}/{again['id']}/input_items?limit=1").json()["data"][0]
    assert newest["content"] == [{"type": "input_text", "text": "more"}]


def test_items_are_found_by_their_ids(kept: tuple[StubService, str]) -> None:
    service, base = kept
    first = ask(base, tools=[WEATHER])
    said, call = first["output"]
    given = httpx.get(f"{base}{PATH}/{first['id']}/input_items").json()["data"][0]
    items = [
        {"type": "item_reference", "id": given["id"]},
        {"id": said["id"]},
        {"type": "item_reference", "id": call["id"]},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "18"},
    ]
    ask(base, input=items, tools=[WEATHER])
    prompt = prompt_of(service, base)
    assert "user\nhello" in prompt and "assistant\nI ask.CALL" in prompt
    for id in (f"{call['id']}9", "msg_x_0", "x"):
        answer = httpx.post(base + PATH, json={"input": [{"type": "item_reference", "id": id}]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].id")


def test_what_is_asked_of_a_kept_answer_is_checked(kept: tuple[StubService, str]) -> None:
    _, base = kept
    id = ask(base)["id"]
    for query, param in (
        ("?stream=true", "stream"),
        ("?include=x", "include"),
        ("?starting_after=1", "starting_after"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=many", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg", "after"),
        ("/input_items?before=msg", "before"),
    ):
        answer = httpx.get(f"{base}{PATH}/{id}{query}")
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
    assert httpx.get(f"{base}{PATH}/{id}?stream=false").json()["id"] == id


def test_an_answer_that_is_too_large_to_keep_says_so() -> None:
    limits = {"store": "default", "max_tenant_bytes": 1024}
    with keeping(HERMES, says_it("Hello."), **limits) as (_, base):
        response = ask(base, input="x" * 1000)
        assert response["store"] is False
        assert httpx.get(f"{base}{PATH}/{response['id']}").status_code == 404


def test_a_tenant_finds_its_own_and_nobody_elses(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump(tenants()))
    tokenizer = tokenizer_of(HERMES)
    settings = replace(
        config(tenants_file=str(file)), responses=ResponsesSection(store="asked", ttl_s=100)
    )
    service = StubService(says(tokenizer, "Hello."))
    with serving(service, tokenizer, settings) as base:
        acme, beta = (
            httpx.Client(base_url=base, headers={"Authorization": f"Bearer {KEYS[name]}"})
            for name in ("acme", "beta")
        )
        with acme, beta:
            made = acme.post(PATH, json={"input": "secret", "store": True}).json()
            id, item = made["id"], made["output"][0]["id"]
            assert acme.get(f"{PATH}/{id}").json()["output"] == made["output"]
            missing = beta.get(f"{PATH}/resp_0").json()["error"]["message"]
            for answer in (
                beta.get(f"{PATH}/{id}"),
                beta.get(f"{PATH}/{id}/input_items"),
                beta.delete(f"{PATH}/{id}"),
            ):
                assert answer.status_code == 404
                assert answer.json()["error"]["message"] == missing.replace("resp_0", id)
            previous = {"input": "x", "previous_response_id": id}
            assert beta.post(PATH, json=previous).status_code == 400
            referring = {"input": [{"type": "item_reference", "id": item}]}
            assert beta.post(PATH, json=referring).status_code == 400
            assert acme.post(PATH, json=referring).status_code == 200
            assert acme.post(PATH, json=previous).status_code == 200
            assert httpx.get(f"{base}{PATH}/{id}").status_code == 401


def test_log_probabilities_are_kept_and_not_gone_on_with() -> None:
    fields: Json = {"include": ["message.output_text.logprobs"], "top_logprobs": 20}
    with keeping(HERMES, says_it("Hello."), store="default") as (_, base):
        first = ask(base, **fields)
        second = ask(base, previous_response_id=first["id"])
        items = httpx.get(f"{base}{PATH}/{second['id']}/input_items?order=asc").json()["data"]
        kept = httpx.get(f"{base}{PATH}/{first['id']}").json()
    assert kept["output"][0]["content"][0]["logprobs"]
    assert items[1]["content"] == [{"type": "output_text", "text": "Hello.", "annotations": []}]


def test_references_bring_no_more_than_a_body_may_have() -> None:
    said = {"role": "user", "content": "x" * 1000}
    with keeping(HERMES, says_it("Hello."), store="default") as (_, base):
        first = ask(base, input=[said])
        id = httpx.get(f"{base}{PATH}/{first['id']}/input_items?order=asc").json()["data"][0]["id"]
        reference = {"type": "item_reference", "id": id}
        few = httpx.post(base + PATH, json={"input": [said, *[reference] * 2]})
        many = httpx.post(
            base + PATH, json={"input": [said, *[reference] * 9000]}, timeout=PATIENCE_S
        )
    assert few.status_code == 200
    assert many.status_code == 413
    assert "input[" in many.json()["error"]["param"]


def test_more_items_than_a_conversation_may_have() -> None:
    thoughts = [{"type": "reasoning"}] * 6000
    said = {"role": "user", "content": "hello"}
    with keeping(HERMES, says_it("Hello."), store="default") as (_, base):
        first = ask(base, input=[*thoughts, said])
        more = {"input": [*thoughts, said], "previous_response_id": first["id"]}
        refused = httpx.post(base + PATH, json=more, timeout=PATIENCE_S)
    assert refused.status_code == 400
    assert "with previous_response_id there are 12003 items" in refused.json()["error"]["message"]
