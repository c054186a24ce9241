"""How much fits into the time that was promised: chunks, places in the batch, and prices."""

from __future__ import annotations

from bisect import bisect_right
from math import inf
from typing import NamedTuple

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.ladder import Restraint
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.preemption import shape_of
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.step_cost import StepCost, StepShape
from dynamo_serve.core.tenant import Class

MIN_CHUNK = 16  # prompt tokens that a step runs whatever was promised: prefill must not stand still
PRICED_CHUNK = 512  # prompt tokens of the step by which one more token is priced


class Budget(NamedTuple):
    """Prompt tokens that a step may run, what set that limit, and the seconds it may take."""

    tokens: int
    limit: Reason
    seconds: float


Chunk = tuple[Sequence, int]
"""A prompt, and how many of its tokens."""


class Prompts(NamedTuple):
    """The prompts of a step. `ahead`: others wait for them; `alone`: so does what is decoding."""

    chunks: list[Chunk]
    ahead: bool = False
    alone: bool = False


class Pace:
    """Turns targets in seconds into numbers of tokens and sequences, by the learned step times."""

    def __init__(
        self, life: Lifecycle, limits: Limits, cost: StepCost, restraint: Restraint
    ) -> None:
        self.life = life
        self.limits = limits
        self.cost = cost
        self.restraint = restraint
        self._is_late = False

    # ── prompt tokens ────────────────────────────────────────────────────────

    def budget(self, decoding: list[Sequence], base: StepShape, now: float) -> Budget:
        """What this step may spend on prompts. `base` is what else it runs. Without mixed steps
        the next decode step has to fit into the same time."""
        cap = self._cap(base, bool(decoding))
        others = base if self.limits.mix_phases else shape_of(decoding)
        needed = self.cost.predict(others)
        usual = self._usual_seconds(needed, bool(decoding))
        promised = self._promised_seconds(decoding, needed, now)
        seconds = min(usual, promised)
        is_shrunk = bool(decoding) and self.restraint.chunk_part < 1.0
        limit = Reason.SHRINK_CHUNKS if is_shrunk else Reason.TOKEN_CAP
        if seconds == inf:
            return Budget(cap, limit, inf)
        if not self.limits.mix_phases:
            seconds -= needed
        chunk = self._fitting(base, self._deepest(), seconds, cap)
        if chunk < cap and promised < usual:
            limit = Reason.ITL_TARGET
        elif chunk < cap and not is_shrunk:
            limit = Reason.STEP_TIME
        return Budget(chunk, limit, seconds)

    def _promised_seconds(self, decoding: list[Sequence], needed: float, now: float) -> float:
        """What a step may take for the targets of those that decode and of newcomers. `needed`:
        what decoding takes alone."""
        if not self.limits.fit_chunks:
            return inf
        newcomers = self._for_newcomers(now)
        left = min(policy.time_left(decoding, now), newcomers)
        if left == inf:
            return inf
        tightest = policy.tightest_itl(decoding)
        self._tell_if_late(needed > tightest, needed, left, now)
        return max(left, policy.LEEWAY * needed) if needed > min(tightest, newcomers) else left

    def _usual_seconds(self, needed: float, is_decoding: bool) -> float:
        """What a step may take where nobody was promised anything."""
        most = max(self.limits.max_step_seconds, policy.STRETCH * needed)
        part = self.restraint.chunk_part if is_decoding else 1.0
        return needed + part * (most - needed) if part < 1.0 else most

    def _cap(self, base: StepShape, is_decoding: bool) -> int:
        """Prompt tokens in a step beside `base`, whatever was promised. `is_decoding`: there are
        sequences that wait for such a step, or are in it."""
        cap = self.limits.max_prefill_tokens
        if base.decode_sequences and self.limits.mix_phases:
            cap = min(cap, self.limits.max_mixed_tokens)
        return self.restraint.chunk_cap(cap) if is_decoding else cap

    def _for_newcomers(self, now: float) -> float:
        """Seconds a step may take so that whoever comes while it runs can still get a first token
        in time: tenants that have been here lately are expected to come again."""
        tenancy = self.life.shares.tenancy
        allowed = inf
        for name, account in self.life.shares.accounts.items():
            promise = tenancy.class_of(name)
            if promise.ttft == inf or now - account.last_arrival >= policy.LATELY:
                continue
            if policy.NEWCOMER_PART * promise.ttft < allowed:
                allowed = min(allowed, self._for_newcomer(account, promise))
        return allowed

    def _for_newcomer(self, account: Account, promise: Class) -> float:
        """Half of the TTFT target; more, if a step can be held for a prompt like the tenant's usual
        one, and as long as nobody's next token comes late for that."""
        half = policy.NEWCOMER_PART * promise.ttft
        running = list(self.life.running.values())
        if not self.limits.hold_steps or not self._has_room_for(account, running):
            return half
        alone = self.cost.predict(StepShape().with_chunk(int(account.usual_prompt), 0))
        if alone > half:
            return half
        own = policy.SAFETY * promise.itl - self.cost.predict(shape_of(running))
        others = policy.SAFETY * policy.tightest_itl(running) - alone
        return max(half, min(promise.ttft, own, others))

    def _has_room_for(self, account: Account, running: list[Sequence]) -> bool:
        """Whether the tenant's next request could run at once, ahead of those that run."""
        pool, most = self.life.pool, account.tenant.quota.live_sequences
        pages = pool.pages_for(int(account.usual_prompt) + 1)
        return (
            len(running) < self.limits.max_decode_sequences
            and pool.num_free + pool.num_cached >= pages + len(running)
            and (most is None or account.live < most)
            and policy.has_right_of_way(account, running, self.life.shares.accounts)
        )

    def _fitting(self, base: StepShape, position: int, seconds: float, cap: int) -> int:
        """The largest chunk that fits a time, but never so small that prefill stands still."""
        return max(self.cost.largest_chunk(base, position, seconds, cap), min(MIN_CHUNK, cap))

    def time_for_drafts(self, decoding: list[Sequence], now: float) -> float:
        """Seconds that a decode step may take with drafts: they break no promise."""
        if not self.limits.fit_chunks:
            return inf
        left = min(policy.time_left(decoding, now), self._for_newcomers(now))
        return policy.DECODE_PART * left

    def refit(self, chunks: list[Chunk], base: StepShape, seconds: float) -> list[Chunk]:
        """Several prompts cost more than one of as many tokens: the long one gives way."""
        fitted = []
        for seq, part in sorted(chunks, key=lambda chunk: chunk[1] < chunk[0].num_pending):
            count = part
            if part < seq.num_pending:
                count = self._fitting(base, seq.num_computed, seconds, part)
            base = base.with_chunk(count, seq.num_computed)
            fitted.append((seq, count))
        return fitted

    def ahead(
        self,
        chosen: list[Sequence],
        chunks: list[Chunk],
        decoding: list[Sequence],
        now: float,
    ) -> Prompts:
        """The prompts of `chosen` that go ahead, for their TTFT targets: in the step with these
        `chunks` their first tokens would come late, or nearly. Other prompts wait for the next
        step, and so does what is decoding where that is not enough and breaks no ITL target.
        Empty if there are none."""
        base = shape_of(decoding) if self.limits.mix_phases else StepShape()
        beside = self._seconds(base, chunks)
        parts = {seq.id: part for seq, part in chunks}
        pressed: list[Sequence] = []
        others = list(decoding)
        for seq in chosen:
            steps = -(-seq.num_pending // parts[seq.id]) if parts.get(seq.id) else 2
            end = now + beside * steps
            (pressed if policy.is_pressed(seq, end) else others).append(seq)
        accounts = self.life.shares.accounts
        pressed = [seq for seq in pressed if policy.may_go_ahead(seq, others, accounts)]
        if not pressed:
            return Prompts([])
        without = [(seq, seq.num_pending) for seq in pressed]
        end = now + self._seconds(base, without)
        fits = end < now + beside and sum(seq.num_pending for seq in pressed) <= self._cap(
            base, bool(decoding)
        )
        if fits and not any(policy.is_pressed(seq, end) for seq in pressed):
            return Prompts(without, ahead=True)
        left = policy.time_left(decoding, now) - self.cost.predict(shape_of(decoding))
        left = min(left, policy.OWN_STEP_PART * beside)
        return Prompts(self.alone(pressed, left, now), ahead=True, alone=True)

    def alone(self, pressed: list[Sequence], left: float, now: float) -> list[Chunk]:
        """Those of `pressed` that run whole in a step of their own of at most `left` seconds: it
        brings their first tokens in time."""
        own: list[Chunk] = []
        for seq in pressed:
            more, until = [*own, (seq, seq.num_pending)], min(left, seq.due - now)
            fits = sum(part for _, part in more) <= self.limits.max_prefill_tokens
            if fits and self._seconds(StepShape(), more) <= until:
                own, left = more, until
        return own

    def _seconds(self, base: StepShape, chunks: list[Chunk]) -> float:
        for seq, count in chunks:
            base = base.with_chunk(count, seq.num_computed)
        return self.cost.predict(base)

    def usual_chunk(self, base: StepShape, itl: float) -> int:
        """Prompt tokens that fit a step beside `base`, whose tightest target is `itl`."""
        is_decoding = bool(base.decode_sequences)
        cap, needed = self._cap(base, is_decoding), self.cost.predict(base)
        left = self._usual_seconds(needed, is_decoding)
        if itl < inf and is_decoding and self.limits.fit_chunks:
            left = min(left, policy.SAFETY * itl if needed <= itl else policy.LEEWAY * needed)
        if left == inf:
            return cap
        if not self.limits.mix_phases:
            base, left = StepShape(), left - needed
        return max(min(MIN_CHUNK, cap), self.cost.largest_chunk(base, 0, left, cap))

    def _deepest(self) -> int:
        """The position of the prompt that has got furthest: attention makes it the dearest."""
        running = self.life.running.values()
        return max((seq.num_computed for seq in running if seq.phase is Phase.PREFILL), default=0)

    def _tell_if_late(self, is_late: bool, needed: float, left: float, now: float) -> None:
        """Note when decoding alone is too slow for what was promised, and when that is over."""
        if is_late and not self._is_late:
            self.life.journal.note(
                now, Kind.DEGRADE, Reason.ITL_TARGET.value, predicted_s=needed, allowed_s=left
            )
        self._is_late = is_late

    # ── places ───────────────────────────────────────────────────────────────

    def has_place(self, seq: Sequence) -> bool:
        """Whether the batch has a place left, also in the time that ITL targets leave."""
        running = self.life.running
        if len(running) >= self.limits.max_decode_sequences:
            return False
        return not running or self._in_time([*running.values(), seq])

    def _in_time(self, seqs: list[Sequence]) -> bool:
        """Whether these can decode together within the tightest ITL target of a strict class."""
        itl = policy.strict_itl(seqs) if self.limits.fit_chunks else inf
        return itl == inf or self.cost.predict(shape_of(seqs)) <= self._allowed(itl)

    def _allowed(self, itl: float) -> float:
        """Seconds a decode step may take under an ITL target. Where one sequence alone takes
        longer than the target, serving them one by one would help nobody."""
        alone = self.cost.predict(StepShape(decode_sequences=1, decode_context=1))
        return max(policy.DECODE_PART * itl, policy.LEEWAY * alone)

    def places(self, running: list[Sequence], seq: Sequence) -> int:
        """How many sequences like these may run together."""
        cap = self.limits.max_decode_sequences
        itl = policy.strict_itl([*running, seq]) if self.limits.fit_chunks else inf
        if itl == inf:
            return cap
        context = sum(s.num_tokens for s in [*running, seq]) // (len(running) + 1)

        def seconds(count: int) -> float:
            return self.cost.predict(
                StepShape(decode_sequences=count, decode_context=count * context)
            )

        return max(1, bisect_right(range(1, cap + 1), self._allowed(itl), key=seconds))

    # ── prices ───────────────────────────────────────────────────────────────

    def prices(self) -> tuple[float, float]:
        """Estimated device-seconds for one more prompt token and for one more token of output."""
        decoding = max(1, len(self.life.running))
        base = StepShape(decode_sequences=decoding, decode_context=128 * decoding)
        cap = min(self.limits.max_prefill_tokens, PRICED_CHUNK)
        whole = self.cost.predict(base)
        more = self.cost.predict(base.with_chunk(cap, 0))
        return max(0.0, more - whole) / cap, whole / decoding / self.life.shares.tokens_per_step
