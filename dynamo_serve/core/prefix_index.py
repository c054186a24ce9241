"""Which token chains are in which pages, and which are being computed right now."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b

KEY_BYTES = 16
SHARED_SALT = "shared by all"  # of declared heads; no tenant has it, for a salt has no spaces
NOTHING: frozenset[bytes] = frozenset()
APART = "\n"  # in a salt between the tenant's, which has no white space, and a request's own


def plain_salt(salt: str) -> str:
    """That of the tenant, without what sets some of its requests apart from the others."""
    return salt.partition(APART)[0]


def root_key(salt: str) -> bytes:
    """First link of a chain; different salts never meet again."""
    return blake2b(salt.encode(), digest_size=KEY_BYTES).digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full page: a hash of its tokens and of everything before them.

    BLAKE2b with 128 bits (RFC 7693): two different chains do not meet by accident, and nobody can
    make them meet on purpose to read another tenant's pages.
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


def extend_keys(
    keys: list[bytes],
    token_ids: Sequence[int],
    salt: str,
    size: int,
    num_tokens: int,
    shared: Container[bytes] = NOTHING,
) -> None:
    """Append the keys of the pages of `size` that the first `num_tokens` of `token_ids` fill.
    Pages that begin a head declared to be `shared` have the same key whatever the salt; from the
    first one on that does not, different salts never meet."""
    for start in range(len(keys) * size, num_tokens - size + 1, size):
        tokens = token_ids[start : start + size]
        before = keys[-1] if keys else None
        if shared and (before is None or before in shared):
            key = page_key(before or root_key(SHARED_SALT), tokens)
            if key in shared:
                keys.append(key)
                continue
        keys.append(page_key(_own_parent(before, salt, shared), tokens))


def shared_keys(token_ids: Sequence[int], size: int) -> list[bytes]:
    """The keys of the full pages of a head that is declared to be shared."""
    keys: list[bytes] = []
    extend_keys(keys, token_ids, SHARED_SALT, size, len(token_ids))
    return keys


def parent_of(keys: Sequence[bytes], place: int, salt: str, shared: Container[bytes]) -> bytes:
    """What the key at a place was made of, besides its tokens."""
    before = keys[place - 1] if place else None
    if place < len(keys) and keys[place] in shared:
        return before or root_key(SHARED_SALT)
    return _own_parent(before, salt, shared)


def _own_parent(before: bytes | None, salt: str, shared: Container[bytes]) -> bytes:
    """For a page of the tenant alone."""
    if before is None:
        return root_key(salt)
    if before in shared:
        return blake2b(root_key(salt) + before, digest_size=KEY_BYTES).digest()
    return before


class PrefixIndex:
    """Maps page keys to page ids. A key is listed once, whoever computed it first."""

    def __init__(self) -> None:
        self.pages: dict[bytes, int] = {}
        self.shared: frozenset[bytes] = NOTHING  # keys that all tenants have in common
        self._makers: dict[bytes, str] = {}

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Ids of the pages that hold the longest known head of the chain."""
        found: list[int] = []
        for key in keys:
            page_id = self.pages.get(key)
            if page_id is None:
                break
            found.append(page_id)
        return found

    def add(self, key: bytes, page_id: int) -> None:
        """List a page; whoever was computing an equal one need not be waited for any more."""
        self.pages[key] = page_id
        self._makers.pop(key, None)

    def claim(self, keys: Iterable[bytes], seq_id: str) -> None:
        """Announce that `seq_id` is computing the pages of `keys`; the first claim stands."""
        for key in keys:
            if key not in self.pages:
                self._makers.setdefault(key, seq_id)

    def unclaim(self, keys: Iterable[bytes], seq_id: str) -> None:
        for key in keys:
            if self._makers.get(key) == seq_id:
                del self._makers[key]

    def maker(self, key: bytes) -> str | None:
        """The sequence that is computing the page of `key`, if any."""
        return self._makers.get(key)

    def check(self, live_ids: set[str]) -> None:
        for key, seq_id in self._makers.items():
            assert seq_id in live_ids, f"{seq_id} is gone but still claims a page"
            assert key not in self.pages, f"{seq_id} claims a page that is already there"
