"""What an answer says: parsed after it is over, in slices, so that nobody's stamps wait for it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo_serve.bench.client import Answer

REFUSALS = (429, 503, 529)
TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")
ERROR_CHARACTERS = 300


@dataclass(slots=True)
class Said:
    """`by_choice`: when tokens of each choice came, one time for each read that brought some.
    `text` is that of the first choice. `error`: what the server said in mid-stream, or why this is
    no answer."""

    by_choice: dict[int, list[float]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    token_ids: dict[int, list[int]] = field(default_factory=dict)  # by choice
    num_pieces: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    explain: dict[str, Any] = field(default_factory=dict)
    finish: str = ""
    is_done: bool = False
    error: str = ""

    def take(self, plain: dict[str, Any]) -> set[int]:
        """Of which choices one event, or a whole answer, brings tokens."""
        brought: set[int] = set()
        if plain.get("error"):
            self.error = message(plain) or str(plain["error"])[:ERROR_CHARACTERS]
            return brought
        self.usage = plain.get("usage") or self.usage
        for choice in plain.get("choices") or ():
            index = choice.get("index") or 0
            if not isinstance(index, int):
                raise TypeError(f"{index!r} is no number of a choice")
            part = choice.get("delta") or choice.get("message") or choice
            text = part.get("content") or part.get("text")
            if text:
                if not isinstance(text, str):
                    raise TypeError(f"{text!r} is no text")
                if index == 0:
                    self.text.append(text)
            if ids := choice.get("token_ids"):
                self.token_ids.setdefault(index, []).extend(ids)
            if text or any(part.get(name) for name in TEXTS):
                brought.add(index)
                self.num_pieces += 1
            self.finish = choice.get("finish_reason") or self.finish
            self.explain = choice.get("explain") or self.explain
        if not isinstance(self.usage, dict) or not isinstance(self.explain, dict):
            self.usage, self.explain = {}, {}
            raise TypeError("usage and explain are objects")
        return brought


def parse(answer: Answer) -> Generator[None, None, Said]:
    """What an answer says; yields wherever something else may be done in between."""
    said = Said()
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        yield from _stream(answer, said)
        return said
    yield
    body = b"".join(data for _, data in answer.reads)
    try:
        plain = json.loads(body)
        said.take(plain)  # what it brings may be empty: a stop word may have come first
        said.is_done = answer.status < 300 and bool(plain.get("choices") or plain.get("data"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        said.error = f"no JSON: {body[:80]!r}" if body else ""
    return said


def _stream(answer: Answer, said: Said) -> Generator[None, None, None]:
    rest: list[bytes] = []  # of a line that goes on in the next read; joined once
    for at, data in answer.reads:
        *lines, end = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*rest, lines[0]))
            rest.clear()
        rest.append(end)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                said.is_done = True
                continue
            try:
                brought = said.take(json.loads(payload))
            except (ValueError, AttributeError, TypeError, RecursionError):
                said.error = f"this is no event of a completion: {payload[:80]!r}"
                return
            for index in brought:
                times = said.by_choice.setdefault(index, [])
                if not times or times[-1] != at:
                    times.append(at)
        yield


def count_tokens(body: bytes) -> int:
    """About how many pieces of text are in a part of a stream; for who hangs up after some."""
    empty = body.count(b'"content":""') + body.count(b'"text":""')
    return body.count(b'"content":') + body.count(b'"text":') - empty


def failure(answer: Answer, said: Said, is_stream: bool) -> str:
    """Why an answer with status 200 is none, or empty."""
    if answer.error or said.error:
        return said.error or answer.error
    if is_stream and not (said.is_done or said.finish):
        return "the stream ended before the answer did"
    return "" if said.is_done or said.finish else "an answer without choices"


def retry_after(answer: Answer) -> float | None:
    """Seconds; dates are not understood, no inference server sends them."""
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def message(plain: Any) -> str:
    error = plain.get("error") if isinstance(plain, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or "")[:ERROR_CHARACTERS]


def server_times(explain: dict[str, Any]) -> dict[str, float]:
    """`explain` of our own server in seconds, and what follows for the first token."""
    times = dict(_seconds(explain))
    if {"queue", "prefill"} <= times.keys():
        times["ttft"] = times["queue"] + times["prefill"]
    return times


def _seconds(explain: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in explain.items():
        if name.endswith("_ms") and isinstance(value, int | float):
            yield name.removesuffix("_ms"), value / 1e3
