from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.tokenizer import Tokenizer
from tests.text.tiny import byte_level, sentencepiece_like

BYTE_LEVEL = Tokenizer(byte_level())
SENTENCEPIECE = Tokenizer(sentencepiece_like())
WINDOWED = Tokenizer(byte_level())  # as if its tokens could not be told alone
WINDOWED.alone = None
ALL = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, WINDOWED, SENTENCEPIECE], ids=["bytes", "windowed bytes", "pieces"]
)
BYTES = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WINDOWED], ids=["alone", "windowed"])
SPACE = SENTENCEPIECE.encode("a b")[2:][0]

WORDS = st.text(st.sampled_from("ab lo.he wö你好世界😀🏳️\u200d🌈\n▁"), max_size=120)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.special_ids, context, tokenizer.alone)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@BYTES
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=150))
def test_any_byte_level_ids_give_the_text_of_the_full_decode(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@BYTES
@given(ids=st.lists(st.sampled_from([BYTE_LEVEL.encode(c)[0] for c in "é你😀a"]), max_size=120))
def test_broken_bytes_give_the_text_of_the_full_decode(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@ALL
@given(text=WORDS)
def test_whole_text_is_never_emitted_by_halves(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=200, deadline=None)
@ALL
@given(text=WORDS, cut=st.integers(0, 120))
def test_a_continuation_is_what_the_full_text_has_after_the_prompt(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    ids = tokenizer.encode(text)
    prompt, rest = ids[:cut], ids[cut:]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    if whole.startswith(before):  # else the cut is inside a character
        assert before + "".join(pieces(tokenizer, rest, prompt)) == whole


def test_a_leading_space_survives_a_continuation_but_not_a_fresh_text() -> None:
    (world,) = SENTENCEPIECE.encode("wo")
    hello = SENTENCEPIECE.encode("he")
    assert "".join(pieces(SENTENCEPIECE, [world])) == "wo"
    assert "".join(pieces(SENTENCEPIECE, [world], hello)) == " wo"


def test_special_tokens_yield_nothing_and_disturb_nobody() -> None:
    first, second = BYTE_LEVEL.encode("ü")
    end = min(BYTE_LEVEL.special_ids)
    assert pieces(BYTE_LEVEL, [first, end, second]) == ["", "", "ü", ""]


def test_only_a_character_of_several_tokens_is_decoded() -> None:
    decoded: list[list[int]] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(list(ids))
        return BYTE_LEVEL.decode(ids)

    ids = BYTE_LEVEL.encode("hello 😀 hello")
    detokenizer = Detokenizer(decode, alone=BYTE_LEVEL.alone)
    assert "".join(map(detokenizer.push, ids)) == "hello 😀 hello"
    parts = [i for i in ids if BYTE_LEVEL.alone is not None and BYTE_LEVEL.alone(i) is None]
    assert decoded == [parts[: n + 1] for n in range(len(parts))]


def test_half_a_character_waits_and_shows_as_broken_at_the_end() -> None:
    first, _ = BYTE_LEVEL.encode("ü")
    assert pieces(BYTE_LEVEL, [first]) == ["", "\ufffd"]


@pytest.mark.parametrize("text", ["hello world ", "é", "😀", "你"])
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
def test_the_work_per_token_does_not_grow(tokenizer: Tokenizer, text: str) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    ids = tokenizer.encode(text * 400)
    detokenizer = Detokenizer(decode, tokenizer.special_ids)
    assert "".join(map(detokenizer.push, ids)) == tokenizer.decode(ids)
    assert longest <= 40


def test_endless_broken_bytes_are_let_go_and_cost_no_more_than_text() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTE_LEVEL.decode(ids)

    lead = BYTE_LEVEL.encode("😀")[0]
    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push(lead) for _ in range(2000))
    assert len(text) > 1900
    assert text + detokenizer.flush() == BYTE_LEVEL.decode([lead] * 2000)
    assert longest <= 80
