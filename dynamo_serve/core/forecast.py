"""When a request will get its first token: the queue played forward with learned step times.

The play knows what the scheduler knows now: who runs and how far, who waits and in which order, how
long steps take. It does not know who will come, who will end early, or what will be preempted; it
takes each tenant's usual part of `max_tokens`.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.waiting import place

MOST_ADMISSIONS = 256  # played one by one; what is behind them is taken to go on at their rate


class Forecast(NamedTuple):
    """Seconds from now, and how many waiting requests go first."""

    first_token: float
    finish: float
    position: int


def forecast(seq: Sequence, life: Lifecycle, intake: Intake) -> Forecast:
    """When `seq` gets its first token and its last. It waits, or is about to."""
    return _Play(seq, life, intake).run()


class _Play:
    """Everything that decodes gains one token per step, so `steps` is a clock for who ends when:
    the ends of the running sequences are a heap on that clock."""

    def __init__(self, seq: Sequence, life: Lifecycle, intake: Intake) -> None:
        intake.take_stock()
        self.seq = seq
        self.intake = intake
        self.pool = life.pool
        self.accounts = life.shares.accounts
        life.shares.account(seq.request.tenant)
        self.prices = intake.prices()
        self.shares = life.shares
        self.time = self.steps = 0.0
        self.left = 0  # prompt tokens that the step in hand has still room for
        running = list(life.running.values())
        self.ends = [(self._outputs(s), self._pages(s)) for s in running]
        heapify(self.ends)
        pages = sum(len(s.page_table) for s in running)
        grown = sum(count for _, count in self.ends)
        self.free = self.pool.num_pages - self.pool.num_used + pages - grown
        self.places = intake.places(running, seq)
        self.itl = policy.tightest_itl(running)
        self.context = max(1, sum(s.num_tokens for s in running) // max(1, len(running)))
        self.queues = self._queues(life)
        self.leads = {name: self.accounts[name].lead for name in self.queues}
        self._prefill(sum(s.num_pending for s in running if s.phase is Phase.PREFILL))

    def _queues(self, life: Lifecycle) -> dict[str, deque[Sequence]]:
        queues = {
            name: deque(life.waiting.first(name, MOST_ADMISSIONS)) for name in life.waiting.tenants
        }
        if self.seq.id not in life.waiting:
            own = [*queues.get(self.seq.request.tenant, ()), self.seq]
            queues[self.seq.request.tenant] = deque(sorted(own, key=place))
        self.behind = max(0, life.waiting.ahead_of(self.seq) - MOST_ADMISSIONS)
        return queues

    def run(self) -> Forecast:
        for position in range(MOST_ADMISSIONS):
            name = min(self.queues, key=lambda at: (self.leads[at], at))
            seq = self.queues[name].popleft()
            self.leads[name] += (
                self.shares.price(seq, *self.prices) / self.accounts[name].tenant.weight
            )
            self._admit(seq)
            if seq is self.seq:
                return self._result(position)
            if not self.queues[name]:
                del self.queues[name]
        return self._extrapolated()

    def _result(self, position: int) -> Forecast:
        rest = self._outputs(self.seq) * self._step_seconds()
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
        pages = self._pages(seq)
        while self.ends and (len(self.ends) >= self.places or pages > self.free):
            self._wait_for_end()
        while self.ends and self.ends[0][0] <= self.steps:
            self._wait_for_end()
        self._prefill(seq.num_pending)
        heappush(self.ends, (self.steps + self._outputs(seq), pages))
        self.free -= pages

    def _wait_for_end(self) -> None:
        end, pages = self.ends[0]
        if end > self.steps:
            self.time += (end - self.steps) * self._step_seconds()
            self.steps, self.left = end, 0
        heappop(self.ends)
        self.free += pages

    def _prefill(self, tokens: int) -> None:
        """Run so many prompt tokens in chunks, beside everything that decodes."""
        price = self.prices[0]
        while tokens > 0:
            if self.left <= 0:
                self.left = self._chunk()
                self.time += self._step_seconds()
                self.steps += 1 if self.ends else 0
            part = min(tokens, self.left)
            self.time += part * price
            self.left -= part
            tokens -= part

    def _chunk(self) -> int:
        """Prompt tokens in one step beside those that decode."""
        return self.intake.usual_chunk(self._shape(), self.itl)

    def _shape(self) -> StepShape:
        count = len(self.ends)
        return StepShape(decode_sequences=count, decode_context=count * self.context)

    def _step_seconds(self) -> float:
        return self.intake.cost.predict(self._shape())

    def _outputs(self, seq: Sequence) -> float:
        """Tokens it will still produce."""
        ratio = self.accounts[seq.request.tenant].output_ratio
        return max(1.0, ratio * seq.request.max_tokens - seq.num_outputs)

    def _pages(self, seq: Sequence) -> int:
        """Pages it will hold when it ends."""
        return self.pool.pages_for(int(seq.num_tokens + self._outputs(seq)))
