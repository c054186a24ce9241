"""Servers that owe clients the same: our API in front of our own engine, and of Triton."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from dynamo_serve import bundled
from dynamo_serve.config import Config, EngineSection, ModelSection, ServerSection, TritonSection
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from scripts.tritonserver import Running
from tests.api.live import MAX_MODEL_LEN, serving
from tests.patience import PATIENCE_S

Json = dict[str, Any]
# What the model on the server tells of requests that it has.
LIVE = {"dserve": "dserve_engine_live", "echo": "echo_live"}


@dataclass(frozen=True)
class Subject:
    """One of them. `on` are fields of a request whose answer does not end by itself; `slowly` is
    what makes the model take its time, put behind a prompt. `live` counts what its engine has, and
    `infers` is what it does not tell."""

    client: httpx.Client
    live: Callable[[], float]
    on: Mapping[str, Any]
    slowly: str = ""
    refuses: str = "logprobs"
    infers: frozenset[str] = frozenset()

    def complete(self, prompt: str, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def text(self, prompt: str, **fields: Any) -> str:
        answer = self.complete(prompt, temperature=0, **fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    @contextlib.contextmanager
    def streaming(self, path: str, body: Json) -> Generator[Iterator[Json]]:
        """The events of a stream, less the end mark, without which it is an error."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            yield events(answer)

    def streamed(self, path: str, **body: Any) -> list[Json]:
        with self.streaming(path, body) as found:
            return list(found)

    def becomes_idle(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while self.live() > 0:
            assert time.monotonic() < until, f"{self.live()} requests are still there"


def events(answer: httpx.Response) -> Iterator[Json]:
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("a stream without an end")


@contextlib.contextmanager
def client_of(config: Config, path: str) -> Generator[tuple[Service, httpx.Client]]:
    service = Service(config, model_path=path)
    with (
        serving(service, Tokenizer.load(path), config) as url,
        httpx.Client(base_url=url, timeout=PATIENCE_S) as client,
    ):
        yield service, client


@contextlib.contextmanager
def ours() -> Generator[Subject]:
    """The engine that computes, with the model of the package."""
    config = Config(
        server=ServerSection(resume_grace_s=0.0),
        engine=EngineSection(process=False),
        model=ModelSection(dtype="float32"),
    )
    with client_of(config, str(bundled.path())) as (service, client):
        yield Subject(client, lambda: service.num_live, {"ignore_eos": True}, refuses="modalities")


@contextlib.contextmanager
def forwarded(server: Running, model: str, path: str) -> Generator[Subject]:
    """An engine that forwards, to the same model where it is `dserve`, else to one that echoes."""
    is_ours = model == "dserve"
    config = Config(
        server=ServerSection(resume_grace_s=0.0),
        engine=EngineSection(kind="triton", process=False),
        model=ModelSection(max_model_len=0 if is_ours else MAX_MODEL_LEN),
        triton=TritonSection(
            endpoints=(server.endpoint,), model=model, connect_timeout_s=PATIENCE_S
        ),
    )
    with client_of(config, path) as (service, client):
        infers = frozenset(service.spec.infers)
        name = LIVE["dserve" if is_ours else "echo"]
        live = lambda: max(service.num_live, metric(server, name, model))  # noqa: E731
        on: Json = {"ignore_eos": True} if model in ("dserve", "echo") else {}
        yield Subject(client, live, on, "" if is_ours else " @pause=250", infers=infers)


def metric(server: Running, name: str, model: str) -> float:
    for line in server.metrics().splitlines():
        if line.startswith(name) and f'model="{model}"' in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"there is no {name} of {model}")
