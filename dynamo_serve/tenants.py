"""The tenants file: classes, tenants with their quotas, and hashed keys. See docs/tenants.md."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_serve.config import ServerSection
from dynamo_serve.core.tenant import CLASSES, Class, Quota, Tenancy, Tenant
from dynamo_serve.directory import DEFAULT_CALLER, Caller, Directory, digest
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import read_yaml
from dynamo_serve.settings_key import BadValue, Key

DAY_MS = 86_400_000
PREFIX = "sha256:"
HASHED = re.compile(PREFIX + r"([0-9a-f]{64})")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # it becomes the label of a metric
HASH_KEY = "keys are stored hashed: run 'dynamo-serve hash-key' and put here what it prints"
REFUSED = object()


class Rule(NamedTuple):
    """One key of the file: where its value goes and what is allowed.

    A value is divided by `per` on its way; `null` is what the file's null stands for.
    """

    field: str
    kind: type
    low: float | None = None
    high: float | None = None
    pattern: str | None = None
    per: int | None = None
    null: Any = REFUSED

    def read(self, value: object) -> Any:
        """Raises `BadValue`."""
        if value is None and self.null is not REFUSED:
            return self.null
        key = Key("", self.kind, None, "", self.low, self.high, self.pattern)
        read: Any = key.from_yaml(value)
        return read / self.per if self.per else read


CLASS = {
    "rank": Rule("rank", int, 0, 1000),
    "ttft_ms": Rule("ttft", float, 1, DAY_MS, per=1000, null=inf),
    "itl_ms": Rule("itl", float, 1, DAY_MS, per=1000, null=inf),
    "max_queue_delay_ms": Rule("max_queue_delay", float, 0, 60_000, per=1000),
    "deadline_ms": Rule("deadline", float, 1, DAY_MS, per=1000, null=inf),
    "reader_patience_ms": Rule("reader_patience", float, 100, DAY_MS, per=1000),
    "strict": Rule("strict", bool),
}
TENANT = {
    "weight": Rule("weight", float, 0.001, 1_000_000),
    "class": Rule("class_name", str, pattern=NAME),
}
SALT = Rule("salt", str, pattern=r"\S+")
QUOTA = {
    "live_sequences": Rule("live_sequences", int, 1, null=None),
    "pages_guaranteed": Rule("pages_guaranteed", int, 0),
    "pages_burst": Rule("pages_burst", int, 1, null=None),
    "tokens_per_minute": Rule("tokens_per_minute", float, 1, null=None),
    "requests_per_minute": Rule("requests_per_minute", float, 1, null=None),
    "queue_length": Rule("queue_length", int, 1, null=None),
}


def load(server: ServerSection) -> Directory:
    """Who may call: from the tenants file if one is set, else everybody is the one tenant.

    Raises `ConfigError` with one line for each fault.
    """
    admins = frozenset(digest(key.encode()) for key in server.admin_keys)
    if server.tenants_file:
        if server.api_keys:
            raise ConfigError(
                "server.api_keys: not allowed with server.tenants_file; keys belong to the tenants"
            )
        return read(Path(server.tenants_file), admins)
    callers = {digest(key.encode()): DEFAULT_CALLER for key in server.api_keys}
    if admins & callers.keys():
        raise ConfigError("server.admin_keys: one of them is in server.api_keys, too")
    return Directory(Tenancy(), callers, admins, is_open=not callers)


def read(path: Path, admins: frozenset[str] = frozenset()) -> Directory:
    """The directory in a file; `admins` are known besides. Raises `ConfigError`."""
    source = f"(from file {path})"
    parser = Parser(admins)
    directory = parser.directory(read_yaml(path))
    if parser.faults:
        raise ConfigError("\n".join(f"{fault} {source}" for fault in parser.faults))
    return directory


class Parser:
    """Reads the tree of a file. Goes on after a fault, so that all are told at once."""

    def __init__(self, admins: frozenset[str]) -> None:
        self.faults: list[str] = []
        self._admins = admins
        self._owners = dict.fromkeys(admins, "server.admin_keys")  # digest → path

    def directory(self, tree: object) -> Directory:
        top = self._known(tree, "", ("classes", "tenants", "admin_keys"))
        admins = self._admins | set(self._keys(top.get("admin_keys"), "admin_keys"))
        classes = self._classes(top.get("classes"))
        tenants: dict[str, Tenant] = {}
        callers: dict[str, Caller] = {}
        for name, entry in self._named(top.get("tenants"), "tenants"):
            path = f"tenants.{name}"
            known = self._known(entry, path, (*TENANT, "salt", "keys", "quota"))
            tenants[name] = self._tenant(name, known, classes)
            salt = self._values(known, path, {"salt": SALT}).get("salt", name)
            for key in self._keys(known.get("keys"), f"{path}.keys"):
                callers[key] = Caller(name, salt)
        if not tenants:
            self.faults.append("tenants: none; allowed: at least one")
        return Directory(Tenancy(tenants, classes), callers, admins)

    def _classes(self, tree: object) -> dict[str, Class]:
        classes = dict(CLASSES)
        for name, entry in self._named(tree, "classes"):
            path = f"classes.{name}"
            values = self._values(self._known(entry, path, CLASS), path, CLASS)
            classes[name] = replace(classes.get(name, Class(name)), **values)
        return classes

    def _tenant(self, name: str, entry: Mapping[str, Any], classes: Mapping[str, Class]) -> Tenant:
        path = f"tenants.{name}"
        tenant = Tenant(name, **self._values(entry, path, TENANT))
        if tenant.class_name not in classes:
            self.faults.append(
                f"{path}.class = {tenant.class_name!r}: no such class; "
                f"allowed: {', '.join(classes)}"
            )
        known = self._known(entry.get("quota"), f"{path}.quota", QUOTA)
        quota = Quota(**self._values(known, f"{path}.quota", QUOTA))
        if quota.pages_burst is not None and quota.pages_burst < quota.pages_guaranteed:
            self.faults.append(
                f"{path}.quota.pages_burst = {quota.pages_burst}: not allowed; "
                f"allowed: at least pages_guaranteed, {quota.pages_guaranteed}"
            )
        return replace(tenant, quota=quota)

    def _keys(self, tree: object, path: str) -> Iterator[str]:
        """The digests in a list of hashed keys. No fault shows what was written there."""
        if not isinstance(tree, list | None):
            self.faults.append(f"{path}: not a list; {HASH_KEY}")
            return
        for i, key in enumerate(tree or ()):
            at = f"{path}[{i}]"
            hashed = HASHED.fullmatch(key) if isinstance(key, str) else None
            if hashed is None:
                self.faults.append(f"{at}: not a hash; {HASH_KEY}")
            elif (owner := self._owners.setdefault(hashed[1], at)) != at:
                self.faults.append(f"{at}: the same key as {owner}; a key has one owner")
            else:
                yield hashed[1]

    def _values(
        self, tree: Mapping[str, object], path: str, rules: Mapping[str, Rule]
    ) -> dict[str, Any]:
        """The values that are given, by the name of their field."""
        values = {}
        for name in tree.keys() & rules.keys():
            try:
                values[rules[name].field] = rules[name].read(tree[name])
            except BadValue as bad:
                orelse = "" if rules[name].null is REFUSED else ", or null"
                self.faults.append(f"{path}.{name}{bad}{orelse}")
        return values

    def _named(self, tree: object, path: str) -> Iterator[tuple[str, object]]:
        """The entries of a mapping whose keys are names."""
        for name, entry in self._mapping(tree, path).items():
            if isinstance(name, str) and re.fullmatch(NAME, name):
                yield name, entry
            else:
                self.faults.append(f"{path}: {name!r} is no name; allowed: text matching {NAME}")

    def _known(self, tree: object, path: str, allowed: Iterable[str]) -> dict[Any, Any]:
        """The entries of a mapping, of which none may have another key than these."""
        mapping = self._mapping(tree, path)
        names = list(allowed)
        for name in mapping.keys() - set(names):
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            at = f"{path}.{name}".removeprefix(".")
            self.faults.append(f"{at}: unknown key; {hint}allowed: {', '.join(names)}")
        return mapping

    def _mapping(self, tree: object, path: str) -> dict[Any, Any]:
        if isinstance(tree, dict | None):
            return tree or {}
        self.faults.append(f"{path or 'the file'}: not a mapping; allowed: 'key: value' lines")
        return {}
