"""Texts with calls and thoughts in them, and ways to cut them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from dynamo_serve.text.dialect import Parsing, Reader
from dynamo_serve.text.parts import Parts, joined

NAMES = ("get_weather", "f")
# What texts are made of: whole calls, calls gone wrong, marks, and what may stand around them.
CALLS: dict[str, list[str]] = {
    "hermes": [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 😀"}}\n</tool_call>',
        '<tool_call>{"arguments": {"a": [1, -2e3, null, "x\\"}\\u00e9"]}, "name": "f"}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}} </tool_cal',
        *("<tool_call>", "</tool_call>", "<tool_call>\n", "<tool", '{"name": "f"'),
    ],
    "llama3": [
        '{"name": "f", "parameters": {"a": {"b": []}}}',
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": "é"}}',
        '<|python_tag|>print("你好")',
        *("; ", "<|python_tag|>", "{"),
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abc"}, {"name": "f"}]',
        '[TOOL_CALLS]f[ARGS]{"a": "😀"}',
        "[TOOL_CALLS]get_weather[CALL_ID]abc123[ARGS]{}",
        '[TOOL_CALLS]f{"a": 1}',
        '[TOOL_CALLS]f[ARGS]["a"]',
        *("[TOOL_CALLS]", "[ARGS]", "[", '{"name": "f", "arguments": {}}'),
    ],
    "json": [
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "f", "arguments": {}}, {"name": "get_weather", "parameters": {"c": "ü"}}]',
        '```json\n{"name": "f", "arguments": {"a": [[]]}}\n```',
        '```python\nprint({"name": 1})\n```',
        '{"name": "Mia", "age": 31}',
        *("{", "[", "```", "```json"),
    ],
}
AROUND = ["Hello", " ", "\n\n", "naïve 你好", "😀", "</think>", "<think>", "<", "[", '"', "}"]


def texts(form: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*CALLS[form], *CALLS[form][:2], *AROUND]), max_size=8).map(
        "".join
    )


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """`text` in pieces, cut anywhere."""
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def read(parsing: Parsing, pieces: Iterable[str]) -> Parts:
    """All that a reader tells of these pieces; how many tokens it thought depends on them."""
    reader = Reader(parsing)
    told: Sequence[Parts] = [*(reader.push(piece) for piece in pieces), reader.flush()]
    return joined(told)._replace(is_calling=reader.is_calling, num_thought=0)
