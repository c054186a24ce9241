"""The bytes behind each token of a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces(dict[int, bytes]):
    """Token id -> bytes, found on first use.

    Decoding a token alone loses what only shows in company: a leading space, or a part of a
    character. So the vocabulary's own spelling is read: byte-level (each byte a printable
    character) or SentencePiece-like (`▁` for a space, `<0x0A>` for a byte).
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        self._size = len(tokenizer)
        kinds = _decoder_kinds(tokenizer)
        self._byte_of = byte_alphabet() if "ByteLevel" in kinds else {}
        self._has_byte_pieces = "ByteFallback" in kinds
        self._has_space_marks = bool(kinds & {"Replace", "Metaspace"})

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._spell(token_id)
        return piece

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        known = token_id < self._size
        token = self._tokenizer.convert_ids_to_tokens(token_id) if known else None
        if token is None:
            return b""
        if self._byte_of:
            return bytes(self._byte_of[c] for c in token if c in self._byte_of)
        if self._has_byte_pieces and (match := BYTE_PIECE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._has_space_marks:
            return str(token).replace("▁", " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()


class WholeTexts(dict[int, str | None]):
    """Token id -> its text if that is whole characters, else None; found on first use.

    Only of a byte-level vocabulary: there a text is its tokens' bytes, end to end, so that a token
    of whole characters reads the same in any company.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token_id: int) -> str | None:
        text = self._decode([token_id])
        whole = self[token_id] = None if "\ufffd" in text else text
        return whole


def is_byte_level(tokenizer: Any) -> bool:
    """Whether decoding is putting the tokens' bytes together, and nothing else."""
    return _decoder_kinds(tokenizer) == {"ByteLevel"}


def _decoder_kinds(tokenizer: Any) -> frozenset[str]:
    if not getattr(tokenizer, "is_fast", False):
        return frozenset()
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    parts = decoder.get("decoders", [decoder])
    return frozenset(part["type"] for part in parts if part)


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary (GPT-2's, used by all).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
