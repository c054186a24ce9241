"""When a request will get its first token: the queue played forward with learned step times.

The play knows what the scheduler knows now: who runs and how far, who waits and in which order, how
long answers and steps usually are, what prefixes are cached, and who may take whose place. It does
not know who will come.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import NamedTuple

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.waiting import place

MOST_ADMISSIONS = 128  # played one by one; what is behind them is taken to go on at their rate


class Forecast(NamedTuple):
    """Seconds from now, and how many waiting requests go first."""

    first_token: float
    finish: float
    position: int


def forecast(
    seq: Sequence, life: Lifecycle, intake: Intake, beside: Iterable[Sequence] = ()
) -> Forecast:
    """When `seq` gets its first token and its last. It waits, or is about to. `beside` are others
    that wait now, and will have come in by then: each as far as chance has it."""
    play = _Play(seq, life, intake)
    play.fill(list(beside))
    return play.run()


class _End(NamedTuple):
    """A running sequence of the play: at which step it ends, and what it holds till then."""

    step: float
    pages: int
    tenant: str


class _Play:
    """Everything that decodes gains the same from a step, so `steps` is a clock for who ends when:
    the ends of the running sequences are a heap on that clock."""

    def __init__(self, seq: Sequence, life: Lifecycle, intake: Intake) -> None:
        intake.take_stock()
        self.seq = seq
        self.life = life
        self.intake = intake
        self.shares = life.shares
        self.shares.account(seq.request.tenant)
        self.accounts = life.shares.accounts
        self.prices = intake.pace.prices()
        self.time, self.steps = life.flight_seconds, 0.0
        self.left = 0  # prompt tokens that the step in hand has still room for
        running = list(life.running.values())
        self.ends = [_End(self.shares.steps(s), self._pages(s), s.request.tenant) for s in running]
        heapify(self.ends)
        held = sum(len(s.page_table) - life.pins.count(s.page_table) for s in running)
        self.free = life.pool.num_idle + held
        self.free -= sum(end.pages for end in self.ends)
        self.live = Counter(end.tenant for end in self.ends)
        self.places = intake.pace.places(running, seq)
        self.itl = policy.tightest_itl(running)
        self.context = max(1, sum(s.num_tokens for s in running) // max(1, len(running)))
        self.queues = self._queues()
        self.leads = {name: self.accounts[name].lead for name in self.queues}
        busy = {*self.leads, *self.live}
        own = policy.parts(busy, self.accounts).items()
        self.due = {name: part * self.places for name, part in own}
        done = life.flight_tokens  # as good as done
        self._prefill(
            sum(s.num_pending - done.get(s.id, 0) for s in running if s.phase is Phase.PREFILL)
        )

    def _queues(self) -> dict[str, deque[Sequence]]:
        waiting, is_past = self.life.waiting, self.intake.brake.lets_pass(self.seq)
        queues = {name: deque(waiting.first(name, MOST_ADMISSIONS)) for name in waiting.tenants}
        if is_past:
            others = {n: waiting.others(n, MOST_ADMISSIONS) for n in waiting.tenants}
            queues = {name: deque(seqs) for name, seqs in others.items() if seqs}
        if self.seq.id not in waiting:
            own = [*queues.get(self.seq.request.tenant, ()), self.seq]
            queues[self.seq.request.tenant] = deque(sorted(own, key=place))
        for seq in chain(*queues.values()):  # as it would be if they were admitted now
            self.intake.brake.bound(seq)
        ahead = waiting.ahead_of(self.seq, with_batch=not is_past)
        self.behind = max(0, ahead - MOST_ADMISSIONS)
        return queues

    def fill(self, others: list[Sequence]) -> None:
        """These run, too: one of them is about to end, another has just begun. Places that work
        with targets has for the moment are theirs when it ends."""
        if not others:
            return
        batch = [seq for seq in self.life.running.values() if seq.promise.is_batch]
        self.ends = [_End(self.shares.steps(s), self._pages(s), s.request.tenant) for s in batch]
        self.live = Counter(end.tenant for end in self.ends)  # else somebody waits for ever
        for i, seq in enumerate(others[: max(0, self.places - len(self.ends))]):
            steps = self.shares.steps(seq) * (i + 1) / len(others)
            self.ends.append(_End(steps, self._pages(seq), seq.request.tenant))
            self.live[seq.request.tenant] += 1
            self.free -= self._pages(seq)
        heapify(self.ends)

    def run(self) -> Forecast:
        for position in range(MOST_ADMISSIONS):
            name = self._turn()
            seq = self.queues[name].popleft()
            price = self.shares.price(seq, *self.prices)
            self.leads[name] += price / self.accounts[name].tenant.weight
            self._admit(seq)
            if seq is self.seq:
                return self._result(position)
            if not self.queues[name]:
                del self.queues[name]
        return self._extrapolated()

    def _turn(self) -> str:
        """The tenant that goes next; whoever is at its quota waits until one of its own ends."""
        while True:
            able = [name for name in self.queues if not self._is_at_quota(name)]
            if able:
                return min(able, key=lambda name: (self.leads[name], name))
            self._wait_for_end()

    def _is_at_quota(self, name: str) -> bool:
        most = self.accounts[name].tenant.quota.live_sequences
        is_at_quota = most is not None and 0 < self.live[name] >= most
        return is_at_quota or self._is_capped(name)

    def _is_capped(self, name: str) -> bool:
        """Whether the places for batch-class work are all taken, as far as tenants tell."""
        cap, tenancy = self.intake.brake.cap, self.shares.tenancy
        if cap >= self.places or not tenancy.class_of(name).is_batch:
            return False
        return sum(n for other, n in self.live.items() if tenancy.class_of(other).is_batch) >= cap

    def _result(self, position: int) -> Forecast:
        rest = self.shares.steps(self.seq) * self._step_seconds()
        return Forecast(self.time, self.time + rest, position)

    def _extrapolated(self) -> Forecast:
        """The queue is longer than we care to play: what is left goes on at the same rate."""
        name = self.seq.request.tenant
        ahead = self.behind + sum(place(s) < place(self.seq) for s in self.queues.get(name, ()))
        share = policy.entitled(name, self.leads, self.accounts)
        position = MOST_ADMISSIONS + int(ahead / share)
        self.time *= position / MOST_ADMISSIONS
        return self._result(position)

    def _admit(self, seq: Sequence) -> None:
        name, pages = seq.request.tenant, self._pages(seq)
        while self.ends and (len(self.ends) >= self.places or pages > self.free):
            if not self._take_place(name):
                self._wait_for_end()
        while self.ends and self.ends[0].step <= self.steps:
            self._wait_for_end()
        self._prefill(self._missing(seq))
        heappush(self.ends, _End(self.steps + self.shares.steps(seq), pages, name))
        self.live[name] += 1
        self.free -= pages

    def _missing(self, seq: Sequence) -> int:
        """Prompt tokens that are not cached."""
        cached = len(self.life.pool.match(self.life.reusable_keys(seq)))
        return seq.num_pending - cached * self.life.pool.page_size

    def _take_place(self, name: str) -> bool:
        """Preempt somebody over his share for somebody who stays within his."""
        if self.live[name] + 1 > max(1.0, self.due[name]):
            return False
        givers = [e for e in self.ends if e.tenant != name and self._may_give(e.tenant)]
        if not givers:
            return False
        end = max(givers)
        self.ends.remove(end)
        heapify(self.ends)
        self.live[end.tenant] -= 1
        self.free += end.pages
        return True

    def _may_give(self, name: str) -> bool:
        return self.live[name] - 1 >= self.due[name]

    def _wait_for_end(self) -> None:
        end = self.ends[0]
        if end.step > self.steps:
            self.time += (end.step - self.steps) * self._step_seconds()
            self.steps, self.left = end.step, 0
        heappop(self.ends)
        self.live[end.tenant] -= 1
        self.free += end.pages

    def _prefill(self, tokens: int) -> None:
        """Run so many prompt tokens in chunks, beside everything that decodes."""
        tokens = max(0, tokens)
        self.time += tokens * self.prices[0]
        part = min(tokens, max(0, self.left))
        self.left -= part
        tokens -= part
        if tokens:
            chunk = self.intake.pace.usual_chunk(self._shape(), self.itl)
            count = -(-tokens // chunk)
            self.time += count * self._step_seconds()
            self.steps += count if self.ends else 0
            self.left = count * chunk - tokens

    def _shape(self) -> StepShape:
        count = len(self.ends)
        return StepShape(decode_sequences=count, decode_context=count * self.context)

    def _step_seconds(self) -> float:
        return self.intake.pace.cost.predict(self._shape())

    def _pages(self, seq: Sequence) -> int:
        """Pages it will hold when it ends, without those that are pinned."""
        pool, pins = self.life.pool, self.life.pins
        pages = pool.pages_for(int(seq.num_tokens + self.shares.outputs(seq)))
        if not pins.pages:
            return pages
        found = seq.page_table or pool.match(self.life.reusable_keys(seq))
        return pages - pins.count(page_id for page_id in found if page_id is not None)
