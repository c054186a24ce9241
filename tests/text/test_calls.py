from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.text.dialect import Parsing
from dynamo_serve.text.parts import CallPart
from dynamo_serve.text.tools.forms import FORMS, call_id, form_of
from dynamo_serve.text.tools.json_text import MAX_DEPTH, JsonText, NotJson
from tests.text.parsing import CALLS, NAMES, cut, read, texts


def parsing(form: str, *, is_single: bool = False) -> Parsing:
    return Parsing(form, NAMES, is_single)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_text_gives_the_same_calls_and_content(form: str, data: st.DataObject) -> None:
    text, is_single = data.draw(texts(form)), data.draw(st.booleans())
    how = Parsing(form, NAMES, is_single, data.draw(st.sampled_from(["", "think"])))
    how = how._replace(is_thinking=bool(how.thoughts) and data.draw(st.booleans()))
    whole = read(how, [text])
    assert read(how, data.draw(cut(text))) == whole
    assert read(how, text) == whole
    if not whole.calls and not how.thoughts:
        assert whole.content == text
    if whole.is_calling:
        assert all(isinstance(json.loads(call.arguments), dict) for call in whole.calls)
    assert all(call.name in NAMES for call in whole.calls)


F = CallPart(0, "f", '{"a": 1}')
G = CallPart(1, "get_weather", "{}")
UNDERSTOOD = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [F]),
    (
        "hermes",
        '<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n<tool_call>'
        '{"arguments":{},"name":"get_weather"}</tool_call>',
        [F, G],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', [F]),
    (
        "llama3",
        ' {"name": "f", "parameters": {"a": 1}}; {"name": "get_weather", "parameters": {}}',
        [F, G],
    ),
    ("llama3", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"},'
        ' {"name": "get_weather", "arguments": {}}]',
        [F, G],
    ),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}', [F, G]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', [F]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', [F]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"a": 1}}', [F]),
    ("json", '{"name": "f", "arguments": {"a": 1}}', [F]),
    ("json", '[{"name": "f", "parameters": {"a": 1}}, {"name": "get_weather"}]', [F, G]),
    ("json", '```json\n{"name": "f", "arguments": {"a": 1}}\n```\n', [F]),
]


@pytest.mark.parametrize(("form", "text", "calls"), UNDERSTOOD)
def test_calls_are_understood(form: str, text: str, calls: list[CallPart]) -> None:
    told = read(parsing(form), [text])
    assert (told.content, list(told.calls), told.is_calling) == ("", calls, True)
    told = read(parsing(form), ["So be it.\n", text] if form != "llama3" else [text])
    assert told.content in ("So be it.", "")
    assert list(told.calls) == calls


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arg'),
        ("hermes", "\n<tool_call>\n"),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        ("llama3", 'Sure: {"name": "f", "parameters": {}}'),
        ("llama3", '<|python_tag|>brave_search.call(query="f")'),
        ("mistral", '[TOOL_CALLS] [{"nam'),
        ("mistral", "[TOOL_CALLS]f[ARGS][1]"),
        ("mistral", '[TOOL_CALLS]{"a": 1}'),
        ("mistral", '[TOOL_CALLS]?{"a": 1}'),
        ("json", '{"name": "Mia", "age": 31}'),
        ("json", "```python\nf()\n```"),
        ("json", "a [1, 2] {3} "),
    ],
)
def test_what_only_looks_like_a_call_is_content(form: str, text: str) -> None:
    told = read(parsing(form), [text])
    assert (told.content, told.calls, told.is_calling) == (text, (), False)


def test_of_a_call_that_breaks_off_the_rest_is_content() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1, oops}}</tool_call> Sorry.'
    told = read(parsing("hermes"), [text])
    assert told.calls == (CallPart(0, "f", '{"a": 1, '),)
    assert told.content == "oops}}</tool_call> Sorry."
    assert not told.is_calling
    told = read(parsing("hermes"), [text[:46]])  # the answer may be no longer
    assert (told.content, told.calls[0].arguments, told.is_calling) == ("", '{"a": 1,', False)


def test_a_call_behind_a_broken_one_is_still_found() -> None:
    text = '<tool_call>well, <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    told = read(parsing("hermes"), [text])
    assert (told.content, told.calls) == ("<tool_call>well,", (F,))


def test_one_call_is_enough_where_one_was_asked_for() -> None:
    text = '[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 1}}] and more'
    told = read(parsing("json", is_single=True), text)
    assert (told.content, told.calls, told.is_calling) == ("", (F,), True)


def test_the_time_for_a_text_grows_with_its_length_only() -> None:
    text = '{"arguments": ' * 20_000
    assert read(parsing("json"), [text]).content == text


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    value=st.lists(ANY_JSON, max_size=3) | st.dictionaries(st.text(max_size=3), ANY_JSON),
    is_ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
    cut=st.integers(0, 200),
    junk=st.sampled_from(list('x,:]}{["\\ 0-.e\n')),
)
def test_the_end_of_json_is_found_and_faults_are_too(
    value: object, is_ascii: bool, indent: int | None, cut: int, junk: str
) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    scan = JsonText()
    assert [scan.push(char) for char in text] == [False] * (len(text) - 1) + [True]
    spoiled = text[:cut] + junk + text[cut + 1 :]
    scan = JsonText()
    try:
        end = next((i for i, char in enumerate(spoiled) if scan.push(char)), None)
    except NotJson:
        with pytest.raises(ValueError):
            json.loads(spoiled)
    else:
        if end is not None:
            json.loads(spoiled[: end + 1])


def test_json_is_read_to_a_depth() -> None:
    scan = JsonText()
    with pytest.raises(NotJson):
        for char in "[" * (MAX_DEPTH + 1):
            scan.push(char)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} <tool_call>\n<function=", ""),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} <|python_tag|>", "llama3"),
        ("{{ tools }}", "json"),
    ],
)
def test_the_template_tells_the_form(template: str, form: str) -> None:
    assert form_of(template) == form


def test_ids_are_the_same_whenever_they_are_told() -> None:
    ids = {call_id(f"chatcmpl-{i}", j, "hermes") for i in range(3) for j in range(3)}
    assert len(ids) == 9 and all(len(id) == 29 and id.startswith("call_") for id in ids)
    assert call_id("chatcmpl-0", 0, "hermes") in ids
    assert len(call_id("a", 0, "mistral")) == 9


def test_every_form_has_examples() -> None:
    assert set(CALLS) == set(FORMS)
