"""What grammars are to llguidance, which follows them: for the engine, and for whoever checks them
before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import llguidance
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from dynamo_serve.core.request import Grammar

# White space between two parts of a JSON text. Without a bound some models never get on; a line
# break and the indentation of thirty levels find room.
SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
NO_SPACE = {"whitespace_flexible": False}
# A mask takes some 20 ms at the very worst, and a state of the lexer up to 2 KB. With the library's
# own limits one grammar could take gigabytes of an engine's memory, and errors repeat it all.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
OPTIONS = "x-guidance"  # the key in a schema that the library reads
SHOWN = 300
LIBRARY = f"llguidance {llguidance.__version__}"


class BadGrammar(ValueError):
    """Nothing can follow it; `path` is the place in a JSON schema that is at fault."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path


def vocabulary(tokenizer: str, vocab_size: int, eos_ids: Iterable[int]) -> LLTokenizer:
    """From the text of a tokenizer.json. Of `eos_ids` each may be picked where a text may end."""
    smallest = LLTokenizer(tokenizer).vocab_size
    return LLTokenizer(tokenizer, n_vocab=max(vocab_size, smallest), eos_token=sorted(eos_ids))


def compiled(grammar: Grammar, words: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of a text; a copy of it costs microseconds. Raises `BadGrammar`.

    The interpreter lock is given up meanwhile.
    """
    try:
        text = source(grammar)
        if any(mark in grammar.text.replace("\\", "") for mark in _special_texts(words)):
            text = _unforced(grammar, text)
    except (GbnfToLarkError, RecursionError, ValueError) as error:
        raise BadGrammar(in_short(str(error))) from error
    matcher = LLMatcher(words, text, limits=LIMITS, log_level=0)
    if fault := matcher.get_error():
        raise BadGrammar(in_short(fault))
    return matcher


@lru_cache(maxsize=2)
def _special_texts(words: LLTokenizer) -> frozenset[str]:
    """What the special tokens are written as."""
    special = filter(words.is_special_token, range(words.vocab_size))
    return frozenset(words.decode_str([token]) for token in special) - {""}


def _unforced(grammar: Grammar, text: str) -> str:
    """`text`, its `source`, with nothing written ahead. Where only one text can follow, the library
    has it tokenized, and special tokens in it would be those tokens: no text to a grammar."""
    if grammar.kind == "json_schema":
        text = f"start: %json {grammar.text}"
    elif grammar.kind == "regex":
        text = json.loads(text)["grammars"][0]["lark_grammar"]
    elif grammar.kind == "grammar" and "%llguidance" in text:
        return text
    return f'%llguidance {{"no_forcing": true}}\n{text}'


def source(grammar: Grammar) -> str:
    """As llguidance reads it. Raises `BadGrammar`."""
    match grammar.kind:
        case "json_schema":
            if grammar.text == "false":
                raise BadGrammar("false allows nothing")
            return LLMatcher.grammar_from_json_schema(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            texts = json.loads(grammar.text)
            either = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {either}")
        case "grammar":
            return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
    raise BadGrammar(f"there is no kind of grammar {grammar.kind!r}")


def schema_grammar(schema: Any, *, compact: bool = False) -> Grammar:
    """Of JSON texts that a schema allows; `compact` ones have no white space between their parts.

    The order of properties counts: it is that of the answer. Raises `BadGrammar`.
    """
    if isinstance(schema, dict) and OPTIONS in schema:
        raise BadGrammar("this keyword is not followed here", OPTIONS)
    if schema is not False:
        schema = {**({} if schema is True else schema), OPTIONS: NO_SPACE if compact else SPACE}
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False, separators=(",", ":")))


def in_short(error: str) -> str:
    """What people need of the library's message: its first line, or what is said of a regular
    expression."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["it is not followed"]
    if found := [line for line in lines if line.startswith("error:")]:
        return f"regular expression: {found[0].removeprefix('error:').strip()}"
    if lines[0].startswith("oneOf constraints"):
        return "the parts of oneOf do not exclude each other: say anyOf, or give them constants"
    return lines[0].rstrip(":.")[:SHOWN]
