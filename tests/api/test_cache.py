"""Why a prompt was not found, over HTTP: the texts on both sides, and nothing of another tenant."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import MAX_MODEL_LEN, config, serving
from tests.api.stub import hangs
from tests.api.test_tenants import KEYS, error, tenants
from tests.patience import PATIENCE_S

HEAD = "You are a patient teacher of arithmetic. Today is "
PROMPT = HEAD + "Monday. What are two and two?"
OTHER = HEAD + "Sunday. What are two and two?"


class House(NamedTuple):
    acme: httpx.Client
    beta: httpx.Client
    admin: httpx.Client


@pytest.fixture
def house(model_folder: str, tokenizer: Tokenizer, tmp_path: Path) -> Generator[House]:
    """The real service on the fake engine, with two tenants and an admin."""
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump(tenants()))
    settings = config(tenants_file=str(file))
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        clients = {
            name: httpx.Client(
                base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S
            )
            for name, key in KEYS.items()
        }
        yield House(**clients)
        for client in clients.values():
            client.close()


def complete(client: httpx.Client, prompt: Any = PROMPT) -> int:
    """Run it; how many of its tokens were found."""
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def explain(client: httpx.Client, prompt: Any = PROMPT, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/cache/explain", json={"prompt": prompt, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_what_is_told_is_what_a_request_then_finds(house: House, tokenizer: Tokenizer) -> None:
    assert explain(house.acme)["miss"]["reason"] == "first_time"
    assert complete(house.acme) == 0
    told = explain(house.acme)
    assert told["model"] == "tiny"
    assert told["prompt_tokens"] == len(tokenizer.encode(PROMPT, add_special_tokens=True))
    assert told["matched_tokens"] == told["reused_tokens"] == complete(house.acme) > 0
    assert told["tiers"] == {"device": told["matched_tokens"]}
    assert told["miss"]["reason"] == "too_short"


def test_ids_and_the_fields_of_a_whole_request_are_taken(
    house: House, tokenizer: Tokenizer
) -> None:
    complete(house.acme)
    ids = tokenizer.encode(PROMPT, add_special_tokens=True)
    assert explain(house.acme, ids) == explain(house.acme, temperature=0.5, stream=True, seed=3)


def test_the_texts_on_both_sides_of_a_difference(house: House) -> None:
    complete(house.acme)
    miss = explain(house.acme, OTHER)["miss"]
    assert miss["reason"] == "differs"
    assert HEAD.endswith(miss["text"]["before"]) and miss["text"]["before"]
    assert OTHER.startswith(HEAD + miss["text"]["prompt"][:3])
    assert PROMPT.startswith(HEAD + miss["text"]["stored"][:3])
    assert miss["text"]["prompt"][:3] == "Sun" and miss["text"]["stored"][:3] == "Mon"
    assert "'Sun" in miss["message"] and "'Mon" in miss["message"]
    assert f"Token {miss['position']} " in miss["message"]


def test_a_conversation_is_rendered_as_a_chat_does_it(house: House) -> None:
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
    assert house.acme.post("/v1/chat/completions", json=chat).status_code == 200
    told = house.acme.post("/v1/cache/explain", json=chat).json()
    usage = house.acme.post("/v1/chat/completions", json=chat).json()["usage"]
    assert told["prompt_tokens"] == usage["prompt_tokens"]
    assert told["reused_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_another_tenant_learns_nothing(house: House) -> None:
    asked = (PROMPT, OTHER, HEAD, HEAD * 3)
    before = [explain(house.beta, prompt) for prompt in asked]
    complete(house.acme)
    complete(house.acme, OTHER)
    assert [explain(house.beta, prompt) for prompt in asked] == before
    assert {told["miss"]["reason"] for told in before} == {"first_time"}
    assert all(told["miss"]["text"]["stored"] is None for told in before)


def test_an_operator_is_told_that_others_have_it(house: House) -> None:
    def asked(tenant: str, prompt: str = PROMPT) -> dict[str, Any]:
        url = "/admin/cache/explain"
        answer = house.admin.post(url, params={"tenant": tenant}, json={"prompt": prompt})
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        assert told["tenant"] == tenant
        return told

    assert (asked("beta")["apart"], asked("beta")["miss"]["reason"]) == ([], "first_time")
    complete(house.acme)
    told = asked("beta")
    (apart,) = told["apart"]
    assert apart["tenants"] == ["acme"] and 0 < apart["tokens"] <= told["prompt_tokens"]
    assert told["miss"]["reason"] == "salted_apart" and "never finds" in told["miss"]["message"]
    assert explain(house.beta)["miss"]["reason"] == "first_time", "the tenant itself learns nothing"
    complete(house.beta)
    assert asked("beta")["miss"]["reason"] == "too_short", "it has its own now"
    assert asked("beta")["apart"] == [apart], "as others have"
    assert asked("acme", OTHER)["miss"]["reason"] == "differs"


@pytest.mark.parametrize("query", ["", "?tenant=", "?tenant=nobody"])
def test_an_operator_names_a_tenant(house: House, query: str) -> None:
    url = "/admin/cache/explain" + query
    assert error(house.admin.post(url, json={"prompt": "a"}), 400)["param"] == "tenant"
    assert "key of a tenant" in error(house.acme.post(url, json={"prompt": "a"}), 403)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**40]}, "prompt[0]"),
        ({"prompt": [2**70]}, "prompt[0]"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"messages": "a"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools[0].type"),
        ({"prompt": "a", "salt": "beta"}, "salt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "tenant": "beta"}, "tenant"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        ({"messages": [{"role": "user", "content": "a" * 4 * MAX_MODEL_LEN}]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(house: House, body: Any, param: str) -> None:
    assert error(house.acme.post("/v1/cache/explain", json=body), 400)["param"] == param


def test_a_model_that_is_not_served_and_a_key_that_is_not_known(house: House) -> None:
    body = {"prompt": "a", "model": "gpt"}
    assert error(house.acme.post("/v1/cache/explain", json=body), 404)["param"] == "model"
    error(house.admin.post("/v1/cache/explain", json={"prompt": "a"}), 401)


def test_an_engine_that_is_not_there_is_told(stubbed: Stubbed) -> None:
    _, base = stubbed(hangs)
    error(httpx.post(base + "/v1/cache/explain", json={"prompt": "a"}), 503)


def test_operators_see_the_tree_and_tenants_do_not(house: House) -> None:
    complete(house.acme)
    complete(house.acme, OTHER)
    complete(house.beta)
    for client in (house.acme, house.beta):
        assert "key of a tenant" in error(client.get("/admin/cache"), 403)["message"]
    told = house.admin.get("/admin/cache").json()
    owners = [tuple(run["tenants"]) for run in told["runs"] if run["parent"] is None]
    assert sorted(owners) == [("acme",), ("beta",)]
    (head,) = [r for r in told["runs"] if r["parent"] is None and r["tenants"] == ["acme"]]
    assert HEAD[:20] in head["text"] and len(head["text"]) <= 60
    assert head["hits"] == 1 and "first_ids" not in head
    assert sum(run["pages"]["device"] for run in told["runs"]) == told["known_pages"]
    assert told["known_pages"] == told["pages"]["device"]
