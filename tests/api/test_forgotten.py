"""What a connection leaves behind: nothing that only the collector of cycles would find."""

from __future__ import annotations

import gc
import json
import socket
import struct
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from dynamo_serve.api.protocol import LimitedProtocol
from dynamo_serve.config import EngineSection
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.test_resume import stuck_client, wait_until
from tests.patience import PATIENCE_S
from tests.test_service import Witness

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
PATH = "/v1/chat/completions"
CLOSE = {"Connection": "close"}
TIMES = 5


@pytest.fixture
def base(model_folder: str, tokenizer: Tokenizer) -> Generator[str]:
    settings = config(resume_grace_s=0)
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as url:
        yield url


@pytest.fixture
def born(monkeypatch: pytest.MonkeyPatch) -> Generator[list[weakref.ref[Any]]]:
    """Every connection since, weakly; the collector of cycles does not run meanwhile."""
    found: list[weakref.ref[Any]] = []
    begin = LimitedProtocol.__init__

    def remember(self: LimitedProtocol, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        found.append(weakref.ref(self))

    monkeypatch.setattr(LimitedProtocol, "__init__", remember)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def post(base: str, **fields: Any) -> None:
    httpx.post(base + PATH, json={**CHAT, **fields}, headers=CLOSE, timeout=PATIENCE_S)


def kept_alive(base: str) -> None:
    with httpx.Client(base_url=base, timeout=PATIENCE_S) as client:
        for _ in range(3):
            client.post(PATH, json=CHAT)
            client.get("/health")


def hung_up(base: str, *, reset: bool) -> None:
    """In the middle of a stream."""
    address = urlsplit(base)
    assert address.hostname and address.port
    raw = json.dumps({**CHAT, "max_tokens": 200, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as sock:
        sock.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def nonsense(base: str) -> None:
    address = urlsplit(base)
    assert address.hostname and address.port
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        while sock.recv(1000):
            pass


WAYS: dict[str, Callable[[str], None]] = {
    "whole": post,
    "stream": lambda base: post(base, stream=True),
    "choices": lambda base: post(base, stream=True, n=3),
    "refused": lambda base: post(base, max_tokens=-1),
    "kept alive": kept_alive,
    "closed": lambda base: hung_up(base, reset=False),
    "reset": lambda base: hung_up(base, reset=True),
    "nonsense": nonsense,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_connection_is_gone_when_it_is_closed(
    base: str, born: list[weakref.ref[Any]], way: str
) -> None:
    for _ in range(TIMES):
        WAYS[way](base)
    assert len(born) == TIMES
    all_gone(born)


def all_gone(born: list[weakref.ref[Any]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(ref() is not None for ref in born):
        assert time.monotonic() < deadline, "a connection refers to itself"
        time.sleep(0.01)


def test_so_is_one_that_was_cut_because_nobody_read(
    model_folder: str,
    tokenizer: Tokenizer,
    born: list[weakref.ref[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamo_serve.deliveries.SLOW_SECONDS", 0.05)
    chosen = config(
        resume_grace_s=0, stream_credit_bytes=1024, stream_buffer_bytes=4096, reader_patience_s=0.1
    )
    slow = EngineSection(kind="fake", process=False, fake_step_ms=1)
    settings = replace(chosen, engine=slow)
    body = {"prompt": "hello", "max_tokens": 250, "ignore_eos": True, "logprobs": 5, "stream": True}
    witness = Witness()
    service = Service(settings, model_path=model_folder, observer=witness)
    with serving(service, tokenizer, settings) as base:
        for number in range(TIMES):
            with (
                stuck_client(base, "/v1/completions", body) as sock,
                pytest.raises(ConnectionError),
            ):
                wait_until(lambda: witness.streams.count("given_up") > number)  # noqa: B023 - at once
                while sock.recv(1 << 16):
                    pass
        assert len(born) == TIMES
        all_gone(born)
