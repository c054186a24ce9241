"""Who asks, in `bench.tiers`: a server with a model, prompts of token ids, times of answers."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.server import Server, free_port, our_command, running, settle
from bench.sse_client import Stream, drive, post

FIRST_ID, LAST_ID = 1000, 30_000


@dataclass
class Client:
    """Asks one server."""

    server: Server
    port: int
    model: str
    rng: random.Random

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(FIRST_ID, LAST_ID) for _ in range(count)]

    def body(self, prompt: list[int], output: int, **more: Any) -> bytes:
        fields = {"model": self.model, "prompt": prompt, "max_tokens": output, "temperature": 0,
                  "ignore_eos": True, "stream": True}  # fmt: skip
        fields |= {"stream_options": {"include_usage": True}, **more}
        return post("/v1/completions", fields)

    def ask(self, prompts: Sequence[list[int]], output: int, width: int) -> list[Stream]:
        return drive(self.port, [self.body(prompt, output) for prompt in prompts], width)

    def ttft(self, prompt: list[int]) -> tuple[float, int]:
        """Seconds to the first token, and how many tokens were cached."""
        (stream,) = self.ask([prompt], 1, 1)
        found = cached(stream)  # first: it says what is wrong with an answer
        return stream.ttft - stream.sent, found

    def foreseen(self, prompt: list[int]) -> dict[str, float]:
        """Seconds that restoring what is below would take, and computing it, as the server says."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1}
        told = httpx.post(self.server.url + "/v1/cache/explain", json=body, timeout=10).json()
        below = told["below"] or {}
        return {key: round(below.get(key, 0.0), 4) for key in ("restoring_s", "computing_s")}

    def metric(self, name: str) -> float:
        text = httpx.get(self.server.url + "/metrics", timeout=10).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def wait(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not done():
            if time.monotonic() > end:
                raise RuntimeError("the tiers never got there")
            time.sleep(0.1)

    def flush(self, num_tokens: int) -> None:
        """Take every page of a pool of so many tokens, a kilotoken at a time."""
        for _ in range(-(-num_tokens // 1000) + 1):
            self.ttft(self.tokens(1000))
            self.quiet()

    def quiet(self) -> None:
        """Wait until nothing is copied any more."""
        before = -1.0
        while (now := self.metric("dserve_tier_copies_total")) != before:
            before = now
            time.sleep(0.3)


def cached(stream: Stream) -> int:
    usage = next(event["usage"] for event in stream.events() if event.get("usage"))
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens", 0))


@contextmanager
def serve(args: argparse.Namespace, folder: Path, *settings: str) -> Iterator[Client]:
    port = free_port()
    command = our_command(args.model, port, [*settings, *args.set])
    with running(command, port, folder / "server.log") as server:
        settle()
        client = Client(server, port, str(args.model), random.Random(args.seed))
        client.ask([client.tokens(300) for _ in range(12)], 8, 4)  # step times are learned
        yield client
