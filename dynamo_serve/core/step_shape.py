"""What a step runs, in the numbers that its time depends on, and what that time is a sum of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

Item = tuple[int, int, bool]
"""One sequence's share of a step: (number of tokens, position of the first, is it prefill). All but
the first token of a sequence that decodes are its draft."""

TILES = (16, 32)  # tokens after which matrix kernels may take one more tile: the time jumps
KNOTS = (0, 16, 32, 64, 128, 256, 512)  # tokens at which the curve may bend
WIDTHS = (*(b - a for a, b in pairwise(KNOTS)), 1 << 40)
PIECES = tuple(zip(KNOTS, WIDTHS, strict=True))
PAIRS, SEQUENCES, READS, JUMPS = 1, 2, 3, 4  # places among the features; 0 is the fixed time
CURVE = JUMPS + len(TILES)
NEAR_WIDTHS = (*WIDTHS[:-1], KNOTS[-1])


class StepShape(NamedTuple):
    """What a step runs, in the numbers that its time depends on.

    `prefill_context` counts pairs of a prompt token and one that it attends to; `prefill_reads`
    and `decode_context` count the tokens whose KV the chunks and the decoding sequences read.
    `draft_tokens` come on top of one token for each decoding sequence.
    """

    prefill_tokens: int = 0
    prefill_context: float = 0.0
    decode_sequences: int = 0
    decode_context: int = 0
    prefill_reads: int = 0
    draft_tokens: int = 0

    @classmethod
    def of(cls, works: Iterable[Item]) -> StepShape:
        prompt = sequences = context = reads = drafts = 0
        pairs = 0.0
        for count, position, is_prefill in works:
            if is_prefill:
                prompt += count
                pairs += count * (position + count / 2)
                reads += position + count
            else:
                sequences += 1
                context += position + count
                drafts += count - 1
        return cls(prompt, pairs, sequences, context, reads, drafts)

    @property
    def tokens(self) -> int:
        return self.prefill_tokens + self.decode_sequences + self.draft_tokens

    def with_chunk(self, count: int, position: int) -> StepShape:
        """This step and `count` tokens of one more prompt, which stands at `position`."""
        return self._replace(
            prefill_tokens=self.prefill_tokens + count,
            prefill_context=self.prefill_context + count * (position + count / 2),
            prefill_reads=self.prefill_reads + position + count,
        )

    def with_drafts(self, count: int) -> StepShape:
        """This step and `count` draft tokens more."""
        return self._replace(
            decode_context=self.decode_context + count, draft_tokens=self.draft_tokens + count
        )


def features_of(shape: StepShape, is_prefill: bool) -> list[float]:
    """What the seconds of a step are a sum of, each with its price."""
    tokens = shape.tokens
    # With one token for each the curve is one in sequences, and has no need of a price for them.
    apart = shape.decode_sequences if is_prefill or shape.draft_tokens else 0
    reads = shape.decode_context + shape.prefill_reads
    return [1.0, shape.prefill_context, apart, reads, *_jumps_and_curve(tokens)]


@lru_cache(maxsize=1 << 14)
def _jumps_and_curve(tokens: int) -> tuple[float, ...]:
    jumps = [tokens > tile for tile in TILES]
    return (*jumps, *(min(max(tokens - knot, 0), width) for knot, width in PIECES))
