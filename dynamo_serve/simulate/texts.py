"""Token ids that have the prefix structure of a trace, and say nothing.

A page's number stands for everything up to its end, so pages of equal numbers get equal tokens and
no others do. What is in no page of a trace (ends of prompts and answers) is a request's own.
"""

from __future__ import annotations

from dynamo_serve.trace import Arrival

OWN = 1 << 31  # token ids from here on are one request's own; the largest is below 2**32
ANSWERS = 3 << 30
STOP = (1 << 32) - 1
OWN_APART = 64  # between the first own token of one request and that of the next

Runs = tuple[tuple[int, int], ...]


def tokens_of(runs: Runs, page_size: int) -> list[int]:
    return [
        token
        for first, count in runs
        for token in range(first * page_size, (first + count) * page_size)
    ]


class Text:
    """A prompt, and the answer that follows it; together they fill the pages that both are in."""

    def __init__(self, number: int, asked: Arrival, page_size: int) -> None:
        ids = tokens_of(asked.pages, page_size)
        missing = asked.prompt_tokens - len(ids)
        after_ids = tokens_of(asked.output_pages, page_size)
        own = OWN + OWN_APART * number % (ANSWERS - OWN - missing)
        ids += after_ids[:missing] or range(own, own + missing)
        ids += range(own, own + asked.prompt_tokens - len(ids))
        self.prompt_ids = tuple(ids)
        self._answer = after_ids[missing:]
        self._own = ANSWERS + number % (STOP - ANSWERS)

    def token(self, place: int) -> int:
        """The token at a place of the answer."""
        return self._answer[place] if place < len(self._answer) else self._own
