"""Texts and pairs for models that make vectors, as the tokenizer's own post-processing has them."""

from __future__ import annotations

import pytest

from dynamo_serve.text.tokenizer import Tokenizer
from tests.engines.local import encoders

TEXTS = ["", "the", "river unknownword", "the page pool holds tokens", "how long is a river " * 5]


@pytest.mark.parametrize("before", [None, "", "who asks"])
@pytest.mark.parametrize("most", [None, 1, 3, 5, 8, 40])
def test_what_is_cut_is_cut_before_the_marks(before: str | None, most: int | None) -> None:
    plain = encoders.tokenizer().backend_tokenizer
    head = None if before is None else plain.encode(before, add_special_tokens=False)
    marks = plain.num_special_tokens_to_add(head is not None)
    expected = []
    for text in TEXTS:
        encoding = plain.encode(text, add_special_tokens=False)
        if most is not None:
            encoding.truncate(max(0, most - marks - (len(head.ids) if head else 0)))
        parts = (encoding,) if head is None else (head, encoding)
        whole = plain.post_process(*parts, add_special_tokens=True)
        expected.append((whole.ids, whole.type_ids))
    assert Tokenizer(encoders.tokenizer()).encode_pairs(TEXTS, before, most) == expected
