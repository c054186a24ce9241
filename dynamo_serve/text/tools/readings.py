"""How calls are read: what each family of models writes behind its marks, as generators.

Each takes a character per turn; `first` is one that was taken already.
"""

from __future__ import annotations

import json
from collections.abc import Generator

from dynamo_serve.text.tools.calls import Desk, NotACall, Reading
from dynamo_serve.text.tools.json_text import SPACE, JsonText, NotJson

MAX_NAME = 256  # characters of a key or a name; what is longer is no call
ARGUMENTS = ("arguments", "parameters")
IGNORED = ("id", "type")  # keys that some models write beside the name
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/")

Taking = Generator[None, str, str]  # a reading that hands on a character, or a text


def tagged(desk: Desk) -> Reading:
    """An object up to its closing tag: Hermes, Qwen."""
    yield from _object(desk, (yield from _solid()))
    char = yield from _solid()
    yield from _literal("</tool_call>", char)


def series(desk: Desk) -> Reading:
    """Objects, with semicolons between them or not: Llama 3."""
    char = yield from _solid()
    while True:
        yield from _object(desk, char)
        char = yield from _solid()
        if char == ";":
            desk.is_closing = False
            char = yield from _solid()


def objects(desk: Desk) -> Reading:
    """An object or a list of them."""
    yield from _objects(desk, (yield from _solid()))


def fenced(desk: Desk) -> Reading:
    """The same within a fence of Markdown, whose beginning was the mark."""
    char = yield
    if char == "j":
        yield from _literal("json", char)
        char = yield
    if char in SPACE:
        char = yield from _solid()
    yield from _objects(desk, char)
    yield from _literal("```", (yield from _solid()))


def mistral(desk: Desk) -> Reading:
    """An object or a list of them; or, newer, a name and its arguments, with marks between them."""
    char = yield from _solid()
    if char in "[{":
        yield from _objects(desk, char)
        return
    name = ""
    while char in NAME_CHARACTERS and len(name) < MAX_NAME:
        name += char
        char = yield
    if not name:
        raise NotACall
    if char == "[":
        char = yield
        if char == "C":
            yield from _literal("CALL_ID]", char)
            char = yield
            while char in NAME_CHARACTERS:
                char = yield
            if char != "[":
                raise NotACall
            char = yield
        yield from _literal("ARGS]", char)
        char = yield from _solid()
    elif char in SPACE:
        char = yield from _solid()
    yield from _arguments(desk, name, char)
    desk.whole()


def _objects(desk: Desk, first: str) -> Reading:
    if first != "[":
        yield from _object(desk, first)
        return
    char = ","
    while char == ",":
        desk.is_closing = False
        yield from _object(desk, (yield from _solid()))
        char = yield from _solid()
    if char != "]":
        raise NotACall


class _Read:
    """What has been read of an object."""

    name = ""
    early = ""  # arguments that came before the name
    has_begun = False


def _object(desk: Desk, first: str) -> Reading:
    """`{"name": ..., "arguments": {...}}`, its keys in any order; without arguments, none."""
    if first != "{":
        raise NotACall
    read, char = _Read(), ","
    while char == ",":
        key = yield from _string((yield from _solid()))
        if (yield from _solid()) != ":":
            raise NotACall
        yield from _value(desk, read, key, (yield from _solid()))
        char = yield from _solid()
    if char != "}" or not read.name:
        raise NotACall
    if not read.has_begun:
        desk.begin(read.name)
        desk.piece("{}")
    desk.whole()


def _value(desk: Desk, read: _Read, key: str, first: str) -> Reading:
    if key == "name" and not read.name:
        read.name = yield from _string(first)
        if read.early:
            desk.begin(read.name)
            desk.piece(read.early)
            read.has_begun = True
    elif key in ARGUMENTS and not (read.has_begun or read.early):
        read.has_begun = bool(read.name)
        read.early = yield from _arguments(desk, read.name, first)
    elif key in IGNORED:
        yield from _string(first)
    else:
        raise NotACall


def _arguments(desk: Desk, name: str, first: str) -> Taking:
    """An object of arguments; they go to the desk as they come if there is a name, else they are
    returned."""
    if first != "{":
        raise NotACall
    if name:
        desk.begin(name)
    scan, kept, char, is_whole = JsonText(), [], first, False
    while True:
        try:
            is_whole = scan.push(char)
        except NotJson:
            raise NotACall from None
        if name:
            desk.piece(char)
        else:
            kept.append(char)
        if is_whole:
            return "".join(kept)
        char = yield


def _solid() -> Taking:
    """The next character that is no space."""
    while (char := (yield)) in SPACE:
        pass
    return char


def _literal(text: str, first: str) -> Reading:
    if first != text[0]:
        raise NotACall
    for expected in text[1:]:
        if (yield) != expected:
            raise NotACall


def _string(first: str) -> Taking:
    """A short string, decoded."""
    if first != '"':
        raise NotACall
    raw, is_escape = "", False
    while True:
        char = yield
        if char == '"' and not is_escape:
            break
        is_escape = char == "\\" and not is_escape
        raw += char
        if len(raw) > MAX_NAME:
            raise NotACall
    try:
        return str(json.loads(f'"{raw}"'))
    except ValueError:
        raise NotACall from None
