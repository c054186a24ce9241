"""Many replicas, each with the whole of its scheduler, behind a router; in one process or several.

A router that looks at loads hears of ends only now and then (`look` seconds), as real ones do. So
between two looks replicas do not depend on each other: processes run a part of them each, and the
result is the same however many processes there are. A router that looks at nothing needs no looks:
each replica is run from beginning to end before the next.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from dynamo_serve.bench.record import Record, Sample
from dynamo_serve.simulate import routing
from dynamo_serve.simulate.clients import Client
from dynamo_serve.simulate.replica import Replica, Setup

Sent = tuple[int, int]
"""A client, by its number, and the replica that it was sent to."""

MOST_GAPS = 5_000_000  # between tokens, kept for the report; of more, those of every second client


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many replicas there are, and how requests come to them."""

    replicas: int = 1
    routing: str = "round_robin"
    look: float = 0.1  # seconds between two looks of the router
    processes: int = 1


class Ended(NamedTuple):
    """What became of the clients of some replicas."""

    records: list[Record]
    samples: list[Sample]


class Shard:
    """Some of the replicas. `clients` are all there are."""

    def __init__(self, setup: Setup, clients: Sequence[Client], *, samples: bool) -> None:
        self._setup = setup
        self._clients = clients
        self._samples = samples
        self._replicas: dict[int, Replica] = {}
        self._ended = Ended([], [])
        tokens = sum(client.length.tokens for client in clients)
        self._every = 1 + tokens // MOST_GAPS

    def whole(self, sent: Sequence[Sent]) -> Ended:
        """Run each replica to its end, one after the other."""
        by_replica: dict[int, list[Client]] = {}
        for number, at in sent:
            by_replica.setdefault(at, []).append(self._clients[number])
        for at, clients in sorted(by_replica.items()):
            replica = self._replica(at)
            for client in clients:
                replica.feed(client, client.asked.at)
            replica.run()
            self._take(at, replica)
            del self._replicas[at]
        return self._ended

    def part(self, sent: Sequence[Sent], until: float) -> list[Sent]:
        """Run all replicas up to a time; those whose clients are through."""
        for number, at in sent:
            client = self._clients[number]
            self._replica(at).feed(client, client.asked.at)
        ended: list[Sent] = []
        for at, replica in self._replicas.items():
            if not replica.is_idle:
                replica.run(until)
                ended += self._take(at, replica)
        return ended

    def rest(self) -> Ended:
        return self._ended

    def _replica(self, at: int) -> Replica:
        if at not in self._replicas:
            self._replicas[at] = Replica(self._setup, at, samples=self._samples)
        return self._replicas[at]

    def _take(self, at: int, replica: Replica) -> list[Sent]:
        done = [(client.number, at) for client in replica.done]
        for client in replica.done:
            if client.number % self._every:
                client.gaps.clear()
            self._ended.records.append(client.record(self._setup.tenancy))
        replica.done.clear()
        self._ended.samples.extend(replica.samples)
        replica.samples.clear()
        return done


class Worker(Protocol):
    """A shard, here or in a process of its own: asked first, answered later."""

    def ask(self, what: str, *arguments: Any) -> None: ...

    def answer(self) -> Any: ...


class Here:
    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._answer: Any = None

    def ask(self, what: str, *arguments: Any) -> None:
        self._answer = getattr(self._shard, what)(*arguments)

    def answer(self) -> Any:
        return self._answer


class There:
    def __init__(self, ours: Connection) -> None:
        self._ours = ours

    def ask(self, what: str, *arguments: Any) -> None:
        self._ours.send((what, arguments))

    def answer(self) -> Any:
        answer = self._ours.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(shard: Shard, theirs: Connection) -> None:
    gc.freeze()  # what was there before the fork is shared as long as nobody writes to it
    try:
        while asked := theirs.recv():
            what, arguments = asked
            theirs.send(getattr(shard, what)(*arguments))
    except EOFError:
        pass  # whoever asked is gone
    except Exception as error:  # whatever it is: the other end raises it
        theirs.send(error)


@contextmanager
def _workers(shard: Shard, count: int) -> Iterator[list[Worker]]:
    if count == 1:
        yield [Here(shard)]
        return
    # A fork shares the clients, which are most of the memory, with this process.
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        workers: list[Worker] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(shard, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            # It would not see this end close: the processes forked after it hold it, too.
            stack.callback(process.terminate)
            workers.append(There(ours))
        yield workers


def run(setup: Setup, clients: Sequence[Client], cluster: Cluster) -> Ended:
    """Every client to its end; records in their order."""
    shard = Shard(setup, clients, samples=cluster.replicas == 1)
    count = min(cluster.processes, cluster.replicas)
    with _workers(shard, count) as workers:
        blind = cluster.routing in routing.BLIND or cluster.replicas == 1
        ended = (_blind if blind else _looking)(clients, cluster, workers)
    ended.records.sort(key=lambda record: record.number)
    return ended


def _blind(clients: Sequence[Client], cluster: Cluster, workers: list[Worker]) -> Ended:
    router, choose = _router(cluster)
    sent: list[list[Sent]] = [[] for _ in workers]
    for client in clients:
        at = router.send(client, choose)
        sent[at % len(workers)].append((client.number, at))
    for worker, part in zip(workers, sent, strict=True):
        worker.ask("whole", part)
    return _together(workers)


def _looking(clients: Sequence[Client], cluster: Cluster, workers: list[Worker]) -> Ended:
    router, choose = _router(cluster)
    at_client, num_live, now = 0, 0, 0.0
    while at_client < len(clients) or num_live:
        if not num_live:
            now = max(now, clients[at_client].asked.at)
        now = now + cluster.look if at_client < len(clients) else inf
        sent: list[list[Sent]] = [[] for _ in workers]
        while at_client < len(clients) and clients[at_client].asked.at < now:
            client = clients[at_client]
            at = router.send(client, choose)
            sent[at % len(workers)].append((client.number, at))
            at_client += 1
            num_live += 1
        for worker, part in zip(workers, sent, strict=True):
            worker.ask("part", part, now)
        for worker in workers:
            for number, at in worker.answer():
                router.ended(clients[number], at)
                num_live -= 1
    for worker in workers:
        worker.ask("rest")
    return _together(workers)


def _router(cluster: Cluster) -> tuple[routing.Router, routing.Policy]:
    return routing.Router(cluster.replicas, seed=0), routing.policy(cluster.routing)


def _together(workers: list[Worker]) -> Ended:
    ended = Ended([], [])
    for worker in workers:
        records, samples = worker.answer()
        ended.records.extend(records)
        ended.samples.extend(samples)
    return ended
