"""Do streams survive? A server is hurt at random moments; every answer is compared with a calm run.

    python -m bench.survival MODEL [--only kills stops raises drops] [--times 200] [--set ...]

kills: SIGKILL to the engine process; stops: SIGSTOP, so that it hangs; raises: steps that raise;
drops: connections cut in mid-stream and gone on with by Last-Event-ID. Load: chat and completions,
streamed and whole, n > 1, seeds, log-probabilities, stop strings. The longest pause is the longest
time between two reads of one stream. A table for people, one JSON line last; exits with 1 if an
answer failed or differed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.control_plane import children
from bench.server import free_port, our_command, running

SCENES = ("kills", "stops", "raises", "drops")
# In half precision an answer may differ with what else is in its steps, engine lost or not.
SETTINGS = ("engine.stall_timeout_s=1", "scheduler.speculation=auto", "model.dtype=float32")
TEXTS = ("Tell me about pages.", "What is a scheduler?", "Count to twenty.", "Say hello.")


def bodies(outputs: int) -> list[tuple[str, dict[str, Any]]]:
    """The kinds of requests, with their paths."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number, text in enumerate(TEXTS):
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": outputs}
        plain = {"prompt": text * 8, "max_tokens": outputs, "ignore_eos": True}
        common: dict[str, Any] = {"seed": number, "stream": True, "return_token_ids": True}
        found += [
            ("/v1/chat/completions", {**chat, **common, "temperature": 0}),
            ("/v1/chat/completions", {**chat, **common, "temperature": 1.0, "n": 3}),
            ("/v1/completions", {**plain, **common, "temperature": 0.8, "top_p": 0.9}),
            ("/v1/completions", {**plain, **common, "temperature": 0, "logprobs": 2}),
            (
                "/v1/completions",
                {**plain, **common, "presence_penalty": 0.5, "stop": ["e a", "qu"]},
            ),
            ("/v1/completions", {**plain, **common, "stream": False, "n": 2}),
        ]
    return found


@dataclass
class Answer:
    """What a client has of one request; equal if token for token the same."""

    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    last_id: str = field(default="", compare=False)
    is_done: bool = field(default=False, compare=False)

    def take(self, data: dict[str, Any]) -> None:
        if "error" in data:
            raise RuntimeError(data["error"]["message"])
        for choice in data["choices"]:
            whole = self.choices.setdefault(
                choice["index"], {"text": "", "ids": [], "logprobs": [], "finish": None}
            )
            message = (
                choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            )
            whole["text"] += message.get("content") or ""
            whole["ids"] += choice.get("token_ids") or []
            whole["logprobs"] += (choice.get("logprobs") or {}).get("tokens") or []
            whole["finish"] = choice["finish_reason"] or whole["finish"]


@dataclass
class Run:
    """One scene."""

    base: str
    rng: random.Random
    pauses: list[float] = field(default_factory=list)  # the longest of each stream, in seconds
    num_requests: int = 0
    num_resumed: int = 0
    failures: list[str] = field(default_factory=list)

    async def ask(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
        answer = Answer()
        if not body["stream"]:
            response = await http.post(self.base + path, json=body)
            answer.take(response.json())
            return answer
        await self.read(http, answer, path, body, cut=float("inf"))
        return answer

    async def read(
        self,
        http: httpx.AsyncClient,
        answer: Answer,
        path: str,
        body: dict[str, Any],
        cut: float,
    ) -> None:
        """Read a stream, or the rest of one, up to so many bytes."""
        headers = {"Accept": "text/event-stream"}  # events with ids
        if answer.last_id:
            headers["Last-Event-ID"] = answer.last_id
        async with http.stream("POST", self.base + path, json=body, headers=headers) as response:
            if response.status_code != 200:
                raise RuntimeError((await response.aread()).decode())
            buffer, before, longest = b"", time.monotonic(), 0.0
            async for chunk in response.aiter_raw():
                if b"data: " in chunk:  # a comment that keeps the connection alive is no progress
                    now = time.monotonic()
                    longest, before = max(longest, now - before), now
                buffer += chunk[: int(min(cut, len(chunk)))]
                cut -= len(chunk)
                *events, buffer = buffer.split(b"\n\n")
                for event in events:
                    take(answer, event)
                if cut <= 0:
                    break
            self.pauses.append(longest)
        if cut > 0 and not answer.is_done:
            raise RuntimeError("the stream ended early")


def take(answer: Answer, event: bytes) -> None:
    if event.startswith(b":"):
        return
    lines = dict(line.split(": ", 1) for line in event.decode().split("\n"))
    if lines["data"] == "[DONE]":
        answer.is_done = True
        return
    answer.take(json.loads(lines["data"]))
    answer.last_id = lines.get("id", answer.last_id)


async def load(
    run: Run, asked: Sequence[tuple[str, dict[str, Any]]], known: Sequence[Answer], width: int,
    hurt: Callable[[], Awaitable[None]],
) -> None:  # fmt: skip
    """`width` clients ask at random until `hurt` is through, and every answer is compared."""
    hurting = asyncio.ensure_future(hurt())
    limits = httpx.Limits(max_connections=width, max_keepalive_connections=0)

    async def client() -> None:
        while not hurting.done():
            number = run.rng.randrange(len(asked))
            run.num_requests += 1
            try:
                if await run.ask(http, *asked[number]) != known[number]:
                    run.failures.append(f"{number}: another answer")
            except (RuntimeError, httpx.HTTPError, KeyError) as error:
                run.failures.append(f"{number}: {type(error).__name__} {error}")

    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        await asyncio.gather(*(client() for _ in range(width)))
    await hurting


def engine_of(server: int) -> int | None:
    """The engine process, once it has taken its name."""
    for pid in children(server):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"worker" in command:
            return pid
    return None


async def hurt_engine(run: Run, server: int, number: signal.Signals, times: int) -> None:
    """Send a signal so many times, each at a random moment after the server is ready again."""
    async with httpx.AsyncClient(timeout=10) as http:
        for done in range(times):
            while (await http.get(run.base + "/ready")).status_code != 200:
                await asyncio.sleep(0.02)
            await asyncio.sleep(run.rng.uniform(0, 0.6))
            if (pid := engine_of(server)) is not None:
                os.kill(pid, number)
            print(f"\r{done + 1} of {times}, {run.num_requests} requests, "
                  f"{len(run.failures)} bad", end="", file=sys.stderr)  # fmt: skip
            while (await http.get(run.base + "/ready")).status_code == 200:
                await asyncio.sleep(0.005)
    print(file=sys.stderr)


async def drop(
    run: Run, asked: Sequence[tuple[str, dict[str, Any]]], known: Sequence[Answer], times: int,
    width: int,
) -> None:  # fmt: skip
    """Streams that are cut at random bytes until so many were, each gone on with."""
    streams = [i for i, (_, body) in enumerate(asked) if body["stream"]]
    limits = httpx.Limits(max_connections=2 * width, max_keepalive_connections=0)

    async def client(http: httpx.AsyncClient) -> None:
        while run.num_resumed < times:
            number, answer = run.rng.choice(streams), Answer()
            run.num_requests += 1
            try:
                while not answer.is_done:
                    run.num_resumed += bool(answer.last_id)
                    cut = run.rng.choice([float("inf"), *[run.rng.randrange(700, 9000)] * 3])
                    await run.read(http, answer, *asked[number], cut=cut)
            except (RuntimeError, httpx.HTTPError, KeyError) as error:
                run.failures.append(f"{number}: {type(error).__name__} {error}")
            else:
                if answer != known[number]:
                    run.failures.append(f"{number}: another answer")

    async with httpx.AsyncClient(timeout=120, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(width)))


async def play(scene: str, args: argparse.Namespace, base: str, server: int) -> dict[str, Any]:
    run = Run(base, random.Random(args.seed))
    asked = bodies(args.outputs)
    async with httpx.AsyncClient(timeout=600) as http:
        known = [await run.ask(http, path, body) for path, body in asked]
        calm = max(run.pauses)
        run.pauses.clear()
    began = time.monotonic()
    if scene == "drops":
        await drop(run, asked, known, args.times, args.width)
    else:
        number = {"kills": signal.SIGKILL, "stops": signal.SIGSTOP}.get(scene)

        async def hurt() -> None:
            if number is None:
                engine = engine_of(server)
                assert engine is not None, "the engine is gone"
                os.kill(engine, signal.SIGUSR1)
                await asyncio.sleep(args.seconds)
            else:
                await hurt_engine(run, server, number, args.times)

        await load(run, asked, known, args.width, hurt)
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(base + "/metrics")).text
    wanted = ("dserve_engine_restarts_total", "dserve_sequences_live", "dserve_sequences_parked")
    numbers = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines()
               if line.startswith(wanted)}  # fmt: skip
    return {
        "scene": scene,
        "seconds": round(time.monotonic() - began, 1),
        "requests": run.num_requests,
        "resumed": run.num_resumed,
        "bad": len(run.failures),
        "first_bad": run.failures[:3],
        "longest_pause_s": round(max(run.pauses), 2),
        "median_longest_pause_s": round(statistics.median(run.pauses), 3),
        "calm_longest_pause_s": round(calm, 3),
        **numbers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=SCENES)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60, help="of steps that raise")
    parser.add_argument("--outputs", type=int, default=48)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    args = parser.parse_args()
    rows = []
    for scene in args.only:
        port = free_port()
        settings = [*SETTINGS, *args.set]
        command = our_command(args.model, port, settings)
        if scene == "raises":
            command[command.index("dynamo_serve.cli")] = "bench.faulty_server"
        with (
            tempfile.NamedTemporaryFile(prefix="survival", suffix=".log", delete=False) as log,
            running(command, port, Path(log.name)) as server,
        ):
            rows.append(asyncio.run(play(scene, args, server.url, server.pid)))
        print(rows[-1], "log:", log.name)
    print(json.dumps(rows))
    return int(any(row["bad"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
