"""The process that compiles grammars: asked once, in time, and started again."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dynamo_serve import bundled, grammar_checker
from dynamo_serve.config import StructuredSection
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import QuotaExceeded, Unavailable
from dynamo_serve.grammar_checker import (
    ENTRY_BYTES,
    KEPT_BYTES,
    MOST_OF_A_TENANT,
    MOST_WAITING,
    Checker,
    _Known,
)
from dynamo_serve.grammar_helper import Helper, Unreadable
from dynamo_serve.grammars import BadGrammar, schema_grammar
from tests.patience import PATIENCE_S
from tests.tries import sooner_or_later


def words() -> tuple[str, int, list[int]]:
    text = (bundled.path() / "tokenizer.json").read_text()
    return text, 2048, [2]


def fault(checker: Checker, grammar: Grammar) -> str:
    async def ask() -> str:
        try:
            await checker.check(grammar, "a")
        except BadGrammar as error:
            return error.message
        return ""

    return asyncio.run(ask())


def test_what_takes_too_long_is_given_up_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = noted_starts(monkeypatch)
    checker = Checker(StructuredSection(compile_timeout_s=0.05), words)
    slow = schema_grammar({"properties": {f"p{i}": {"type": "string"} for i in range(3000)}})
    assert "compile_timeout_s" in fault(checker, slow)
    given_up, _ = started
    assert given_up.poll() is not None
    quick = (schema_grammar({"const": number}) for number in itertools.count())
    assert sooner_or_later(lambda: not fault(checker, next(quick)) or None, "answered in time")
    num_started = len(started)
    assert "compile_timeout_s" in fault(checker, slow)
    assert len(started) == num_started, "it is remembered, not tried again"


def test_what_was_too_slow_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(StructuredSection(), words)
    asked = stand_in(monkeypatch, lambda grammar: seconds_of(grammar, 9.0))
    assert "compile_timeout_s (5 s)" in fault(checker, Grammar("regex", "a"))
    assert "compile_timeout_s (5 s)" in fault(checker, Grammar("regex", "a"))
    assert len(asked) == 2  # once by each process, and remembered
    monkeypatch.setattr(grammar_checker, "SLOW_KEPT_SECONDS", 0.0)
    assert "compile_timeout_s" in fault(checker, Grammar("regex", "aa"))
    stand_in(monkeypatch, lambda grammar: 0.0)
    assert fault(checker, Grammar("regex", "aa")) == ""
    assert "compile_timeout_s" in fault(checker, Grammar("regex", "a"))


def stand_in(
    monkeypatch: pytest.MonkeyPatch, takes: Callable[[Grammar], float]
) -> list[tuple[Grammar, float]]:
    """Compiles nothing, as if it took so many seconds. The list: what was asked, and the limits."""
    asked = []

    def ask(helper: Helper, question: tuple[str, str, int], limit: float) -> None:
        grammar = Grammar(question[0], question[1])
        asked.append((grammar, limit))
        if takes(grammar) > limit:
            raise TimeoutError

    monkeypatch.setattr(Helper, "start", lambda helper, vocabulary: None)
    monkeypatch.setattr(Helper, "ask", ask)
    return asked


def seconds_of(grammar: Grammar, slow: float) -> float:
    return slow if grammar.text.startswith("a") else 0.0


def test_a_slow_grammar_is_tried_by_the_patient_process_only_after_the_quick_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = Checker(StructuredSection(), words)
    asked = stand_in(monkeypatch, lambda grammar: seconds_of(grammar, 2.0))
    a, b = Grammar("regex", "a"), Grammar("regex", "b")
    assert asyncio.run(checker.check(a, "")) == a._replace(is_slow=True)
    assert asyncio.run(checker.check(a, "")) == a._replace(is_slow=True)
    assert asyncio.run(checker.check(b, "")).text == "b"
    assert [(g.text, limit) for g, limit in asked] == [("a", 0.2), ("a", 5.0), ("b", 0.2)]


def test_equal_grammars_are_looked_at_once_and_wait_in_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = Checker(StructuredSection(), words)
    go_on = threading.Event()
    asked = stand_in(monkeypatch, lambda _: 0.0 if go_on.wait(PATIENCE_S) else 99.0)

    async def ask() -> list[Any]:
        first = asyncio.create_task(checker.check(schema_grammar({}), "a"))
        others = [
            asyncio.create_task(checker.check(schema_grammar({}), "ab"[i % 2]))
            for i in range(2 * MOST_WAITING)
        ]
        await asyncio.sleep(0)
        first.cancel()  # it hangs up: the others stay
        await asyncio.wait((first,))
        go_on.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert isinstance(first, asyncio.CancelledError) and {one.text for one in others} == {
        schema_grammar({}).text
    }
    assert len(asked) == 1 and not checker._asking


def test_nobody_has_all_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(StructuredSection(), words)
    go_on = threading.Event()
    stand_in(monkeypatch, lambda _: 0.0 if go_on.wait(PATIENCE_S) else 99.0)

    async def ask() -> list[list[Any]]:
        tasks = {}
        for tenant in "abcde":
            texts = [tenant + str(i) for i in range(MOST_OF_A_TENANT + 1)]
            asking = (checker.check(Grammar("regex", text), tenant) for text in texts)
            tasks[tenant] = list(map(asyncio.create_task, asking))
            await asyncio.sleep(0)
        go_on.set()
        return [await asyncio.gather(*own, return_exceptions=True) for own in tasks.values()]

    *first, last = asyncio.run(ask())
    for answers in first:
        assert {type(answer) for answer in answers[:-1]} == {Grammar}
        assert isinstance(answers[-1], QuotaExceeded) and answers[-1].retry_after
    assert {type(answer) for answer in last} == {Unavailable}


def test_a_tokenizer_that_cannot_be_read_is_no_passing_fault() -> None:
    checker = Checker(StructuredSection(), lambda: ("{}", 2048, [2]))
    with pytest.raises(Unreadable, match="tokenizer"):
        asyncio.run(checker.check(schema_grammar({}), "a"))


def noted_starts(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that compile, as they are started."""
    started = []
    start = Helper.start

    def noted(helper: Helper, vocabulary: Any) -> None:
        start(helper, vocabulary)
        assert helper._process is not None
        started.append(helper._process)

    monkeypatch.setattr(Helper, "start", noted)
    return started


def test_a_compiler_that_dies_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started = noted_starts(monkeypatch)
    checker = Checker(StructuredSection(), words)
    assert fault(checker, schema_grammar({})) == ""
    [process] = started
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert fault(checker, schema_grammar({"type": "null"})) == ""
    _, again = started
    assert again.pid != process.pid
    del checker  # the process ends with whoever asked it
    deadline = time.monotonic() + PATIENCE_S
    while again.poll() is None:  # a thread that worked for it may hold it a moment longer
        assert time.monotonic() < deadline
        gc.collect()


def test_many_small_grammars_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(StructuredSection(), words)
    stand_in(monkeypatch, lambda _: 0.0)
    most = KEPT_BYTES // ENTRY_BYTES

    async def ask() -> None:
        for number in range(most + 100):
            checker._remember(Grammar("regex", str(number)), _Known(None))
        await checker.check(Grammar("regex", "0"), "a")

    asyncio.run(ask())
    assert most // 2 < len(checker._known) < most
