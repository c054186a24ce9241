"""The process that looks whether grammars can be followed: whatever a client sends, it harms no
other one.

A line of JSON for each question, and one in answer. First comes the vocabulary; the answer to that
is why it cannot be read, empty if it can.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
from typing import Any, BinaryIO

from llguidance import LLTokenizer

from dynamo_serve.core.request import Grammar
from dynamo_serve.grammar_schema import Flaw, culprit, first_flaw
from dynamo_serve.grammars import (
    OPTIONS,
    BadGrammar,
    compiled,
    in_short,
    schema_grammar,
    vocabulary,
)

MEMORY_BYTES = 4 << 30  # of address space; threads and the vocabulary take some of it
TRIED_TOKENS = 24
SLOW_NICE = 10
NO_TEXT = "no text that the model could write fits it"
STACK_BYTES = 8 << 20  # less than an engine compiles with, so that what is sound here is there, too


def flaw_in(grammar: Grammar, words: LLTokenizer, max_depth: int) -> Flaw | None:
    """Why nothing can follow this grammar, and where in a schema; None if something can."""
    if grammar.kind == "json_schema":
        schema = json.loads(grammar.text)
        bare = {k: v for k, v in schema.items() if k != OPTIONS} if _is_map(schema) else schema
        if flaw := first_flaw(bare, max_depth):
            return flaw
        if error := error_of(grammar, words):
            return culprit(bare, error, lambda part: error_of(schema_grammar(part), words)), error
        return None
    error = error_of(grammar, words)
    return ("", error) if error else None


def _is_map(schema: Any) -> bool:
    return isinstance(schema, dict)


def error_of(grammar: Grammar, words: LLTokenizer) -> str:
    """Empty if it compiles and some tokens can be picked, whichever come first."""
    try:
        matcher = compiled(grammar, words)
    except BadGrammar as error:
        return str(error)
    rng = random.Random(0)
    for at in range(TRIED_TOKENS):
        mask = matcher.compute_bitmask()
        if fault := matcher.get_error():
            empty = "NoExtension" in fault and at == 0
            return NO_TEXT if empty else f"it is too complex: {in_short(fault)}"
        if matcher.is_stopped():
            break
        # A byte of the mask that has a bit, from anywhere on.
        start = rng.randrange(len(mask))
        places = (*range(start, len(mask)), *range(start))
        if (place := next((i for i in places if mask[i]), None)) is None:
            return NO_TEXT
        matcher.consume_token(8 * place + (mask[place] & -mask[place]).bit_length() - 1)
    fault = matcher.get_error()
    return f"it is too complex: {in_short(fault)}" if fault else ""


def answer(questions: BinaryIO, answers: BinaryIO) -> None:
    def say(value: Any) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    try:
        words = vocabulary(*json.loads(questions.readline()))
    except ValueError as error:
        say(in_short(str(error)))
        return
    say("")
    for line in questions:
        kind, text, max_depth = json.loads(line)
        try:
            say(flaw_in(Grammar(kind, text), words, max_depth))
        except (RecursionError, MemoryError):
            say(("", "it is nested too deep, or too large"))


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the API process closes our end of the pipe
    if "--give-way" in sys.argv[1:]:
        os.nice(SLOW_NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=answer, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
