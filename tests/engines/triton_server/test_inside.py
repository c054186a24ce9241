"""Our own engine inside a real Triton server: the same tokens as outside."""

from __future__ import annotations

import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_serve.config import Config, EngineSection, ModelSection
from scripts import tritonserver
from scripts.tritonserver import MODELS, Running
from tests.api.live import MAX_MODEL_LEN, save_model
from tests.engines.triton_server.conftest import skip_without_server
from tests.engines.triton_server.test_forward import forwarding, settings, settles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inside")


@pytest.fixture(scope="module")
def inside(folder: Path) -> Generator[Running]:
    """The model of triton_models/dserve, with the fake engine: it needs no torch."""
    skip_without_server()
    given = {
        **{"engine.kind": "fake", "model.path": save_model(folder), "engine.fake_step_ms": "10"},
        "model.max_model_len": str(MAX_MODEL_LEN),
        "cache.num_pages": "1024",
    }
    model = folder / "models" / "dserve"
    model.mkdir(parents=True)
    (model / "1").symlink_to(MODELS / "dserve" / "1")
    config = (MODELS / "dserve" / "config.pbtxt").read_text().partition("parameters {")[0]
    lines = [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in given.items()
    ]
    (model / "config.pbtxt").write_text("\n".join([config, *lines]))
    with tritonserver.running(["dserve"], folder / "log", models=folder / "models") as server:
        yield server


@pytest.fixture(scope="module")
def client(inside: Running, folder: Path) -> Generator[httpx.Client]:
    with forwarding(folder, settings(inside, model="dserve")) as client:
        yield client


@pytest.fixture(scope="module")
def outside(folder: Path) -> Generator[httpx.Client]:
    config = Config(
        engine=EngineSection(kind="fake", process=False),
        model=ModelSection(max_model_len=MAX_MODEL_LEN),
    )
    with forwarding(folder, config) as client:
        yield client


def ids(client: httpx.Client, number: int) -> list[Any]:
    """Tokens and finish of both choices, whose ends differ with the number."""
    fields = {"prompt": f"hello {number}", "n": 2, "min_tokens": number % 3, "seed": number}
    length = {"max_tokens": 3 + 2 * (number % 9), "stop_token_ids": [97, 98, 99]}
    body = {**fields, **length, "return_token_ids": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [(c["token_ids"], c["finish_reason"], c["text"]) for c in answer.json()["choices"]]


def metric(server: Running, name: str) -> float:
    for line in server.metrics().splitlines():
        if line.startswith(f"dserve_engine_{name}"):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"there is no {name}")


def test_the_tokens_are_those_of_our_engine_outside(
    client: httpx.Client, outside: httpx.Client, inside: Running
) -> None:
    with ThreadPoolExecutor(32) as pool:
        there = list(pool.map(lambda number: ids(client, number), range(32)))
        here = list(pool.map(lambda number: ids(outside, number), range(32)))
    assert there == here
    assert {finish for choices in here for _, finish, _ in choices} == {"stop", "length"}
    assert metric(inside, "step_sequences_total") > 2 * metric(inside, "steps_total"), "batched"


def test_sixty_four_streams_share_their_steps(client: httpx.Client, inside: Running) -> None:
    def streamed(number: int) -> int:
        body = {"prompt": f"say {number}", "max_tokens": 50, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            return sum(line.startswith("data: {") for line in answer.iter_lines())

    def counted() -> list[float]:
        return [metric(inside, f"{name}_total") for name in ("tokens", "step_sequences", "steps")]

    before = counted()
    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(streamed, range(64)))
    tokens, sequences, steps = (now - then for now, then in zip(counted(), before, strict=True))
    assert tokens == 64 * 50
    assert sequences / steps > 8, "batched step by step"


def test_who_hangs_up_leaves_its_batch(client: httpx.Client, inside: Running) -> None:
    body = {"prompt": "on and on", "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 8}
    before = metric(inside, "tokens_total")
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
        settles(lambda: metric(inside, "live") > 0 and metric(inside, "tokens_total") > before)
    settles(lambda: metric(inside, "live") == 0)
    assert metric(inside, "tokens_total") < before + 8 * 200


def test_who_comes_back_goes_on_with_the_same_tokens(client: httpx.Client) -> None:
    body = {"prompt": "once more", "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]
    please = {"Accept": "text/event-stream"}
    got: list[int] = []
    last, body = "", {**body, "stream": True}
    with client.stream("POST", "/v1/completions", json=body, headers=please) as answer:
        for line in answer.iter_lines():
            last = line.removeprefix("id: ") if line.startswith("id: ") else last
            if line.startswith("data: {"):
                got += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids", [])
            if len(got) >= 10:
                break
    path = f"/v1/streams/{last.partition(':')[0]}"
    with client.stream("GET", path, headers={"Last-Event-ID": last}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                got += json.loads(line.removeprefix("data: "))["choices"][0].get("token_ids", [])
    assert got == whole


def test_what_our_engine_refuses_is_told(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": "hi", "logprobs": 1})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"
