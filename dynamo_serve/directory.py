"""Who may call: keys, only ever as digests, and the tenants they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from dynamo_serve.core.prefix_index import APART
from dynamo_serve.core.tenant import Tenancy


def digest(key: bytes) -> str:
    """The SHA-256 of a key, in hex: all that is kept of it.

    A slow or salted hash protects words that people choose. These keys are random and long, so
    there is nothing to guess, and a fast hash can be looked up for every request.
    """
    return sha256(key).hexdigest()


class Caller(NamedTuple):
    """Who is asking. Callers with different salts never share a page."""

    tenant: str
    salt: str

    def salted(self, cache_salt: str | None) -> Caller:
        """The same with the salt of a request: only those with an equal `cache_salt` share pages.
        From here on there is its hash only; who could read it could join those who sent it."""
        if cache_salt is None:
            return self
        return self._replace(salt=self.salt + APART + digest(cache_salt.encode()))


DEFAULT_CALLER = Caller("default", "")


@dataclass(frozen=True, slots=True)
class Directory:
    """Everybody who may call, by the digest of the key. `is_open`: no key is asked for."""

    tenancy: Tenancy = field(default_factory=Tenancy)
    callers: Mapping[str, Caller] = field(default_factory=dict, repr=False)
    admins: frozenset[str] = field(default=frozenset(), repr=False)
    is_open: bool = False


class Changes(NamedTuple):
    """Names that one mapping has more, less, or with another value than an earlier one."""

    added: list[str]
    removed: list[str]
    changed: list[str]

    @classmethod
    def between(cls, old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
        return cls(
            sorted(new.keys() - old.keys()),
            sorted(old.keys() - new.keys()),
            sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        )


def summed_up(changed: Mapping[str, Mapping[str, list[str]]]) -> str:
    """What `changes` found, for a line of the log."""
    parts = [
        f"{what} {how}: {', '.join(names)}"
        for what, lists in changed.items()
        for how, names in lists.items()
        if names
    ]
    return "; ".join(parts) or "no tenant or class has changed"


def changes(old: Directory, new: Directory) -> dict[str, dict[str, list[str]]]:
    """What a reload did, by name: {"tenants": {"added", "removed", "changed"}, "classes": ...}."""
    return {
        "tenants": Changes.between(_tenants(old), _tenants(new))._asdict(),
        "classes": Changes.between(old.tenancy.classes, new.tenancy.classes)._asdict(),
    }


def _tenants(directory: Directory) -> dict[str, object]:
    """All there is to each tenant, its keys and its salt included."""
    keys: dict[str, set[tuple[str, str]]] = {name: set() for name in directory.tenancy.tenants}
    for key, caller in directory.callers.items():
        keys[caller.tenant].add((key, caller.salt))
    return {name: (t, keys[name]) for name, t in directory.tenancy.tenants.items()}
