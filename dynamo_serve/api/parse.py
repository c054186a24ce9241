"""From the bytes of a request to a checked model. Everything wrong raises a named error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from dynamo_serve.api import fields, size
from dynamo_serve.api.bodies import INNER, KNOWN
from dynamo_serve.api.by_type import ByType, Inner
from dynamo_serve.api.names import OWN, Names
from dynamo_serve.errors import InvalidRequest, PayloadTooLarge

MAX_DEPTH = 64  # a schema takes two for each of its own levels (`structured.max_depth`)
SHOWN = 80
SEARCHED_BYTES = 500_000  # in a larger body a faulty character is not looked for, but refused
PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")

T = TypeVar("T", bound=BaseModel)


async def read_object(http: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body; reads no more than `max_bytes` of it."""
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    # A web page may send any other type to a server on localhost without asking first.
    if kind != "application/json":
        raise InvalidRequest("Send JSON with the header 'Content-Type: application/json'.")
    return to_object(await _read(http, max_bytes))


async def _read(http: Request, max_bytes: int) -> bytes:
    too_large = f"The request body is larger than the limit of {max_bytes} bytes."
    declared = http.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise PayloadTooLarge(too_large)
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > max_bytes:
            raise PayloadTooLarge(too_large)
    return bytes(body)


def to_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, finite numbers, whole characters, moderately nested, of so many
    parts that this does not hold up everybody else."""
    size.check(raw)
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: byte {error.start} is wrong.") from error
    except RecursionError as error:
        raise InvalidRequest(f"The JSON is nested deeper than {MAX_DEPTH} levels.") from error
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {_json_type(value)}.")
    # A prompt of a million ids is not worth a walk: what the walks look for leaves traces.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in raw and _has_half_character(raw):
        _refuse_half_character(value if len(raw) <= SEARCHED_BYTES else {})
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(root: dict[str, Any]) -> None:
    if is_deep(root):
        raise InvalidRequest(f"The JSON is nested deeper than {MAX_DEPTH} levels.")


def is_deep(root: dict[str, Any]) -> bool:
    """Whether it is nested deeper than `MAX_DEPTH` levels."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        items = (
            item for node in level for item in (node.values() if isinstance(node, dict) else node)
        )
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _has_half_character(raw: bytes) -> bool:
    """Whether there is a character that no UTF-8 text can hold (an escape like \\ud800 alone)."""
    return HALF.search(PAIR.sub(b"", raw.replace(b"\\\\", b"x"))) is not None


def _refuse_half_character(root: dict[str, Any]) -> NoReturn:
    """Say where it is, if it is in `root`."""
    steps, position = _half_character(root) or ((), None)
    path = _path(steps)
    at = "" if position is None else f" at character {position}"
    raise InvalidRequest(
        f"{path or 'A key or a text'} holds half a surrogate pair{at}.", param=path or None
    )


def _half_character(node: Any) -> tuple[tuple[int | str, ...], int] | None:
    """Steps to the first text or object that has one, and the position in it."""
    if isinstance(node, str):
        position = _first_half(node)
        return None if position is None else ((), position)
    if isinstance(node, dict):
        for key in node:
            if (position := _first_half(key)) is not None:
                return (), position
        items: Iterable[tuple[int | str, Any]] = node.items()
    else:
        items = enumerate(node) if isinstance(node, list) else ()
    # The path is put together on the way back: one for every node would be body size squared.
    for step, item in items:
        if isinstance(item, str) and item.isascii():
            continue
        if (found := _half_character(item)) is not None:
            return (step, *found[0]), found[1]
    return None


def _first_half(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def to_model(model: type[T], body: Mapping[str, Any], on_unknown: str) -> T:
    """Check names, then types and bounds. `on_unknown` is "refuse" or "warn"."""
    kept = _sift(body, model, "", on_unknown)
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        raise first_fault(error) from error


def _sift(value: Any, part: type[BaseModel], path: str, on_unknown: str) -> Any:
    """`value` without what has no effect, and so for all that is in it."""
    kept = fields.sift(value, part, KNOWN[part], path, on_unknown)
    for name, inner in INNER.get(part, {}).items():
        item = kept.get(name)
        if isinstance(item, list):
            kept[name] = [
                _sift_one(each, inner, f"{path}{name}[{i}]", on_unknown)
                for i, each in enumerate(item)
            ]
        elif item is not None:
            kept[name] = _sift_one(item, inner, f"{path}{name}", on_unknown)
    return kept


def _sift_one(value: Any, inner: Inner, path: str, on_unknown: str) -> Any:
    if not isinstance(value, dict):
        return value  # if its type is wrong, the model will say so
    part = inner.model_of(value, path) if isinstance(inner, ByType) else inner
    return _sift(value, part, f"{path}.", on_unknown)


def first_fault(error: ValidationError, names: Names = OWN) -> InvalidRequest:
    """The first of what a model says is wrong, with its path."""
    fault = error.errors(include_url=False, include_context=False)[0]
    path = names.of(_path(fault["loc"]))
    if fault["type"] == "missing":
        return InvalidRequest(f"'{path}' is required.", param=path)
    expected = fault["msg"][0].lower() + fault["msg"][1:]
    if fault["type"] in ("model_type", "dict_type"):
        expected = "input should be an object"  # a client knows nothing of our classes
    if fault["type"] == "too_short":
        return InvalidRequest(f"'{path}' is empty; at least 1 item is needed.", param=path)
    if fault["type"] == "too_long":
        return InvalidRequest(f"'{path}': {expected.replace(' after validation', '')}.", param=path)
    return InvalidRequest(f"'{path}': {expected}, got {_shown(fault['input'])}.", param=path)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("#"):
            path += f".{step[:SHOWN]}" if path else step[:SHOWN]
    return path


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _json_type(value)
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{_json_type(value)} of length {len(text)}"


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
        case _:
            return "a number"
