"""Streams that go on after their connection broke: no token lost, none repeated."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from dynamo_serve.config import Config, EngineSection
from dynamo_serve.delivery import Delivery
from dynamo_serve.directory import digest
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.patience import PATIENCE_S
from tests.tries import sooner_or_later

EVENTS = {"Accept": "text/event-stream"}  # as who wants ids sends it
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
CLOCK = {"type": "function", "function": {"name": "clock"}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**CHAT, "max_tokens": 40}),
    "tokens and logprobs": (
        "/v1/completions",
        {
            **{"prompt": [5, 6, 7], "max_tokens": 40, "stream": True, "ignore_eos": True},
            **{"return_token_ids": True, "logprobs": 2},
            "stream_options": {"include_usage": True},
        },
    ),
    "three choices": ("/v1/chat/completions", {**CHAT, "max_tokens": 30, "n": 3, "seed": 5}),
    "tools": ("/v1/chat/completions", {**CHAT, "max_tokens": 40, "tools": [CLOCK]}),
    "stop string": ("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 60}),
}


def settings(**server: Any) -> Config:
    return replace(
        config(**server), engine=EngineSection(kind="fake", process=False, fake_step_ms=2)
    )


@pytest.fixture(scope="module")
def service(model_folder: str) -> Service:
    return Service(settings(), model_path=model_folder)


@pytest.fixture(scope="module")
def base(service: Service, tokenizer: Tokenizer) -> Generator[str]:
    with serving(service, tokenizer, settings()) as url:
        yield url


@dataclass
class Answer:
    """What a client has put together."""

    last_id: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    offsets: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    is_done: bool = False

    def take(self, event: str) -> None:
        lines = dict(line.split(": ", 1) for line in event.split("\n"))
        if lines["data"] == "[DONE]":
            self.is_done = True
            return
        data = json.loads(lines["data"])
        assert "error" not in data, data
        self.usage = data.get("usage") or self.usage
        self.last_id = lines.get("id", self.last_id)
        for choice in data["choices"]:
            at = choice["index"]
            text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            self.texts[at] = self.texts.get(at, "") + text
            self.token_ids.setdefault(at, []).extend(choice.get("token_ids") or [])
            if choice.get("logprobs"):
                self.offsets.setdefault(at, []).extend(choice["logprobs"]["text_offset"])
            if choice["finish_reason"]:
                assert at not in self.finishes, "two ends"
                self.finishes[at] = choice["finish_reason"]


def events_of(chunks: Iterator[bytes], num_bytes: float) -> Iterator[str]:
    """The events in the first so many bytes; what is begun and not whole is thrown away."""
    buffer, left = b"", num_bytes
    for chunk in chunks:
        buffer += chunk[: int(min(left, len(chunk)))]
        left -= len(chunk)
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            if not event.startswith(b":"):
                yield event.decode()
        if left <= 0:
            return


def read(answer: Answer, response: httpx.Response, num_bytes: float = float("inf")) -> None:
    assert response.status_code == 200, response.read()
    for event in events_of(response.iter_bytes(), num_bytes):
        answer.take(event)


def whole(base: str, path: str, body: dict[str, Any]) -> Answer:
    answer = Answer()
    with httpx.stream("POST", base + path, json=body, headers=EVENTS) as response:
        read(answer, response)
    assert answer.is_done
    return answer


@pytest.mark.parametrize("accept", ["*/*", "application/json", None])
def test_who_does_not_ask_for_events_gets_nothing_but_data(base: str, accept: str | None) -> None:
    """Load generators and other simple clients take every event for `data: ` and JSON."""
    path, body = BODIES["three choices"]
    answer = httpx.post(base + path, json=body, headers={"Accept": accept} if accept else {})
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
    id = json.loads(events[0].removeprefix("data: "))["id"]
    with httpx.stream("GET", f"{base}/v1/streams/{id}") as response:  # and has ids from now on
        read(again := Answer(), response)
    assert again.is_done and again.last_id.startswith(id)


def test_the_readme_asks_for_ids_where_it_shows_them(base: str) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.partition("## Streams that survive")[2].partition("Last-Event-ID")[0]
    curl = re.search(r"curl -N http://127.0.0.1:8000(\S+) (.*?)-d '(.*?)'\n", shown, re.DOTALL)
    assert curl
    headers = dict(header.split(": ") for header in re.findall(r"-H '(.*?)'", curl[2]))
    body = {**json.loads(curl[3]), "max_tokens": 4}
    answer = httpx.post(base + curl[1], json=body, headers=headers)
    *events, _, _ = answer.text.split("\n\n")
    assert events and all(event.startswith("id: chatcmpl-") for event in events)


@pytest.mark.parametrize("name", BODIES)
def test_a_broken_stream_goes_on_where_it_was(base: str, service: Service, name: str) -> None:
    """Cut at random bytes, also within an event, as often as it takes."""
    path, body = BODIES[name]
    if name == "stop string":
        body = {**body, "stop": [whole(base, path, body).texts[0][20:23]]}
    expected = whole(base, path, body)
    rng = random.Random(name)
    for _ in range(8):
        answer, num_tries = Answer(), 0
        while not answer.is_done:
            num_tries += 1
            assert num_tries < 100
            headers = EVENTS | ({"Last-Event-ID": answer.last_id} if answer.last_id else {})
            again = answer.last_id and rng.random() < 0.5
            id = answer.last_id.partition(":")[0]
            method, url = ("GET", f"/v1/streams/{id}") if again else ("POST", path)
            # Long enough to get an id at all.
            num_bytes = rng.choice([float("inf"), rng.randrange(500, 6000)])
            sent = None if again else body
            with httpx.stream(method, base + url, json=sent, headers=headers) as response:
                read(answer, response, num_bytes)
        answer.last_id = expected.last_id = ""
        assert answer == expected
    wait_until(lambda: service.num_live == 0)  # of a stop string the engine hears afterwards


def test_the_rest_is_computed_only_when_somebody_is_there(base: str, service: Service) -> None:
    body = {**CHAT, "max_tokens": 200, "ignore_eos": True}

    def left_in_time() -> tuple[Answer, Delivery] | None:
        answer = Answer()
        with httpx.stream(
            "POST", base + "/v1/chat/completions", json=body, headers=EVENTS
        ) as response:
            read(answer, response, 1000)
        wait_until(lambda: service.num_live == 0)
        wait_until(lambda: service.stats.num_running == service.stats.pages_used == 0)
        unfinished = [d for d in service.deliveries.kept.values() if d.is_parked]
        return (answer, unfinished[0]) if unfinished else None

    answer, parked = sooner_or_later(left_in_time, "left before all was computed")
    assert len(parked.tokens) < 200
    headers = {"Last-Event-ID": answer.last_id}
    with httpx.stream("POST", base + "/v1/chat/completions", headers=headers) as response:
        read(answer, response)
    assert answer.is_done
    assert len(parked.tokens) == 200


def test_the_end_is_told_again(base: str) -> None:
    """The client has all but the last bytes."""
    path, body = BODIES["tokens and logprobs"]
    answer = whole(base, path, body)
    again = Answer()
    with httpx.stream("POST", base + path, headers={"Last-Event-ID": answer.last_id}) as response:
        read(again, response)
    assert again.is_done
    assert again.usage == answer.usage
    assert not again.texts


def test_a_second_reader_takes_the_stream_over(base: str) -> None:
    """A client may know that a connection is dead before the server does."""
    body = {**CHAT, "max_tokens": 200, "ignore_eos": True}
    expected = whole(base, "/v1/chat/completions", body)
    answer = Answer()
    with httpx.stream("POST", base + "/v1/chat/completions", json=body, headers=EVENTS) as first:
        chunks = first.iter_bytes()
        for event in events_of(chunks, 3000):
            answer.take(event)
        headers = {"Last-Event-ID": answer.last_id}
        with httpx.stream("POST", base + "/v1/chat/completions", headers=headers) as second:
            read(answer, second)
    assert (answer.texts, answer.finishes) == (expected.texts, expected.finishes)


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ("chatcmpl-nobody:3", 404),
        ("no such thing", 404),
        ("chatcmpl-x:three", 400),
        ("chatcmpl-x:3,,4", 400),
        (":", 400),
        ("chatcmpl-x:" + "9" * 400, 400),
    ],
)
def test_what_is_no_id_of_ours_is_refused(base: str, last: str, status: int) -> None:
    answer = httpx.post(base + "/v1/chat/completions", headers={"Last-Event-ID": last})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_marks_that_do_not_fit_the_stream_are_refused(base: str) -> None:
    path, body = BODIES["chat"]
    id = whole(base, path, body).last_id.partition(":")[0]
    for marks, status in (("3,4", 400), ("999", 404)):
        answer = httpx.post(base + path, headers={"Last-Event-ID": f"{id}:{marks}"})
        assert answer.status_code == status
    other = httpx.get(f"{base}/v1/streams/chatcmpl-other", headers={"Last-Event-ID": f"{id}:3"})
    assert other.status_code == 400


@pytest.mark.parametrize("grace", [PATIENCE_S, 0.1])
def test_a_stream_is_kept_for_its_own_tenant_and_not_for_ever(
    model_folder: str, tokenizer: Tokenizer, tmp_path: Any, grace: float
) -> None:
    keys = {name: f"key-of-{name}-with-enough-characters" for name in ("acme", "beta")}
    file = tmp_path / "tenants.yaml"
    tenants = {name: {"keys": [f"sha256:{digest(key.encode())}"]} for name, key in keys.items()}
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    chosen = settings(tenants_file=str(file), resume_grace_s=grace)
    service = Service(chosen, model_path=model_folder)
    with serving(service, tokenizer, chosen) as base:

        def headers(name: str, last: str = "") -> dict[str, str]:
            auth = {"Authorization": f"Bearer {keys[name]}"}
            return auth | ({"Last-Event-ID": last} if last else EVENTS)

        path, body = BODIES["chat"]
        answer = Answer()
        with httpx.stream("POST", base + path, json=body, headers=headers("acme")) as response:
            read(answer, response)
        asked = httpx.post(base + path, headers=headers("beta", answer.last_id))
        assert asked.status_code == 404
        if grace < PATIENCE_S:
            wait_until(lambda: not service.deliveries.live and not service.deliveries.kept)
        asked = httpx.post(base + path, headers=headers("acme", answer.last_id))
        assert asked.status_code == (404 if grace < PATIENCE_S else 200)


def test_without_a_grace_there_are_no_ids_and_a_hang_up_cancels(
    model_folder: str, tokenizer: Tokenizer
) -> None:
    chosen = settings(resume_grace_s=0)
    service = Service(chosen, model_path=model_folder)
    with serving(service, tokenizer, chosen) as base:
        body = {**CHAT, "max_tokens": 200, "ignore_eos": True}
        with httpx.stream(
            "POST", base + "/v1/chat/completions", json=body, headers=EVENTS
        ) as response:
            assert next(response.iter_lines()).startswith("data: ")
        wait_until(lambda: service.num_live == 0)
        assert not service.deliveries.kept


def test_a_connection_that_takes_nothing_is_cut_in_the_end(
    model_folder: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request was parked before, so that it cost nobody anything; and the rest can be had."""
    monkeypatch.setattr("dynamo_serve.deliveries.SLOW_SECONDS", 0.05)
    chosen = replace(
        settings(stream_credit_bytes=1024, stream_buffer_bytes=4096, reader_patience_s=1.5),
        engine=EngineSection(kind="fake", process=False, fake_step_ms=1),
    )
    service = Service(chosen, model_path=model_folder)
    with serving(service, tokenizer, chosen) as base:
        body = {**BODIES["tokens and logprobs"][1], "max_tokens": 250, "logprobs": 5}
        with stuck_client(base, "/v1/completions", body) as connection:
            wait_until(lambda: service.deliveries.kept)
            (delivery,) = service.deliveries.kept.values()
            assert delivery.inbox is not None and len(delivery.tokens) < 250
            wait_until(lambda: delivery.inbox is None)
            with pytest.raises(ConnectionError):  # reset: what it had not taken is gone
                while connection.recv(1 << 16):
                    pass
        answer = Answer()
        id = delivery.request.id.rpartition("-")[0]
        with httpx.stream("GET", f"{base}/v1/streams/{id}") as response:
            read(answer, response)
        assert answer.is_done and len(answer.token_ids[0]) == 250


@contextlib.contextmanager
def stuck_client(base: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Has sent its request, and reads nothing."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        address = urlsplit(base)
        assert address.hostname and address.port
        connection.connect((address.hostname, address.port))
        connection.settimeout(PATIENCE_S)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        yield connection


def test_streams_that_begin_together_can_all_be_gone_on_with(base: str) -> None:
    """Also before the service has seen the first of them."""
    body = {**CHAT, "max_tokens": 100, "ignore_eos": True}
    expected = whole(base, "/v1/chat/completions", body)

    def cut_and_gone_on_with(number: int) -> Answer:
        answer = Answer()
        with httpx.stream(
            "POST", base + "/v1/chat/completions", json=body, headers=EVENTS
        ) as response:
            read(answer, response, 1500)
        headers = {"Last-Event-ID": answer.last_id}
        with httpx.stream("POST", base + "/v1/chat/completions", headers=headers) as response:
            read(answer, response)
        return answer

    with ThreadPoolExecutor(12) as pool:
        for answer in pool.map(cut_and_gone_on_with, range(12)):
            assert answer.texts == expected.texts


def test_a_choice_that_has_ended_is_kept_for_the_others(
    model_folder: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(resume_grace_s=0.2)
    service = Service(chosen, model_path=model_folder)
    body = {"prompt": [[5, 6], [7]], "stream": True, "ignore_eos": True, "return_token_ids": True}
    monkeypatch.setattr(
        "dynamo_serve.api.job._max_tokens", lambda b, n, limit: 10 if n == 2 else 220
    )
    with serving(service, tokenizer, chosen) as base:

        def left_between_the_two_ends() -> Answer | None:
            answer = Answer()
            with httpx.stream(
                "POST", base + "/v1/completions", json=body, headers=EVENTS
            ) as response:
                for event in events_of(response.iter_bytes(), float("inf")):
                    answer.take(event)
                    if len(answer.token_ids.get(1, [])) > 130:  # one end more than the grace ago
                        break
            if answer.finishes != {0: "length"}:
                return None
            headers = {"Last-Event-ID": answer.last_id}
            with httpx.stream("POST", base + "/v1/completions", headers=headers) as response:
                if response.status_code == 404:  # perhaps later than the grace
                    return None
                read(answer, response)
            return answer

        answer = sooner_or_later(left_between_the_two_ends, "gone on with between the two ends")
        assert answer.is_done and len(answer.token_ids[1]) == 220
        wait_until(lambda: not service.deliveries.kept)


def test_the_end_by_a_stop_string_is_told_to_who_has_not_had_it(base: str) -> None:
    path, body = BODIES["stop string"]
    body = {**body, "stop": [whole(base, path, body).texts[0][20:23]]}
    answer = whole(base, path, body)
    assert answer.finishes == {0: "stop"} and answer.last_id.endswith("e")
    rest = Answer()
    headers = {"Last-Event-ID": answer.last_id[:-1]}
    with httpx.stream("POST", base + path, headers=headers) as response:
        read(rest, response)
    assert (rest.texts, rest.finishes, rest.is_done) == ({0: ""}, {0: "stop"}, True)
