from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.text.stop import StopMatcher

SHORT = st.text(st.sampled_from("abc"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4)


def run(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = ""
    for part in parts:
        text += matcher.push(part)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.flush(), None


def obvious(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter: the first end at which a stop string is complete; the longest of these."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=1000, deadline=None)
@given(text=SHORT, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_split_gives_the_answer_of_the_obvious_search(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    marks = [0, *sorted(cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(marks)]
    assert run(parts, stops) == obvious(text, stops)


@settings(max_examples=500, deadline=None)
@given(text=SHORT, stops=STOPS)
def test_nothing_is_held_that_cannot_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent = ""
    for end, letter in enumerate(text, start=1):
        sent += matcher.push(letter)
        if matcher.matched is not None:
            return
        held = text[len(sent) : end]
        assert not held or any(s.startswith(held) for s in stops)


@pytest.mark.parametrize(
    ("stops", "text", "kept"),
    [
        (["END"], "the ENd", "the ENd"),
        (["END"], "the END.", "the "),
        (["abcde", "bc"], "abcde", "a"),
        (["aab"], "aaab", "a"),
        (["b", "ab"], "ab", ""),
        ([], "anything", "anything"),
    ],
)
def test_examples(stops: list[str], text: str, kept: str) -> None:
    assert run(list(text), stops)[0] == kept
