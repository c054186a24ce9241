"""Where the latest tokens of a sequence stood before, and what came after them there.

The tokens are indexed by pairs in hash chains, as deflate does (RFC 1951, section 4): a table of
the latest place of each hash, and for each place a link to the one before it. That is eight to
twelve bytes a token, and a few operations. As a source of drafts: A. Saxena, "Prompt Lookup
Decoding", 2023.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

SHORTEST = 2  # tokens that must be equal
SLIP = 1
LONGEST = 8  # equal tokens beyond which a match is no better
MOST_PLACES = 8  # looked at in one search, the latest first
LEAST_HEADS, MOST_HEADS = 1 << 8, 1 << 15
NOWHERE = -1
MOST_FOLLOWED = 32  # new tokens compared with what was foreseen; of more, only the last are

OWN_GAIN = 0.15  # of what one token tells about its sequence
COMMON_GAIN = 0.01  # the same about its tenant
# How often the next token is right after so many equal ones, before the first was seen.
FIRST_GUESS = (0.0, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8)


class Lookup:
    """Follows one sequence, whose tokens are only ever appended to.

    The last `matched` tokens (at most `LONGEST` count) are equal to those that end at place
    `source`; 0 means that there is no such place. Texts go on as before where a word has been
    replaced: a token that was not the expected one counts as equal (then `matched` is `SLIP`) if
    those before it were and nothing better is found.
    """

    __slots__ = ("_heads", "_links", "_mask", "matched", "source")

    def __init__(self, num_tokens: int) -> None:
        """`num_tokens` is how long the sequence may become."""
        size = LEAST_HEADS
        while size < min(num_tokens, MOST_HEADS):
            size *= 2
        self._mask = size - 1
        self._heads = array("i", [NOWHERE]) * size
        self._links = array("i")
        self.matched = 0
        self.source = NOWHERE

    @property
    def num_seen(self) -> int:
        return len(self._links)

    def read(self, tokens: Sequence[int], end: int) -> None:
        """Index the tokens before place `end`; what matches is not looked for."""
        heads, links, mask = self._heads, self._links, self._mask
        start = len(links)
        previous = tokens[start - 1] if start else NOWHERE
        for place in range(start, end):
            token = tokens[place]
            slot = (previous * 40503 ^ token * 2654435761) >> 4 & mask
            links.append(heads[slot])
            heads[slot] = place
            previous = token
        self.matched = 0

    def follow(self, tokens: Sequence[int]) -> list[tuple[int, bool]]:
        """Take in the new tokens. Of each for which there was something to expect: how many tokens
        before it had matched, and whether it was the expected one."""
        outcomes: list[tuple[int, bool]] = []
        for place in range(len(self._links), len(tokens)):
            matched = self.matched
            self.read(tokens, place + 1)
            if matched:
                is_right = tokens[self.source + 1] == tokens[place]
                outcomes.append((matched, is_right))
                self.source += 1
                if is_right:
                    self.matched = min(matched + 1, LONGEST)
                    continue
            if not self._search(tokens, place) and matched > SLIP:
                self.matched = SLIP
        return outcomes

    def draft(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """What will come next if it goes on as at `source`; a loop goes round."""
        assert self.matched, "nothing to go by"
        draft: list[int] = []
        length = len(tokens)
        for place in range(self.source + 1, self.source + 1 + count):
            draft.append(tokens[place] if place < length else draft[place - length])
        return tuple(draft)

    def _search(self, tokens: Sequence[int], place: int) -> bool:
        """Find the latest of the longest matches for the tokens that end at `place`."""
        links, best = self._links, SHORTEST - 1
        other = links[place]
        for _ in range(MOST_PLACES):
            if other < SHORTEST - 1:
                break
            length, most = 0, min(LONGEST, other + 1)
            while length < most and tokens[other - length] == tokens[place - length]:
                length += 1
            if length > best:
                best, self.source = length, other
                if length == LONGEST:
                    break
            other = links[other]
        self.matched = best if best >= SHORTEST else 0
        return best >= SHORTEST


class Drafter:
    """Guesses how one sequence goes on, and how likely the guess is right.

    `common` is what the sequences of its tenant have shown together: how often the next token was
    right after so many equal ones. All of them write to it.
    """

    __slots__ = ("_common", "_rates", "lookup")

    def __init__(self, num_tokens: int, common: list[float]) -> None:
        self.lookup = Lookup(num_tokens)
        self._common = common
        self._rates = list(common)

    def catch_up(self, tokens: Sequence[int], prompt_len: int, budget: int) -> int:
        """Take in what is new, but no more than `budget` tokens at once; how many those were.

        Whether guesses were right is learned of the output, drafted or not: that costs nothing.
        """
        lookup = self.lookup
        start = lookup.num_seen
        unwatched = max(prompt_len, len(tokens) - MOST_FOLLOWED)
        if start < unwatched:
            lookup.read(tokens, min(unwatched, start + budget))
        if lookup.num_seen >= unwatched:
            for matched, is_right in lookup.follow(tokens):
                for rates, gain in ((self._rates, OWN_GAIN), (self._common, COMMON_GAIN)):
                    rates[matched] += gain * (is_right - rates[matched])
        return lookup.num_seen - start

    def chances(self, tokens: Sequence[int], count: int) -> list[float]:
        """The chance that the first token of a draft is right, that the first two are, …"""
        lookup = self.lookup
        if not lookup.matched or lookup.num_seen < len(tokens):
            return []
        chances, chance = [], 1.0
        for i in range(count):
            chance *= self._rates[min(lookup.matched + i, LONGEST)]
            chances.append(chance)
        return chances
