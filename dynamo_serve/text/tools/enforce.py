"""The grammar of an answer that has to call tools, in the form that will be read.

In Lark, as llguidance reads it: `<[7]>` is the token 7, `%json` a JSON schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dynamo_serve.text.dialect import TAGS, Parsing

SPACE = "/[ \\n]{0,2}/"
ANYTHING = "/(.|\\n)*/"


class Offer(NamedTuple):
    """A tool that may be called; `schema` is that of its arguments, in JSON."""

    name: str
    schema: str


class Marks:
    """How marks are written in a grammar: as a token where the tokenizer has one for it, since such
    a token is no text to a grammar, else as text."""

    def __init__(self, token_of: Callable[[str], int | None]) -> None:
        self._token_of = token_of

    def is_token(self, mark: str) -> bool:
        return self._token_of(mark) is not None

    def rule(self, mark: str) -> str:
        token = self._token_of(mark)
        return json.dumps(mark) if token is None else f"<[{token}]>"

    def until(self, name: str, mark: str) -> str:
        """The rule `name`: any text, and the mark."""
        if self.is_token(mark):
            return f"{name}: {ANYTHING} {self.rule(mark)}"
        return f"{name}[suffix={json.dumps(mark)}]: {ANYTHING}"


class _Frame(NamedTuple):
    """A call as `opening`, which is a mark or nothing, and `rest`; and several of them."""

    opening: str
    rest: str
    calls: str


def calls_grammar(
    parsing: Parsing,
    offers: Sequence[Offer],
    marks: Marks,
    *,
    is_required: bool,
    answer: str | None = None,
) -> str:
    """Thoughts, if the model thinks, and then calls; or, unless they are required, `answer`: a
    rule of its own, without which it is any text with calls in it."""
    rules = [_thoughts(parsing, marks)] if parsing.thoughts else []
    rest = "calls" if offers else "answer"
    if offers:
        rules += _calls(parsing, offers, marks)
    if offers and not is_required:
        rest = "free" if answer is None else "(calls | answer)"
    if rest == "free":
        rules += _free(parsing, marks)
    if answer is not None:
        rules.append(f"answer: {answer}")
    start = f"start: {'thoughts ' if parsing.thoughts else ''}{rest}"
    return "\n".join([start, *rules, ""])


def can_be_free(parsing: Parsing) -> bool:
    """Whether calls can be held to schemas although the model need not call anything: if they
    are not to be found just anywhere in its text."""
    return parsing.tools != "json"


def _thoughts(parsing: Parsing, marks: Marks) -> str:
    tags = TAGS[parsing.thoughts]
    inner = marks.until("inner", tags.closing)
    if parsing.is_thinking:
        return f"thoughts: inner {SPACE}\n{inner}"
    return f"thoughts: ({marks.rule(tags.opening)} inner {SPACE})?\n{inner}"


def _calls(parsing: Parsing, offers: Sequence[Offer], marks: Marks) -> list[str]:
    """The rules of `calls`, `call`, `rest` and what they are made of."""
    is_bare = parsing.tools == "mistral" and marks.is_token("[ARGS]")
    key = "parameters" if parsing.tools == "llama3" else "arguments"
    bodies = [
        _bare(i, offer, marks) if is_bare else _object(i, offer, key)
        for i, offer in enumerate(offers)
    ]
    frame = _frame(parsing, marks)
    opening = f"{marks.rule(frame.opening)} " if frame.opening else ""
    return [
        f"calls: {'call' if parsing.is_single else frame.calls}",
        f"call: {opening}rest",
        f"rest: {frame.rest}",
        f"body: {' | '.join(f'body{i}' for i in range(len(offers)))}",
        *bodies,
    ]


def _free(parsing: Parsing, marks: Marks) -> list[str]:
    """Any text with calls in it, and nothing in it that only looks like the beginning of one."""
    opening = _frame(parsing, marks).opening
    if opening and marks.is_token(opening):
        return [f"free: {ANYTHING} (call {ANYTHING})*"]
    if opening:
        mark = re.escape(opening).replace("/", "\\/")
        return [
            "free: (lead rest)* TAIL",
            f"lead[suffix={json.dumps(opening)}]: {ANYTHING}",
            *_but_for(f"/(.|\\n)*{mark}(.|\\n)*/"),
        ]
    return ["free: calls | TAIL", *_but_for("/[ \\n\\r\\t]*[{](.|\\n)*/")]


def _but_for(expression: str) -> list[str]:
    return ["TAIL: ANY & ~CALLING", f"ANY: {ANYTHING}", f"CALLING: {expression}"]


def _object(number: int, offer: Offer, key: str) -> str:
    head = json.dumps(f'{{"name": {json.dumps(offer.name)}, "{key}": ')
    return f'body{number}: {head} schema{number} "}}"\nschema{number}: %json {offer.schema}'


def _bare(number: int, offer: Offer, marks: Marks) -> str:
    head = f"{json.dumps(offer.name)} {marks.rule('[ARGS]')}"
    return f"body{number}: {head} schema{number}\nschema{number}: %json {offer.schema}"


def _frame(parsing: Parsing, marks: Marks) -> _Frame:
    match parsing.tools:
        case "hermes":
            closing = marks.rule("</tool_call>")
            rest = f"{SPACE} body {SPACE} {closing}"
            return _Frame("<tool_call>", rest, f"call ({SPACE} call)*")
        case "llama3":
            return _Frame("", "body", 'call ("; " call)*')
        case "mistral" if marks.is_token("[ARGS]"):
            return _Frame("[TOOL_CALLS]", "body", "call+")
        case "mistral":
            bodies = "body" if parsing.is_single else 'body (", " body)*'
            return _Frame("[TOOL_CALLS]", f'" "? "[" {bodies} "]"', "call")
        case _:
            return _Frame("", "body", 'body | "[" body (", " body)* "]"')
