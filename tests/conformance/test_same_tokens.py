"""Our engine inside Triton says what it says outside, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.conformance.subjects import Subject

TEXT = "what is a page and who owns it when two requests share the same prefix"
WISHES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0, "repetition_penalty": 1.2, "ignore_eos": True},
    {"temperature": 0.7, "frequency_penalty": 0.4, "presence_penalty": 0.2, "min_tokens": 6},
    {"temperature": 0.9, "logit_bias": {"20": 3.0, "21": -100}, "stop_token_ids": [30, 31, 32]},
)


def answers(subject: Subject, number: int) -> list[Any]:
    prompt = " ".join(TEXT.split()[number % 7 : number % 7 + 3 + number % 5])
    wish = WISHES[number % len(WISHES)]
    body = {"n": 2, "seed": number, "max_tokens": 6 + 3 * (number % 8), "return_token_ids": True}
    answer = subject.complete(prompt, **body, **wish)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return [(choice["token_ids"], choice["finish_reason"], choice["text"]) for choice in choices]


def test_inside_and_outside_say_the_same(outside: Subject, inside: Subject) -> None:
    with ThreadPoolExecutor(24) as pool:
        there = list(pool.map(lambda number: answers(inside, number), range(24)))
        here = list(pool.map(lambda number: answers(outside, number), range(24)))
    assert there == here
