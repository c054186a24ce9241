"""Requests that wait for admission: a queue per tenant, the tightest target first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import islice

from dynamo_serve.core.sequence import AGING_SECONDS, Sequence

GROUP_PART = 0.5  # of its TTFT target: how much earlier a request may go to follow its group
MOST_PASSED = 64  # that it may go before for it
Place = tuple[float, int]  # its turn, and how many came before it


def place(seq: Sequence) -> Place:
    return (seq.turn, seq.ordinal)


def turn(seq: Sequence, before: Iterable[Sequence]) -> float:
    """When it is due; or, if one of its group (`prompt_cache_key`) waits not far before it, the
    turn of that one: what they share is then still in the cache. `before` are those that would go
    first, the last of them first.

    So nobody is passed by one that is due more than `GROUP_PART` of a target later, and nobody
    who was promised more, or has a lower `priority` number, by any."""
    earliest = seq.due - GROUP_PART * min(seq.promise.ttft, AGING_SECONDS)
    for other in before:
        if other.turn < earliest:
            break
        if (other.request.group, other.request.salt) == (seq.request.group, seq.request.salt):
            return other.turn
        if other.promise.strict or other.promise.ttft < seq.promise.ttft:
            break
        if other.request.priority < seq.request.priority:
            break
    return seq.due


class WaitingQueue:
    """Within a tenant the order is by `turn`, then by arrival; between tenants `policy` decides.

    Batch-class requests are kept apart from the others, so that neither can hide the other.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, Sequence] = {}
        self._by_tenant: dict[str, tuple[list[Sequence], list[Sequence]]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._by_id

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, seq_id: str) -> Sequence | None:
        return self._by_id.get(seq_id)

    def add(self, seq: Sequence) -> None:
        self._by_id[seq.id] = seq
        queues = self._by_tenant.setdefault(seq.request.tenant, ([], []))
        queue = queues[seq.promise.is_batch]
        if seq.request.group:
            seq.turn = turn(seq, self._before(seq))
        insort(queue, seq, key=place)

    def _before(self, seq: Sequence) -> list[Sequence]:
        """Those of its tenant that would go first, the last of them first; not all of many."""
        near: list[Sequence] = []
        for queue in self._by_tenant[seq.request.tenant]:
            at = bisect_left(queue, (seq.due, seq.ordinal), key=place)
            near += queue[max(0, at - MOST_PASSED) : at]
        return sorted(near, key=place, reverse=True)[:MOST_PASSED]

    def remove(self, seq: Sequence) -> None:
        queues = self._by_tenant[seq.request.tenant]
        queue = queues[seq.promise.is_batch]
        at = bisect_left(queue, place(seq), key=place)
        assert queue[at] is seq, f"{seq.id} is not where it should wait"
        del queue[at], self._by_id[seq.id]
        if not any(queues):
            del self._by_tenant[seq.request.tenant]

    @property
    def tenants(self) -> list[str]:
        """The tenants that wait for something."""
        return list(self._by_tenant)

    def count(self, tenant: str) -> int:
        return sum(map(len, self._by_tenant.get(tenant, ())))

    def first(self, tenant: str, most: int) -> list[Sequence]:
        """Up to `most` requests of a tenant, in their order."""
        return self.scan(tenant, most)[:most]

    def scan(self, tenant: str, most: int) -> list[Sequence]:
        """The same, but so many of either kind: a rung may keep back all that is batch-class."""
        queues = self._by_tenant.get(tenant, ())
        heads = [list(islice(queue, most)) for queue in queues if queue]
        return heads[0] if len(heads) == 1 else list(merge(*heads, key=place))

    def others(self, tenant: str, most: int) -> list[Sequence]:
        """Up to `most` of those that are not batch-class."""
        return list(islice(self._by_tenant[tenant][0], most))

    def ahead_of(self, seq: Sequence, with_batch: bool = True) -> int:
        """How many requests of its own tenant go before it; also for one that does not wait."""
        queues = self._by_tenant.get(seq.request.tenant, ())[: 1 + with_batch]
        return sum(bisect_left(queue, place(seq), key=place) for queue in queues)

    def check(self) -> None:
        """Raise AssertionError if a queue and the register disagree."""
        queues = [queue for both in self._by_tenant.values() for queue in both]
        queued = [seq for queue in queues for seq in queue]
        assert {seq.id for seq in queued} == self._by_id.keys(), "a request waits nowhere"
        assert len(queued) == len(self._by_id), "a request waits twice"
        for queue in queues:
            assert queue == sorted(queue, key=place), "a queue out of order"
