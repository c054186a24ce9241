"""Files of JSON objects, one in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamo_serve.errors import ConfigError


def parse(path: Path, number: int, text: str) -> dict[str, Any]:
    """Line `number` of a file. Raises `ConfigError` that names it."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: no JSON: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}, line {number}: not an object")
    return plain


def check_header(plain: dict[str, Any], path: Path, format: str, version: int) -> None:
    """Take `format` and `format_version` out of a header. Raises `ConfigError` for others."""
    if plain.pop("format", None) != format:
        raise ConfigError(f"{path}: its first line is not a header of {format}")
    if (found := plain.pop("format_version", None)) != version:
        raise ConfigError(f"{path} is of format version {found}; this reads {version}")
