"""Admit, chunk, decode, preempt, finish: how sequences move. Who and why is in `policy`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Finish, Request, TokenEvent, TokenLogprob
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.stats import Stats, StepStats
from dynamo_serve.core.tenant import Tenancy

SCAN_LIMIT = 64  # waiting sequences looked at in one step, so that a long queue costs nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of a step: `max_queue_delay` in seconds, the others in tokens and sequences."""

    max_prefill_tokens: int = 512
    max_decode_sequences: int = 64
    max_queue_delay: float = 0.003


class Scheduler:
    """Decides what the next step runs. Prefill and decode are separate, by name and by batch."""

    def __init__(self, pool: PagePool, limits: Limits, tenancy: Tenancy | None = None) -> None:
        self.tenancy = tenancy or Tenancy()
        self.pool = pool
        self.limits = limits
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: dict[str, Sequence] = {}  # in order of admission
        self.dropped: list[str] = []  # for the engine to forget
        self._last = Phase.DECODE
        self._totals = dict.fromkeys(
            ("prefix_asked", "prefix_hit", "preemptions", "prompt", "output"), 0
        )

    # ── the four verbs of the loop ───────────────────────────────────────────

    def configure(self, tenancy: Tenancy) -> None:
        """Other tenants, classes and quotas from now on, also for what is live."""
        self.tenancy = tenancy

    def add(self, request: Request, now: float) -> list[TokenEvent]:
        """Queue a request, or shed it: then the one event carries the refusal. The edge has made
        sure that it fits the pool."""
        assert request.id not in self.waiting and request.id not in self.running, request.id
        longest = len(request.prompt_ids) + request.max_tokens
        assert request.prompt_ids and request.max_tokens > 0, request.id
        assert self.pool.pages_for(longest) <= self.pool.num_pages, f"{request.id} can never fit"
        self.waiting[request.id] = Sequence.of(request)
        return []

    def cancel(self, request_id: str, now: float) -> list[TokenEvent]:
        """End a request; its pages are free when this returns. Cancelling twice is no error."""
        seq = self.running.get(request_id) or self.waiting.get(request_id)
        return [self._finish(seq, Finish.CANCELLED, now)] if seq else []

    def schedule(self, now: float) -> Batch | None:
        """The plan for the next step, or None if nothing can run (yet: see `wake_at`)."""
        for phase in policy.phase_order(self._last):
            batch = self._prefill(now) if phase is Phase.PREFILL else self._decode()
            if batch:
                self._last = phase
                return batch
        return None

    def update(
        self, batch: Batch, outputs: Iterable[SequenceOutput], now: float
    ) -> list[TokenEvent]:
        """Take in what a step produced; a sequence that was to yield a token and is not mentioned
        simply has none yet."""
        produced = {out.seq_id: out for out in outputs}
        events: list[TokenEvent] = []
        for work in batch.work:
            seq = self.running.get(work.seq_id)
            if seq is None:
                continue  # cancelled while the step was in flight
            out = produced.get(work.seq_id)
            if out is None:
                out = SequenceOutput(work.seq_id)
            event = self._accept(seq, work, out, now)
            if event is not None:
                events.append(event)
        return events

    # ── what the loop needs to know ──────────────────────────────────────────

    def wake_at(self) -> float | None:
        """When a merge window ends that is all there is to wait for; None if there is none."""
        return None if self.running or not self.waiting else self._merge_until()

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def stats(self, step: StepStats | None = None) -> Stats:
        totals = self._totals
        return Stats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            pages_used=self.pool.num_used,
            pages_cached=self.pool.num_cached,
            pages_free=self.pool.num_free,
            prefix_asked_tokens_total=totals["prefix_asked"],
            prefix_hit_tokens_total=totals["prefix_hit"],
            preemptions_total=totals["preemptions"],
            prompt_tokens_total=totals["prompt"],
            output_tokens_total=totals["output"],
            step=step,
        )

    def check(self) -> None:
        """Raise AssertionError if pages, claims or phases are inconsistent."""
        self.pool.check(seq.page_table for seq in self.running.values())
        self.pool.index.check(set(self.running))
        for seq in self.waiting.values():
            assert not seq.page_table and seq.phase is Phase.PREFILL, f"{seq.id} waits with pages"
        for seq in self.running.values():
            assert seq.num_pending > 0, f"{seq.id} has nothing to run"
            assert seq.phase is Phase.PREFILL or seq.num_pending == 1, f"{seq.id}: bad decode"
            assert seq.num_sealed <= len(seq.page_table), f"{seq.id} sealed what it does not hold"

    # ── prefill ──────────────────────────────────────────────────────────────

    def _prefill(self, now: float) -> Batch | None:
        if not self.running and (not self.waiting or now < self._merge_until()):
            return None
        work: list[Work] = []
        budget = self.limits.max_prefill_tokens
        for seq in self._running_in(Phase.PREFILL):
            budget = self._take(seq, budget, work)
        for seq in list(islice(self.waiting.values(), SCAN_LIMIT)):
            if budget <= 0 or len(self.running) >= self.limits.max_decode_sequences:
                break
            if self._awaits_prefix(seq):
                continue
            if not self._admit(seq, now):
                break  # no room yet: it keeps its place at the head of the queue
            budget = self._take(seq, budget, work)
        return Batch(Phase.PREFILL, tuple(work)) if work else None

    def _merge_until(self) -> float:
        return policy.merge_until(
            self.waiting.values(),
            delay=self.limits.max_queue_delay,
            tokens=self.limits.max_prefill_tokens,
            sequences=self.limits.max_decode_sequences,
        )

    def _awaits_prefix(self, seq: Sequence) -> bool:
        """Whether the next page it lacks is being computed right now by a running sequence.

        Computing a page twice is never faster than waiting for it: the maker is running, ahead
        of `seq` in the order of admission, and its claim falls when it ends or is preempted.
        """
        keys = self._reusable_keys(seq)
        matched = len(self.pool.index.match(keys))
        return matched < len(keys) and self.pool.index.maker(keys[matched]) is not None

    def _reusable_keys(self, seq: Sequence) -> list[bytes]:
        # The last token is always run: its logits pick the next one.
        end = seq.num_tokens - 1
        self.pool.extend_keys(seq.page_keys, seq.tokens, seq.request.salt, end)
        return seq.page_keys[: end // self.pool.page_size]

    def _admit(self, seq: Sequence, now: float) -> bool:
        """waiting → running, with pages for all its tokens; False if there is no room."""
        keys = self._reusable_keys(seq)
        # A page for each running sequence that can still grow stays free: admitting one more is
        # no reason to preempt another a few tokens later.
        reserve = sum(len(s.page_table) < self._most_pages(s) for s in self.running.values())
        if not self.pool.has_room(keys, seq.num_tokens, reserve):
            return False
        seq.page_table = self.pool.attach(keys)
        seq.num_sealed = len(seq.page_table)
        seq.num_computed = seq.num_unseen = seq.num_sealed * self.pool.page_size
        has_grown = self.pool.grow(seq.page_table, seq.num_tokens)
        assert has_grown, "has_room promised it"
        self.pool.index.claim(keys[seq.num_sealed :], seq.id)
        if seq.admitted_at is None:  # counted once: a preempted sequence finds its own pages
            seq.admitted_at = now
            seq.cached_tokens = seq.num_computed
            self._totals["prefix_asked"] += seq.num_tokens
            self._totals["prefix_hit"] += seq.num_computed
            self._totals["prompt"] += seq.num_tokens
        del self.waiting[seq.id]
        self.running[seq.id] = seq
        return True

    def _most_pages(self, seq: Sequence) -> int:
        return self.pool.pages_for(seq.prompt_len + seq.request.max_tokens)

    # ── decode ───────────────────────────────────────────────────────────────

    def _decode(self) -> Batch | None:
        for seq in self._running_in(Phase.DECODE):
            while seq.id in self.running and not self.pool.grow(seq.page_table, seq.num_tokens):
                self._preempt(policy.victim(list(self.running.values())))
        work: list[Work] = []
        for seq in self._running_in(Phase.DECODE):
            self._take(seq, 1, work)
        return Batch(Phase.DECODE, tuple(work)) if work else None

    def _preempt(self, seq: Sequence) -> None:
        """running → waiting, ahead of all others; the pages go back, the tokens survive."""
        self._leave(seq)
        seq.phase = Phase.PREFILL
        seq.num_preemptions += 1
        self._totals["preemptions"] += 1
        del self.running[seq.id]
        self.waiting[seq.id] = seq
        self.waiting.move_to_end(seq.id, last=False)

    def _running_in(self, phase: Phase) -> list[Sequence]:
        return [seq for seq in self.running.values() if seq.phase is phase]

    def _take(self, seq: Sequence, budget: int, work: list[Work]) -> int:
        """Add the sequence's share to `work`; what is left of the budget."""
        count = min(seq.num_pending, budget)
        if count <= 0:
            return budget
        work.append(seq.work(count))
        seq.num_unseen = 0
        return budget - count

    def _accept(
        self, seq: Sequence, work: Work, out: SequenceOutput, now: float
    ) -> TokenEvent | None:
        if out.finish is Finish.ERROR:  # what it left in its pages must not be published
            return self._finish(seq, Finish.ERROR, now, out._replace(token_ids=()))
        tokens, finish, stop_id = self._append(seq, out)
        cached_tokens = None
        if tokens and seq.first_token_at is None:
            seq.first_token_at, cached_tokens = now, seq.cached_tokens
        # The newest token is always pending: its KV is written by the next step.
        if work.samples:
            seq.phase, seq.num_computed = Phase.DECODE, seq.num_tokens - 1
        else:
            seq.num_computed = work.position + len(work.token_ids)
        self._seal(seq)
        if finish:
            last = self._finish(seq, finish, now, out._replace(token_ids=tokens), stop_id)
            return last._replace(cached_tokens=cached_tokens)
        return TokenEvent(seq.id, tokens, out.logprobs, cached_tokens) if tokens else None

    def _append(
        self, seq: Sequence, out: SequenceOutput
    ) -> tuple[tuple[int, ...], Finish | None, int | None]:
        """Add the produced tokens up to the first that ends the sequence."""
        request = seq.request
        for i, token in enumerate(out.token_ids, start=1):
            seq.tokens.append(token)
            self._totals["output"] += 1
            if token in request.stop_ids and seq.num_outputs > request.min_tokens:
                return out.token_ids[:i], Finish.STOP, token
            if seq.num_outputs >= request.max_tokens:
                return out.token_ids[:i], Finish.LENGTH, None
        return out.token_ids, out.finish, None

    def _seal(self, seq: Sequence) -> None:
        full = seq.num_computed // self.pool.page_size
        if full <= seq.num_sealed:
            return
        self.pool.extend_keys(seq.page_keys, seq.tokens, seq.request.salt, seq.num_computed)
        for i in range(seq.num_sealed, min(full, len(seq.page_keys))):
            self.pool.seal(seq.page_table[i], seq.page_keys[i])
        self.pool.index.unclaim(seq.page_keys[seq.num_sealed : full], seq.id)
        seq.num_sealed = full

    def _leave(self, seq: Sequence) -> None:
        """Give up pages and claims; the engine is told to forget the sequence."""
        self.pool.index.unclaim(seq.page_keys[seq.num_sealed :], seq.id)
        self.pool.release(seq.page_table)
        seq.num_computed = seq.num_sealed = seq.num_unseen = 0
        self.dropped.append(seq.id)

    def _finish(
        self,
        seq: Sequence,
        finish: Finish,
        now: float,
        out: SequenceOutput | None = None,
        stop_id: int | None = None,
    ) -> TokenEvent:
        """The one way out: every sequence leaves through here, whatever the reason."""
        if self.running.pop(seq.id, None) is None:
            del self.waiting[seq.id]
        self._leave(seq)
        tokens: tuple[int, ...] = out.token_ids if out else ()
        logprobs: tuple[TokenLogprob, ...] = out.logprobs[: len(tokens)] if out else ()
        return TokenEvent(
            request_id=seq.id,
            token_ids=tokens,
            logprobs=logprobs,
            finish=finish,
            stop_id=stop_id,
            summary=seq.summary(now),
            error=out.error if out else None,
            artifact=out.artifact if out else None,
        )
