"""What a server's /metrics say during a run, once in a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

from dynamo_serve.bench.client import Client, Reading
from dynamo_serve.bench.later import Later
from dynamo_serve.bench.record import Sample

LINES_AT_ONCE = 40
PATIENCE = Reading(timeout_s=10.0)


class Sampler:
    """Asks until it is cancelled. Histograms' buckets are many: they are kept at both ends only."""

    def __init__(self, client: Client, later: Later, every: float, api_key: str) -> None:
        self.samples: list[Sample] = []
        self.num_failed = 0
        self._client, self._later, self._every = client, later, every
        self._raw = client.request("GET", "/metrics", api_key=api_key)

    async def run(self, began: float) -> None:
        while True:
            await self.take(began, with_buckets=not self.samples)
            await asyncio.sleep(self._every)

    async def end(self, began: float) -> None:
        await self.take(began, with_buckets=True)
        await self._client.close()

    async def take(self, began: float, *, with_buckets: bool) -> None:
        at = time.monotonic() - began
        answer = await self._client.send(self._raw, PATIENCE)
        if answer.status != 200 or answer.error:
            self.num_failed += 1
            return
        text = b"".join(data for _, data in answer.reads).decode(errors="replace")
        values = await self._later.run(parse(text, with_buckets=with_buckets))
        self.samples.append(Sample(round(at, 4), values))


def parse(text: str, *, with_buckets: bool) -> Generator[None, None, dict[str, float]]:
    """Values by name with labels, from Prometheus' text format."""
    values: dict[str, float] = {}
    for number, line in enumerate(text.splitlines()):
        if number % LINES_AT_ONCE == 0:
            yield
        if not line or line[0] == "#":
            continue
        name, _, value = line.rpartition(" ")
        family = name.partition("{")[0]
        if family.endswith("_created") or (family.endswith("_bucket") and not with_buckets):
            continue
        try:
            values[name] = float(value)
        except ValueError:
            continue  # a format that is newer than this
    return values
