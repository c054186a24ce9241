"""Pinned prefixes over HTTP: each tenant its own, within bounds, back after an engine is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from dynamo_serve import prefixes
from dynamo_serve.config import CacheSection, Config, EngineSection
from dynamo_serve.directory import digest
from dynamo_serve.link import ProcessLink
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import MAX_MODEL_LEN, config, serving
from tests.patience import PATIENCE_S

KEYS = {name: f"key-of-{name}-with-enough-characters" for name in ("acme", "beta")}
SYSTEM = {"role": "system", "content": "You are the help of a shop that sells foxes. " * 2}
PAGE = 16
PAGES = 64


class House(NamedTuple):
    service: Service
    acme: httpx.Client
    beta: httpx.Client


def settings_of(tmp_path: Path, *, process: bool, **cache: Any) -> Config:
    tenants: dict[str, Any] = {
        name: {"keys": [f"sha256:{digest(k.encode())}"]} for name, k in KEYS.items()
    }
    tenants["beta"] |= {"quota": {"pages_burst": 8}}
    file = tmp_path / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    return replace(
        config(tenants_file=str(file)),
        engine=EngineSection(kind="fake", process=process),
        cache=CacheSection(page_size=PAGE, num_pages=PAGES, **cache),
    )


Open = Callable[..., House]


@pytest.fixture
def opened(model_folder: str, tokenizer: Tokenizer, tmp_path: Path) -> Generator[Open]:
    """Starts a server with two tenants, over the fake engine."""
    with contextlib.ExitStack() as stack:

        def start(*, process: bool = False, **cache: Any) -> House:
            settings = settings_of(tmp_path, process=process, **cache)
            service = Service(settings, model_path=model_folder)
            base = stack.enter_context(serving(service, tokenizer, settings))
            clients = [
                httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"})
                for key in KEYS.values()
            ]
            for client in clients:
                client.timeout = httpx.Timeout(PATIENCE_S)
                stack.enter_context(client)
            return House(service, *clients)

        yield start


def pin(client: httpx.Client, status: int = 201, **body: Any) -> Any:
    answer = client.post("/v1/prefixes", json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 201 else answer.json()["error"]


def cached(client: httpx.Client, question: str) -> int:
    messages = [SYSTEM, {"role": "user", "content": question}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def of(client: httpx.Client, id: str) -> Any:
    return client.get(f"/v1/prefixes/{id}").json()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came about"


def test_a_conversation_finds_what_was_pinned(opened: Open) -> None:
    house = opened()
    made = pin(house.acme, messages=[SYSTEM], name="shop", ttl_s=60)
    assert made["status"] == "ready" and made["name"] == "shop" and made["object"] == "prefix"
    assert made["pinned_tokens"] == made["pages"] * PAGE <= made["tokens"]
    assert made["cached_tokens"] == 0 and made["hits"] == 0 and made["last_hit_at"] is None
    assert 0 < made["expires_at"] - time.time() <= 60
    assert cached(house.acme, "hello") >= made["pinned_tokens"] - PAGE > 0
    assert house.service.stats.pages_pinned == made["pages"]
    again = pin(house.acme, messages=[SYSTEM])
    assert again["cached_tokens"] > 0 and again["id"] != made["id"]
    assert house.service.stats.pages_pinned == made["pages"]
    assert [p["id"] for p in house.acme.get("/v1/prefixes").json()["data"]] == [
        made["id"],
        again["id"],
    ]


def test_hits_are_told(opened: Open) -> None:
    house = opened()
    ids = list(range(60, 60 + 2 * PAGE))
    made = pin(house.acme, prompt=ids)
    assert (made["tokens"], made["pages"], made["tiers"]) == (2 * PAGE, 2, ["device"])
    before = time.time()
    house.acme.post("/v1/completions", json={"prompt": [*ids, 5], "max_tokens": 1})
    told = of(house.acme, made["id"])
    assert told["hits"] == 1 and before - 1 < told["last_hit_at"] <= time.time()


def test_nobody_sees_or_deletes_what_another_tenant_has_pinned(opened: Open) -> None:
    house = opened()
    made = pin(house.acme, messages=[SYSTEM])
    path = f"/v1/prefixes/{made['id']}"
    for ask in (house.beta.get, house.beta.delete):
        answer = ask(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "prefix_not_found"
    assert house.beta.get("/v1/prefixes").json()["data"] == []
    assert cached(house.beta, "hello") == 0
    assert httpx.get(str(house.acme.base_url) + "/v1/prefixes").status_code == 401
    assert house.acme.delete(path).json() == {
        "id": made["id"],
        "object": "prefix.deleted",
        "deleted": True,
    }
    assert house.acme.get(path).status_code == house.acme.delete(path).status_code == 404
    house.acme.get("/v1/prefixes")  # asks the engine, which has taken the order before
    assert cached(house.acme, "hello") > 0, "its pages are cached still"
    until(lambda: house.service.stats.pages_pinned == 0 == house.service.stats.pages_used)


def test_more_than_may_be_pinned_is_refused_with_the_remedy(opened: Open) -> None:
    house = opened()
    fault = pin(house.beta, 429, prompt=list(range(60, 60 + 9 * PAGE)))
    assert fault["code"] == "rate_limit_exceeded" and fault["reason"] == "too_large"
    pin(house.beta, prompt=list(range(60, 60 + 5 * PAGE)))
    fault = pin(house.beta, 429, prompt=list(range(90, 90 + 4 * PAGE)))
    assert fault["reason"] == "pins" and fault["limit"] == 8
    assert "quota.pages_burst" in fault["message"] and fault["retry_after_s"] > 3000
    pin(house.acme, prompt=list(range(60, 60 + 9 * PAGE)))
    fault = pin(house.acme, 429, prompt=list(range(61, 61 + 5 * PAGE)))
    assert "cache.pinned_fraction" in fault["message"]
    assert len(house.acme.get("/v1/prefixes").json()["data"]) == 1, "what is refused is not listed"


def test_how_many_a_tenant_may_have_is_bounded(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "MOST_PREFIXES", 2)
    house = opened()
    for _ in range(2):
        pin(house.acme, prompt=[65] * PAGE)
    assert "DELETE" in pin(house.acme, 429, prompt=[65] * PAGE)["message"]


def test_a_prefix_ends_with_its_time(opened: Open) -> None:
    house = opened()
    made = pin(house.acme, prompt=[65] * PAGE, ttl_s=1)
    until(lambda: house.acme.get(f"/v1/prefixes/{made['id']}").status_code == 404)
    until(lambda: house.service.stats.pages_pinned == 0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x" * 99, "messages": [SYSTEM]}, "prompt"),
        ({"prompt": "short"}, "prompt"),
        ({"prompt": [65] * (PAGE - 1)}, "prompt"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"prompt": [10**6] * PAGE}, "prompt[0]"),
        ({"prompt": ["a", "b"]}, "prompt[0]"),
        ({"prompt": [65] * PAGE, "ttl_s": 0}, "ttl_s"),
        ({"prompt": [65] * PAGE, "ttl_s": 86_401}, "ttl_s"),
        ({"prompt": [65] * PAGE, "ttl_s": "1h"}, "ttl_s"),
        ({"prompt": [65] * PAGE, "name": "n" * 300}, "name"),
        ({"prompt": [65] * PAGE, "max_tokens": 1}, "max_tokens"),
        ({"prompt": [65] * PAGE, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "hi", "nonsense": 1}]}, "messages[0].nonsense"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(
    url: str, body: dict[str, Any], param: str
) -> None:
    answer = httpx.post(f"{url}/v1/prefixes", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_what_no_request_could_begin_with_is_too_long(url: str) -> None:
    answer = httpx.post(f"{url}/v1/prefixes", json={"prompt": [65] * MAX_MODEL_LEN})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert httpx.get(f"{url}/v1/prefixes").json()["data"] == []


def test_without_sharing_nothing_can_be_pinned(opened: Open) -> None:
    house = opened(prefix_sharing=False)
    fault = pin(house.acme, 400, prompt=[65] * PAGE)
    assert fault["code"] == "unsupported_parameter" and "prefix_sharing" in fault["message"]


def kill_engine(service: Service) -> None:
    assert isinstance(service.engine._link, ProcessLink) and service.engine._link.process
    os.kill(service.engine._link.process.pid, signal.SIGKILL)


def test_the_next_engine_computes_them_again(opened: Open) -> None:
    house = opened(process=True)
    made = [pin(house.acme, messages=[SYSTEM]), pin(house.beta, prompt=[65] * PAGE)]
    gone = pin(house.acme, prompt=[66] * PAGE)
    restarts: list[int] = []
    for count in (1, 2):
        restarts.append(count)
        kill_engine(house.service)
        until(lambda: house.service.engine.num_restarts == restarts[-1])
        if count == 1:
            assert house.acme.delete(f"/v1/prefixes/{gone['id']}").status_code == 200
        until(lambda: of(house.acme, made[0]["id"])["status"] == "ready")
        until(lambda: of(house.beta, made[1]["id"])["status"] == "ready")
        assert of(house.acme, made[0]["id"])["tiers"] == ["device"]
        assert house.acme.get(f"/v1/prefixes/{gone['id']}").status_code == 404
        assert cached(house.acme, f"hello {count}") >= made[0]["pinned_tokens"] - PAGE > 0
        assert house.service.stats.pages_pinned == made[0]["pages"] + 1


def test_while_there_is_no_engine_they_are_computing(opened: Open) -> None:
    house = opened(process=True)
    made = pin(house.acme, prompt=[65] * PAGE)
    engine, go_on = house.service.engine, threading.Event()
    start = engine.start

    async def start_when_told() -> None:
        await asyncio.to_thread(go_on.wait, PATIENCE_S)
        await start()

    engine.start = start_when_told  # type: ignore[method-assign]
    kill_engine(house.service)
    until(lambda: not engine.is_up)
    told = of(house.acme, made["id"])
    go_on.set()
    assert (told["status"], told["hits"], told["tiers"]) == ("computing", None, [])
    until(lambda: of(house.acme, made["id"])["status"] == "ready")
