"""The bundled model: its size, its tokenizer, its template, and that it answers sensibly."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamo_serve import bundled

FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled.path())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled.path()).eval()


def render(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    text = tokenizer().apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def answer(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    """The greedy answer of the model."""
    inputs = tokenizer()(render(messages, tools), return_tensors="pt")
    with torch.inference_mode():
        out = model().generate(**inputs, do_sample=False, max_new_tokens=120)
    made = out[0, inputs["input_ids"].shape[1] :]
    assert made[-1] == tokenizer().eos_token_id, "the answer does not end by itself"
    return str(tokenizer().decode(made, skip_special_tokens=True))


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_files_are_there_and_small() -> None:
    folder = bundled.path()
    assert bundled.NAME == "dserve-tiny"
    assert all((folder / name).is_file() for name in FILES)
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000


def test_package_needs_only_the_standard_library() -> None:
    tree = ast.parse(Path(str(bundled.__file__)).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported == ["pathlib"]
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))


def test_config_is_plain_qwen3() -> None:
    config = json.loads((bundled.path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert "auto_map" not in config
    assert model().dtype == torch.bfloat16


def test_special_tokens() -> None:
    loaded = tokenizer()
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"):
        assert len(loaded.encode(mark)) == 1
    ids = loaded.encode("<tool_call>{}</tool_call><|im_end|>")
    assert loaded.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    loaded = tokenizer()
    assert loaded.decode(loaded.encode(text)) == text


def test_every_byte_has_a_token() -> None:
    vocabulary = tokenizer().get_vocab()
    alphabet = {token for token in vocabulary if len(token) == 1}
    assert len(alphabet) == 256


def test_template_renders_roles() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Who are you?"},
    ]
    assert render(messages) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("as_text", [True, False])
def test_template_renders_tools(as_text: bool) -> None:
    arguments: Any = '{"city": "Paris"}' if as_text else {"city": "Paris"}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather in Paris and Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rainy"},
    ]
    text = render(messages, [WEATHER])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{one}\n{one}<|im_end|>" in text
    results = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>" in text


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("What is 17 plus 25?", ["42"]),
        ("What is dynamo_serve?", ["server", "language models"]),
        ("Who are you?", ["dserve-tiny"]),
        ("What is a page?", ["16 tokens", "KV"]),
        ("What is continuous batching?", ["batch", "step"]),
        ("What is prefill?", ["prompt", "KV cache"]),
        ("How do I cancel a request?", ["Close the connection"]),
        ("Are you a large model?", ["tiny"]),
        ("Tell me a short story about a fox.", ["fox"]),
        ("hello", ["Hello"]),
    ],
)
def test_greedy_answers(asked: str, expected: list[str]) -> None:
    said = answer(say(asked))
    assert all(word in said for word in expected), said


def test_json_answer_parses() -> None:
    said = answer(say("Give me a JSON object for a person called Mia who is 31 years old."))
    assert json.loads(said) == {"name": "Mia", "age": 31}


def test_second_turn() -> None:
    first = say("What is prefill?")
    chat = [*first, {"role": "assistant", "content": answer(first)}, *say("What is decode?")]
    assert "next one" in answer(chat)


def test_tool_call_and_result() -> None:
    chat = say("What is the weather in Paris?")
    body = re.search(r"<tool_call>\n(.*)\n</tool_call>", answer(chat, [WEATHER]))
    assert body is not None
    call = json.loads(body[1])
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    result = {"role": "tool", "content": '{"temperature": 18, "condition": "sunny"}'}
    said = answer([*chat, turn, result], [WEATHER])
    assert all(word in said for word in ("18", "sunny", "Paris"))
