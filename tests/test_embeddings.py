"""Vectors end to end: real models behind real HTTP, the official client, and engines that die."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch

from dynamo_serve import bundled
from dynamo_serve.config import (
    CacheSection,
    Config,
    EngineSection,
    ModelSection,
    SchedulerSection,
    ServerSection,
)
from dynamo_serve.core.request import Finish, Pooling, Request
from dynamo_serve.engines.fake_pooling import vector
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import serving
from tests.engines.local import encoders
from tests.patience import PATIENCE_S
from tests.test_service import config_of, kill_engine, run, running, until
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

TOLERANCE = 1e-5
TEXTS = ("the page holds tokens", "how long is the queue", "bread is made of flour", "page")


class Served(NamedTuple):
    service: Service
    base: str
    tokenizer: Tokenizer
    client: openai.OpenAI


@contextmanager
def served(path: str, *, process: bool = False, **sections: Any) -> Generator[Served]:
    """A server of a real model."""
    engine = EngineSection(device="cpu", threads=2, process=process)
    cache = sections.pop("cache", CacheSection(page_size=4))
    config = Config(server=ServerSection(port=0), engine=engine, cache=cache, **sections)
    tokenizer = Tokenizer.load(path)
    service = Service(config, model_path=path)
    with (
        serving(service, tokenizer, config) as base,
        openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(service, base, tokenizer, client)


def unit(states: torch.Tensor) -> list[float]:
    return (states / states.norm()).tolist()  # type: ignore[no-any-return]


def expected(tokenizer: Tokenizer, text: str) -> list[float]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=True))
    return unit(encoders.plain_states("bert", ids).mean(dim=0))


def test_an_encoder_in_a_process_of_its_own_and_the_official_client() -> None:
    """Alone, together, and after its engine was killed."""
    with served(encoders.checkpoint("bert"), process=True) as (service, _, tokenizer, client):
        wanted = [expected(tokenizer, text) for text in TEXTS]
        for _ in range(2):
            together = client.embeddings.create(model="tiny", input=list(TEXTS))
            for text, whole, numbers in zip(TEXTS, together.data, wanted, strict=True):
                alone = client.embeddings.create(model="tiny", input=text).data[0]
                for found in (whole, alone):
                    assert found.embedding == pytest.approx(numbers, abs=TOLERANCE)
            kill_engine(service)
        with pytest.raises(openai.BadRequestError, match="makes no text"):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.BadRequestError, match=r"'input\[1\]' has .* takes 80"):
            client.embeddings.create(model="tiny", input=["page", "page " * 100])
        assert service.engine.num_restarts >= 1


def test_a_cross_encoder_ranks_as_transformers_does() -> None:
    query, documents = TEXTS[1], [*TEXTS, "the river runs slow"]
    with served(encoders.checkpoint("bert", 1)) as (_, base, tokenizer, _):
        made = tokenizer.encode_pairs(documents, query)
        assert made[0][1].count(1) == len(tokenizer.encode(documents[0])) + 1
        logits = [
            encoders.plain_logit("bert", tuple(ids), kinds.index(1) if 1 in kinds else 0)
            for ids, kinds in made
        ]
        body: dict[str, Any] = {"query": query, "documents": documents}
        raw = httpx.post(f"{base}/v1/rerank", json={**body, "raw_scores": True}).json()
        scores = {each["index"]: each["relevance_score"] for each in raw["results"]}
        assert [scores[i] for i in range(5)] == pytest.approx(logits, abs=TOLERANCE)
        order = sorted(range(5), key=lambda i: -logits[i])
        squashed = torch.sigmoid(torch.tensor(logits)).tolist()
        best = httpx.post(f"{base}/v1/rerank", json={**body, "top_n": 2}).json()
        assert [each["index"] for each in best["results"]] == order[:2]
        for each in best["results"]:
            assert each["relevance_score"] == pytest.approx(squashed[each["index"]], abs=TOLERANCE)
            assert each["document"]["text"] == documents[each["index"]]
        assert raw["usage"]["prompt_tokens"] == sum(len(ids) for ids, _ in made)
        long = httpx.post(f"{base}/v1/rerank", json={**body, "documents": ["page " * 90]})
        assert long.status_code == 400 and "'documents[0]' with 'query'" in long.text
        cut = {**body, "documents": ["page " * 90], "truncate_prompt_tokens": -1}
        assert httpx.post(f"{base}/v1/rerank", json=cut).json()["usage"]["prompt_tokens"] == 80
        wide = {"query": "page " * 90, "documents": ["a"] * 2048, "truncate_prompt_tokens": -1}
        alone = httpx.post(f"{base}/v1/rerank", json=wide).json()["error"]
        assert alone["param"] == "query" and "'query' has 92 tokens" in alone["message"]
        refused = httpx.post(f"{base}/v1/embeddings", json={"input": "page"})
        assert refused.status_code == 400 and "cross-encoder" in refused.text


def test_the_bundled_model_embeds_in_chunks_and_talks_beside_it() -> None:
    """What is found in the cache, and in how many chunks it was run, changes nothing."""
    text = "A page is a fixed run of KV slots. " * 12
    found: list[list[float]] = []
    said: set[str] = set()
    with_last = ModelSection(pooling="last", dtype="float32")
    for pooling, most in (("mean", 512), ("mean", 24), ("last", 512), ("last", 24)):
        model = with_last if pooling == "last" else ModelSection(pooling="mean", dtype="float32")
        scheduler = SchedulerSection(max_prefill_tokens=most, max_mixed_tokens=most)
        with served(str(bundled.path()), model=model, scheduler=scheduler) as (*_, client):
            stream = client.completions.create(
                model="tiny", prompt="What is", max_tokens=40, stream=True, temperature=0
            )
            for _ in range(2):  # the second time it may be in the cache
                data = client.embeddings.create(model="tiny", input=[text, "A page"]).data
                found.append(data[0].embedding)
            said.add("".join(chunk.choices[0].text for chunk in stream))
    for numbers in found[:4]:
        assert numbers == pytest.approx(found[0], abs=TOLERANCE)
    for numbers in found[4:]:
        assert numbers == pytest.approx(found[4], abs=TOLERANCE)
    assert len(said) == 1 and said != {""}
    assert found[0] != pytest.approx(found[4], abs=1e-2)


def test_retrieval_and_an_answer_from_one_server() -> None:
    """A small RAG: sections of our own documents, found by a question, put into the prompt."""
    docs = Path(__file__).parents[1] / "docs"
    sections = [
        section.strip()[:1200]
        for name in ("tenants.md", "triton.md", "tiers.md", "page-pool.md")
        for section in next(docs.rglob(name)).read_text().split("\n## ")[1:]
    ]
    model = ModelSection(pooling="mean")
    with served(str(bundled.path()), model=model) as (_, base, _, client):
        question = " ".join(sections[3].split()[:40])  # the words of one of them
        ranked = httpx.post(
            f"{base}/v1/rerank",
            json={"query": question, "documents": sections, "truncate_prompt_tokens": 200},
            timeout=PATIENCE_S,
        ).json()["results"]
        assert ranked[0]["index"] == 3
        context = ranked[0]["document"]["text"][:400]
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"{context}\n\nWhat is this about?"}],
            max_tokens=24,
        )
        assert answer.choices[0].message.content


def test_requests_for_vectors_outlive_their_engine(folder: str) -> None:
    """Waiting and half computed ones alike, beside one that writes."""

    async def embedded(service: Service, request: Request) -> bytes | None:
        async with aclosing(service.generate(request)) as events:
            async for event in events:
                if event.finish:
                    assert event.finish is Finish.STOP
                    return event.artifact
        return None

    async def main() -> None:
        settings = config_of(True, max_prefill_tokens=32, max_decode_sequences=4)
        engine = EngineSection(kind="fake", fake_step_ms=2.0)
        settings = replace(settings, engine=engine)
        async with running(settings, folder) as service:
            requests = [
                Request(f"r{i}", tuple((i + j) % 23 for j in range(2000)), 0, pooling=pooling)
                for i in range(6)
                for pooling in (Pooling("mean" if i % 2 else "last"),)
            ]
            tasks = [asyncio.create_task(embedded(service, request)) for request in requests]
            for count in (1, 2):
                await until(lambda: service.stats.num_running > 0)
                kill_engine(service)
                await until(lambda: service.engine.num_restarts == count)  # noqa: B023
            for request, found in zip(requests, await asyncio.gather(*tasks), strict=True):
                assert request.pooling is not None and found is not None
                wanted = vector(request.prompt_ids, request.pooling.kind)
                assert array("f", found) == array("f", wanted)

    run(main)
