"""Grammars of calls, followed by the library that follows them in the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from dynamo_serve.core.request import Grammar
from dynamo_serve.grammars import compiled, vocabulary
from dynamo_serve.text.dialect import Parsing
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.enforce import Marks, Offer, calls_grammar, can_be_free
from dynamo_serve.text.tools.forms import FORMS
from tests.text.parsing import read
from tests.text.tiny import byte_level

MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}},
    "required": ["city"],
}
CITY |= {"additionalProperties": False, "$defs": {"c": {"type": "string"}}}
OFFERS = [Offer("get_weather", json.dumps(CITY)), Offer("f", '{"type": "object"}')]
NAMES = tuple(offer.name for offer in OFFERS)
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
WRONG = '{"name": "get_weather", "arguments": {"town": "Paris"}}'
F = '{"name": "f", "arguments": {"a": [1]}}'
# Of each form: a call, two, and one that does not fit its schema.
CALLS = {
    "hermes": (
        f"<tool_call>\n{WEATHER}\n</tool_call>",
        f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>",
        f"<tool_call>\n{WRONG}\n</tool_call>",
    ),
    "llama3": tuple(
        text.replace("arguments", "parameters") for text in (WEATHER, f"{WEATHER}; {F}", WRONG)
    ),
    "mistral": (
        f"[TOOL_CALLS] [{WEATHER}]",
        f"[TOOL_CALLS][{WEATHER}, {F}]",
        f"[TOOL_CALLS][{WRONG}]",
    ),
    "json": (WEATHER, f"[{WEATHER}, {F}]", WRONG),
}
NEWER = (
    '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
    '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]f[ARGS]{"a": [1]}',
    '[TOOL_CALLS]get_weather[ARGS]{"town": "Paris"}',
)


class Follower:
    """A tokenizer, whose marks are tokens or not, and what a grammar lets through of it."""

    def __init__(self, *, has_tokens: bool) -> None:
        made = byte_level()
        if has_tokens:
            made.add_special_tokens({"additional_special_tokens": MARKS})
        self._tokenizer = Tokenizer(made)
        self.marks = Marks(self._tokenizer.added_id)
        text, size = self._tokenizer.as_json, self._tokenizer.vocab_size
        assert text is not None
        self._words: LLTokenizer = vocabulary(text, size, self._tokenizer.eos_ids)

    def takes(self, rules: str, text: str) -> bool:
        """Whether `text` may be a whole answer."""
        matcher = compiled(Grammar("grammar", rules), self._words)
        ids = self._tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def follower(request: pytest.FixtureRequest) -> Follower:
    return Follower(has_tokens=request.param)


def examples(form: str, follower: Follower) -> tuple[str, ...]:
    return NEWER if form == "mistral" and follower.marks.is_token("[ARGS]") else CALLS[form]


@pytest.mark.parametrize("form", FORMS)
def test_a_required_call_is_made_in_the_form_that_is_read(form: str, follower: Follower) -> None:
    parsing = Parsing(form, NAMES)
    rules = calls_grammar(parsing, OFFERS, follower.marks, is_required=True)
    one, two, wrong = examples(form, follower)
    for text, count in ((one, 1), (two, 2)):
        assert follower.takes(rules, text), text
        told = read(parsing, [text])
        assert (told.content, len(told.calls), told.is_calling) == ("", count, True)
    for text in (wrong, "", "Hello", f"Well, {one}"):
        assert not follower.takes(rules, text), text


@pytest.mark.parametrize("form", FORMS)
def test_a_named_one_is_called_once(form: str, follower: Follower) -> None:
    rules = calls_grammar(
        Parsing(form, NAMES[:1], is_single=True), OFFERS[:1], follower.marks, is_required=True
    )
    one, two, _ = examples(form, follower)
    assert follower.takes(rules, one)
    assert not follower.takes(rules, two)


@pytest.mark.parametrize("form", [name for name in FORMS if can_be_free(Parsing(name))])
def test_calls_in_any_text_are_held_to_their_schemas(form: str, follower: Follower) -> None:
    rules = calls_grammar(Parsing(form, NAMES), OFFERS, follower.marks, is_required=False)
    one, two, wrong = examples(form, follower)
    for text in (one, two, "", "Hello, <world> {1} [2]"):
        assert follower.takes(rules, text), text
    assert not follower.takes(rules, wrong)
    if form != "llama3":
        assert follower.takes(rules, f"Well, {one} and {two}")
        assert not follower.takes(rules, f"Well, {one} and {wrong}")


@pytest.mark.parametrize("is_open", [True, False])
def test_thoughts_come_first(is_open: bool, follower: Follower) -> None:
    parsing = Parsing("hermes", NAMES, thoughts="think", is_thinking=is_open)
    rules = calls_grammar(parsing, OFFERS, follower.marks, is_required=True)
    one, _, _ = CALLS["hermes"]
    thought = ("" if is_open else "<think>") + "Hm, a < b.\n</think>\n\n"
    assert follower.takes(rules, thought + one)
    assert follower.takes(rules, one) is not is_open
    assert not follower.takes(rules, thought + "Hello")


def test_an_answer_may_be_calls_or_what_else_was_asked_for(follower: Follower) -> None:
    one, two, wrong = CALLS["hermes"]
    parsing = Parsing("hermes", NAMES)
    answer = '%json {"type": "array", "items": {"type": "integer"}}'
    args = (parsing, OFFERS, follower.marks)
    rules = calls_grammar(*args, is_required=False, answer=answer)
    assert all(follower.takes(rules, text) for text in (one, two, "[1, 2]"))
    assert not any(follower.takes(rules, text) for text in (wrong, "Hello", '["a"]'))
    alone = Parsing(thoughts="think", is_thinking=True)
    rules = calls_grammar(alone, [], follower.marks, is_required=False, answer=answer)
    assert follower.takes(rules, "Hm.</think>[1]")
    assert not follower.takes(rules, "[1]")
