"""The process that compiles grammars, and the pipes to it."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import subprocess
import sys
import threading
from typing import Any

from dynamo_serve.errors import Unavailable
from dynamo_serve.process import describe_exit, engine_environment

log = logging.getLogger(__name__)

CODE = ("-P", "-m", "dynamo_serve.grammar_process")
START_SECONDS = 60.0  # for a large vocabulary on a busy machine

Vocabulary = tuple[str, int, list[int]]
"""The text of tokenizer.json, the width of the logits, the ids that end a text."""


class Unreadable(Exception):
    """The library cannot read the model's tokenizer, and never will; the message says why."""


class Helper:
    """One of them, started when it is asked first. One thread at a time."""

    def __init__(self, *, gives_way: bool = False) -> None:
        """Whether it has a low priority."""
        self._flags = ["--give-way"] if gives_way else []
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, vocabulary: Vocabulary) -> None:
        """Raises `Unavailable`, and `Unreadable`."""
        self.end()
        self._process = subprocess.Popen(
            [sys.executable, *CODE, *self._flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=engine_environment(1),
            start_new_session=True,  # Ctrl-C is for the API process
        )
        try:
            fault = self.ask(vocabulary, START_SECONDS)
        except (EOFError, TimeoutError) as error:
            log.error("grammars cannot be compiled: %s", error)
            raise Unavailable(f"grammars cannot be compiled ({error})") from error
        if fault:
            self.end()
            raise Unreadable(fault)

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
