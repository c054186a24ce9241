"""The file of prefixes that operators declare shared between tenants. See docs/tenants.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import read_yaml

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
WAYS = ("messages", "text", "file")
MESSAGE = {"role", "content"}


class Declared(NamedTuple):
    """One prefix: a text, or the messages that a conversation begins with."""

    name: str
    text: str | None
    messages: list[dict[str, str]] | None


def read(file: str) -> list[Declared]:
    """What is declared in a file. Raises `ConfigError` with one line for each fault."""
    path = Path(file)
    faults: list[str] = []
    declared = list(_prefixes(read_yaml(path), path.parent, faults))
    if not declared and not faults:
        faults.append("prefixes: none; allowed: at least one, as 'prefixes: {name: {text: ...}}'")
    if faults:
        raise ConfigError("\n".join(f"{fault} (from file {path})" for fault in faults))
    return declared


def _prefixes(tree: object, folder: Path, faults: list[str]) -> Iterator[Declared]:
    if not isinstance(tree, dict) or set(tree) != {"prefixes"}:
        faults.append("the file: has to have the one key 'prefixes'")
        return
    if not isinstance(tree["prefixes"], dict | None):
        faults.append("prefixes: not a mapping; allowed: 'name: {text: ...}'")
        return
    for name, entry in (tree["prefixes"] or {}).items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            faults.append(f"prefixes: {name!r} is no name; allowed: text matching {NAME}")
            continue
        fault = _fault(entry)
        if fault:
            faults.append(f"prefixes.{name}{fault}")
            continue
        try:
            yield _declared(name, entry, folder)
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"prefixes.{name}.file = {entry['file']!r}: cannot be read: {error}")


def _fault(entry: object) -> str | None:
    """What is wrong with one entry."""
    if not isinstance(entry, dict) or len(entry) != 1 or not set(entry) <= {*WAYS}:
        return f": has to have one key of {', '.join(WAYS)}"
    ((way, value),) = entry.items()
    if way != "messages":
        return None if isinstance(value, str) and value else f".{way}: not a text"
    if not isinstance(value, list) or not value:
        return ".messages: not a list of messages"
    for i, message in enumerate(value):
        is_one = isinstance(message, dict) and set(message) == MESSAGE
        if not is_one or not all(isinstance(part, str) for part in message.values()):
            return f".messages[{i}]: has to have the keys role and content, both texts"
    return None


def _declared(name: str, entry: dict[str, Any], folder: Path) -> Declared:
    if "file" in entry:
        return Declared(name, (folder / entry["file"]).read_text(encoding="utf-8"), None)
    return Declared(name, entry.get("text"), entry.get("messages"))
