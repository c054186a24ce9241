"""Streams of the Messages API that go on after their connection broke."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from dynamo_serve.config import Config, EngineSection, ModelSection
from dynamo_serve.service import Service
from tests.api.live import config, serving
from tests.api.talking import THINKING, tokenizer_of
from tests.api.test_messages import MESSAGES, TOOLS, Event, body, events_of, put_together
from tests.api.test_resume import EVENTS
from tests.api.test_resume import events_of as raw_events
from tests.tries import sooner_or_later

ANSWER: dict[str, Any] = {"stream": True, "max_tokens": 40, "tools": TOOLS}


@pytest.fixture(scope="module")
def base(model_folder: str) -> Generator[str]:
    engine = EngineSection(kind="fake", process=False, fake_step_ms=2)
    settings: Config = replace(config(), engine=engine, model=ModelSection(max_model_len=512))
    service = Service(settings, model_path=model_folder)
    with serving(service, tokenizer_of(THINKING), settings) as url:
        yield url


class Reader:
    """Keeps the events up to the last one with an id: what came after it comes again."""

    def __init__(self) -> None:
        self.last_id = ""
        self.kept: list[str] = []
        self._open: list[str] = []

    def read(self, response: httpx.Response, num_bytes: float = float("inf")) -> None:
        assert response.status_code == 200, response.read()
        self._open.clear()
        for event in raw_events(response.iter_bytes(), num_bytes):
            first, _, rest = event.partition("\n")
            if not first.startswith("id: "):
                self._open.append(event)
                continue
            self.last_id = first[4:]
            self.kept += [*self._open, rest]
            self._open.clear()

    def events(self) -> list[Event]:
        return events_of("".join(f"{event}\n\n" for event in self.kept))


def told(events: list[Event]) -> dict[str, Any]:
    message = put_together(events)
    message.pop("id")
    message["usage"].pop("cache_read_input_tokens")
    message["usage"].pop("input_tokens")
    return message


@pytest.mark.parametrize("seed", range(4))
def test_no_event_is_lost_and_none_repeated(base: str, seed: int) -> None:
    rng = random.Random(seed)
    whole = Reader()
    with httpx.stream("POST", base + MESSAGES, json=body(**ANSWER), headers=EVENTS) as response:
        whole.read(response)

    def begun() -> Reader | None:
        reader = Reader()
        with httpx.stream("POST", base + MESSAGES, json=body(**ANSWER), headers=EVENTS) as response:
            reader.read(response, rng.randint(500, 3000))
        return reader if reader.last_id else None

    broken = sooner_or_later(begun, "an id before the cut")
    for _ in range(3):
        headers = {**EVENTS, "Last-Event-ID": broken.last_id}
        stream = f"{base}/v1/streams/{broken.last_id.partition(':')[0]}"
        with httpx.stream("GET", stream, headers=headers) as response:
            broken.read(response, rng.randint(500, 3000))
    headers = {**EVENTS, "Last-Event-ID": broken.last_id}
    with httpx.stream("POST", base + MESSAGES, json=body(**ANSWER), headers=headers) as response:
        broken.read(response)
    assert told(broken.events()) == told(whole.events())


def test_who_has_it_all_gets_nothing_more(base: str) -> None:
    reader = Reader()
    with httpx.stream("POST", base + MESSAGES, json=body(**ANSWER), headers=EVENTS) as response:
        reader.read(response)
    assert reader.last_id.endswith("e")
    stream = f"{base}/v1/streams/{reader.last_id.partition(':')[0]}"
    again = httpx.get(stream, headers={**EVENTS, "Last-Event-ID": reader.last_id})
    assert (again.status_code, again.text) == (200, "")
