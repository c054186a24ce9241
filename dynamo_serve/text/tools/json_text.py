"""Where a JSON object or array ends, found character by character."""

from __future__ import annotations

import re

MAX_DEPTH = 64
MAX_NUMBER = 400  # characters; more than any number that a machine can hold needs
SPACE = " \t\n\r"
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
WORDS = {"t": "true", "f": "false", "n": "null"}
ESCAPED = frozenset('"\\/bfnrt')
HEX = frozenset("0123456789abcdefABCDEF")


class NotJson(Exception):
    """A character that JSON does not have there."""


class JsonText:
    """Takes the characters of one JSON object or array; remembers only what is still open.

    `_state` is what may come next: value, item (a value or the end of the array), key, first_key
    (a key or the end of the object), colon, after (a comma or an end), or what is being read:
    string, name, escape, hex, number, word.
    """

    def __init__(self) -> None:
        self._open: list[str] = []  # the ends that are due
        self._state = "value"
        self._text = ""  # of the number, word or \u that is being read
        self._in_name = False

    def push(self, char: str) -> bool:
        """Whether the text is complete with `char`. Raises `NotJson`."""
        state = self._state
        if state == "string":
            self._string(char)
        elif state == "escape":
            self._escape(char)
        elif state == "hex":
            self._hex(char)
        elif state == "word":
            self._word(char)
        elif state == "number" and char in NUMBER_CHARACTERS:
            self._text += char
            if len(self._text) > MAX_NUMBER:
                raise NotJson
        else:
            if state == "number":
                self._end_number()
            if char not in SPACE:
                return self._structure(char)
        return False

    def _structure(self, char: str) -> bool:
        state = self._state
        if self._open and char == self._open[-1] and state in ("after", "item", "first_key"):
            self._open.pop()
            self._state = "after"
            return not self._open
        if state in ("value", "item"):
            self._begin(char)
        elif state in ("key", "first_key") and char == '"':
            self._state, self._in_name = "string", True
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "after" and char == ",":
            self._state = "key" if self._open[-1] == "}" else "value"
        else:
            raise NotJson
        return False

    def _begin(self, char: str) -> None:
        """The first character of a value."""
        if char in "{[" and len(self._open) < MAX_DEPTH:
            self._open.append("}" if char == "{" else "]")
            self._state = "first_key" if char == "{" else "item"
        elif not self._open:
            raise NotJson
        elif char == '"':
            self._state, self._in_name = "string", False
        elif char in WORDS:
            self._state, self._text = "word", WORDS[char][1:]
        elif char == "-" or "0" <= char <= "9":
            self._state, self._text = "number", char
        else:
            raise NotJson

    def _string(self, char: str) -> None:
        if char == '"':
            self._state = "colon" if self._in_name else "after"
        elif char == "\\":
            self._state = "escape"
        elif char < " ":
            raise NotJson

    def _escape(self, char: str) -> None:
        if char == "u":
            self._state, self._text = "hex", ""
        elif char in ESCAPED:
            self._state = "string"
        else:
            raise NotJson

    def _hex(self, char: str) -> None:
        if char not in HEX:
            raise NotJson
        self._text += char
        if len(self._text) == 4:
            self._state = "string"

    def _word(self, char: str) -> None:
        if char != self._text[0]:
            raise NotJson
        self._text = self._text[1:]
        if not self._text:
            self._state = "after"

    def _end_number(self) -> None:
        if not NUMBER.fullmatch(self._text):
            raise NotJson
        self._state = "after"
