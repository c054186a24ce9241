"""waiting → running → finished, and back to waiting: how a sequence moves, with its pages."""

from __future__ import annotations

from itertools import takewhile

from dynamo_serve.core.batch import Phase, SequenceOutput, Work
from dynamo_serve.core.hits import attach, count_in
from dynamo_serve.core.journal import Journal, Kind, Reason
from dynamo_serve.core.page_parts import PageParts
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.pins import Pins
from dynamo_serve.core.request import Finish, TokenEvent
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Shares
from dynamo_serve.core.spill import Spill
from dynamo_serve.core.tally import Tally
from dynamo_serve.core.waiting import WaitingQueue

MOST_HISTORY = 64  # decisions kept about one request
TOTALS = "prefix_asked prefix_hit preemptions prompt output draft draft_accepted evicted_admitting"


class Lifecycle:
    """Holds every live sequence. Each change of state is one method here, and nowhere else."""

    def __init__(
        self,
        pool: PagePool,
        shares: Shares,
        journal: Journal,
        spill: Spill,
        pins: Pins,
        parts: PageParts,
    ) -> None:
        self.pool = pool
        self.parts = parts
        self.spill = spill
        self.pins = pins
        self.shares = shares
        self.journal = journal
        self.tally = Tally()
        self.waiting = WaitingQueue()
        self.running: dict[str, Sequence] = {}  # in order of admission
        self.dropped: list[str] = []  # for the engine to forget
        # While a step is held: seconds that it still takes, and tokens that it runs of a sequence.
        self.flight_seconds = 0.0
        self.flight_tokens: dict[str, int] = {}
        self.totals = dict.fromkeys(TOTALS.split(), 0)

    @property
    def busy(self) -> list[str]:
        """Tenants that have something running or waiting."""
        running = {seq.request.tenant for seq in self.running.values()}
        return sorted(running.union(self.waiting.tenants))

    # ── waiting → running ────────────────────────────────────────────────────

    def note(self, seq: Sequence, now: float, kind: Kind, reason: str, **numbers: float) -> None:
        """Put a decision about a sequence into the journal and its own history."""
        entry = self.journal.note(now, kind, reason, seq.id, seq.request.tenant, **numbers)
        seq.history.append(entry)
        if len(seq.history) > MOST_HISTORY:
            del seq.history[1]  # the first tells when it began

    def enqueue(self, seq: Sequence, now: float) -> None:
        """Begin: the request waits."""
        tenant = seq.request.tenant
        busy = self.busy
        self.shares.advance(busy)
        if tenant not in busy:
            self.shares.wake(tenant)
        account = seq.account = self.shares.account(tenant)
        account.num_requests += 1
        account.last_arrival = now
        seq.waits_since = seq.request.arrival
        if self.waiting.count(tenant):
            seq.waits_for = Reason.ORDER.value
        elif not self.running:
            seq.waits_for = Reason.MERGE_WINDOW.value
        self.waiting.add(seq)

    def defer(self, seq: Sequence, reason: Reason, now: float, **numbers: float) -> None:
        """It goes on waiting; noted when the reason is a new one."""
        if seq.waits_for != reason.value and seq.wait_for(reason.value, now):
            self.note(seq, now, Kind.DEFER, reason.value, **numbers)

    def reusable_keys(self, seq: Sequence) -> list[bytes]:
        """Keys of the pages that it need not compute itself, if somebody has them."""
        if seq.is_read_whole:
            return []
        # The last token is always run: its logits pick the next one.
        end = seq.num_tokens - 1
        self.pool.extend_keys(seq.page_keys, seq.tokens, seq.request.salt, end)
        keys = seq.page_keys[: end // self.pool.page_size]
        if seq.is_suspect or not seq.may_restore:  # nothing that takes time, or may go wrong again
            return list(takewhile(self.pool.__contains__, keys))
        return keys

    def admit(self, seq: Sequence, now: float) -> None:
        """waiting → running, with pages for all its tokens; there must be room."""
        evicted, tree, keys = self.pool.num_evicted, self.pool.tree, self.reusable_keys(seq)
        attach(self, seq, keys, now)
        has_grown = self.grow(seq, now)
        assert has_grown, "has_room promised it"
        tree.blame(tree.alone(seq.request.tenant), now)
        self.totals["evicted_admitting"] += self.pool.num_evicted - evicted
        if seq.admitted_at is None:  # counted once: a preempted sequence finds its own pages
            count_in(self, seq, keys, now)
        if seq.preempted_at is not None:
            seq.stall_seconds += now - seq.preempted_at
            seq.preempted_at = None
        self.waiting.remove(seq)
        self.running[seq.id] = seq
        seq.wait_for(Reason.TURN.value, now)
        self.note(
            *(seq, now, Kind.ADMIT, Reason.TURN.value),
            cached_tokens=seq.num_computed,
            copied_tokens=seq.num_computed % self.pool.page_size,
            pages=len(seq.page_table),
            waited_s=now - seq.request.arrival,
        )
        if seq.restoring:
            self.note(
                *(seq, now, Kind.RESTORE, Reason.SOONER.value),
                pages=seq.restoring.num_pages,
                predicted_s=seq.restoring.seconds,
                computing_s=seq.restoring.saves,
            )

    def grow(self, seq: Sequence, now: float, more: int = 0) -> bool:
        """Pages for all its tokens and so many more; False, and nothing done, without room."""
        evicted, held = self.pool.num_evicted, len(seq.page_table)
        has_grown = self.pool.grow(seq.page_table, seq.num_tokens + more, seq.owner)
        seq.page_part += len(seq.page_table) - held
        if evicted := self.pool.num_evicted - evicted:
            self.note(seq, now, Kind.EVICT, Reason.PAGES.value, pages=evicted)
            self.pool.tree.blame(self.pool.tree.alone(seq.request.tenant), now)
        return has_grown

    # ── running → waiting ────────────────────────────────────────────────────

    def preempt(self, seq: Sequence, reason: Reason, now: float) -> None:
        """Back to where it waited before; the pages go back, the tokens survive."""
        numbers = {"pages": len(seq.page_table), "output_tokens": seq.num_outputs}
        self.note(seq, now, Kind.PREEMPT, reason.value, **numbers)
        if seq.restoring and seq.restoring.counted is not None:
            seq.admitted_at = None  # nothing was counted: what it finds the next time is
        self._leave(seq)
        seq.phase = Phase.PREFILL
        seq.num_preemptions += 1
        seq.waits_for, seq.waits_since, seq.preempted_at = reason.value, now, now
        self.totals["preemptions"] += 1
        del self.running[seq.id]
        self.waiting.add(seq)

    # ── running → finished ───────────────────────────────────────────────────

    def accept(
        self, seq: Sequence, work: Work, out: SequenceOutput, now: float
    ) -> TokenEvent | None:
        """Take in what a step produced for one sequence."""
        if out.finish is Finish.ERROR:  # what it left in its pages must not be published
            return self.finish(seq, Finish.ERROR, now, out._replace(token_ids=()))
        if seq.copied_from is not None:
            self.parts.let_go(seq)
        tokens, finish, stop_id = seq.take(out.token_ids, out.finish)
        seq.prompt_logprobs += out.prompt_logprobs
        if work.samples and (work.draft_len or len(tokens) != self.shares.tokens_per_step):
            self._count(seq, work.draft_len, len(tokens))
        is_first = seq.first_token_at is None
        if tokens or out.artifact is not None:
            self._put_down(seq, len(tokens), now)
        # The newest token is always pending: its KV is written by the next step.
        if work.samples:
            seq.phase, seq.num_computed = Phase.DECODE, len(seq.tokens) - 1
        else:
            seq.num_computed = work.position + len(work.token_ids)
        full = seq.num_computed // self.pool.page_size
        if full > seq.num_sealed:
            self._seal(seq, full, now)
        if finish:
            last = self.finish(seq, finish, now, out._replace(token_ids=tokens), stop_id)
            return seq.first(last) if is_first and seq.first_token_at is not None else last
        if not tokens:
            return None
        event = TokenEvent(seq.request.id, tokens, out.logprobs)
        if is_first:
            event = seq.first(event)._replace(max_tokens=seq.cut_to)
        return event

    def _put_down(self, seq: Sequence, num_tokens: int, now: float) -> None:
        """Tokens of its answer have come."""
        account = seq.account
        account.output_tokens += num_tokens
        account.tokens.level -= num_tokens
        if seq.is_watched:
            self.tally.token(seq, now)
        if seq.first_token_at is None:
            seq.first_token_at = now
        seq.last_token_at, seq.is_suspect = now, False

    def _count(self, seq: Sequence, draft_len: int, num_tokens: int) -> None:
        """Put down what a step brought, and how much of it because of a draft."""
        if seq.phase is Phase.DECODE:
            self.shares.learn_pace(num_tokens)
        if draft_len:
            accepted = min(draft_len, max(0, num_tokens - 1))
            seq.draft_tokens += draft_len
            seq.draft_accepted += accepted
            self.totals["draft"] += draft_len
            self.totals["draft_accepted"] += accepted

    def _seal(self, seq: Sequence, full: int, now: float) -> None:
        """Publish the pages that have been filled, of the first `full` ones."""
        self.pool.extend_keys(seq.page_keys, seq.tokens, seq.request.salt, seq.num_computed)
        for i in (places := range(seq.num_sealed, min(full, len(seq.page_keys)))):
            self.pool.seal(seq.page_table[i], seq.page_keys[i])
        if self.pool.events is not None:
            self.pool.events.sealed(seq.page_keys, seq.tokens, places)
        if seq.page_keys:
            self.pool.tree.learn(seq.chain(seq.page_keys), range(seq.num_sealed, full), now)
        self.pool.index.unclaim(seq.page_keys[seq.num_sealed : full], seq.id)
        seq.num_sealed = full

    def _leave(self, seq: Sequence) -> None:
        """Give up pages and claims; the engine is told to forget the sequence."""
        begin = 0 if seq.restoring else seq.num_sealed
        self.pool.index.unclaim(seq.page_keys[begin:], seq.id)
        seq.restoring = None
        self.parts.let_go(seq)
        self.pool.release(seq.page_table)
        seq.page_part = 0.0
        seq.num_computed = seq.num_sealed = seq.num_unseen = 0
        self.dropped.append(seq.id)

    def finish(
        self,
        seq: Sequence,
        finish: Finish,
        now: float,
        out: SequenceOutput | None = None,
        stop_id: int | None = None,
    ) -> TokenEvent:
        """The one way out: every sequence leaves through here, whatever the reason."""
        if self.running.pop(seq.id, None) is None:
            self.waiting.remove(seq)
            seq.wait_for(finish.value, now)
            if seq.preempted_at is not None:
                seq.stall_seconds += now - seq.preempted_at
        self.tally.end(seq, finish, now)
        is_whole = finish in (Finish.STOP, Finish.LENGTH)
        self.spill.asked(self.pins.settle(seq, is_computed=is_whole))
        self._leave(seq)
        if seq.tells_length(finish):
            self.shares.learn_length(seq, finish is Finish.LENGTH)
        if seq.request.tenant not in self.busy:
            self.shares.rest(seq.request.tenant)
        self.note(
            *(seq, now, Kind.FINISH, finish.value),
            output_tokens=seq.num_outputs,
            device_seconds=seq.device_seconds,
            draft_tokens=seq.draft_tokens,
            draft_accepted=seq.draft_accepted,
        )
        self.journal.remember(seq.id, seq.history)
        last = out or SequenceOutput(seq.id)
        return TokenEvent(
            request_id=seq.id,
            token_ids=last.token_ids,
            logprobs=last.logprobs[: len(last.token_ids)],
            finish=finish,
            stop_id=stop_id,
            summary=seq.summary(now),
            error=last.error,
            artifact=last.artifact,
        )

    def check(self) -> None:
        """Raise AssertionError if pages, claims or phases are inconsistent."""
        tables = [seq.page_table for seq in self.running.values()]
        pinned = [pinned.page_table for pinned in self.pins.by_id.values()]
        copied = self.parts.check(self.running.values())
        self.pool.check([*tables, *self.spill.flights.held_pages, *pinned, *copied])
        self.spill.check()
        self.pins.check()
        self.pool.index.check(set(self.running))
        self.waiting.check()
        for seq in self.waiting:
            assert not seq.page_table and seq.phase is Phase.PREFILL, f"{seq.id} waits with pages"
            assert seq.id not in self.running, f"{seq.id} waits and runs"
        for seq in self.running.values():
            assert seq.num_pending > 0, f"{seq.id} has nothing to run"
            assert not seq.restoring or seq.phase is Phase.PREFILL, f"{seq.id}: decodes too soon"
            assert seq.phase is Phase.PREFILL or seq.num_pending == 1, f"{seq.id}: bad decode"
            assert seq.num_sealed <= len(seq.page_table), f"{seq.id} sealed what it does not hold"
            shown = tuple(seq.page_table[: len(seq.shown)])
            assert shown == seq.shown, f"{seq.id}: engines see other pages"
