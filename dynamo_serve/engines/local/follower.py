"""One sequence in its grammar."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from llguidance import LLMatcher

from dynamo_serve.core.batch import Work
from dynamo_serve.grammars import in_short

logger = logging.getLogger(__name__)

# Seconds of a core for the masks of a sequence, or to go on by a token, after which nobody else
# waits behind it: a thread with a low priority works for it, and not the engine's.
SLOW = 0.001
# Handing work to a thread and waiting for it costs the step a third of a millisecond: masks that
# take less than so much, each and together, are made at once.
CHEAP, MOST_CHEAP = 60e-6, 300e-6

Key = tuple[int, tuple[int, ...], frozenset[int]]
"""What masks depend on: tokens seen, a draft, banned ids."""


class Masks(NamedTuple):
    """The tokens that may follow, a bit for each: behind the settled tokens, and behind each token
    of a draft as far as the grammar allows it; or that nothing can follow, or why nobody knows."""

    rows: tuple[bytes, ...] = ()
    is_over: bool = False
    error: str = ""


class Taken(NamedTuple):
    """How many of the picked tokens there is room for; whether nothing can follow them."""

    num_tokens: int
    is_over: bool = False
    error: str = ""


class Follower:
    """One sequence in its grammar. Its matcher belongs to whoever makes masks for `asked` until
    they are `made`, and then to the engine's thread again."""

    def __init__(self, start: Future[LLMatcher]) -> None:
        """`start` is where its grammar begins; it may still be being compiled."""
        self.start = start
        self.length = 0  # tokens of the sequence that were seen
        self.wanted: Key | None = None  # in this step
        self.asked: Key | None = None
        self.made: Masks | None = None
        self.is_over = False  # nothing can follow
        self.seconds = CHEAP  # that the last ones took
        self._matcher: LLMatcher | None = None
        self._unread: list[int] = []  # output that the matcher has not seen

    def see(self, work: Work) -> None:
        """Take in what is settled of `work`, once, however often it is run."""
        draft_at = len(work.token_ids) - work.draft_len
        if self.length != work.position + draft_at:  # else its step has brought nothing
            if work.cached_ids:
                assert self.length == 0, f"{work.seq_id}: cached tokens in the middle"
                self._unread += work.cached_ids[work.prompt_len :]
                self.length = len(work.cached_ids)
            assert self.length == work.position, f"{work.seq_id}: tokens seen out of order"
            self._unread += work.token_ids[max(0, work.prompt_len - work.position) : draft_at]
            self.length += draft_at
        self.wanted = self.length, work.token_ids[draft_at:], work.banned_ids

    def make(self) -> None:
        """Masks for what was asked."""
        began = time.thread_time()
        try:
            made = self._masks()
        except Exception as error:  # nobody would ask a thread what has become of it
            logger.exception("a grammar could not be followed")
            made = Masks(error=f"the grammar cannot be followed: {error}")
        self.seconds = time.thread_time() - began
        self.made = made

    def _masks(self) -> Masks:
        assert self.asked is not None
        _, draft, banned = self.asked
        if self._matcher is None:
            if error := self.start.exception():
                return Masks(error=f"the grammar cannot be compiled: {error}")
            self._matcher = self.start.result().deep_copy()
        matcher, unread, self._unread = self._matcher, self._unread, []
        if unread and not matcher.consume_tokens(unread):
            return Masks(error=f"the grammar cannot be followed: {in_short(matcher.get_error())}")
        if matcher.is_stopped() and not matcher.is_error():
            return Masks(is_over=True)
        rows = [_without(matcher.compute_bitmask(), banned)]
        num_drafted = 0
        for token in draft:
            if matcher.is_stopped() or matcher.try_consume_tokens([token]) != 1:
                break
            num_drafted += 1
            rows.append(_without(matcher.compute_bitmask(), banned))
        if num_drafted:
            matcher.rollback(num_drafted)
        if matcher.is_error():
            return Masks(error=f"the grammar is too complex: {in_short(matcher.get_error())}")
        if not all(map(_has_any, rows)):
            return Masks(error="no token of the model can follow where its grammar has got to")
        return Masks(tuple(rows))

    def take(self, tokens: Sequence[int]) -> Taken:
        """Go on by what was picked. Whether a slow one is over then, the next masks will tell."""
        matcher = self._matcher
        assert matcher is not None and not self._unread
        if self.is_slow:
            self._unread += tokens[:1]
            self.length += 1
            return Taken(1)
        began = time.thread_time()
        for count, token in enumerate(tokens, start=1):
            if not matcher.consume_token(token):
                return Taken(count, error=f"the grammar is lost: {in_short(matcher.get_error())}")
            self.length += 1
            if matcher.is_stopped():
                self.is_over = True
                return Taken(count, is_over=True)
        self.seconds = max(self.seconds, time.thread_time() - began)
        return Taken(len(tokens))

    @property
    def is_slow(self) -> bool:
        return self.seconds > SLOW

    @property
    def is_cheap(self) -> bool:
        return self.seconds < CHEAP

    @property
    def wants(self) -> bool:
        """Whether masks are to be made, and can be: a thread that still makes those of another
        draft has to end first."""
        is_idle = self.asked is None or self.made is not None
        return is_idle and self.asked != self.wanted and self.start.done()

    @property
    def is_ready(self) -> bool:
        return self.asked == self.wanted and self.made is not None


def _without(mask: bytes, banned: frozenset[int]) -> bytes:
    """`mask` without these tokens, but where that would leave none."""
    if not banned:
        return mask
    less = bytearray(mask)
    for token in banned:
        less[token >> 3] &= ~(1 << (token & 7))
    return bytes(less) if _has_any(less) else mask


def _has_any(mask: bytes | bytearray) -> bool:
    return mask.count(0) < len(mask)
