"""/v1/embeddings and /v1/rerank: shapes, limits and refusals, on engines that make nonsense."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from array import array
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.engines.fake_pooling import SIZE, vector
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.live import MAX_MODEL_LEN, config, serving
from tests.api.stub import StubService, hangs
from tests.api.test_hang_up import cancelled, send
from tests.patience import PATIENCE_S

EMBED, RERANK = "/v1/embeddings", "/v1/rerank"
TEXTS = ["hello world", "the stop word", "how are you today?", "hello"]


@pytest.fixture
def http(url: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def client(url: str) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def unit(numbers: list[float]) -> list[float]:
    length = math.hypot(*numbers)
    return [x / length for x in numbers]


def raw(tokenizer: Tokenizer, text: str) -> list[float]:
    """What the fake engine makes of a text."""
    ids = tokenizer.encode(text, add_special_tokens=True)
    return list(array("f", vector(ids, "last")))


def posted(http: httpx.Client, path: str = EMBED, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


# ── what comes back ──────────────────────────────────────────────────────────


def test_the_official_client_gets_unit_vectors_in_order(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    for form in ("float", "base64", openai.omit):  # left out, the client asks for base64 itself
        answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
        assert answer.object == "list" and answer.model == "tiny"
        assert [data.index for data in answer.data] == [0, 1, 2, 3]
        for text, data in zip(TEXTS, answer.data, strict=True):
            numbers = data.embedding
            if isinstance(numbers, str):  # asked for by name, it is handed on as it came
                numbers = list(array("f", base64.b64decode(numbers)))
            assert numbers == pytest.approx(unit(raw(tokenizer, text)), abs=1e-6)
        counts = [len(tokenizer.encode(text, add_special_tokens=True)) for text in TEXTS]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(counts)


def test_base64_is_to_the_bit_what_the_numbers_say(http: httpx.Client) -> None:
    numbers = posted(http, input="hello")["data"][0]["embedding"]
    packed = posted(http, input="hello", encoding_format="base64")["data"][0]["embedding"]
    assert array("f", base64.b64decode(packed)) == array("f", numbers)


def test_every_form_of_input_is_the_same_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world", add_special_tokens=True)
    forms: list[Any] = ["hello world", ["hello world"], ids, [ids]]
    found = [posted(http, input=form) for form in forms]
    assert all(answer == found[0] for answer in found)
    assert found[0]["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}


def test_dimensions_cut_and_make_it_a_unit_again(http: httpx.Client, tokenizer: Tokenizer) -> None:
    whole = raw(tokenizer, "hello")
    (cut,) = posted(http, input="hello", dimensions=5)["data"]
    assert cut["embedding"] == pytest.approx(unit(whole[:5]), abs=1e-6)
    (plain,) = posted(http, input="hello", dimensions=5, normalize=False)["data"]
    assert plain["embedding"] == pytest.approx(whole[:5], abs=1e-7)
    assert len(posted(http, input="hello", dimensions=SIZE)["data"][0]["embedding"]) == SIZE


def test_what_is_too_long_is_cut_where_that_is_asked_for(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("hello world, how are you?", add_special_tokens=True)
    wanted = posted(http, input=ids[:4])["data"]
    for form in ("hello world, how are you?", ids):
        answer = posted(http, input=form, truncate_prompt_tokens=4)
        assert answer["data"] == wanted and answer["usage"]["prompt_tokens"] == 4
    long = posted(http, input="hello " * 500, truncate_prompt_tokens=-1)
    assert long["usage"]["prompt_tokens"] == MAX_MODEL_LEN


def test_many_inputs_come_back_each_in_its_place(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = [[i % 300 + 10, i // 300 + 10] for i in range(700)]
    data = posted(http, input=ids)["data"]
    assert [each["index"] for each in data] == list(range(700))
    for i in (0, 1, 299, 300, 699):
        wanted = unit(list(array("f", vector(ids[i], "last"))))
        assert data[i]["embedding"] == pytest.approx(wanted, abs=1e-6)


def test_rerank_by_embeddings_orders_by_cosine(http: httpx.Client, tokenizer: Tokenizer) -> None:
    query, documents = "hello", [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
    answer = posted(http, RERANK, query=query, documents=documents)
    one = unit(raw(tokenizer, query))
    cosines = [
        sum(a * b for a, b in zip(one, unit(raw(tokenizer, text)), strict=True))
        for text in TEXTS[:3]
    ]
    order = sorted(range(3), key=lambda i: -cosines[i])
    assert [each["index"] for each in answer["results"]] == order
    for each in answer["results"]:
        assert each["relevance_score"] == pytest.approx(cosines[each["index"]], abs=1e-6)
        assert each["document"] == {"text": TEXTS[each["index"]]}
    assert answer["id"].startswith("rerank-") and answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0
    best = posted(
        http, "/v2/rerank", query=query, documents=documents, top_n=1, return_documents=False
    )
    assert best["results"] == [
        {"index": order[0], "relevance_score": answer["results"][0]["relevance_score"]}
    ]
    everything = posted(http, RERANK, query=query, documents=documents, top_n=9)
    assert len(everything["results"]) == 3


def test_a_request_can_be_looked_up(http: httpx.Client) -> None:
    http.post(EMBED, json={"input": ["hello", "world"]}, headers={"X-Request-Id": "mine"})
    choices = http.get("/v1/requests/mine").json()["choices"]
    assert [choice["state"] for choice in choices] == ["finished", "finished"]


# ── what is refused ──────────────────────────────────────────────────────────

LONG = "hello " * 300
TABLE: list[tuple[str, dict[str, Any], str, str]] = [
    (EMBED, {}, "input", "required"),
    (EMBED, {"input": 3}, "input", "string"),
    (EMBED, {"input": []}, "input", "at least 1"),
    (EMBED, {"input": [[]]}, "input[0]", "at least 1"),
    (EMBED, {"input": ["a", 3]}, "input[1]", "string"),
    (EMBED, {"input": [5, 100_000]}, "input[1]", "out of range"),
    (EMBED, {"input": [[5], [100_000]]}, "input[1][0]", "out of range"),
    (EMBED, {"input": LONG}, "input", "the model takes 256"),
    (EMBED, {"input": ["a", LONG]}, "input[1]", "truncate_prompt_tokens"),
    (EMBED, {"input": ["a"] * 5}, "input", "the limit is 4"),
    (EMBED, {"input": "a", "dimensions": 0}, "dimensions", "greater"),
    (EMBED, {"input": "a", "dimensions": SIZE + 1}, "dimensions", f"makes {SIZE}"),
    (EMBED, {"input": "a", "encoding_format": "hex"}, "encoding_format", "'base64'"),
    (EMBED, {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1 to 256"),
    (EMBED, {"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "1 to 256"),
    (EMBED, {"input": "a", "input_type": "query"}, "input_type", "before the text"),
    (EMBED, {"input": "a", "output_dimension": 3}, "output_dimension", "dimensions"),
    (EMBED, {"input": "a", "stream": True}, "stream", "Unknown"),
    (EMBED, {"input": "a", "class": "gold"}, "class", "no class"),
    (RERANK, {"documents": ["a"]}, "query", "required"),
    (RERANK, {"query": "a"}, "documents", "required"),
    (RERANK, {"query": "", "documents": ["a"]}, "query", "at least 1"),
    (RERANK, {"query": "a", "documents": []}, "documents", "at least 1"),
    (RERANK, {"query": "a", "documents": [3]}, "documents[0]", "string"),
    (RERANK, {"query": "a", "documents": [{}]}, "documents[0].text", "required"),
    (RERANK, {"query": "a", "documents": [{"text": "a", "title": "b"}]}, "documents[0].title", "U"),
    (RERANK, {"query": "a", "documents": ["b", LONG]}, "documents[1]", "the model takes 256"),
    (RERANK, {"query": LONG, "documents": ["b"]}, "query", "the model takes 256"),
    (RERANK, {"query": "a", "documents": ["b"] * 5}, "documents", "the limit is 4"),
    (RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater"),
    (RERANK, {"query": "a", "documents": ["b"], "raw_scores": True}, "raw_scores", "cosine"),
    (RERANK, {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields", "one field"),
]


@pytest.fixture(scope="module")
def narrow(model_folder: str, tokenizer: Tokenizer) -> Generator[httpx.Client]:
    """A server that takes four inputs at a time."""
    settings = config(max_inputs=4)
    with (
        serving(Service(settings, model_path=model_folder), tokenizer, settings) as base,
        httpx.Client(base_url=base, timeout=PATIENCE_S) as http,
    ):
        yield http


@pytest.mark.parametrize(("path", "body", "param", "part"), TABLE)
def test_faults_are_named(
    narrow: httpx.Client, path: str, body: dict[str, Any], param: str, part: str
) -> None:
    answer = narrow.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], part in error["message"]) == (param, True), error


def test_bookkeeping_and_harmless_values_are_taken(http: httpx.Client) -> None:
    plain = posted(http, input="a")
    told = posted(http, input="a", user="me", input_type=None, late_chunking=False, truncate="NONE")
    assert told == plain


def served_by(spec: EngineSpec, tokenizer: Tokenizer, path: str, body: Any) -> httpx.Response:
    service = StubService(hangs)
    service.spec = spec
    with serving(service, tokenizer, config()) as base:
        if path == "/v1/models":
            return httpx.get(base + path)
        return httpx.post(base + path, json=body)


ENCODER = replace(StubService.spec, pooling="mean", vector_size=8, generates=False)
CROSS = replace(ENCODER, pooling="score", vector_size=1)
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("spec", "path", "body", "part"),
    [
        (ENCODER, "/v1/chat/completions", CHAT, "use /v1/embeddings"),
        (ENCODER, "/v1/completions", {"prompt": "a"}, "use /v1/embeddings"),
        (ENCODER, "/v1/prefixes", {"prompt": "a"}, "use /v1/embeddings"),
        (CROSS, "/v1/chat/completions", CHAT, "use /v1/rerank"),
        (CROSS, EMBED, {"input": "a"}, "cross-encoder"),
        (StubService.spec, EMBED, {"input": "a"}, "local engine"),
        (StubService.spec, RERANK, {"query": "a", "documents": ["b"]}, "local engine"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_reason(
    tokenizer: Tokenizer, spec: EngineSpec, path: str, body: Any, part: str
) -> None:
    answer = served_by(spec, tokenizer, path, body)
    assert answer.status_code == 400, answer.text
    assert part in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("spec", "able"),
    [
        (StubService.spec, {"completions", "chat"}),
        (ENCODER, {"embeddings", "rerank"}),
        (CROSS, {"rerank"}),
        (replace(ENCODER, generates=True), {"completions", "chat", "embeddings", "rerank"}),
    ],
)
def test_models_tell_what_they_can_do(
    tokenizer: Tokenizer, spec: EngineSpec, able: set[str]
) -> None:
    (model, _) = served_by(spec, tokenizer, "/v1/models", None).json()["data"]
    assert {name for name, can in model["capabilities"].items() if can} == able
    assert model["max_model_len"] == spec.max_model_len


# ── ends ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [EMBED, RERANK])
def test_hanging_up_cancels_every_input(tokenizer: Tokenizer, path: str) -> None:
    service = StubService(hangs)
    service.spec = ENCODER
    body: dict[str, object] = {"input": TEXTS}
    if path == RERANK:
        body = {"query": "a", "documents": TEXTS[1:]}
    with serving(service, tokenizer, config()) as base:
        connection = send(base, path, body)
        ids = {service.seen.get(timeout=PATIENCE_S).id for _ in TEXTS}
        connection.close()
        assert cancelled(service, len(TEXTS)) == ids


def test_one_that_fails_takes_the_others_with_it(tokenizer: Tokenizer) -> None:
    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        if request.id.endswith("-2"):
            yield TokenEvent(request.id, finish=Finish.DEADLINE)
        await asyncio.Event().wait()

    service = StubService(script)
    service.spec = ENCODER
    with serving(service, tokenizer, config()) as base:
        answer = httpx.post(base + EMBED, json={"input": TEXTS}, timeout=PATIENCE_S)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_passed"
        seen = {service.seen.get(timeout=PATIENCE_S) for _ in TEXTS}
        assert cancelled(service, 3) == {r.id for r in seen if not r.id.endswith("-2")}
    first = next(r for r in seen if r.id.endswith("-0"))
    assert first.num_choices == 4 and first.call_tokens == sum(len(r.prompt_ids) for r in seen)
    assert sum(r.num_choices for r in seen) == 4


def test_the_document_describes_them(stubbed: Stubbed) -> None:
    _, base = stubbed(hangs)
    document = json.loads(httpx.get(f"{base}/openapi.json").text)
    for path in (EMBED, RERANK, "/v2/rerank"):
        assert "requestBody" in document["paths"][path]["post"]
