"""What a body may cost: no more than a small multiple of its size, however it is made."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dynamo_serve.api import parse
from dynamo_serve.api.schema import ChatRequest, CompletionRequest, DetokenizeRequest
from dynamo_serve.errors import InvalidRequest

LONG_KEY = "k" * 20_000


@pytest.mark.parametrize(
    "children",
    [
        '{"\\u0041": 1, ' + ", ".join(f'"{i}": 1' for i in range(4000)) + "}",
        '["\\u0041"' + ', ""' * 4000 + "]",
    ],
    ids=["object", "array"],
)
def test_a_long_key_is_not_copied_for_each_of_its_children(children: str) -> None:
    raw = f'{{"{LONG_KEY}": {children}}}'.encode()
    tracemalloc.start()
    try:
        parse.to_object(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50 * len(raw)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ('{"a": {"b": ["x", {"c": "\\ud800"}]}}', "a.b[1].c"),
        ('{"a": [{"\\udfff": 1}]}', "a[0]"),
        ('{"\\udfff": 1}', None),
        ('{"' + LONG_KEY + '": "\\ud800"}', LONG_KEY[: parse.SHOWN]),
    ],
)
def test_half_a_character_is_found_where_it_is(raw: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest, match="half a surrogate pair at character 0") as caught:
        parse.to_object(raw.encode())
    assert caught.value.param == param


def test_a_whole_pair_of_surrogates_is_a_character() -> None:
    assert parse.to_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("text", "is_half"),
    [
        (r"\ud83d\ude00", False),
        (r"\uD83D\uDE00", False),
        (r"\ud83d\ud83d\ude00", True),
        (r"\ud83d\\\ude00", True),
        (r"\\ud83d\ude00", True),
        (r"\\ud83d", False),
        (r"\ude00\ud83d", True),
        (r"\u00d8", False),
    ],
)
@pytest.mark.parametrize("padding", [0, parse.SEARCHED_BYTES])
def test_half_a_character_is_told_from_a_whole_one(text: str, is_half: bool, padding: int) -> None:
    raw = f'{{"a": "{text}"}}'.encode() + b" " * padding
    if is_half:
        with pytest.raises(InvalidRequest, match="half a surrogate pair") as caught:
            parse.to_object(raw)
        assert caught.value.param == (None if padding else "a")
    else:
        parse.to_object(raw)["a"].encode()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": [' + b"[]," * 70_000 + b"1]}",
        b'{"messages": [' + b'{"role":"user"},' * 40_000 + b"1]}",
        b'{"metadata": {' + b'"a":1,' * 70_000 + b'"a":1}}',
        b'{"prompt": [' + b"5," * 1_100_000 + b"5]}",
        b'{"a": "' + b"[" * 70_000 + b'", "b": [' + b'"",' * 300_000 + b"1]}",
    ],
)
def test_a_body_of_too_many_parts_is_not_parsed(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "json", None)
    with pytest.raises(InvalidRequest, match="too many parts"):
        parse.to_object(raw)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 70_000,
        r"{\"a\": 1}" * 40_000,
        r"\\" * 70_001 + "[:" * 40_000,
        "a, b" * 1_100_000,
    ],
)
def test_what_is_within_a_text_is_no_part(text: str) -> None:
    assert len(parse.to_object(f'{{"a": "{text}"}}'.encode())["a"]) > 65_536


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (CompletionRequest, {"prompt": [1] + [1.5] * 3}, "prompt[1]"),
        (CompletionRequest, {"prompt": ["a", 1, 2, 3]}, "prompt[1]"),
        (CompletionRequest, {"prompt": [[1], 2, 3]}, "prompt[1]"),
        (CompletionRequest, {"prompt": [[1, "a", "b"], [2]]}, "prompt[0][1]"),
        (ChatRequest, {"messages": [1, 2, 3]}, "messages[0]"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [1, 2]}]},
            "messages[0].content[0]",
        ),
        (DetokenizeRequest, {"tokens": ["a", "b"]}, "tokens[0]"),
    ],
)
def test_only_the_first_of_many_faults_is_looked_for(
    model: type[BaseModel], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse.to_model(model, body, "refuse")
    assert caught.value.param == param
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() == 1


def test_a_fault_does_not_repeat_a_long_key() -> None:
    body = {"prompt": "a", "logit_bias": {LONG_KEY: "x"}}
    with pytest.raises(InvalidRequest) as caught:
        parse.to_model(CompletionRequest, body, "refuse")
    assert len(caught.value.message) < 500
    assert len(caught.value.param or "") < 200
