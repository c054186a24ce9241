"""What the next step runs, and what the last one brought. Who and why is in `policy`."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.admission import Admission
from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.bill import Bill
from dynamo_serve.core.controller import Controller
from dynamo_serve.core.cut_in import CutIn
from dynamo_serve.core.deadlines import Deadlines
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.journal import Journal, Kind, Reason
from dynamo_serve.core.ladder import Restraint
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.outlook import Outlook
from dynamo_serve.core.pace import Chunk, Prompts
from dynamo_serve.core.page_parts import PageParts
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.pins import NOTHING, Pinning, Pins
from dynamo_serve.core.preemption import shape_of
from dynamo_serve.core.quarantine import Quarantine
from dynamo_serve.core.report import report
from dynamo_serve.core.request import READER_BACK, Finish, Request, Resumed, TokenEvent
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Shares
from dynamo_serve.core.speculation import Drafts, Speculation
from dynamo_serve.core.spill import Spill
from dynamo_serve.core.stats import Stats, StepStats
from dynamo_serve.core.step_cost import Item, StepCost, StepShape
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.core.tiers import Tier, TierSpec


class Scheduler:
    """Decides what the next step runs. Prefill and decode have caps of their own."""

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        tenancy: Tenancy | None = None,
        *,
        cost: StepCost | None = None,
        tiers: Iterable[TierSpec] = (),
        pinning: Pinning = NOTHING,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.tenancy = tenancy or Tenancy()
        self.cost = cost or StepCost()
        self.journal = Journal()
        self.shares = Shares(self.tenancy)
        pool.cached.configure(self.tenancy.tenant)
        self.spill = Spill(pool, [Tier(spec) for spec in tiers], self.cost)
        self.pins = Pins(pool, self.shares, pinning)
        parts = PageParts(pool, self.spill, limits.copy_seconds, limits.min_copied_tokens)
        self.life = Lifecycle(pool, self.shares, self.journal, self.spill, self.pins, parts)
        restraint = Restraint()
        self.intake = Intake(self.life, limits, self.cost, restraint)
        self.speculation = Speculation(self.intake.pace)
        self.admission = Admission(self.life, self.intake)
        self.waiting, self.running = self.life.waiting, self.life.running
        self.bill = Bill(self.life, self.cost)
        outlook = Outlook(self.life, self.intake)
        self.controller = Controller(self.life, restraint, self.bill.wear, limits, outlook.worst)
        self.newcomers = CutIn(self.intake, self.bill)
        self.quarantine = Quarantine(self.intake)
        self._last = Phase.DECODE  # of steps of one kind
        self._went_ahead = False  # did prompts make others wait in the last step?
        self._deadlines = Deadlines(lambda id: id in self.running or id in self.waiting)
        self._num_added = 0

    # ── the verbs of the loop ────────────────────────────────────────────────

    def configure(self, tenancy: Tenancy) -> None:
        """Other tenants, classes and quotas from now on; what is live keeps its class."""
        self.tenancy = tenancy
        self.shares.configure(tenancy)
        self.pool.cached.configure(tenancy.tenant)

    def add(self, request: Request, now: float) -> list[TokenEvent]:
        """Queue a request, or shed it: then the one event carries the refusal. The edge has made
        sure that it fits the pool."""
        assert request.id not in self.waiting and request.id not in self.running, request.id
        longest = len(request.prompt_ids) + request.max_tokens
        assert request.prompt_ids and (request.max_tokens > 0 or request.pooling), request.id
        assert self.pool.pages_for(longest) <= self.pool.num_pages, f"{request.id} can never fit"
        seq = self._sequence(request)
        seq.transit_seconds = max(0.0, now - request.arrival)
        self.life.tally.arrive(seq)
        self.intake.brake.bound(seq)
        refusal = self.admission.refuse(seq, now)
        if refusal is not None:
            return [TokenEvent(request.id, refusal=refusal)]
        self._enqueue(seq, now)
        return []

    def resume(self, request: Request, done: Resumed, now: float) -> list[TokenEvent]:
        """Queue a request that was accepted before, by an engine that is gone or by this one; it is
        never refused, but for one to be pinned for which there is no room any more."""
        seq = self._sequence(request)
        seq.resume(done, now)
        if (refusal := self.admission.refuse_pin(seq, now)) is not None:
            return [TokenEvent(request.id, refusal=refusal)]
        self._enqueue(seq, now)
        away, seq.was_left = now - done.since, done.reason == READER_BACK
        if not seq.was_left:
            self.life.tally.pause(seq, away)
        self.life.note(
            *(seq, now, Kind.RESUME, done.reason), output_tokens=len(done.token_ids), away_s=away
        )
        if done.is_suspect:
            self.quarantine.add(seq)
        return []

    def _sequence(self, request: Request) -> Sequence:
        promise = self.tenancy.class_of(request.tenant, request.class_name)
        self._num_added += 1
        return Sequence.of(request, promise, self._num_added)

    def _enqueue(self, seq: Sequence, now: float) -> None:
        self.life.enqueue(seq, now)
        self._deadlines.add(seq.request, len(self.running) + len(self.waiting))

    def cancel(self, request_id: str, now: float) -> list[TokenEvent]:
        """End a request; its pages are free when this returns. Cancelling twice is no error."""
        seq = self.running.get(request_id) or self.waiting.get(request_id)
        return [self.life.finish(seq, Finish.CANCELLED, now)] if seq else []

    def expire(self, now: float) -> list[TokenEvent]:
        """End every request whose deadline has passed, and every pin."""
        self.pins.expire(now)
        events: list[TokenEvent] = []
        for request_id in self._deadlines.pop(now):
            seq = self.running.get(request_id) or self.waiting.get(request_id)
            if seq is not None:
                events.append(self.life.finish(seq, Finish.DEADLINE, now))
        return events

    def schedule(self, now: float) -> Batch | None:
        """The plan for the next step, or None if nothing can run (yet: see `wake_at`)."""
        self.bill.begin(now)
        self.pool.cached.now = now
        self.controller.look(now)
        batch = self._plan(now)
        self.spill.plan(now, is_idle=self.is_idle)
        return batch

    def _plan(self, now: float) -> Batch | None:
        self.intake.brake.spill(now)
        if suspect := self.quarantine.chunk(now):
            return self._batch([], {}, [suspect], now)
        if self.quarantine:
            return None  # nobody runs beside it, and it waits for pages that copies hold
        return self._mixed(now) if self.limits.mix_phases else self._alternate(now)

    def update(
        self, batch: Batch, outputs: Iterable[SequenceOutput], now: float
    ) -> list[TokenEvent]:
        """Take in what a step produced; a sequence that was to yield a token and is not mentioned
        simply has none yet."""
        produced = {out.seq_id: out for out in outputs}
        self.bill.settle(produced, now)
        accepted = self.life.totals["draft_accepted"]
        events: list[TokenEvent] = []
        for work in batch.work:
            seq = self.running.get(work.seq_id)
            if seq is None:
                continue  # cancelled while the step was in flight
            out = produced.get(work.seq_id) or SequenceOutput(work.seq_id)
            if (event := self.life.accept(seq, work, out, now)) is not None:
                events.append(seq.forwarded(event, out) if out.texts or out.fault else event)
        self.life.totals["output"] += sum([len(event.token_ids) for event in events])
        if batch.phase is Phase.DECODE and self.bill.step is not None:
            accepted = self.life.totals["draft_accepted"] - accepted
            self.speculation.settle(now - self.bill.step.began, accepted)
        return events

    def may_cut_in(self, request: Request) -> bool:
        """Whether a step may be held for it: it was promised a first token in time."""
        return self.tenancy.class_of(request.tenant, request.class_name).ttft < inf

    def cut_in(self, request_ids: Iterable[str], now: float) -> Batch | None:
        """A plan for while the step in flight is held (`bill.hold`): the prompts of those that have
        just come and cannot wait for its end, if there are any. It has an `update` of its own."""
        waiting = (self.waiting.get(request_id) for request_id in request_ids)
        chunks = self.newcomers.chunks([seq for seq in waiting if seq], now)
        for seq, part in chunks:
            self.intake.note_chunk(seq, part, Reason.CUT_IN, now)
        return self._batch([], {}, chunks, now)

    # ── what the loop needs to know ──────────────────────────────────────────

    def wake_at(self) -> float | None:
        """When a merge window or a deadline ends that is all there is to wait for, or a rung may be
        undone; None if there is none."""
        look_at = self.controller.wake_at()
        if self.quarantine and not self.running:
            return 0.0
        if self.running or not self.waiting:
            return look_at
        return min(
            self.intake.merge_until(), self._deadlines.next, inf if look_at is None else look_at
        )

    def take_dropped(self) -> list[str]:
        """Sequences for the engine to forget; asking twice gives nothing."""
        dropped, self.life.dropped = self.life.dropped, []
        return dropped

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def stats(self, step: StepStats | None = None) -> Stats:
        return report(self.life, self.controller, step)

    def check(self) -> None:
        """Raise AssertionError if pages, claims, queues or phases are inconsistent."""
        self.life.check()

    # ── the plan ─────────────────────────────────────────────────────────────

    def _mixed(self, now: float) -> Batch | None:
        """Every decoding sequence, and as much of the prompts as fits beside them."""
        decoding = self._grown(now)
        num_preempted = self.life.totals["preemptions"]
        prompts, _, alone = self._chunks(decoding, now)
        if alone:
            decoding = []
        elif self.life.totals["preemptions"] > num_preempted:  # to admit somebody
            decoding = [seq for seq in decoding if seq.id in self.running]
        # Not beside prompts: what drafts cost there could not be told from what the prompts did.
        drafts = {} if prompts else self.speculation.drafts(decoding, now)
        return self._batch(decoding, drafts, prompts, now)

    def _alternate(self, now: float) -> Batch | None:
        for phase in policy.phase_order(self._last):
            if phase is Phase.PREFILL:
                prompts = self._chunks(self._in(Phase.DECODE), now)
                batch = self._batch([], {}, prompts.chunks, now)
            else:
                decoding = self._grown(now)
                drafts = self.speculation.drafts(decoding, now)
                batch = self._batch(decoding, drafts, [], now)
            if batch:
                self._last = phase
                return batch
        return None

    def _in(self, phase: Phase) -> list[Sequence]:
        return [seq for seq in self.running.values() if seq.phase is phase]

    def _grown(self, now: float) -> list[Sequence]:
        """The decoding sequences, each with room for its newest token; whoever has to go to make
        that room has gone."""
        decoding, page_size = self._in(Phase.DECODE), self.pool.page_size
        num_preempted = self.life.totals["preemptions"]
        for seq in decoding:
            if len(seq.tokens) <= page_size * len(seq.page_table):
                continue
            self.intake.preemption.keep_within_burst(seq, now)
            while seq.id in self.running and not self.life.grow(seq, now):
                self.intake.take_stock()
                victim = self.intake.preemption.victim(seq, now)
                self.life.preempt(victim, Reason.OUT_OF_PAGES, now)
        is_changed = self.life.totals["preemptions"] != num_preempted
        return self._in(Phase.DECODE) if is_changed else decoding

    def _chunks(self, decoding: list[Sequence], now: float) -> Prompts:
        """Prompts for this step. None go ahead twice in a row."""
        may_go_ahead = self.limits.fit_chunks and not self._went_ahead
        self._went_ahead = False
        is_over = not self.waiting and len(decoding) == len(self.running)
        if is_over or (not self.running and now < self.intake.merge_until()):
            return Prompts([])
        base = shape_of(decoding) if self.limits.mix_phases else StepShape()
        prompts = self.intake.chunks(decoding, base, now, may_go_ahead=may_go_ahead)
        self._went_ahead = prompts.ahead
        return prompts

    def _batch(
        self, decoding: list[Sequence], drafts: Drafts, prompts: list[Chunk], now: float
    ) -> Batch | None:
        if not decoding and not prompts:
            return None
        work: list[Work] = [seq.work(1, drafts.get(seq.request.id, ())) for seq in decoding]
        items: list[Item] = [(len(w.token_ids), w.position, False) for w in work]
        for seq, count in prompts:
            items.append((count, seq.num_computed, True))
            work.append(seq.work(count))
            seq.num_unseen = 0
        self.bill.expect([*decoding, *(seq for seq, _ in prompts)], items, now)
        phase = Phase.DECODE if not prompts else Phase.MIXED if decoding else Phase.PREFILL
        return Batch(phase, tuple(work))
