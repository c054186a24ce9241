"""What a feature has to come to with the bundled model, whichever client it went through.

Structure is held by a grammar, so that names and types are certain; what the model says of itself
at temperature 0 is what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MIA = {"name": "Mia", "age": 31}
SIZE = 256  # of the bundled model's hidden states
PARIS = ["get_weather", {"city": "Paris"}]


class InOnePiece(AssertionError):
    """An answer came at once. A server that is late puts pieces together, so it is asked again."""


def in_pieces(number: int) -> None:
    if number < 2:
        raise InOnePiece


def one_model(told: Any) -> None:
    assert told == ["dserve-tiny"]


def chat(told: Any) -> None:
    assert "42" in told["text"], told
    assert told["finish"] == "stop"
    assert told["tokens"] > 10


def stream(told: Any) -> None:
    """Pieces, which are the whole answer, and the tokens counted once."""
    assert told["text"] == told["whole"]
    assert "fox" in told["text"]
    assert len(told["tokens"]) == 1
    assert told["tokens"][0] >= told["pieces"]
    in_pieces(told["pieces"])


def sum_is_right(told: Any) -> None:
    assert "42" in told


def sums_are_right(told: Any) -> None:
    assert len(told) > 1
    assert all("42" in text for text in told)


def is_mia(told: Any) -> None:
    assert told == MIA


def all_are_mia(told: Any) -> None:
    assert told
    assert all(person == MIA for person in told.values()), told


def is_call(told: Any) -> None:
    assert told == PARIS


def are_calls(told: Any) -> None:
    """Of each way to ask for one, exactly one call."""
    assert told
    assert all(calls == [PARIS] for calls in told), told


def tells_the_weather(told: Any) -> None:
    """Made from what the function said."""
    assert all(word in told for word in ("18", "sunny", "Paris")), told


def called_and_told(told: Any) -> None:
    assert told["call"] == PARIS
    tells_the_weather(told["text"])


def tool_loop(told: Any) -> None:
    called_and_told(told)
    assert told["finish"] == ["tool_calls", "stop"]


def own_loop(told: Any) -> None:
    """The client called the function itself, once."""
    assert told["cities"] == ["Paris"]
    tells_the_weather(told["text"])


def logprobs(told: Any) -> None:
    assert told["text"] == told["whole"]
    assert set(told["tops"]) == {2}


def two_vectors(told: Any) -> None:
    assert told == [SIZE, SIZE]


def refusal(told: Any) -> None:
    assert told == {"param": "modalities", "code": "unsupported_parameter"}


def completion(told: Any) -> None:
    assert told == {"finish": "length", "tokens": 4}


Judge = Callable[[Any], None]
