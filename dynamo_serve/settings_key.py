"""One setting: its type, what is allowed, and how text or a YAML value becomes it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml

_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
# What the commonest patterns mean.
_IN_WORDS = {None: "", r"\S+": " without spaces", r".*\S.*": " that is not blank"}
MASK = "****"


class BadValue(Exception):
    """Why a value was refused, worded to follow the key's path."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the settings; `kind` is bool, int, float, str, a Literal, or tuple[str, ...]."""

    path: str
    kind: Any
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    pattern: str | None = None
    secret: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The words a Literal allows; empty for every other kind."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind is bool:
            return "true, false"
        if self.kind in (int, float):
            return ("a whole number" if self.kind is int else "a number") + self._bounds()
        noun = "a list of texts" if self.is_list else "text"
        return noun + _IN_WORDS.get(self.pattern, f" matching {self.pattern}")

    def _bounds(self) -> str:
        if self.low is not None and self.high is not None:
            return f" from {self.low:g} to {self.high:g}"
        return f" of at least {self.low:.16g}" if self.low is not None else ""

    def from_text(self, text: str) -> object:
        """The value written as `text` in the environment or a flag. Raises `BadValue`."""
        if self.is_list:
            return self._check(text, self._split(text))
        if self.kind is bool:
            return self._check(text, _WORDS.get(text.strip().lower()))
        if self.kind in (int, float):
            try:
                return self._check(text, self.kind(text))
            except ValueError:
                raise self._refused(text) from None
        return self._check(text, text)

    def _split(self, text: str) -> object:
        if not text.strip().startswith("["):
            return [part.strip() for part in text.split(",") if part.strip()]
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: [2020-13-01]
            raise self._refused(text) from None

    def from_yaml(self, value: object) -> object:
        """The value found in a file. Raises `BadValue`; nothing is converted but int to float."""
        if type(value) is int and abs(value) >= 2**63:  # more than a message or a float may hold
            raise self._refused(value)
        if self.kind is float and type(value) is int:
            return self._check(value, float(value))
        return self._check(value, value)

    def _check(self, given: object, value: Any) -> object:
        if self.is_list:
            if type(value) is not list or not all(self._allows_text(part) for part in value):
                raise self._refused(given)
            return tuple(value)
        if self.choices:
            allowed = value in self.choices
        elif self.kind is str:
            allowed = self._allows_text(value)
        else:
            allowed = type(value) is self.kind and self._within(value)
        if not allowed:
            raise self._refused(given)
        return value

    def _allows_text(self, value: object) -> bool:
        if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
            return False  # half a character is what bytes that are not UTF-8 become
        return self.pattern is None or re.fullmatch(self.pattern, value) is not None

    def _within(self, value: float) -> bool:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return math.isfinite(value) and low <= value <= high

    def _refused(self, given: object) -> BadValue:
        shown = MASK if self.secret else repr(given)
        return BadValue(f" = {shown}: not allowed; allowed: {self.allowed}")

    def shown(self, value: Any) -> Any:
        """`value` as it may be printed."""
        if self.secret:
            return [MASK] * len(value)
        return list(value) if self.is_list else value
