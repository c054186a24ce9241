"""Files of JSON objects, one in a line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from dynamo_serve.errors import ConfigError

MOST = 1 << 53  # beyond it JSON's numbers are not exact, and no time or count is as large


def numbered(file: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text, counted from 1. Raises `ConfigError` for what cannot be read as such."""
    number = 0
    try:
        for number, text in enumerate(file, 1):
            yield number, text
    except UnicodeDecodeError:
        raise ConfigError(f"{path}, after line {number}: no text in UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}, after line {number}: cannot be read: {error}") from None


def parse(path: Path, number: int, text: str) -> dict[str, Any]:
    """Line `number` of a file. Raises `ConfigError` that names it."""
    try:
        plain = json.loads(text)
        if "\\ud" in text.lower():  # halves of characters are no text that could be told
            json.dumps(plain, ensure_ascii=False).encode()
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: no JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}, line {number}: too deep") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}, line {number}: not an object")
    return plain


def check_header(plain: dict[str, Any], path: Path, format: str, version: int) -> None:
    """Take `format` and `format_version` out of a header. Raises `ConfigError` for others."""
    if plain.pop("format", None) != format:
        raise ConfigError(f"{path}: its first line is not a header of {format}")
    if (found := plain.pop("format_version", None)) != version:
        raise ConfigError(f"{path} is of format version {found}; this reads {version}")


def check_fields(made: Any, given: Container[str] | None = None) -> None:
    """Hold the fields of a dataclass against their types, or those that were `given`: the others
    have their defaults. Raises `ValueError`."""
    for f in fields(made):
        if given is not None and f.name not in given:
            continue
        value = getattr(made, f.name)
        if not FITS[str(f.type)](value):
            raise ValueError(f"{f.name} cannot be {str(value)[:40]!r}")


def is_number(value: Any) -> bool:
    """Finite, and of a size that can be calculated with."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= MOST and isfinite(value)


def is_count(value: Any) -> bool:
    return is_number(value) and isinstance(value, int)


def are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_number, value.values()))


# By the types that fields are declared with.
FITS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "dict[str, float]": are_numbers,
    "float": is_number,
    "float | None": lambda value: value is None or is_number(value),
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "tuple[float, ...]": lambda value: all(map(is_number, value)),
    "tuple[tuple[int, int], ...]": lambda value: all(is_count(n) for run in value for n in run),
}
