"""Which part of a JSON schema is at fault: the path that a client is told."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

# What is followed; the types of their values are the compiler's to check.
FOLLOWED = frozenset(
    (
        *("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"),
        *("properties", "patternProperties", "additionalProperties", "required"),
        *("minProperties", "maxProperties", "items", "prefixItems", "additionalItems"),
        *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
# What says nothing about which values are valid.
NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly"),
        *("writeOnly", "$schema", "$id", "id", "$comment", "$anchor", "discriminator"),
        *("externalDocs", "xml"),
    )
)
BY_NAME = ("properties", "patternProperties")
IN_ORDER = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
ALONE = ("items", "additionalItems", "additionalProperties")
MOST_TRIALS = 256  # parts compiled alone, to find the one that cannot be

Flaw = tuple[str, str]
"""A path and what is wrong there."""


def first_flaw(schema: Any, max_depth: int) -> Flaw | None:
    """The first part that is no schema, is nested too deep, or has a keyword that is not followed.
    Definitions count where they are referred to."""
    waiting, seen = [("", schema, 1)], set()
    while waiting:
        path, node, depth = waiting.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            return path, "a schema is an object, true or false"
        if depth > max_depth:
            return path, f"schemas nested deeper than {max_depth} levels (structured.max_depth)"
        for keyword in node:
            if keyword not in FOLLOWED and keyword not in NOTES and not _is_extension(keyword):
                return join(path, keyword), "this keyword is not followed here"
        if isinstance(ref := node.get("$ref"), str) and ref not in seen:
            seen.add(ref)
            found = resolve(schema, ref)
            if found is None:
                return join(path, "$ref"), f"{ref[:80]!r} is no place in this schema"
            waiting.append((found[0], found[1], 1))
        waiting += reversed([(at, part, depth + 1) for at, part in parts(node, path)])
    return None


def _is_extension(keyword: str) -> bool:
    return keyword.startswith("x-") and keyword != "x-guidance"


def parts(node: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, but for its definitions."""
    for keyword in BY_NAME:
        if isinstance(named := node.get(keyword), dict):
            for name, part in named.items():
                yield join(path, keyword, name), part
    for keyword in IN_ORDER:
        if isinstance(several := node.get(keyword), list):
            for i, part in enumerate(several):
                yield f"{join(path, keyword)}[{i}]", part
    for keyword in ALONE:
        if keyword in node and not isinstance(node[keyword], list):
            yield join(path, keyword), node[keyword]


def join(path: str, *steps: str) -> str:
    """Names as they are where that is plain, else in brackets."""
    for step in steps:
        plain = step.replace("_", "").replace("$", "").replace("-", "").isalnum()
        path += f".{step}" if plain and path else step if plain else f"[{step[:80]!r}]"
    return path


def resolve(root: Any, ref: str) -> tuple[str, Any] | None:
    """The path and the schema that a reference within the schema means."""
    if ref == "#":
        return "", root
    if not ref.startswith("#/"):
        return None
    node, path = root, ""
    for step in ref[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node, path = node[name], join(path, name)
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node, path = node[int(name)], f"{path}[{name}]"
        else:
            return None
    return path, node


def culprit(schema: Any, error: str, error_of: Callable[[Any], str]) -> str:
    """The path of the smallest part that fails alone with the same `error`; `error_of` compiles."""
    path, node, trials = "", schema, MOST_TRIALS
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in _object(schema)}
    while True:
        for at, part in _below(schema, node, path):
            trials -= 1
            if trials < 0:
                return path
            if isinstance(part, dict) and error_of({**definitions, **part}) == error:
                path, node = at, part
                break
        else:
            return _at_keyword(path, node, error)


def _below(root: Any, node: Any, path: str) -> Generator[tuple[str, Any]]:
    yield from parts(_object(node), path)
    if isinstance(ref := _object(node).get("$ref"), str) and (found := resolve(root, ref)):
        yield found


def _at_keyword(path: str, node: Any, error: str) -> str:
    """Closer, if the message names one of its keywords."""
    named = [key for key in _object(node) if key in error.replace("'", " ").split()]
    return join(path, named[0]) if len(named) == 1 else path


def _object(node: Any) -> dict[str, Any]:
    return node if isinstance(node, dict) else {}
