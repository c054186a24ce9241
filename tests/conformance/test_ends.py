"""Errors, hang-ups, deadlines: how it ends otherwise, whoever computes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conformance.subjects import Json, Subject, events
from tests.tries import sooner_or_later

PROMPT = "one two three four five six seven eight nine ten"


def long(subject: Subject, **fields: Any) -> Json:
    """A request whose answer takes longer than anybody here waits."""
    return {
        "prompt": PROMPT + subject.slowly,
        "max_tokens": 1500 if not subject.slowly else 100,
        **subject.on,
        **fields,
    }


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"temperature": 9}, 400, None, "temperature"),
        ({"max_tokens": "many"}, 400, None, "max_tokens"),
        ({"max_tokens": 1_000_000}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": [1, 10**9]}, 400, None, "prompt[1]"),
        ({"no_such_field": 1}, 400, None, "no_such_field"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
        ({"deadline_ms": -1}, 400, None, "deadline_ms"),
    ],
)
def test_a_wrong_request_is_refused_with_its_fault(
    subject: Subject, fields: Json, status: int, code: str | None, param: str
) -> None:
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 3, "stream": stream, **fields}
        answer = subject.client.post("/v1/completions", json=body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and error["message"]
        assert code in (None, error["code"])


def test_what_the_engine_cannot_do_is_refused_by_name(subject: Subject) -> None:
    values: Json = {"logprobs": True, "modalities": ["audio"]}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body[subject.refuses] = values[subject.refuses]
    error = subject.client.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", subject.refuses)


def test_what_is_no_json_is_a_400(subject: Subject) -> None:
    assert subject.client.post("/v1/completions", content=b"{no").status_code == 400


def test_who_hangs_up_frees_the_engine(subject: Subject) -> None:
    with subject.streaming("/v1/completions", long(subject)) as found:
        assert next(found)["choices"]
        assert subject.live() >= 1
    subject.becomes_idle()


def test_so_does_who_does_not_even_wait_for_an_answer(subject: Subject) -> None:
    with pytest.raises(httpx.ReadTimeout):
        subject.client.post("/v1/completions", json=long(subject), timeout=0.3)
    subject.becomes_idle()


def test_many_who_hang_up_at_once_leave_room_for_the_next(subject: Subject) -> None:
    def glance(number: int) -> None:
        body = long(subject, prompt=f"{number} {PROMPT}{subject.slowly}")
        with subject.streaming("/v1/completions", body) as found:
            assert next(found)["choices"]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(glance, range(16)))
    subject.becomes_idle()
    assert subject.text(PROMPT, max_tokens=4)


# Looks short, so that it is let in, and takes longer than its deadline.
DAWDLING: Json = {
    "prompt": "one two three four five six @pause=150",
    "max_tokens": 9,
    "deadline_ms": 600,
}


def test_a_deadline_ends_an_answer_with_what_there_is(echo: Subject) -> None:
    def has_begun() -> str | None:
        answer = echo.client.post("/v1/completions", json=DAWDLING)
        echo.becomes_idle()
        if is_late(answer):
            return None
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "deadline"
        return choice["text"] or None

    text = sooner_or_later(has_begun, "let in and begun before the deadline")
    assert DAWDLING["prompt"].startswith(text.rstrip()) and "@pause" not in text


def test_a_deadline_ends_a_stream_with_its_reason(echo: Subject) -> None:
    def ended() -> str | None:
        body = {**DAWDLING, "stream": True}
        with echo.client.stream("POST", "/v1/completions", json=body) as answer:
            if is_late(answer):
                return None
            *_, last = events(answer)
        echo.becomes_idle()
        return str(last["choices"][0]["finish_reason"])

    assert sooner_or_later(ended, "let in") == "deadline"


def is_late(answer: httpx.Response) -> bool:
    """Whether it was refused, as what cannot be in time any more is."""
    if answer.status_code == 200:
        return False
    answer.read()
    assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "deadline"), answer.text
    return True


@pytest.mark.parametrize("is_header", [False, True])
def test_a_deadline_that_cannot_be_kept_is_refused_or_ends_the_answer(
    subject: Subject, is_header: bool
) -> None:
    wish = {} if is_header else {"deadline_ms": 100}
    headers = {"X-Request-Deadline-Ms": "100"} if is_header else {}
    answer = subject.client.post("/v1/completions", json=long(subject, **wish), headers=headers)
    body = answer.json()
    if answer.status_code == 200:
        assert body["choices"][0]["finish_reason"] == "deadline"
    else:
        assert (answer.status_code, body["error"]["reason"]) == (503, "deadline"), body
        assert float(answer.headers["Retry-After"]) > 0
    subject.becomes_idle()
