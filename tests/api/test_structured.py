"""Structured output over HTTP, with the official client and the model that ships with us."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Generator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from bench.structured_schemas import fault_of
from dynamo_serve import bundled
from dynamo_serve.api.grammar import wished_grammar
from dynamo_serve.api.schema import CompletionRequest
from dynamo_serve.config import (
    CacheSection,
    Config,
    EngineSection,
    ModelSection,
    SchedulerSection,
    ServerSection,
)
from dynamo_serve.errors import InvalidRequest
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import serving
from tests.patience import PATIENCE_S

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


class Reply(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    ok: bool


@pytest.fixture(scope="module")
def base() -> Generator[str]:
    path = str(bundled.path())
    settings = Config(
        server=ServerSection(),
        engine=EngineSection(process=False, device="cpu", threads=1),
        model=ModelSection(max_model_len=512),
        cache=CacheSection(num_pages=256),
        scheduler=SchedulerSection(max_decode_sequences=8),
    )
    with serving(Service(settings, model_path=path), Tokenizer.load(path), settings) as base:
        yield base


@pytest.fixture
def http(base: str) -> Generator[httpx.Client]:
    with httpx.Client(base_url=base, timeout=PATIENCE_S) as http:
        yield http


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 200, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def texts(answer: dict[str, Any]) -> list[str]:
    assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
    return [choice["message"]["content"] for choice in answer["choices"]]


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, **more}}


def test_the_official_client_parses_into_its_own_type(base: str) -> None:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            response_format=Reply,
            max_tokens=200,
        )
    assert isinstance(answer.choices[0].message.parsed, Reply)


def test_streams_choices_seeds_and_penalties_keep_a_schema(http: httpx.Client) -> None:
    fields = {
        "response_format": schema_format(SCHEMA, strict=True),
        "n": 4,
        "temperature": 1.5,
        "seed": 3,
        "repetition_penalty": 1.2,
        "min_p": 0.01,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = texts(chat(http, **fields))
    assert len(set(whole)) > 1
    assert all(not fault_of(text, SCHEMA) for text in whole)
    parts = [""] * 4
    body = {"messages": HELLO, "max_tokens": 200, "stream": True, **fields}
    with http.stream("POST", CHAT, json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    parts[choice["index"]] += choice["delta"].get("content") or ""
    assert parts == whole


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda t: isinstance(json.loads(t), dict)),
        ({"structured_outputs": {"json_object": True}}, lambda t: isinstance(json.loads(t), dict)),
        ({"structured_outputs": {"json": SCHEMA}}, lambda t: not fault_of(t, SCHEMA)),
        (
            {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
            lambda t: (
                not fault_of(t, SCHEMA) and t == json.dumps(json.loads(t), separators=(",", ":"))
            ),
        ),
        ({"structured_outputs": {"choice": ["left", "right"]}}, lambda t: t in ("left", "right")),
        ({"structured_outputs": {"regex": "^[ab]{4}$"}}, lambda t: len(t) == 4),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, lambda t: t in ("a", "b")),
    ],
)
def test_each_kind(http: httpx.Client, fields: dict[str, Any], check: Any) -> None:
    compact = {"max_tokens": 400, "seed": 1, **fields}
    if "json_object" in str(fields):
        compact["logit_bias"] = {str(i): 100.0 for i in closing(http)}
    [text] = texts(chat(http, **compact))
    assert check(text), text
    body = {"prompt": "hello", **compact}
    answer = http.post(TEXT, json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop" and check(choice["text"]), choice


def closing(http: httpx.Client) -> list[int]:
    """Tokens that a model says which wants to come to an end."""
    found: list[int] = http.post("/tokenize", json={"prompt": "{ }"}).json()["tokens"]
    return found


def test_a_stop_string_ends_it_before_its_end(http: httpx.Client) -> None:
    answer = chat(http, structured_outputs={"regex": "abcdef"}, stop="d")
    assert texts(answer) == ["abc"]


def test_text_is_no_constraint(http: httpx.Client) -> None:
    free = chat(http, max_tokens=8, temperature=0)
    same = chat(http, max_tokens=8, temperature=0, response_format={"type": "text"})
    assert free["choices"] == same["choices"]


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(24):
    DEEP = {"properties": {"a": DEEP}}
PATH = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        ({"type": "nonsense"}, "", "nonsense"),
        ({"properties": {"a": {"items": {"type": "int"}}}}, ".properties.a.items", "int"),
        ({"properties": {"a b": {"not": {}}}}, ".properties['a b'].not", "not followed"),
        (
            {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "("}]},
            ".anyOf[1]",
            "unclosed group",
        ),
        ({"$ref": "#/$defs/a"}, ".$ref", "no place"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"format": "nope"}}}, ".$defs.a", "format"),
        ({"$ref": "https://example.com/schema"}, ".$ref", "no place"),
        ({"properties": {"a": 1}}, ".properties.a", "an object"),
        ({"requierd": ["a"]}, ".requierd", "not followed"),
        ({"x-guidance": {"lenient": True}}, ".x-guidance", "not followed"),
        ({"minLength": 5, "maxLength": 3, "type": "string"}, "", "greater"),
        ({"enum": []}, "", "nsatisfiable"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, ".oneOf", "anyOf"),
        (DEEP, "", "nested deeper"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_told_by_its_path(
    http: httpx.Client, schema: Any, path: str, message: str
) -> None:
    answer = http.post(CHAT, json={"messages": HELLO, "response_format": schema_format(schema)})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith(PATH) if schema is DEEP else error["param"] == PATH + path


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "a"}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(" * 50_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "a b c"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "start: <none>"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "start: x\nx: x"}}, "structured_outputs.grammar"),
        (
            {"structured_outputs": {"grammar": "start: " + "(" * 60_000}},
            "structured_outputs.grammar",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"const": "\\ud800"}'}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"typo": 1}}, "structured_outputs.typo"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_bad_wishes_are_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "a"})):
        answer = http.post(path, json={**body, **fields})
        assert answer.status_code == 400, (fields, answer.text)
        assert answer.json()["error"]["param"] == param, answer.text


def test_a_text_of_any_depth_is_a_schema_or_is_refused() -> None:
    """Also where what can just be read cannot be written again."""
    for depth in range(700, 1010):
        wish = {"json": '{"a":' * depth + "1" + "}" * depth}
        body = CompletionRequest.model_validate({"prompt": "a", "structured_outputs": wish})
        with contextlib.suppress(InvalidRequest):
            wished_grammar(body)


def test_an_engine_that_follows_none_says_so(url: str) -> None:
    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    error = httpx.post(url + CHAT, json=body).json()["error"]
    assert error["param"] == "response_format" and "fake engine" in error["message"]


@pytest.mark.parametrize(
    "wish",
    [
        {"choice": ["<|im_end|>"]},
        {"regex": r"a/<\|im_end\|>\ntail"},
        {"json": {"const": "x</tool_call>y"}},
        {"json": {"enum": ["say <tool_call> now", "q <|im_start|>"]}},
        {"grammar": 'start: "is <|im_end|> it"'},
    ],
)
def test_the_text_of_a_special_token_is_written_as_text(
    http: httpx.Client, wish: dict[str, Any]
) -> None:
    [text] = texts(chat(http, structured_outputs=wish))
    [[kind, value]] = wish.items()
    if kind == "json":
        assert json.loads(text) in value.get("enum", [value.get("const")])
    elif kind == "regex":
        assert re.fullmatch(value, text)
    else:
        assert text in (value[0], "is <|im_end|> it")
