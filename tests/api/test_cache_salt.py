"""`cache_salt` over HTTP: who finds what, what is told of it, and that no salt is told."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from dynamo_serve.directory import Caller, digest
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.stub import says
from tests.api.test_cache import House, explain
from tests.api.test_cache import house as house  # noqa: PLC0414
from tests.api.test_prefixes import SYSTEM, Open, kill_engine, of, pin, until
from tests.api.test_prefixes import opened as opened  # noqa: PLC0414
from tests.api.test_shared import House as SharedHouse
from tests.api.test_shared import Open as OpenShared
from tests.api.test_shared import opened as shared_house  # noqa: F401
from tests.api.test_tenants import error
from tests.patience import PATIENCE_S

TEXT = "Dear diary, nobody is to know what I have written here, today of all days. "
ANN, BOB = "ann-5e0f1b", "bob-77a90c"
CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 1}
ASKS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 1},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": TEXT, "max_output_tokens": 1},
}


def cached(client: httpx.Client, path: str, **more: Any) -> int:
    """Ask; how many tokens of the prompt were found, as each endpoint tells it."""
    answer = client.post(path, json={**ASKS[path], **more})
    assert answer.status_code == 200, answer.text
    for salt in (ANN, BOB):
        assert salt not in answer.text
    usage = answer.json()["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    found: int = details["cached_tokens"] if details else usage["cache_read_input_tokens"]
    return found


@pytest.mark.parametrize("path", ASKS)
def test_only_an_equal_salt_of_the_same_tenant_finds_a_prompt(house: House, path: str) -> None:
    assert cached(house.acme, path, cache_salt=ANN) == 0
    assert cached(house.acme, path, cache_salt=BOB) == 0
    assert cached(house.acme, path) == 0
    assert cached(house.beta, path, cache_salt=ANN) == 0
    found = [cached(house.acme, path, cache_salt=salt) for salt in (ANN, BOB, None)]
    assert found[0] > 16 and len(set(found)) == 1
    assert cached(house.beta, path) == 0


def test_choices_of_a_call_share_what_no_other_salt_finds(house: House) -> None:
    path = "/v1/completions"
    answer = house.acme.post(path, json={**ASKS[path], "n": 3, "cache_salt": ANN})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 3
    runs = house.admin.get("/admin/cache").json()["runs"]
    assert [run["parent"] for run in runs] == [None], "one chain of pages"
    assert cached(house.acme, path, cache_salt=BOB) == 0
    assert cached(house.acme, path, cache_salt=ANN) > 0


@pytest.mark.parametrize(("stored", "asked"), [(ANN, BOB), (ANN, None), (None, ANN)])
def test_explain_says_up_to_where_it_is_stored_apart(
    house: House, stored: str | None, asked: str | None
) -> None:
    cached(house.acme, "/v1/completions", cache_salt=stored)
    told = explain(house.acme, TEXT, cache_salt=asked)
    miss = told["miss"]
    assert (told["matched_tokens"], miss["reason"], miss["position"]) == (0, "salted_apart", 0)
    assert 0 < miss["apart_until"] <= told["prompt_tokens"] and miss["apart_until"] % 16 == 0
    assert f"token {miss['apart_until']} " in miss["message"]
    assert miss["text"]["stored"] is None
    assert ANN not in str(told) and BOB not in str(told)
    assert explain(house.acme, TEXT, cache_salt=stored)["matched_tokens"] >= miss["apart_until"]
    for salt in (None, ANN, BOB):
        assert explain(house.beta, TEXT, cache_salt=salt)["miss"]["reason"] == "first_time"


def test_operators_see_what_is_apart_and_no_salt(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        cached(house.acme, "/v1/completions", cache_salt=ANN)
        told = house.admin.get("/admin/cache")
    assert [run["salted"] for run in told.json()["runs"]] == [True]
    url = "/admin/cache/explain"
    own = house.admin.post(url, params={"tenant": "acme"}, json={"prompt": TEXT}).json()
    assert own["miss"]["reason"] == "salted_apart" and "stored for you" in own["miss"]["message"]
    ask = {"prompt": TEXT, "cache_salt": ANN}
    same = house.admin.post(url, params={"tenant": "acme"}, json=ask).json()
    assert same["matched_tokens"] >= own["miss"]["apart_until"] > 0
    other = house.admin.post(url, params={"tenant": "beta"}, json={"prompt": TEXT}).json()
    assert other["apart"] == [{"tenants": ["acme"], "tokens": own["miss"]["apart_until"]}]
    state = house.admin.get("/admin/state")
    logged = caplog.text
    for text in (told.text, state.text, logged, str(own), str(same), str(other)):
        assert ANN not in text and digest(ANN.encode()) not in text


BODIES: dict[str, dict[str, Any]] = {
    **ASKS,
    "/v1/embeddings": {"input": TEXT},
    "/v1/rerank": {"query": TEXT, "documents": [TEXT]},
    "/v1/prefixes": {"prompt": TEXT},
    "/v1/cache/explain": {"prompt": TEXT},
}


def test_a_salt_that_is_none_is_named(house: House) -> None:
    for path, body in BODIES.items():
        for salt in ("", 7, ["a"], "s" * 513):
            answer = house.acme.post(path, json={**body, "cache_salt": salt})
            assert answer.status_code == 400, answer.text
            assert "'cache_salt'" in answer.json()["error"]["message"]
            assert "s" * 99 not in answer.text
            if path != "/v1/messages":
                assert error(answer, 400)["param"] == "cache_salt"
    assert cached(house.acme, "/v1/completions", cache_salt="s" * 512) == 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank"])
def test_what_vectors_are_made_of_is_apart(house: House, path: str) -> None:
    answer = house.acme.post(path, json={**BODIES[path], "cache_salt": ANN})
    assert answer.status_code == 200, answer.text
    assert cached(house.acme, "/v1/completions", cache_salt=BOB) == 0
    assert cached(house.acme, "/v1/completions", cache_salt=ANN) > 0


def test_a_request_carries_the_hash_of_its_salt(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    service, base = stubbed(says(tokenizer, "a b c"))
    httpx.post(base + "/v1/chat/completions", json={**CHAT, "cache_salt": ANN})
    request = service.seen.get(timeout=PATIENCE_S)
    assert request.salt == Caller("default", "").salted(ANN).salt
    assert ANN not in repr(request)


def test_a_pin_is_found_with_its_salt_and_computed_again_with_it(opened: Open) -> None:
    house = opened(process=True)
    made = pin(house.acme, messages=[SYSTEM], cache_salt=ANN)
    plain = {"messages": [SYSTEM, {"role": "user", "content": "hello"}], "max_tokens": 1}

    def found(salt: str | None) -> int:
        answer = house.acme.post("/v1/chat/completions", json={**plain, "cache_salt": salt})
        assert answer.status_code == 200, answer.text
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert (found(BOB), found(None)) == (0, 0)
    assert found(ANN) > 0 and of(house.acme, made["id"])["hits"] == 1
    kill_engine(house.service)
    until(lambda: of(house.acme, made["id"])["status"] == "computing")
    until(lambda: of(house.acme, made["id"])["status"] == "ready")
    assert found(BOB) == 0 < found(ANN)


def test_what_operators_declare_is_found_whatever_the_salt(shared_house: OpenShared) -> None:  # noqa: F811
    house: SharedHouse = shared_house()
    question = {"role": "user", "content": "hello, where are the red foxes, and what do they cost?"}
    body = {"messages": [SYSTEM, question], "max_tokens": 1}

    def found(salt: str | None) -> int:
        answer = house.acme.post("/v1/chat/completions", json={**body, "cache_salt": salt})
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    head = found(ANN)
    assert head > 0 and found(BOB) == head, "the head that is shared, and nothing after it"
    assert found(ANN) > head
    told = house.acme.post("/v1/cache/explain", json=body).json()
    assert (told["shared_tokens"], told["matched_tokens"]) == (head, head)
    assert (told["miss"]["reason"], told["shared_prefix"]) == ("salted_apart", "shop")
