"""Thousands of wrong requests against a running server: `python -m bench.fuzz URL`.

Every answer has to be a documented one: no 5xx but a 503 with Retry-After (or a 504), every error
OpenAI's object, and /health answers throughout. Exits with 1 if not. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench.fuzz_cases import Case, Endpoint, Maker, endpoints
from dynamo_serve.cli_progress import Progress

LONGEST_S = 40.0  # longer than every limit of the server
HEALTH_EVERY = 250
SHOWN = 20
ERROR_KEYS = {"message", "type", "param", "code"}
ANTHROPIC_KEYS = {"message", "type"}
MESSAGES = "/v1/messages"
LAST_EVENTS = {  # what the last event of a whole stream is called, where it is not [DONE]
    MESSAGES: ("message_stop", "error"),
    "/v1/responses": (
        *("response.completed", "response.incomplete", "response.failed"),
        "error",
    ),
}


@dataclass
class Report:
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, case: Case, outcome: str, fault: str | None, seconds: float) -> None:
        self.counts.setdefault(case.endpoint, Counter())[outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if fault is not None:
            self.faults.append(f"{fault}: {case.raw[:300]!r} (ends after {case.hang_up})")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def parse(raw: bytes) -> Answer | None:
    """The last answer in `raw` (1xx may come before it), or None if there is none."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return None
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    if status < 200:
        return parse(rest)
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    body = _dechunked(rest) if headers.get("transfer-encoding") == "chunked" else rest
    return Answer(status, headers, body)


def _dechunked(raw: bytes) -> bytes:
    whole = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        whole, raw = whole + raw[:length], raw[length + 2 :]
        if not length:
            break
    return whole


def fault_of(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer, if anything."""
    status, headers = answer.status, answer.headers
    if status >= 500 and not (status == 504 or (status == 503 and "retry-after" in headers)):
        return f"undocumented status {status}"
    if case.method == "HEAD":
        return None
    if status >= 400:
        keys = ANTHROPIC_KEYS if MESSAGES in case.endpoint else ERROR_KEYS
        return _error_fault(answer, keys)
    if headers.get("content-type", "").startswith("text/event-stream"):
        return _stream_fault(case, answer.body)
    return None


def _error_fault(answer: Answer, keys: set[str]) -> str | None:
    try:
        body = json.loads(answer.body)
        is_error = body["error"].keys() >= keys
    except (ValueError, KeyError, TypeError, AttributeError):
        is_error = False
    is_json = answer.headers.get("content-type") == "application/json"
    if is_error and is_json:
        return None
    return f"a {answer.status} that is no JSON error object: {answer.body[:80]!r}"


def _stream_fault(case: Case, body: bytes) -> str | None:
    if b'"internal_error"' in body:
        return "an internal error within a stream"
    names = LAST_EVENTS.get(case.endpoint.rpartition(" ")[2])
    if names is None:
        is_whole = body.endswith(b"data: [DONE]\n\n")
    else:
        last = body.rstrip().rpartition(b"\n\n")[2]
        is_whole = last.startswith(tuple(f"event: {name}\n".encode() for name in names))
    return None if is_whole and body.endswith(b"\n\n") else "a stream without an end"


class Fuzz:
    def __init__(
        self, url: str, seed: int, keys: list[str], known: list[Endpoint], schemas: Any
    ) -> None:
        address = urlsplit(url)
        self._url = url
        self._host, self._port = address.hostname or "", address.port or 80
        self._seed = seed
        self._keys = keys or [""]
        self._known = known
        self._schemas = schemas
        self._ids: list[str] = []
        self.report = Report()

    def learn_ids(self) -> None:
        """Of prefixes that there are, so that some are asked for, and deleted."""
        for key in self._keys:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            listed = httpx.get(f"{self._url}/v1/prefixes", headers=headers, timeout=30)
            if listed.status_code == 200:
                self._ids += [prefix["id"] for prefix in listed.json()["data"]]

    async def one(self, number: int) -> None:
        """Send case `number` and judge the answer."""
        rng = random.Random(f"{self._seed}-{number}")
        case = Maker(rng, self._known, self._schemas, rng.choice(self._keys), self._ids).case()
        began = time.monotonic()
        try:
            async with asyncio.timeout(LONGEST_S):
                raw = await self._exchange(case)
        except TimeoutError:
            self.report.add(case, "timeout", "no end", LONGEST_S)
            return
        except ConnectionError as error:
            raw = b""
            if isinstance(error, ConnectionRefusedError):
                self.report.add(case, "refused", "the server is gone", 0)
                return
        outcome, fault = self._judge(case, raw)
        self.report.add(case, outcome, fault, time.monotonic() - began)

    async def _exchange(self, case: Case) -> bytes:
        """Everything that came back until the server closed, or b"" after a hang-up."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            if case.hang_up is not None:
                writer.write(case.raw[: case.hang_up])
                await writer.drain()
                if case.hang_up > len(case.raw):
                    await reader.read(1)
                writer.transport.abort()
                return b""
            writer.write(case.raw)
            with contextlib.suppress(OSError):  # refused before all of it was sent
                if case.silent:
                    writer.write_eof()  # else both sides might wait for the other's next byte
                await writer.drain()
            return await reader.read(-1)
        finally:
            writer.close()

    def _judge(self, case: Case, raw: bytes) -> tuple[str, str | None]:
        if case.hang_up is not None:
            return "hung up", None
        answer = parse(raw)
        if answer is None:
            return "closed", None if case.silent else "no answer"
        return str(answer.status), None if case.silent else fault_of(case, answer)

    async def check_health(self) -> None:
        try:
            async with httpx.AsyncClient(timeout=10) as client:
                status = (await client.get(f"{self._url}/health")).status_code
        except httpx.HTTPError as error:
            self.report.faults.append(f"/health: {error!r}")
        else:
            if status != 200:
                self.report.faults.append(f"/health: {status}")


async def fuzz(url: str, requests: int, concurrency: int, seed: int, keys: list[str]) -> Report:
    """Send `requests` cases, `concurrency` at a time."""
    document = httpx.get(f"{url}/openapi.json", timeout=30).raise_for_status().json()
    fuzz = Fuzz(url, seed, keys, endpoints(document), document["components"]["schemas"])
    fuzz.learn_ids()
    progress = Progress(sys.stderr)
    numbers = iter(range(requests))

    async def work() -> None:
        for number in numbers:
            await fuzz.one(number)
            if number % HEALTH_EVERY == 0:
                await fuzz.check_health()
                progress("fuzz", number / requests)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    progress("fuzz", 1.0)
    await fuzz.check_health()
    return fuzz.report


def main() -> int:
    parser = argparse.ArgumentParser(description="Wrong requests by the thousand.")
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--key", action="append", default=[], help="API keys and admin keys")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    began = time.monotonic()
    url = args.url.rstrip("/")
    report = asyncio.run(fuzz(url, args.requests, args.concurrency, args.seed, args.key))
    seconds = time.monotonic() - began
    for name, counts in sorted(report.counts.items()):
        print(f"{name:32}", *(f"{status}: {n}" for status, n in sorted(counts.items())), sep="  ")
    for fault in report.faults[:SHOWN]:
        print("FAULT", fault)
    facts = {
        "requests": args.requests,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "slowest_s": round(report.slowest_s, 3),
        "faults": len(report.faults),
        "by_endpoint": {name: dict(counts) for name, counts in sorted(report.counts.items())},
    }
    print(json.dumps(facts))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
