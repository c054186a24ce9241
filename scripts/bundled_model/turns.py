"""The types that all generators share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Turns = list[Message]


@dataclass(frozen=True)
class Example:
    """One training document: either a conversation or plain text, of which some may be given."""

    turns: Turns = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    given: str = ""


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def ask(question: str, answer: str) -> Turns:
    return [user(question), assistant(answer)]
