"""From the fields that say what an answer has to be to a grammar that can be followed."""

from __future__ import annotations

import json
from typing import Any

from dynamo_serve.api.names import Names
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.schema_structured import ResponseFormat, StructuredOutputs
from dynamo_serve.config import StructuredSection
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.grammar_checker import Checker
from dynamo_serve.grammar_helper import Unreadable, Vocabulary
from dynamo_serve.grammars import BadGrammar, schema_grammar
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer

OBJECT = {"type": "object"}
KINDS = ("json", "regex", "choice", "grammar", "json_object")


class Grammars:
    """Makes grammars of a tenant's request, and has them checked before anything is queued."""

    def __init__(self, compilers: Compilers, tenant: str) -> None:
        self._compilers = compilers
        self._tenant = tenant

    async def of(self, body: ChatRequest | CompletionRequest) -> Grammar | None:
        """Raises `InvalidRequest` with the path of what is wrong."""
        wished = wished_grammar(body)
        return None if wished is None else await self.check(*wished)

    async def check(self, grammar: Grammar, path: str) -> Grammar:
        """For the engine, which can follow it, a grammar that was made from the field `path`.

        Raises `InvalidRequest`, and `TryLater` if too many are being looked at.
        """
        self.check_engine(path)
        try:
            return await self._compilers.check(grammar, self._tenant)
        except BadGrammar as error:
            raise _fault(path, error) from error
        except Unreadable as error:
            raise self._unsupported(path) from error

    def check_engine(self, path: str) -> None:
        """Raise `UnsupportedField` where no grammar is followed, whatever `path` says."""
        if self._compilers.why_not():
            raise self._unsupported(path)

    def _unsupported(self, path: str) -> UnsupportedField:
        why_not = self._compilers.why_not()
        return UnsupportedField(f"'{path}' is not supported here: {why_not}.", param=path)


class Compilers:
    """What grammars are compiled with, for the model that is served."""

    def __init__(self, section: StructuredSection, service: Service, tokenizer: Tokenizer) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._checker = Checker(section, self._vocabulary)
        self._unreadable = ""

    async def check(self, grammar: Grammar, tenant: str) -> Grammar:
        """As `Checker.check`. After `Unreadable`, `why_not` says why."""
        try:
            return await self._checker.check(grammar, tenant)
        except Unreadable as error:
            self._unreadable = f"the model's tokenizer cannot be read for it ({error})"
            raise

    def why_not(self) -> str:
        """Why the engine follows no grammar; empty if it does."""
        if not self._service.spec.follows_grammars:
            kind = self._service.spec.facts.get("architecture", "this")
            return f"the {kind} engine follows no grammar"
        if self._tokenizer.as_json is None:
            return "the model's tokenizer is not a fast one"
        if not self._tokenizer.eos_ids:
            return "the model has no end-of-text token"
        return self._unreadable

    def _vocabulary(self) -> Vocabulary:
        assert self._tokenizer.as_json is not None
        eos_ids = sorted(self._tokenizer.eos_ids)
        return self._tokenizer.as_json, self._service.spec.vocab_size, eos_ids


def _fault(path: str, error: BadGrammar) -> InvalidRequest:
    at = path + (f".{error.path}" if error.path and error.path[0] != "[" else error.path)
    return InvalidRequest(f"'{at}': {error.message}.", param=at)


def wished_grammar(body: ChatRequest | CompletionRequest) -> tuple[Grammar, str] | None:
    """What a request asks for, and the path of the field that says so."""
    one, other = body.response_format, body.structured_outputs
    grammar = _of_format(one, body.names) if one is not None else None
    if other is None:
        return grammar
    if grammar is not None:
        raise InvalidRequest(
            f"'structured_outputs' and '{body.names.of('response_format')}' say twice what the "
            "answer has to be.",
            param="structured_outputs",
        )
    return _of_structured(other)


def _of_format(wish: ResponseFormat, names: Names) -> tuple[Grammar, str] | None:
    path = names.of("response_format.json_schema")
    if wish.type != "json_schema" and wish.json_schema is not None:
        raise InvalidRequest(f'\'{path}\' needs "type": "json_schema".', param=path)
    if wish.type == "text":
        return None
    if wish.type == "json_object":
        return schema_grammar(OBJECT), names.of("response_format")
    if wish.json_schema is None:
        raise InvalidRequest(f"'{path}' is required.", param=path)
    schema = wish.json_schema.schema_
    return of_schema(
        {} if schema is None else schema, names.of("response_format.json_schema.schema")
    )


def _of_structured(wish: StructuredOutputs) -> tuple[Grammar, str]:
    values = dict(zip(KINDS, (wish.json_, wish.regex, wish.choice, wish.grammar), strict=False))
    given = {kind: value for kind, value in values.items() if value is not None}
    if wish.json_object:
        given["json_object"] = True
    if len(given) != 1:
        raise InvalidRequest(
            f"'structured_outputs' takes exactly one of {', '.join(KINDS)}, not {len(given)}.",
            param="structured_outputs",
        )
    [(kind, value)] = given.items()
    path, is_compact = f"structured_outputs.{kind}", wish.disable_any_whitespace
    if kind not in ("json", "json_object") and is_compact:
        raise InvalidRequest(
            "'structured_outputs.disable_any_whitespace' says something about JSON only.",
            param="structured_outputs.disable_any_whitespace",
        )
    match kind:
        case "json_object":
            return schema_grammar(OBJECT, compact=is_compact), path
        case "json":
            return of_schema(_schema(value, path), path, compact=is_compact)
        case "choice":
            return Grammar("choice", json.dumps(value, ensure_ascii=False)), path
    return Grammar(kind, str(value)), path


def of_schema(schema: Any, path: str, *, compact: bool = False) -> tuple[Grammar, str]:
    """Of JSON that a schema allows, which is the field `path`. Raises `InvalidRequest`."""
    try:
        return schema_grammar(schema, compact=compact), path
    except BadGrammar as error:
        raise _fault(path, error) from error
    except RecursionError as error:
        raise InvalidRequest(f"'{path}' is nested too deep.", param=path) from error


def _schema(value: Any, path: str) -> Any:
    """A JSON schema that may have been sent as text, in which half a character can hide."""
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
        json.dumps(schema, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"'{path}' is not JSON: {error}.", param=path) from error
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest(f"'{path}' is no JSON schema: an object is.", param=path)
    return schema
