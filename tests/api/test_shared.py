"""Prefixes that operators declare shared between tenants, from the file to the answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from dynamo_serve.api.heads import declared_heads
from dynamo_serve.cli import main
from dynamo_serve.config import CacheSection, EngineSection
from dynamo_serve.directory import digest
from dynamo_serve.errors import ConfigError, EngineStartError
from dynamo_serve.service import Service, State
from dynamo_serve.shared import read
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import MAX_MODEL_LEN, config, serving
from tests.api.test_prefixes import KEYS, PAGE, SYSTEM, cached, kill_engine, until
from tests.patience import PATIENCE_S

ADMIN = "key-of-the-operator-with-enough-characters"
TEXT = "The terms of the shop, which nobody reads. " * 3


class House(NamedTuple):
    service: Service
    acme: httpx.Client
    beta: httpx.Client
    admin: httpx.Client


Open = Callable[..., House]


def file_of(folder: Path, prefixes: Any = None) -> str:
    (folder / "terms.txt").write_text(TEXT)
    declared = {"shop": {"messages": [SYSTEM]}, "terms": {"file": "terms.txt"}}
    file = folder / "shared.yaml"
    file.write_text(yaml.safe_dump({"prefixes": prefixes or declared}))
    return str(file)


@pytest.fixture
def opened(model_folder: str, tokenizer: Tokenizer, tmp_path: Path) -> Generator[Open]:
    """Starts a server with two tenants and two shared prefixes, over the fake engine."""
    with contextlib.ExitStack() as stack:

        def start(*, process: bool = False, **cache: Any) -> House:
            tenants = {n: {"keys": [f"sha256:{digest(k.encode())}"]} for n, k in KEYS.items()}
            tenants["beta"]["quota"] = {"pages_burst": 20}  # type: ignore[assignment]
            file = tmp_path / "tenants.yaml"
            file.write_text(yaml.safe_dump({"tenants": tenants}))
            cache = {"num_pages": 64, "shared_prefixes": file_of(tmp_path), **cache}
            settings = replace(
                config(tenants_file=str(file), admin_keys=(ADMIN,)),
                engine=EngineSection(kind="fake", process=process),
                cache=CacheSection(page_size=PAGE, pinned_fraction=0.5, **cache),
            )
            service = Service(settings, model_path=model_folder)
            service.declare(declared_heads(settings.cache, tokenizer))
            base = stack.enter_context(serving(service, tokenizer, settings))
            clients = []
            for key in (*KEYS.values(), ADMIN):
                client = httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"})
                client.timeout = httpx.Timeout(PATIENCE_S)
                clients.append(stack.enter_context(client))
            house = House(service, *clients)
            until(lambda: {p["status"] for p in shared(house.acme)} == {"ready"})
            return house

        yield start


def shared(client: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = client.get("/v1/prefixes").json()["data"]
    return [prefix for prefix in listed if prefix["shared"]]


def test_every_tenant_finds_what_is_shared_and_nothing_of_others(opened: Open) -> None:
    house = opened()
    shop = next(p for p in shared(house.acme) if p["name"] == "shop")
    head = shop["pinned_tokens"]
    assert cached(house.acme, "hello, where are the red foxes?") == head > PAGE
    assert cached(house.beta, "hello, where are the red foxes?") == head
    assert cached(house.beta, "hello, where are the red foxes?") > head
    ask = {"prompt": TEXT + "And so on, for much longer than a page.", "max_tokens": 1}
    usage = house.beta.post("/v1/completions", json=ask).json()["usage"]
    terms = next(p for p in shared(house.beta) if p["name"] == "terms")
    assert usage["prompt_tokens_details"]["cached_tokens"] >= terms["pinned_tokens"] - PAGE > 0


def test_tenants_see_what_is_shared_and_cannot_change_it(opened: Open) -> None:
    house = opened()
    cached(house.acme, "hello")
    for prefix in shared(house.beta):
        assert prefix["expires_at"] is None
        assert (prefix["hits"], prefix["last_hit_at"]) == (None, None), "that is others' business"
        assert house.beta.get(f"/v1/prefixes/{prefix['id']}").json() == prefix
        answer = house.beta.delete(f"/v1/prefixes/{prefix['id']}")
        assert answer.status_code == 403 and "cache.shared_prefixes" in answer.text
    told = house.admin.get("/admin/cache").json()
    assert {p["name"]: p["hits"] for p in told["shared_prefixes"]} == {"shop": 1, "terms": 0}
    assert any(run["shared"] for run in told["runs"])


def test_explain_names_the_shared_prefix(opened: Open) -> None:
    house = opened()
    cached(house.acme, "hello, where are the red foxes, and what do they cost?")
    question = {"role": "user", "content": "hello, where are the red foxes, and what do they cost?"}
    body = {"messages": [SYSTEM, question]}
    told = house.beta.post("/v1/cache/explain", json=body).json()
    shop = next(p for p in shared(house.beta) if p["name"] == "shop")
    assert told["shared_prefix"] == "shop"
    assert told["shared_tokens"] == told["matched_tokens"] == shop["pinned_tokens"]
    assert told["miss"]["reason"] == "first_time"
    told = house.beta.post("/v1/cache/explain", json={"prompt": "Something else. " * 9}).json()
    assert (told["shared_prefix"], told["shared_tokens"]) == (None, 0)


def test_the_next_engine_computes_what_is_shared_again(opened: Open) -> None:
    house = opened(process=True)
    assert cached(house.acme, "one") > PAGE
    kill_engine(house.service)
    until(lambda: house.service.engine.num_restarts == 1)
    until(lambda: {p["status"] for p in shared(house.acme)} == {"ready"})
    assert cached(house.beta, "two") > PAGE
    assert house.service.stats.pages_pinned == sum(p["pages"] for p in shared(house.beta))


def test_what_cannot_stay_in_the_pool_stops_the_start(
    model_folder: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pages = -(-MAX_MODEL_LEN // PAGE) + 2
    cache = CacheSection(page_size=PAGE, num_pages=pages, shared_prefixes=file_of(tmp_path))
    settings = replace(config(), cache=cache)
    service = Service(settings, model_path=model_folder)
    service.declare(declared_heads(cache, tokenizer))

    async def start() -> None:
        try:
            await service.start()
        finally:
            await service.close()

    with pytest.raises(EngineStartError, match=r"cache\.shared_prefixes.*allows"):
        asyncio.run(start())


def test_pages_that_several_heads_begin_with_are_asked_for_once(
    model_folder: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    heads = {name: {"text": TEXT} for name in ("one", "two", "three", "four")}
    cache = CacheSection(page_size=PAGE, num_pages=64, shared_prefixes=file_of(tmp_path, heads))
    service = Service(replace(config(), cache=cache), model_path=model_folder)
    service.declare(declared_heads(cache, tokenizer))
    pages, common = len(service.prefixes.heads[0].keys), int(64 * cache.pinned_fraction)
    assert pages <= common < 4 * pages

    async def start() -> None:
        try:
            await service.start()
            assert service.state is State.READY
        finally:
            await service.close()

    asyncio.run(start())


@pytest.mark.parametrize(
    ("prefixes", "fault"),
    [
        ({"a b": {"text": "x"}}, "'a b' is no name"),
        ({"a": {"text": "x", "file": "y"}}, "prefixes.a: has to have one key"),
        ({"a": {"text": 7}}, "prefixes.a.text: not a text"),
        ({"a": {"messages": []}}, "prefixes.a.messages: not a list"),
        ({"a": {"messages": [{"role": "system"}]}}, "prefixes.a.messages[0]: has to have"),
        ({"a": {"file": "none.txt"}}, "prefixes.a.file = 'none.txt': cannot be read"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path: Path, prefixes: Any, fault: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(file_of(tmp_path, prefixes))
    assert fault in str(error.value) and "shared.yaml" in str(error.value)


def test_check_config_looks_into_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, {"a": {"text": 7}})
    assert main(["check-config", "--set", f"cache.shared_prefixes={file}"]) == 2
    assert "prefixes.a.text" in capsys.readouterr().err


def test_without_prefix_sharing_there_is_nothing_to_declare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"cache.shared_prefixes={file_of(tmp_path)}", "cache.prefix_sharing=false"]
    assert main(["check-config", *(f"--set={setting}" for setting in settings)]) == 2
    assert "set cache.prefix_sharing to true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prefix", "fault"),
    [
        ({"text": "short"}, "only full pages"),
        ({"messages": [{"role": "function", "content": "x" * 90}]}, "role"),
    ],
)
def test_what_cannot_be_shared_is_named(
    tokenizer: Tokenizer, tmp_path: Path, prefix: Any, fault: str
) -> None:
    cache = CacheSection(page_size=PAGE, shared_prefixes=file_of(tmp_path, {"a": prefix}))
    with pytest.raises(ConfigError, match=fault):
        declared_heads(cache, tokenizer)
