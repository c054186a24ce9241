"""The process that compiles grammars: asked once, in time, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest

from dynamo_serve import bundled
from dynamo_serve.config import StructuredSection
from dynamo_serve.core.request import Grammar
from dynamo_serve.grammar_checker import ENTRY_BYTES, KEPT_BYTES, MOST_WAITING, Checker
from dynamo_serve.grammars import BadGrammar, schema_grammar


def words() -> tuple[str, int, list[int]]:
    text = (bundled.path() / "tokenizer.json").read_text()
    return text, 2048, [2]


def fault(checker: Checker, grammar: Grammar) -> str:
    async def ask() -> str:
        try:
            await checker.check(grammar)
        except BadGrammar as error:
            return error.message
        return ""

    return asyncio.run(ask())


def test_what_takes_too_long_is_given_up_and_the_next_one_is_answered() -> None:
    checker = Checker(StructuredSection(compile_timeout_s=0.05), words)
    slow = schema_grammar({"properties": {f"p{i}": {"type": "string"} for i in range(3000)}})
    began = time.monotonic()
    assert "compile_timeout_s" in fault(checker, slow)
    assert fault(checker, schema_grammar({})) == ""
    assert "compile_timeout_s" in fault(checker, slow)  # remembered, not tried again
    assert time.monotonic() - began < 20


def test_equal_grammars_are_looked_at_once_and_wait_in_one_place() -> None:
    checker = Checker(StructuredSection(), words)
    asked: list[Grammar] = []

    def look(grammar: Grammar) -> None:
        asked.append(grammar)
        time.sleep(0.1)

    checker._ask = look  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        first = asyncio.create_task(checker.check(schema_grammar({})))
        others = [checker.check(schema_grammar({})) for _ in range(2 * MOST_WAITING)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, first.cancel)  # it hangs up: the others stay
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert isinstance(first, asyncio.CancelledError) and set(others) == {None}
    assert len(asked) == 1 and not checker._asking


def test_a_compiler_that_dies_is_started_again() -> None:
    checker = Checker(StructuredSection(), words)
    assert fault(checker, schema_grammar({})) == ""
    process = checker._helper._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert fault(checker, schema_grammar({"type": "null"})) == ""
    again = checker._helper._process
    assert again is not None and again.pid != process.pid
    del checker  # the process ends with whoever asked it
    again.wait(30)


def test_many_small_grammars_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(StructuredSection(), words)
    monkeypatch.setattr(checker, "_ask", lambda _: None)
    most = KEPT_BYTES // ENTRY_BYTES

    async def ask() -> None:
        for number in range(most + 100):
            checker._remember(Grammar("regex", str(number)), len(str(number)), None)
        await checker.check(Grammar("regex", "0"))

    asyncio.run(ask())
    assert most // 2 < len(checker._known) < most
