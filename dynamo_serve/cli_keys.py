"""`dynamo-serve hash-key`: from a key to the line that stands for it in the tenants file."""

from __future__ import annotations

import getpass
import secrets
import sys

from dynamo_serve.directory import digest
from dynamo_serve.errors import ConfigError
from dynamo_serve.tenants import PREFIX

MIN_CHARACTERS = 20  # shorter ones could be guessed from their hash


def hash_key(new: bool) -> int:
    """Print the line; the key is read, or with `new` made and shown once, on standard error."""
    if new:
        key = "dsk-" + secrets.token_urlsafe(32)
        sys.stderr.write(f"the key, shown this once: {key}\n")
    else:
        key = _read()
    sys.stdout.write(f'- "{PREFIX}{digest(key.encode())}"\n')
    return 0


def _read() -> str:
    """One key from standard input, unseen on a terminal. Raises `ConfigError`."""
    key = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.read()
    key = key.strip()
    if len(key) < MIN_CHARACTERS or not key.isprintable() or " " in key:
        raise ConfigError(
            f"hash-key: not a key; allowed: one text of at least {MIN_CHARACTERS} characters "
            "without spaces on standard input; --new makes a random one"
        )
    return key
