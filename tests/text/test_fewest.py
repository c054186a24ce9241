"""A lower bound of tokens: never above what the tokenizer makes, and close where it matters."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dynamo_serve.text.fewest import Fewest
from tests.text.tiny import byte_level, sentencepiece_like

MARKS = "\u0301\u0308\u0344\u0327\u0338"
ALPHABETS = [
    "hello wrd",
    "ab \t\n",
    "  \u3000\u00a0",
    "é你好世界😀",
    "aeino" + MARKS,
    "\u212a\u212b\u2126\uac00\u1100\u1161\u11a8" + "AK",
    "▁ ab",
    "".join(map(chr, range(32, 127))),
]


def byte_level_backend(**steps: Any) -> Backend:
    backend: Backend = byte_level().backend_tokenizer
    for name, step in steps.items():
        setattr(backend, name, step)
    return backend


def stripping() -> Backend:
    backend = byte_level_backend()
    backend.add_special_tokens([AddedToken("<|im_end|>", lstrip=True, rstrip=True, special=True)])
    backend.add_special_tokens([AddedToken("<strip me>", lstrip=True, rstrip=True, special=True)])
    return backend


def marked() -> Backend:
    """Llama 2's older way: the space is replaced by the normalizer."""
    backend: Backend = sentencepiece_like().backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = None
    backend.add_tokens([AddedToken("a b", normalized=True)])
    return backend


def found_as_normalized() -> Backend:
    """As before, and the token is found behind the mark that is put before it, too."""
    backend = marked()
    backend.add_tokens([AddedToken("gift", normalized=True)])
    return backend


def merging_bytes() -> Backend:
    backend: Backend = sentencepiece_like().backend_tokenizer
    parts = [f"<0x{byte:02X}>" for byte in "你".encode()]
    merges = [(parts[0], parts[1]), (parts[0] + parts[1], parts[2]), ("h", "e")]
    vocab = backend.get_vocab()
    for merge in merges:
        vocab.setdefault("".join(merge), len(vocab))
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    return backend


def qwen() -> Backend:
    split = pre_tokenizers.Split(" ", "isolated")
    parts = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    return byte_level_backend(normalizer=normalizers.NFC(), pre_tokenizer=parts)


BOUNDED = {
    "byte level": byte_level_backend,
    "white space is stripped": stripping,
    "composed": qwen,
    "bytes as a last resort": lambda: sentencepiece_like().backend_tokenizer,
    "marked by the normalizer": marked,
    "found as normalized": found_as_normalized,
    "bytes that are merged": merging_bytes,
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_no_text_has_less(kind: str) -> None:
    backend, rng = BOUNDED[kind](), random.Random(5)
    fewest = Fewest(backend)
    words = ["<|im_end|>", "<strip me>", "a b", "a▁b", " " * 40, "▁" * 9, "hello", *MARKS]
    words += [" gift" * 30, "你" * 9]
    for alphabet in ALPHABETS:
        for _ in range(200):
            letters = rng.choices([*alphabet, *rng.sample(words, 2)], k=rng.randrange(60))
            text = "".join(letters)
            made = len(backend.encode(text, add_special_tokens=False).ids)
            assert fewest.of(text) <= made, text


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_long_text_has_many(kind: str) -> None:
    backend = BOUNDED[kind]()
    text = "hello world, and so on. " * 1000
    made = len(backend.encode(text, add_special_tokens=False).ids)
    assert made / 20 < Fewest(backend).of(text) <= made


def test_what_is_not_ascii_may_be_composed() -> None:
    composed = byte_level_backend(normalizer=normalizers.NFC())
    text = "e\u0301" * 1000
    assert Fewest(byte_level_backend()).of(text) > Fewest(composed).of(text) == 0
    assert Fewest(composed).of("e" * 1000 + "\u0301") > 0


def removing() -> Backend:
    split = pre_tokenizers.Split(" ", "removed")
    parts = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    return byte_level_backend(pre_tokenizer=parts)


def spelled_twice(*spellings: Any) -> Backend:
    return byte_level_backend(pre_tokenizer=pre_tokenizers.Sequence([*spellings]))


UNBOUNDED = {
    "bytes of bytes": lambda: spelled_twice(
        pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel()
    ),
    "marks among bytes": lambda: spelled_twice(
        pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace()
    ),
    "lower case": lambda: byte_level_backend(normalizer=normalizers.Lowercase()),
    "compatibility": lambda: byte_level_backend(normalizer=normalizers.NFKC()),
    "stripped": lambda: byte_level_backend(normalizer=normalizers.Strip()),
    "replaced": lambda: byte_level_backend(normalizer=normalizers.Replace("aa", "a")),
    "spaces removed": removing,
    "white space removed": lambda: byte_level_backend(
        pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    ),
    "words": lambda: Backend(models.WordLevel({"a": 0}, unk_token="a")),
    "no last resort": lambda: Backend(models.BPE({"a": 0}, [], unk_token="a", fuse_unk=True)),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_text_may_vanish_nothing_is_said(kind: str) -> None:
    make: Callable[[], Backend] = UNBOUNDED[kind]
    backend = make()
    assert Fewest(backend).of("hello world" * 1000) == 0
