"""Drafts: guessed tokens that a step verifies beside the newest one, where that saves time.

The engine picks every token by its own logits and its own random number, drafted or not, and a
draft only says how many picks of one step count. So answers are the same with drafts and without.

A draft is worth the steps it will save: the chance that its tokens are right, times what a token
costs now. It costs what it makes the step longer (`step_cost`). Y. Leviathan, M. Kalman, Y. Matias,
"Fast Inference from Transformers via Speculative Decoding", ICML 2023, section 3.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.lookup import FIRST_GUESS, Drafter
from dynamo_serve.core.pace import Pace
from dynamo_serve.core.preemption import shape_of
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import StepShape

Drafts = dict[str, tuple[int, ...]]

LEAST_RETURN = 1.25  # seconds saved for each second that a draft costs; both are estimates
MOST_IN_STEP = 64  # draft tokens
COUNTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, MOST_IN_STEP)  # to choose from
READ_IN_STEP = 1024  # tokens of prompts indexed between two steps: about a millisecond


class Speculation:
    """Decides which of the decoding sequences get a draft, and how long."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.life = pace.life
        self.rates: dict[str, list[float]] = {}  # by tenant

    def drafts(self, decoding: list[Sequence], now: float) -> Drafts:
        """A draft for each of `decoding` (which have room for their newest token) that is worth
        one. Their pages cover it when this returns."""
        if not self.pace.limits.max_draft_tokens or not decoding:
            return {}
        base = shape_of(decoding)
        best_case = [1.0] * min(MOST_IN_STEP, len(decoding) * self.pace.limits.max_draft_tokens)
        if not self._best_count(base, best_case, now, decoding):
            return {}
        self._catch_up(decoding)
        likely = sorted(
            (
                (chance, -i)
                for i, seq in enumerate(decoding)
                if seq.drafter is not None
                for chance in seq.drafter.chances(seq.tokens, self._most(seq))
            ),
            reverse=True,
        )[:MOST_IN_STEP]
        count = self._best_count(base, [chance for chance, _ in likely], now, decoding)
        lengths = Counter(-i for _, i in likely[:count])
        drafts = (self._draft(decoding[i], length, now) for i, length in lengths.items())
        return {seq_id: draft for seq_id, draft in drafts if draft}

    def _catch_up(self, decoding: list[Sequence]) -> None:
        budget = READ_IN_STEP
        for seq in decoding:
            if seq.request.sampling.needs_history or budget <= 0:
                continue
            if seq.drafter is None:
                common = self.rates.setdefault(seq.request.tenant, list(FIRST_GUESS))
                seq.drafter = Drafter(seq.prompt_len + seq.request.max_tokens, common)
            budget -= seq.drafter.catch_up(seq.tokens, seq.prompt_len, budget)

    def _most(self, seq: Sequence) -> int:
        """The longest draft that makes sense: one token is picked after it, and all of a work's
        picks have the same banned ids."""
        request, num_outputs = seq.request, seq.num_outputs
        most = min(self.pace.limits.max_draft_tokens, request.max_tokens - num_outputs - 1)
        if num_outputs < request.min_tokens:
            most = min(most, request.min_tokens - num_outputs - 1)
        return most

    def _best_count(
        self, base: StepShape, chances: list[float], now: float, decoding: list[Sequence]
    ) -> int:
        """How many draft tokens, the likeliest first, gain most in a step; 0 if none do."""
        cost = self.pace.cost
        alone = cost.predict(base)
        value = alone / len(decoding)
        allowed = self.pace.time_for_drafts(decoding, now)
        gains = list(accumulate(chances))
        best, best_gain = 0, 0.0
        for count in (*(c for c in COUNTS if c < len(gains)), len(gains)):
            if not count:
                break
            seconds = cost.predict(base.with_drafts(count))
            gain = value * gains[count - 1] - LEAST_RETURN * (seconds - alone)
            if gain > best_gain and seconds <= allowed:
                best, best_gain = count, gain
        return best

    def _draft(self, seq: Sequence, count: int, now: float) -> tuple[str, tuple[int, ...]]:
        """Up to `count` tokens, as far as there are pages, and none that would end the sequence:
        nothing comes after those."""
        assert seq.drafter is not None
        draft = seq.drafter.lookup.draft(seq.tokens, count)
        stops = seq.request.stop_ids
        end = next((i for i, token in enumerate(draft) if token in stops), count)
        end = min(end, self._room(seq, end, now))
        if end and not seq.draft_tokens:
            matched = seq.drafter.lookup.matched
            self.life.note(seq, now, Kind.DRAFT, Reason.PAYS.value, tokens=end, matched=matched)
        return seq.id, draft[:end]

    def _room(self, seq: Sequence, count: int, now: float) -> int:
        """Tokens beyond the newest that its pages cover. More pages are taken for up to `count`
        only if enough are left for everybody's next token: nobody is to go for a draft."""
        pool = self.life.pool
        missing = pool.pages_for(seq.num_tokens + count) - len(seq.page_table)
        if missing > 0:
            left = pool.num_free + pool.num_cached - missing
            if left >= len(self.life.running) and self._within_burst(seq, missing):
                self.life.grow(seq, now, count)
        return len(seq.page_table) * pool.page_size - seq.num_tokens

    def _within_burst(self, seq: Sequence, missing: int) -> bool:
        name = seq.request.tenant
        burst = self.life.shares.account(name).tenant.quota.pages_burst
        own = [other for other in self.life.running.values() if other.request.tenant == name]
        return burst is None or self.life.keeps_within(burst, own, missing)
