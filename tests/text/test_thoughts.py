from __future__ import annotations

import pytest

from dynamo_serve.text.dialect import TAGS, Parsing, dialect_of, ends_thinking
from tests.text.parsing import read

QWEN3 = "{% if enable_thinking is false %}<think>\n\n</think>{% endif %} {{ tools }} <tool_call>"


@pytest.mark.parametrize(
    ("text", "is_open", "thought", "content"),
    [
        ("<think>\nHm.\n</think>\n\nHello.", False, "Hm.", "Hello."),
        ("\nHm.\n</think>\n\nHello.", True, "Hm.", "Hello."),
        ("<think>Hm.</think>Hello.", True, "Hm.", "Hello."),
        ("<think>\n\n</think>\n\nHello.", False, "", "Hello."),
        ("Hello.", False, "", "Hello."),
        ("  Hello. <think>no</think>", False, "", "  Hello. <think>no</think>"),
        ("<think>Hm. a < b </thin", False, "Hm. a < b </thin", ""),
        ("Hm.", True, "Hm.", ""),
        ("<thi", False, "", "<thi"),
        ("<thi", True, "<thi", ""),
        ("", True, "", ""),
        ("a</think>b</think>c <think>", True, "a", "b</think>c <think>"),
    ],
)
def test_thoughts_are_told_from_the_answer(
    text: str, is_open: bool, thought: str, content: str
) -> None:
    told = read(Parsing(thoughts="think", is_thinking=is_open), [text])
    assert (told.thought, told.content) == (thought, content)
    assert read(Parsing(thoughts="think", is_thinking=is_open), text) == told


def test_calls_are_looked_for_behind_the_thoughts_only() -> None:
    call = '<tool_call>{"name": "f"}</tool_call>'
    told = read(Parsing("hermes", ("f",), thoughts="think"), f"<think>{call}</think>\n{call}")
    assert (told.thought, told.content, len(told.calls)) == (call, "", 1)


def test_the_template_tells_the_tags_and_what_can_be_asked() -> None:
    dialect = dialect_of(QWEN3)
    assert (dialect.thoughts, dialect.tools, dialect.switch) == (
        "think",
        "hermes",
        "enable_thinking",
    )
    assert not any(dialect_of("{{ messages }}"))
    assert dialect_of(QWEN3, tools="none", thoughts="none").tools == ""
    assert dialect_of("{{ messages }}", tools="hermes").tools == ""  # it could not be told of any
    assert dialect_of("{{ messages }}", thoughts="seed").thoughts == "seed"
    for name, tags in TAGS.items():
        assert dialect_of(f"{{{{ x }}}} {tags.closing}").thoughts == name


def test_what_a_template_only_says_is_no_variable_of_it() -> None:
    said = "{# tools #}Say what you are thinking. {{ 'These are tools' }} {{ messages }}"
    assert not any(dialect_of(said))
    assert not any(dialect_of("{{ ) }} {{ tools }}"))
    asked = "{%- generation -%}{%- if thinking is defined and reasoning_effort -%}"
    assert dialect_of(asked).variables == {"thinking", "reasoning_effort"}


def test_the_end_of_the_prompt_tells_whether_thoughts_are_open() -> None:
    assert ends_thinking("<|im_start|>assistant\n<think>\n", "think")
    assert not ends_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n", "think")
    assert not ends_thinking("<|im_start|>assistant\n<think>\n", "")
