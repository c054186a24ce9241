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
