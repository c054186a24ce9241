"""What an answer is made of: thoughts, content, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class CallPart(NamedTuple):
    """What is new of a call, by its number in the answer: its name when it begins, then its
    arguments piece by piece."""

    number: int
    name: str | None
    arguments: str


class Parts(NamedTuple):
    """What some tokens add to an answer that is told apart. `num_thought` of these tokens were
    spent on thinking. With the end of the answer: whether it is calls, and all of them whole."""

    content: str = ""
    thought: str = ""
    calls: tuple[CallPart, ...] = ()
    num_thought: int = 0
    is_calling: bool = False

    @property
    def is_telling(self) -> bool:
        """Whether a client gets to see any of it."""
        return bool(self.content or self.thought or self.calls)


def joined(parts: Iterable[Parts]) -> Parts:
    """Several as one, with at most one `CallPart` of each call."""
    items = list(parts)
    return Parts(
        "".join(item.content for item in items),
        "".join(item.thought for item in items),
        merged(call for item in items for call in item.calls),
        sum(item.num_thought for item in items),
        any(item.is_calling for item in items),
    )


def merged(calls: Iterable[CallPart]) -> tuple[CallPart, ...]:
    """The same with one part of each call, in the order in which they began."""
    names: dict[int, str | None] = {}
    pieces: dict[int, list[str]] = {}
    for call in calls:
        names[call.number] = call.name or names.get(call.number)
        pieces.setdefault(call.number, []).append(call.arguments)
    return tuple(CallPart(number, names[number], "".join(pieces[number])) for number in pieces)
