"""Drafts: guessed tokens that a step verifies beside the newest one, where that saves time.

The engine picks every token by its own logits and its own random number, drafted or not, and a
draft only says how many picks of one step count. So answers are the same with drafts and without.

A draft is worth the steps it will save: the chance that its tokens are right, times what a token
costs now. It costs what it makes the step longer (`step_cost`); see Y. Leviathan, M. Kalman,
Y. Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, section 3. Both
are estimates, so accounts are kept of what steps with drafts really took and brought, and losses
are bounded whatever was estimated.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import NamedTuple

from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.lookup import FIRST_GUESS, Drafter
from dynamo_serve.core.pace import Pace
from dynamo_serve.core.preemption import keeps_within, shape_of
from dynamo_serve.core.sequence import Sequence

Drafts = dict[str, tuple[int, ...]]

LEAST_RETURN = 1.25  # seconds saved for each second that a draft costs
LOSS_PART = 0.02  # of all steps' time may be lost to drafts that do not pay
MOST_CREDIT = 4.0  # steps' time that may be lost at once: at first, after gains, or after a pause
PLAIN_EVERY = 50  # steps one goes without drafts, to know what they are compared with
# Times the predicted duration: what is beyond it is the machine's doing, not the drafts'.
MOST_SURPRISE, FIRST_SURPRISE = 2.0, 4.0
MOST_IN_STEP = 64  # draft tokens
COUNTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, MOST_IN_STEP)  # to choose from
READ_IN_STEP = 1024  # tokens of prompts indexed between two steps: about a millisecond


class Trial(NamedTuple):
    """A step with drafts: what it is predicted to take with them and without, and what a token of
    output costs without; in seconds."""

    predicted: float
    alone: float
    value: float


class Speculation:
    """Decides which of the decoding sequences get a draft, and how long."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.life = pace.life
        self.rates: dict[str, list[float]] = {}  # by tenant
        self.credit = MOST_CREDIT  # steps' time that may be lost
        self._trial: Trial | None = None
        self._num_trials = 0  # since the last plain step

    def drafts(self, decoding: list[Sequence], now: float) -> Drafts:
        """A draft for each of `decoding` (which have room for their newest token) that is worth
        one. Their pages cover it when this returns."""
        self._trial = None
        if not self.pace.limits.max_draft_tokens or not decoding:
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
        )[: min(MOST_IN_STEP, self.pace.cost.draft_reach)]
        if not likely or not self._may_try():
            return {}
        count = self._best_count(decoding, [chance for chance, _ in likely], now)
        lengths = Counter(-i for _, i in likely[:count])
        found = (self._draft(decoding[i], length, now) for i, length in lengths.items())
        drafts = {seq_id: draft for seq_id, draft in found if draft}
        if not drafts:
            self._trial = None
        return drafts

    def _may_try(self) -> bool:
        cost = self.pace.cost
        return self.credit > 0 and cost.knows_decoding and self._num_trials < PLAIN_EVERY

    def settle(self, seconds: float, accepted: int) -> None:
        """The step has taken so long, and so many tokens of its drafts were right."""
        self.credit += LOSS_PART
        if self._trial is None:
            self._num_trials = 0
        else:
            self._num_trials += 1
            predicted, alone, value = self._trial
            surprise = MOST_SURPRISE if self.pace.cost.knows_drafts else FIRST_SURPRISE
            seconds = min(seconds, surprise * predicted)
            self.credit += (value * accepted - (seconds - alone)) / alone
        self.credit = min(self.credit, MOST_CREDIT)

    def _catch_up(self, decoding: list[Sequence]) -> None:
        budget = READ_IN_STEP
        for seq in decoding:
            if seq.request.sampling.needs_history or budget <= 0:
                continue
            if seq.drafter is None:
                common = self.rates.setdefault(seq.request.tenant, list(FIRST_GUESS))
                seq.drafter = Drafter(seq.prompt_len + seq.max_tokens, common)
            budget -= seq.drafter.catch_up(seq.tokens, seq.prompt_len, budget)

    def _most(self, seq: Sequence) -> int:
        """The longest draft that makes sense: one token is picked after it, and all of a work's
        picks have the same banned ids."""
        request, num_outputs = seq.request, seq.num_outputs
        most = min(self.pace.limits.max_draft_tokens, seq.max_tokens - num_outputs - 1)
        if num_outputs < request.min_tokens:
            most = min(most, request.min_tokens - num_outputs - 1)
        return most

    def _best_count(self, decoding: list[Sequence], chances: list[float], now: float) -> int:
        """How many draft tokens, the likeliest first, gain most in a step; 0 if none do."""
        cost, base = self.pace.cost, shape_of(decoding)
        alone = cost.predict(base)
        value = alone / len(decoding)
        allowed = self.pace.time_for_drafts(decoding, now)
        gains = list(accumulate(chances))
        best, best_gain = 0, 0.0
        for count in (*(c for c in COUNTS if c < len(gains)), len(gains)):
            seconds = cost.predict(base.with_drafts(count))
            gain = value * gains[count - 1] - LEAST_RETURN * (seconds - alone)
            if gain > best_gain and seconds <= allowed:
                best, best_gain = count, gain
                self._trial = Trial(seconds, alone, value)
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
        return burst is None or keeps_within(self.life, burst, own, missing)
