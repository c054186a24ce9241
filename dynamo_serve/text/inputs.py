"""Texts, and pairs of them, as a model wants them that makes vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dynamo_serve.text.tokenizer import Tokenizer


class Input(NamedTuple):
    """The ids of a text or of a pair, whose second text begins at `second_at` (0: of one kind)."""

    ids: Sequence[int]
    second_at: int = 0


def inputs_of(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    before: str | None = None,
    most: int | None = None,
) -> list[Input]:
    """Each of `texts`, or `before` and it as a pair, with the special tokens that the model wants;
    of what is longer than `most` tokens the text is cut."""
    return [_input(*made) for made in tokenizer.encode_pairs(texts, before, most)]


def _input(ids: Sequence[int], kinds: Sequence[int]) -> Input:
    return Input(ids, kinds.index(1) if 1 in kinds else 0)
