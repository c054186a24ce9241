"""How a setting is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    pattern: str | None = None,
    secret: bool = False,
) -> Any:
    """A field with a default, a sentence for people, and what is allowed.

    `low` and `high` are inclusive bounds of a number; `pattern` is a regular expression that a
    text matches as a whole; a `secret` is masked wherever it would be shown.
    """
    rules = {"low": low, "high": high, "pattern": pattern, "secret": secret}
    return field(default=default, metadata={"help": help, **rules})
