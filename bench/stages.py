"""Microseconds a token spends in each stage between the model and the socket, each stage alone.

    python -m bench.stages [--streams 64] [--output 512]

The stages are the server's own functions, fed with what the stage before them made: a scheduler
and the fake engine decode so many sequences; what leaves the engine process is decoded, handed to
as many readers, made text, rendered and sent through uvicorn to a client in another process. The
medians of all steps. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from bench.sse_client import drive, post
from dynamo_serve import bundled, wire
from dynamo_serve.api.frames import Writer
from dynamo_serve.api.job import Job
from dynamo_serve.api.render import ChatRenderer
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import FlightRecorder
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Command
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, Sampling, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.metrics import Metrics
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer

PROMPT = 32
PAGE_SIZE = 16


class Stopwatch:
    """Seconds by stage, one entry for each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(stage, []).append(time.perf_counter() - began)

    def per_token(self, streams: int) -> dict[str, float]:
        return {name: 1e6 * median(times) / streams for name, times in self.seconds.items()}


def requests(args: argparse.Namespace) -> list[Request]:
    sampling = Sampling(temperature=0.0)
    return [
        Request(f"chatcmpl-{i:024x}-0", tuple(range(i, i + PROMPT)), args.output, sampling)
        for i in range(args.streams)
    ]


def engine_process(watch: Stopwatch, args: argparse.Namespace, vocab_size: int) -> list[bytes]:
    """Decode to the end; the frames of the steps that brought a token for every stream."""
    length = PROMPT + args.output
    pages = args.streams * -(-length // PAGE_SIZE)
    engine = FakeEngine(
        vocab_size=vocab_size, max_model_len=length, page_size=PAGE_SIZE, num_pages=pages
    )
    engine.start()
    limits = Limits(max_decode_sequences=args.streams, mix_phases=True, max_queue_delay=0.0)
    scheduler = Scheduler(PagePool(pages, PAGE_SIZE), limits)
    for request in requests(args):
        scheduler.add(request, 0.0)
    sent: list[bytes] = []
    began = time.monotonic()
    while not scheduler.is_idle:
        with watch("plan"):
            batch = scheduler.schedule(time.monotonic() - began)
        assert batch
        with watch("(fake engine)"):
            outputs = engine.step(batch)
        with watch("update"):
            events = scheduler.update(batch, outputs, time.monotonic() - began)
        with watch("encode"):
            frame = wire.pack_step(events, scheduler.stats())
        if len(events) == args.streams and not any(event.finish for event in events):
            sent.append(frame)
    return sent


def link(watch: Stopwatch, sent: list[bytes]) -> list[tuple[list[TokenEvent], Stats]]:
    frames, steps = wire.Frames(), []
    for frame in sent:
        with watch("link decode"):
            (message,) = frames.feed(frame)
            steps.append(wire.step_of(message))
    return steps


class NoLink:
    """In place of the engine process: takes commands and does nothing."""

    flight = FlightRecorder(bytearray(1024))
    is_stopped = False
    began_at = 0.0

    def kill(self, reason: str) -> bool:
        return False

    async def start(self) -> EngineSpec:
        raise NotImplementedError

    def send(self, command: Command) -> None:
        pass

    async def close(self) -> None:
        pass


async def hand_over(
    watch: Stopwatch, steps: list[tuple[list[TokenEvent], Stats]], args: argparse.Namespace
) -> None:
    """From the link to readers that only count: metrics, inboxes and one wake-up for each."""
    service = Service(Config(), model_path="", observer=Metrics(model="m", version="0"))
    service.engine.spec = EngineSpec(1 << 20, PAGE_SIZE, 1 << 20, 1 << 20, {})
    service.engine._link = NoLink()
    service.engine.is_up = service._has_started = True
    seen = 0

    async def read(events: AsyncGenerator[TokenEvent, None]) -> None:
        nonlocal seen
        async for _ in events:
            seen += 1

    readers = [asyncio.create_task(read(service.generate(r))) for r in requests(args)]
    await asyncio.sleep(0)
    for events, stats in steps:
        wanted = seen + len(events)
        with watch("hand over"):
            service._on_step(events, stats)
            while seen < wanted:
                await asyncio.sleep(0)
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)


def render(
    watch: Stopwatch,
    steps: list[tuple[list[TokenEvent], Stats]],
    args: argparse.Namespace,
    tokenizer: Tokenizer,
) -> list[bytes]:
    """Text, then the events of the last stream."""
    jobs = [job(request) for request in requests(args)]
    transcripts = [job.transcript(0, tokenizer) for job in jobs]
    writers = [Writer(job, ChatRenderer(job, tokenizer)) for job in jobs]
    bodies: list[bytes] = []
    for events, _ in steps:
        with watch("detokenize"):
            deltas = [t.deltas(event)[0] for t, event in zip(transcripts, events, strict=True)]
        with watch("render"):
            rendered = [w.events(0, delta) for w, delta in zip(writers, deltas, strict=True)]
        bodies.append(rendered[-1])
    return [body for body in bodies[1:] if body]


def job(request: Request) -> Job:
    return Job(
        id=request.id.removesuffix("-0"), created=1_764_000_000, model="dserve-tiny",
        fingerprint="fp_0123456789", n=1, requests=(request,), stops=(), endpoint="chat",
        stream=True, include_usage=True, return_token_ids=False, logprobs=None, explain=False,
    )  # fmt: skip


def send(watch: Stopwatch, bodies: list[bytes], args: argparse.Namespace) -> None:
    """Through uvicorn to a client that reads on another core."""
    tick = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(len(bodies) // args.streams):
            with watch("send"):
                for body in bodies[: args.streams]:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0.001)
        await send({"type": "http.response.body", "body": b"0"})
        tick.set()

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    client = multiprocessing.Process(target=drive, args=(port, [post("/", {})], 1))
    client.start()

    async def main() -> None:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await tick.wait()
        server.should_exit = True
        await serving

    asyncio.run(main())
    client.join()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output", type=int, default=512)
    return parser.parse_args()


def main() -> None:
    args = parse()
    watch = Stopwatch()
    tokenizer = Tokenizer.load(str(bundled.path()))
    steps = link(watch, engine_process(watch, args, tokenizer.vocab_size))
    asyncio.run(hand_over(watch, steps, args))
    bodies = render(watch, steps, args, tokenizer)
    send(watch, bodies * args.streams, args)
    table: dict[str, Any] = {k: round(v, 2) for k, v in watch.per_token(args.streams).items()}
    for stage, microseconds in table.items():
        print(f"{stage:>14} {microseconds:7.2f}")
    print(json.dumps({"us_per_token": table}))


if __name__ == "__main__":
    main()
