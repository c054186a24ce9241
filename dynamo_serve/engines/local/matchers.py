"""Grammars of live sequences: compiled once each, followed token by token, masks made beside the
step.

Where a sequence is in its grammar is a function of its tokens alone: it is found again from them
after a preemption or in another engine.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from dynamo_serve.cgroups import usable_cores
from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import Grammar
from dynamo_serve.engines.local.follower import MOST_CHEAP, Follower, Masks
from dynamo_serve.fair_queue import FairQueue
from dynamo_serve.grammars import compiled

KEPT = 64  # compiled grammars
STACK_BYTES = 32 << 20  # to compile with; see `grammar_process`
# What a step with others in it waits for masks once it has its logits: this part of what it has
# taken so far. A mask that takes longer is used in the next one: nobody else waits for it.
PATIENCE_PART, LEAST_PATIENCE = 0.05, 0.0003
PATIENCE_ALONE = 0.1  # so that commands are still looked at
MOST_MAKERS = 8
SLOW_NICE = 10


class Matchers:
    """The followers of the live sequences, and the threads that work for them."""

    def __init__(self, vocabulary: Callable[[], LLTokenizer]) -> None:
        """`vocabulary` is called once, on a thread, when there is a grammar."""
        self._vocabulary = vocabulary
        self._words: LLTokenizer | None = None
        self._reading = threading.Lock()
        self._slow_grammars = FairQueue[tuple[Grammar, Future[LLMatcher]]]()
        self._lock = threading.Lock()  # of that queue
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._of: dict[str, Follower] = {}
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._quick: list[Future[None]] = []  # the latest jobs
        self._slow: list[Future[None]] = []
        self._began = 0.0

    def begin(self, work: Sequence[Work]) -> dict[str, Follower]:
        """Have masks made for all of `work` that has a grammar and samples, which is to be run
        now. The followers, by sequence."""
        followers = {}
        self._began = time.perf_counter()
        for w in work:
            if w.grammar is None:
                continue
            follower = self._of.get(w.seq_id)
            if follower is None:
                tenant = w.request.tenant if w.request else ""
                follower = self._of[w.seq_id] = Follower(self._start(w.grammar, tenant))
            follower.see(w)
            if w.samples:
                followers[w.seq_id] = follower
        if followers:
            self._make_cheap(followers.values())
            self._ask(followers.values())
        return followers

    def finish(self, followers: Mapping[str, Follower], *, is_alone: bool) -> dict[str, Masks]:
        """The masks that are there by now, or soon; the others have to wait for a later step."""
        if not all(f.is_ready for f in followers.values()):
            patience = max(LEAST_PATIENCE, PATIENCE_PART * (time.perf_counter() - self._began))
            self._ask(followers.values())  # those whose grammar was being compiled till now
            wait(self._quick, timeout=patience)
            if is_alone and not any(f.is_ready for f in followers.values()):
                jobs: set[Future[Any]] = {*self._slow}
                jobs |= {f.start for f in followers.values() if not f.start.done()}
                wait(jobs, PATIENCE_ALONE, FIRST_COMPLETED)
                self._ask(followers.values())
                wait(self._quick, timeout=PATIENCE_ALONE)
        return {id: f.made for id, f in followers.items() if f.made is not None and f.is_ready}

    def _make_cheap(self, followers: Iterable[Follower]) -> None:
        left = MOST_CHEAP
        for follower in followers:
            if follower.is_cheap and follower.wants and left > 0:
                follower.asked, follower.made = follower.wanted, None
                follower.make()
                left -= follower.seconds

    def go_on(self, followers: Mapping[str, Follower]) -> None:
        """The step has been taken in: begin with the masks for the next one, which may have no
        draft."""
        live = [f for f in followers.values() if not f.is_over and not f.is_cheap]
        for follower in live:
            assert follower.wanted is not None
            follower.wanted = follower.length, (), follower.wanted[2]
        self._ask(live)

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids if self._of else ():
            self._of.pop(seq_id, None)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._pools.clear()
        self._of.clear()
        self._compiled.clear()

    def _start(self, grammar: Grammar, tenant: str) -> Future[LLMatcher]:
        """Where texts of a grammar begin; nearly always at once, else it is being compiled."""
        future = self._compiled.get(grammar)
        if future is not None:
            self._compiled.move_to_end(grammar)
            return future
        before = threading.stack_size(STACK_BYTES)
        try:
            if grammar.is_slow:
                future = Future()
                with self._lock:
                    self._slow_grammars.push(tenant, (grammar, future))
                self._pool("slow-grammars", 1).submit(self._compile_slow)
            else:
                future = self._pool("grammars", 1).submit(self._compile, grammar)
        finally:
            threading.stack_size(before)
        self._compiled[grammar] = future
        if len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return future

    def _compile(self, grammar: Grammar) -> LLMatcher:
        with self._reading:
            if self._words is None:
                self._words = self._vocabulary()
        return compiled(grammar, self._words)

    def _compile_slow(self) -> None:
        """The one whose turn it is."""
        with self._lock:
            turn = self._slow_grammars.pop()
        assert turn is not None
        grammar, future = turn
        began = time.perf_counter()
        try:
            future.set_result(self._compile(grammar))
        except Exception as error:
            future.set_exception(error)
        with self._lock:
            self._slow_grammars.charge(time.perf_counter() - began)

    def _ask(self, followers: Iterable[Follower]) -> None:
        quick, slow = list[Follower](), list[Follower]()
        for follower in followers:
            if follower.wants:
                follower.asked, follower.made = follower.wanted, None
                (slow if follower.is_slow else quick).append(follower)
        if not quick and not slow:
            return
        number = min(MOST_MAKERS, max(1, usable_cores() // 2))
        self._quick = [job for job in self._quick if not job.done()]
        self._slow = [job for job in self._slow if not job.done()]
        self._quick += [
            self._pool("masks", number).submit(_make_all, part)
            for part in (quick[i::number] for i in range(number))
            if part
        ]
        self._slow += [self._pool("slow-masks", 1).submit(_make_all, [f]) for f in slow]

    def _pool(self, name: str, number: int) -> ThreadPoolExecutor:
        if name not in self._pools:
            begin = _give_way if name.startswith("slow-") else None
            self._pools[name] = ThreadPoolExecutor(number, name, initializer=begin)
        return self._pools[name]


def _give_way() -> None:
    """Linux has a priority for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SLOW_NICE)


def _make_all(followers: Iterable[Follower]) -> None:
    for follower in followers:
        follower.make()
