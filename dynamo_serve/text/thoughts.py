"""Tells the thoughts at the beginning of an answer from what follows them."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Tags(NamedTuple):
    """What a family of models writes around its thoughts."""

    opening: str
    closing: str


class _State(Enum):
    START = "nothing but space so far"
    OPENED = "thinking; an opening tag would be one too many"
    THINKING = "thinking"
    GAP = "the space after the thoughts"
    ENDED = "the rest"


class Thoughts:
    """Splits a text that arrives in pieces; space next to a tag belongs to neither side.

    `is_open`: the prompt ends with the opening tag. Only the first thoughts count: a tag in the
    middle of the answer is text. The split does not depend on how the text is cut into pieces.
    """

    def __init__(self, tags: Tags, is_open: bool) -> None:
        self._tags = tags
        self._state = _State.OPENED if is_open else _State.START
        self._held = ""
        self._has_text = False  # there is something of the thoughts but space

    @property
    def is_thinking(self) -> bool:
        return self._state in (_State.OPENED, _State.THINKING)

    def push(self, text: str) -> tuple[str, str]:
        """What is certain now: of the thoughts, and of the rest."""
        text, self._held = self._held + text, ""
        if self._state in (_State.START, _State.OPENED):
            text = self._begin(text)
        thought = ""
        if self._state is _State.THINKING:
            thought, text = self._think(text)
        if self._state is _State.GAP:
            text = text.lstrip()
            self._state = _State.ENDED if text else _State.GAP
        if self._state in (_State.GAP, _State.ENDED):
            return thought, text
        return thought, ""

    def flush(self) -> tuple[str, str]:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return (held, "") if self.is_thinking else ("", held)

    def _begin(self, text: str) -> str:
        """What follows the opening tag, or all there is if none comes."""
        opening, bare = self._tags.opening, text.lstrip()
        if bare.startswith(opening):
            self._state = _State.THINKING
            return bare[len(opening) :]
        if opening.startswith(bare):
            self._held = text
            return ""
        self._state = _State.THINKING if self._state is _State.OPENED else _State.ENDED
        return text

    def _think(self, text: str) -> tuple[str, str]:
        """The certain part of the thoughts, and what comes after them."""
        if not self._has_text:
            text = text.lstrip()
            self._has_text = bool(text)
        thought, closing, rest = text.partition(self._tags.closing)
        if closing:
            self._state = _State.GAP
            return thought.rstrip(), rest
        cut = possible_start(text, (self._tags.closing,))
        kept = text[:cut].rstrip()
        self._held = text[len(kept) :]
        return kept, ""


def possible_start(text: str, marks: tuple[str, ...]) -> int:
    """Where the end of `text` may be the beginning of one of `marks`; its length if nowhere."""
    longest = max(map(len, marks), default=0)
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[at:]) for mark in marks):
            return at
    return len(text)
