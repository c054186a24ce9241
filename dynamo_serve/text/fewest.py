"""How many tokens a text has at least, without making them.

A token of k bytes that has the byte b in it takes b away once for 1/k of a token, and no token with
b in it is longer than `longest(b)`. So each b of a text costs at least 1/longest(b), and the sum of
that over its bytes is a lower bound: runs of spaces cost little, for there are long tokens of
nothing else, and letters cost more. Whatever may take bytes from a text before it is tokenized is
allowed for, and where that is not possible there is no bound.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

from tokenizers import models

from dynamo_serve.text.pieces import BYTE_PIECE, byte_alphabet

SPACE, MARK = b" ", "▁".encode()
NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
PIECE_BYTES = 65_536  # counted at once, for the other threads of this process
ASCII = range(0x80)
# None of these takes a byte from a text. The first two write it otherwise, and may add to it: only
# one of them can be followed.
SPELLINGS = frozenset({"ByteLevel", "Metaspace"})
PLAIN_SPLITS = SPELLINGS | {"Digits"}
SPLITS = frozenset({"Split", "Punctuation"})  # neither do these, unless told to
NO_LENGTH = 0


class Fewest:
    """For one tokenizer, of the `tokenizers` library."""

    def __init__(self, backend: Any) -> None:
        self._groups: list[tuple[int, bytes]] = []  # how long at most, and all the other bytes
        self._composes = False  # canonically (NFC)
        longest = _longest(backend)
        if longest is None:
            return
        self._composes = "NFC" in _kinds(backend.normalizer)
        # Of bytes of nearly the same cost one is as good as the other, and counting is quicker.
        sizes = [1 << (length - 1).bit_length() if length else NO_LENGTH for length in longest]
        for size in sorted(set(sizes) - {NO_LENGTH}):
            others = bytes(byte for byte in range(256) if sizes[byte] != size)
            self._groups.append((size, others))

    def of(self, text: str) -> int:
        """No text is tokenized to less; 0 where nothing can be said."""
        if not self._groups:
            return 0
        if not self._composes or text.isascii():
            return int(self._cost(text.encode(errors="replace")))
        # A composition takes a character that is not ASCII, and at most one that is.
        plain = text.encode("ascii", "ignore")
        return max(0, int(self._cost(plain)) - (len(text) - len(plain)))

    def _cost(self, raw: bytes) -> float:
        pieces = (raw[at : at + PIECE_BYTES] for at in range(0, len(raw), PIECE_BYTES))
        return sum(
            len(piece.translate(None, others)) / size
            for piece in pieces
            for size, others in self._groups
        )


def _longest(backend: Any) -> list[int] | None:
    """Of each byte the length of the longest token that has it; `NO_LENGTH` if a byte may vanish,
    None if all of them may."""
    model = backend.model
    if not isinstance(model, models.BPE):  # others have one token for all that they do not know
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not (_keeps_all(backend.normalizer) and _splits_only(backend.pre_tokenizer)):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    is_byte_level = "ByteLevel" in _kinds(backend.pre_tokenizer)
    byte_of = byte_alphabet() if is_byte_level else {f"<0x{b:02X}>": b for b in range(256)}
    missing = {byte for name, byte in byte_of.items() if name not in vocabulary}
    if not (is_byte_level or model.byte_fallback) or missing - NOT_IN_UTF8:
        return None
    added = backend.get_added_tokens_decoder().values()
    tokens = _byte_level(vocabulary, byte_of) if is_byte_level else map(_with_bytes, vocabulary)
    longest = [1] * 256
    has_marks = not is_byte_level or bool({"Replace", "Metaspace"} & _steps(backend))
    for token in chain(tokens, _contents(added, backend.normalizer)):
        # Where spaces are written as marks, each may be meant by the other.
        widest = token.replace(SPACE, MARK) if has_marks else token
        for byte in {*token, *(SPACE + MARK if has_marks and MARK in widest else b"")}:
            longest[byte] = max(longest[byte], len(widest))
    if any(token.lstrip or token.rstrip for token in added):
        for byte in _white_space():  # may be part of such a token, however much it is
            longest[byte] = NO_LENGTH
    return longest


def _byte_level(vocabulary: Iterable[str], byte_of: dict[str, int]) -> Iterator[bytes]:
    """The bytes of each token; of one that stands for none there is nothing in a text."""
    for token in vocabulary:
        if all(character in byte_of for character in token):
            yield bytes(map(byte_of.__getitem__, token))


def _with_bytes(token: str) -> bytes:
    """The bytes of a token, and those that it means if it is made of several tokens for bytes."""
    if BYTE_PIECE.fullmatch(token):
        return token.encode()  # `ignore_merges` finds it in a text, too
    return token.encode() + bytes.fromhex("".join(BYTE_PIECE.findall(token)))


def _contents(added: Iterable[Any], normalizer: Any) -> Iterator[bytes]:
    """What added tokens are found by: some by what the normalizer makes of them, which may begin
    with more."""
    for token in added:
        yield str(token.content).encode()
        if token.normalized and normalizer is not None:
            yield str(normalizer.normalize_str(token.content)).encode()


@cache
def _white_space() -> frozenset[int]:
    """The bytes of all characters that are white space."""
    characters = map(chr, range(sys.maxunicode + 1))
    return frozenset("".join(filter(str.isspace, characters)).encode())


def _keeps_all(normalizer: Any) -> bool:
    """Whether it takes nothing from a text, but by composing characters."""
    for part in _parts(normalizer):
        is_mark = (part.get("pattern"), part.get("content")) == ({"String": " "}, "▁")
        if part["type"] not in ("NFC", "Prepend") and not (part["type"] == "Replace" and is_mark):
            return False
    return True


def _splits_only(pre_tokenizer: Any) -> bool:
    """Whether it drops nothing of what it splits, and one can tell what of a text is in a token."""
    if sum(part["type"] in SPELLINGS for part in _parts(pre_tokenizer)) > 1:
        return False
    for part in _parts(pre_tokenizer):
        is_split = part["type"] in SPLITS and part.get("behavior") != "Removed"
        is_own_mark = part["type"] == "Metaspace" and part.get("replacement") != "▁"
        if is_own_mark or not (is_split or part["type"] in PLAIN_SPLITS):
            return False
    return True


def _steps(backend: Any) -> frozenset[str]:
    return _kinds(backend.normalizer) | _kinds(backend.pre_tokenizer)


def _kinds(step: Any) -> frozenset[str]:
    return frozenset(part["type"] for part in _parts(step))


def _parts(step: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its parts."""
    return [] if step is None else _flat(json.loads(step.__getstate__()))


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [each for one in inner for each in _flat(one)]
