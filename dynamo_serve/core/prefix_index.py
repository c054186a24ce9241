"""Which token chains are in which pages, and which are being computed right now."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

KEY_BYTES = 16


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
    keys: list[bytes], token_ids: Sequence[int], salt: str, size: int, num_tokens: int
) -> None:
    """Append the keys of the pages of `size` that the first `num_tokens` of `token_ids` fill."""
    for start in range(len(keys) * size, num_tokens - size + 1, size):
        parent = keys[-1] if keys else root_key(salt)
        keys.append(page_key(parent, token_ids[start : start + size]))


class PrefixIndex:
    """Maps page keys to page ids. A key is listed once, whoever computed it first."""

    def __init__(self) -> None:
        self.pages: dict[bytes, int] = {}
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
