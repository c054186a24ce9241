"""Asks whether a grammar can be followed, before a request with it is queued.

Compilers of grammars are attacked with grammars. So processes of their own do it, under limits of
memory and time, and tenants take turns. One process has a short limit, so that whoever sends what
takes seconds does not hold up the rest; only what has met that limit is tried by the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_serve.config import StructuredSection
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import QuotaExceeded, Unavailable
from dynamo_serve.grammar_helper import Helper, Vocabulary
from dynamo_serve.grammars import BadGrammar
from dynamo_serve.turns import Turns

log = logging.getLogger(__name__)

QUICK_SECONDS = 0.2  # most grammars take a millisecond
SLOW_SECONDS = 0.02  # the engine does not let others wait for these
MOST_WAITING = 256  # different ones
MOST_OF_A_TENANT = 64
KEPT_BYTES = 8 << 20  # of grammars whose answer is remembered
ENTRY_BYTES = 512  # what remembering one takes besides its text
SLOW_KEPT_SECONDS = 60.0  # on a machine that is less busy it may be in time

Verdict = tuple[str, str] | None
"""The path in the schema and what is wrong there; None if nothing is."""


class _Known(NamedTuple):
    fault: Verdict
    is_slow: bool = False
    until: float = float("inf")


@dataclass(slots=True)
class _Asking:
    answer: asyncio.Task[_Known]
    num_readers: int = 0


class Checker:
    """Remembers its answers. All waiting is on threads of its own, never on the event loop."""

    def __init__(self, section: StructuredSection, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is called once an engine has started."""
        self._section = section
        self._vocabulary = vocabulary
        self._known: OrderedDict[Grammar, _Known] = OrderedDict()
        self._known_bytes = 0
        self._asking: dict[tuple[str, Grammar], _Asking] = {}
        self._num_asking: Counter[str] = Counter()  # by tenant
        self._lanes = [self._lane(min(QUICK_SECONDS, section.compile_timeout_s))]
        if section.compile_timeout_s > QUICK_SECONDS:
            self._lanes.append(self._lane(section.compile_timeout_s))

    def _lane(self, seconds: float) -> Turns[Grammar, _Known]:
        helper = Helper(gives_way=seconds > QUICK_SECONDS)
        weakref.finalize(self, helper.end)  # also when this process ends
        depth, vocabulary, known = self._section.max_depth, self._vocabulary, self._known

        def ask(grammar: Grammar) -> _Known:
            if found := known.get(grammar):  # for another tenant, meanwhile
                return found
            if not helper.is_up:
                helper.start(vocabulary())
            began = time.monotonic()
            try:
                answer = helper.ask((grammar.kind, grammar.text, depth), seconds)
            except TimeoutError:
                helper.start(vocabulary())  # in the turn of who made it necessary
                raise
            except EOFError as error:
                log.warning("a grammar of %d characters: %s", len(grammar.text), error)
                return _Known(("", "it is too complex to be compiled"))
            is_slow = seconds > QUICK_SECONDS or time.monotonic() - began > SLOW_SECONDS
            return _Known(None if answer is None else (answer[0], answer[1]), is_slow)

        return Turns(ask, self._remember)

    async def check(self, grammar: Grammar, tenant: str) -> Grammar:
        """The same, with `is_slow` as it was found to be.

        Raises `BadGrammar`; `Unavailable` and `QuotaExceeded` if too many wait for an answer,
        and `Unreadable`.
        """
        size = len(grammar.text.encode())
        if size > self._section.max_bytes:
            most = self._section.max_bytes
            raise BadGrammar(f"it has {size} bytes, more than structured.max_bytes ({most})")
        found = self._known.get(grammar)
        if found is not None and found.until < time.monotonic():
            self._forget(grammar)
            found = None
        if found is None:
            found = await self._found_out(grammar, tenant)
        else:
            self._known.move_to_end(grammar)
        if found.fault is not None:
            raise BadGrammar(found.fault[1], found.fault[0])
        return grammar._replace(is_slow=found.is_slow)

    async def _found_out(self, grammar: Grammar, tenant: str) -> _Known:
        """Asked once for all who wait for it; not at all once nobody does."""
        asking = self._asking.get((tenant, grammar))
        if asking is None:
            self._check_room(tenant)
            asking = _Asking(asyncio.create_task(self._ask(grammar, tenant)))
            self._asking[tenant, grammar] = asking
            self._num_asking[tenant] += 1
        asking.num_readers += 1
        try:
            return await asyncio.shield(asking.answer)
        finally:
            asking.num_readers -= 1
            if not asking.num_readers:
                del self._asking[tenant, grammar]
                self._num_asking[tenant] -= 1
                asking.answer.cancel()

    def _check_room(self, tenant: str) -> None:
        if self._num_asking[tenant] >= MOST_OF_A_TENANT:
            raise QuotaExceeded(
                f"{MOST_OF_A_TENANT} of your grammars wait to be compiled: send less at a time.",
                retry_after=1.0,
                reason="grammars_waiting",
                limit=MOST_OF_A_TENANT,
            )
        if len(self._asking) >= MOST_WAITING:
            raise Unavailable("too many grammars are being compiled", retry_after=1.0)
        self._num_asking += Counter()  # forgets tenants with none

    async def _ask(self, grammar: Grammar, tenant: str) -> _Known:
        for lane in self._lanes:
            try:
                return await lane.run(tenant, grammar)
            except TimeoutError:
                continue
        limit = self._section.compile_timeout_s
        why = f"compiling it takes more than structured.compile_timeout_s ({limit:g} s)"
        found = _Known(("", why), True, time.monotonic() + SLOW_KEPT_SECONDS)
        self._remember(grammar, found)
        return found

    def _remember(self, grammar: Grammar, found: _Known) -> None:
        if grammar not in self._known:
            self._known_bytes += len(grammar.text.encode()) + ENTRY_BYTES
        self._known[grammar] = found
        while self._known_bytes > KEPT_BYTES and len(self._known) > 1:
            self._forget(next(iter(self._known)))

    def _forget(self, grammar: Grammar) -> None:
        del self._known[grammar]
        self._known_bytes -= len(grammar.text.encode()) + ENTRY_BYTES
