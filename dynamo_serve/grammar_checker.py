"""Asks whether a grammar can be followed, before a request with it is queued.

Compilers of grammars are attacked with grammars. So a process of its own does it, under limits of
memory and time: it is started with the first grammar, and again when it had to be ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dynamo_serve.config import StructuredSection
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import Unavailable
from dynamo_serve.grammars import BadGrammar
from dynamo_serve.process import describe_exit, engine_environment

log = logging.getLogger(__name__)

CODE = ("-P", "-m", "dynamo_serve.grammar_process")
START_SECONDS = 60.0  # for a large vocabulary on a busy machine
MOST_WAITING = 256  # different ones; most take a millisecond
KEPT_BYTES = 8 << 20  # of grammars whose answer is remembered
ENTRY_BYTES = 512  # what remembering one takes besides its text

Vocabulary = tuple[str, int, list[int]]
"""The text of tokenizer.json, the width of the logits, the ids that end a text."""


@dataclass(slots=True)
class _Asking:
    answer: asyncio.Future[tuple[str, str] | None]
    num_readers: int = 0


class Checker:
    """Remembers its answers. All waiting is on a thread of its own, never on the event loop."""

    def __init__(self, section: StructuredSection, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is called once an engine has started."""
        self._section = section
        self._vocabulary = vocabulary
        self._known: OrderedDict[Grammar, tuple[str, str] | None] = OrderedDict()
        self._known_bytes = 0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._asking: dict[Grammar, _Asking] = {}
        self._helper = Helper()
        weakref.finalize(self, self._helper.end)  # also when this process ends

    async def check(self, grammar: Grammar) -> None:
        """Raises `BadGrammar`, and `Unavailable` if too many wait for an answer."""
        size = len(grammar.text.encode())
        if size > self._section.max_bytes:
            most = self._section.max_bytes
            raise BadGrammar(f"it has {size} bytes, more than structured.max_bytes ({most})")
        if grammar not in self._known:
            self._remember(grammar, size, await self._found_out(grammar))
        else:
            self._known.move_to_end(grammar)
        if (fault := self._known[grammar]) is not None:
            raise BadGrammar(fault[1], fault[0])

    async def _found_out(self, grammar: Grammar) -> tuple[str, str] | None:
        """Asked once for all who wait for it; not at all once nobody does."""
        asking = self._asking.get(grammar)
        if asking is None:
            if len(self._asking) >= MOST_WAITING:
                raise Unavailable("too many grammars are being compiled", retry_after=1.0)
            loop = asyncio.get_running_loop()
            asking = _Asking(loop.run_in_executor(self._threads, self._ask, grammar))
            self._asking[grammar] = asking
        asking.num_readers += 1
        try:
            return await asyncio.shield(asking.answer)
        finally:
            asking.num_readers -= 1
            if not asking.num_readers:
                del self._asking[grammar]
                asking.answer.cancel()

    def _remember(self, grammar: Grammar, size: int, fault: tuple[str, str] | None) -> None:
        if grammar not in self._known:
            self._known_bytes += size + ENTRY_BYTES
        self._known[grammar] = fault
        while self._known_bytes > KEPT_BYTES and len(self._known) > 1:
            oldest, _ = self._known.popitem(last=False)
            self._known_bytes -= len(oldest.text.encode()) + ENTRY_BYTES

    def _ask(self, grammar: Grammar) -> tuple[str, str] | None:
        if not self._helper.is_up:
            self._helper.start(self._vocabulary())
        limit = self._section.compile_timeout_s
        try:
            answer = self._helper.ask((*grammar, self._section.max_depth), limit)
        except TimeoutError:
            return "", f"compiling it takes more than structured.compile_timeout_s ({limit:g} s)"
        except EOFError as error:
            log.warning("a grammar of %d characters: %s", len(grammar.text), error)
            return "", "it is too complex to be compiled"
        return None if answer is None else (answer[0], answer[1])


class Helper:
    """The process that compiles, and the pipes to it. One thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, vocabulary: Vocabulary) -> None:
        """Raises `Unavailable`."""
        self.end()
        self._process = subprocess.Popen(
            [sys.executable, *CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=engine_environment(1),
            start_new_session=True,  # Ctrl-C is for the API process
        )
        try:
            self.ask(vocabulary, START_SECONDS)
        except (EOFError, TimeoutError) as error:
            log.error("grammars cannot be compiled: %s", error)
            raise Unavailable(f"grammars cannot be compiled ({error})") from error

    def ask(self, question: Any, seconds: float) -> Any:
        """Its answer. Raises `TimeoutError` and `EOFError`; the process has then ended."""
        process = self._process
        assert process is not None and process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is what is read next
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            self.end()
            raise TimeoutError(f"no answer within {seconds:g} s")
        if not (line := process.stdout.readline()):
            code = process.wait()
            self.end()
            raise EOFError(describe_exit(code, "the process that compiles grammars"))
        return json.loads(line)

    def end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin and process.stdout
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
