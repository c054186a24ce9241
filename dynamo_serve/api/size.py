"""How many parts a JSON text has, counted without parsing it.

Parsing cannot be interrupted, and what it costs depends less on the bytes than on what they make:
four megabytes of `[[],[],…` or of tiny messages take a second, as one text they take ten
milliseconds.
"""

from __future__ import annotations

from dynamo_serve.errors import InvalidRequest

MAX_NODES = 65_536  # objects, arrays and keys
MAX_VALUES = 1_048_576  # elements of arrays and objects: a prompt may be a million ids
MAX_TEXTS = 4 * MAX_NODES  # looked into only if a text may be what all the brackets are in


def check(raw: bytes) -> None:
    """Raises `InvalidRequest` for a body of too many parts."""
    if _within(raw):  # brackets within texts counted as well, so there are fewer
        return
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Every second piece is inside of a text.
    if plain.count(b'"') > 2 * MAX_TEXTS or not _within(b"".join(plain.split(b'"')[::2])):
        raise InvalidRequest(
            f"The JSON has too many parts: at most {MAX_NODES} objects, arrays and keys, "
            f"and {MAX_VALUES} values."
        )


def _within(text: bytes) -> bool:
    num_nodes = text.count(b"[") + text.count(b"{") + text.count(b":")
    return num_nodes <= MAX_NODES and text.count(b",") < MAX_VALUES
