"""What a sequence's own text says about how it goes on."""

from __future__ import annotations

import random

import pytest

from dynamo_serve.core.lookup import (
    FIRST_GUESS,
    LONGEST,
    MOST_HEADS,
    SHORTEST,
    SLIP,
    Drafter,
    Lookup,
)


def following(tokens: list[int], num_read: int = 0) -> Lookup:
    lookup = Lookup(len(tokens))
    lookup.read(tokens, num_read)
    lookup.follow(tokens)
    return lookup


def test_a_text_that_comes_again_goes_on_as_it_did() -> None:
    text = list(range(100, 140))
    tokens = [1, 2, *text, 3, 4, *text[10:15]]
    lookup = following(tokens)
    assert lookup.matched == 5
    assert lookup.draft(tokens, 6) == tuple(text[15:21])


def test_one_token_alone_says_nothing() -> None:
    assert following([5, 6, 7, 8, 6]).matched == 0


def test_a_loop_goes_round() -> None:
    tokens = [9, *[1, 2, 3] * 4]
    assert following(tokens).draft(tokens, 7) == (1, 2, 3, 1, 2, 3, 1)
    assert following([7, 7, 7]).draft([7, 7, 7], 4) == (7, 7, 7, 7)


def test_the_longest_match_wins_and_among_equals_the_latest() -> None:
    tokens = [1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3]
    assert following(tokens, len(tokens) - 1).draft(tokens, 1) == (50,)
    tokens = [7, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3]
    assert following(tokens, len(tokens) - 1).draft(tokens, 1) == (70,)


def test_after_a_replaced_word_it_goes_on_where_it_was() -> None:
    text = list(range(100, 120))
    tokens = [*text, 1, 2, *text[:6], 77]
    lookup = following(tokens)
    assert lookup.matched == SLIP
    assert lookup.draft(tokens, 3) == tuple(text[7:10])
    tokens.append(78)
    lookup.follow(tokens)
    assert lookup.matched == 0


def test_outcomes_tell_what_was_expected_of_each_token() -> None:
    lookup = Lookup(16)
    tokens = [1, 2, 3, 4, 1, 2]
    assert lookup.follow(tokens) == []
    tokens += [3, 4, 9]
    assert lookup.follow(tokens) == [(2, True), (3, True), (4, False)]


@pytest.mark.parametrize("seed", range(30))
def test_a_match_is_what_it_says(seed: int) -> None:
    rng = random.Random(seed)
    tokens: list[int] = []
    lookup = Lookup(rng.choice([10, 400]))
    for _ in range(rng.randint(1, 60)):
        tokens += [rng.randrange(rng.choice([2, 5, 1000])) for _ in range(rng.randint(1, 9))]
        if rng.random() < 0.3:
            lookup.read(tokens, len(tokens) - 1)
        lookup.follow(tokens)
        if lookup.matched:
            at, end = lookup.source, len(tokens) - 1
            equal = [tokens[at - i] == tokens[end - i] for i in range(lookup.matched)]
            assert at < end and all(equal[:-1])  # the first may be the replaced one
            draft = lookup.draft(tokens, 12)
            assert len(draft) == 12
            whole = [*tokens, *draft]
            period = len(tokens) - 1 - lookup.source
            assert all(whole[i] == whole[i - period] for i in range(len(tokens), len(whole)))


def test_it_finds_what_a_dumb_search_finds_in_a_text_with_few_repetitions() -> None:
    rng = random.Random(4)
    tokens = [rng.randrange(5000) for _ in range(2000)]
    for start in rng.sample(range(1900), 50):
        tokens += [rng.randrange(5000), *tokens[start : start + LONGEST]]
        lookup = following(tokens, len(tokens) - 1)
        own = tokens[-LONGEST:]
        places = [i for i in range(len(tokens) - LONGEST) if tokens[i : i + LONGEST] == own]
        assert lookup.source == places[-1] + LONGEST - 1


def test_the_index_of_a_long_text_is_small_and_made_in_pieces() -> None:
    tokens = list(range(40_000))
    drafter = Drafter(len(tokens), list(FIRST_GUESS))
    parts = []
    while drafter.lookup.num_seen < len(tokens):
        parts.append(drafter.catch_up(tokens, len(tokens) - 1, 1024))
        assert drafter.chances(tokens, 4) == []
    assert max(parts) <= 1025 and sum(parts) == len(tokens)
    lookup = drafter.lookup
    assert len(lookup._heads) == MOST_HEADS and len(lookup._links) == len(tokens)


def test_a_drafter_learns_how_far_to_trust() -> None:
    rng = random.Random(5)
    common = list(FIRST_GUESS)
    copying, inventing = Drafter(4000, common), Drafter(4000, common)
    text = [rng.randrange(1000) for _ in range(300)]
    tokens = [*text, *text[:2]]
    for i in range(2, 200):
        copying.catch_up(tokens, len(text), 4000)
        tokens.append(text[i])
    copying.catch_up(tokens, len(text), 4000)
    assert copying.chances(tokens, 3)[2] > 0.95
    pairs = [rng.randrange(8) for _ in range(300)]
    for i in range(1, 300):
        inventing.catch_up(pairs[:i], 1, 4000)
    assert max(inventing.chances(pairs[:299], 3), default=0.0) < 0.5
    assert common[LONGEST] > FIRST_GUESS[LONGEST] and common[SHORTEST] < FIRST_GUESS[SHORTEST]
