from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from dynamo_serve import __version__
from dynamo_serve.api.job import fingerprint
from dynamo_serve.api.prompts import INLINE_MESSAGES
from dynamo_serve.config import LogSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.stub import StubService, hangs
from tests.patience import PATIENCE_S


@pytest.fixture
def http(url: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        yield client


def test_tokens_there_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hi 你", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert answer["token_strs"][0] == "<|im_start|>"
    plain = http.post("/tokenize", json={"prompt": "hi 你", "add_special_tokens": False}).json()
    assert plain["tokens"] == answer["tokens"][1:]
    text = http.post("/detokenize", json={"tokens": plain["tokens"]}).json()
    assert text == {"prompt": "hi 你"}


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [20]})]
)
def test_a_salt_changes_no_tokens(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    salted = http.post(path, json={**body, "cache_salt": "an end user"})
    assert salted.status_code == 200
    assert salted.json() == http.post(path, json=body).json()


def test_messages_are_tokenized_as_a_chat_sees_them(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = http.post("/tokenize", json={"messages": messages}).json()
    chat = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert answer["count"] == chat["usage"]["prompt_tokens"]
    bare = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
    assert tokenizer.decode(bare.json()["tokens"]) == "<|im_start|>user\nhello<|im_end|>\n"


def test_a_long_conversation_is_rendered_like_a_short_one(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """It is rendered on a thread, from which a refusal comes back too."""
    messages = [{"role": "user", "content": str(i)} for i in range(INLINE_MESSAGES + 1)]
    answer = http.post("/tokenize", json={"messages": messages})
    shown = "".join(f"<|im_start|>user\n{m['content']}<|im_end|>\n" for m in messages)
    assert tokenizer.decode(answer.json()["tokens"]) == shown + "<|im_start|>assistant\n"
    messages.append({"role": "user", "content": "refuse me"})
    assert http.post("/tokenize", json={"messages": messages}).status_code == 400


def test_a_line_break_in_a_path_is_not_one_in_the_log(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(config(), log=LogSection(requests=True))
    service = StubService(hangs)
    with (
        caplog.at_level("INFO", logger="dynamo_serve.api.middleware"),
        serving(service, tokenizer, settings) as base,
    ):
        httpx.get(base + "/a%0Ab%20c")
    (line,) = [m for m in caplog.messages if "404" in m]
    assert line.startswith("GET /a%0Ab%20c 404 ")


def test_the_server_tells_facts_and_limits(http: httpx.Client) -> None:
    facts = http.get("/v1/server").json()
    assert facts["version"] == __version__
    assert facts["models"] == ["tiny", "tiny-alias"]
    assert facts["engine"]["attention_backend"] == "none"
    assert facts["limits"]["max_model_len"] == 256
    assert facts["limits"]["max_body_bytes"] == 200_000


def test_probes_answer(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok", "state": "ready"}
    assert http.get("/ready").json() == {"status": "ready"}
    page = http.get("/metrics")
    assert page.text == "dserve_up 1\n"
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/openapi.json"])
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    asked, got = http.head(path), http.get(path)
    assert (asked.status_code, asked.content) == (200, b"")
    for header in ("content-length", "content-type"):
        assert asked.headers[header] == got.headers[header]
    assert http.get("/health").status_code == 200, "the connection is still in step"


def test_head_takes_no_stream_over(http: httpx.Client) -> None:
    assert http.head("/v1/streams/chatcmpl-1").status_code == 405
    assert http.head("/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("x" * 200, False), ("a b", False)])
def test_answers_carry_a_request_id(http: httpx.Client, sent: str, kept: bool) -> None:
    answer = http.get("/health", headers={"X-Request-Id": sent})
    assert (answer.headers["x-request-id"] == sent) is kept
    assert answer.headers["x-request-id"]
    assert http.get("/nowhere").headers["x-request-id"]


def test_the_fingerprint_depends_on_what_can_change_an_answer() -> None:
    spec = EngineSpec(256, 16, 64, 400, {"dtype": "float32", "kv_pool_bytes": 1})
    same = replace(spec, num_pages=99, facts={"dtype": "float32", "kv_pool_bytes": 2})
    other = replace(spec, facts={"dtype": "bfloat16", "kv_pool_bytes": 1})
    assert fingerprint(same) == fingerprint(spec) != fingerprint(other)
