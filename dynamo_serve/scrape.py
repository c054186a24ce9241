"""Fetches what other servers tell of themselves on their metrics ports, within limits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

import httpx

from dynamo_serve.metrics_scraped import Page, read

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20  # of one page: a server with a hundred models tells a tenth of it


class Scrape(NamedTuple):
    """`page` is empty and `error` says why where there is none."""

    page: Page
    seconds: float
    error: str = ""


class Scraper:
    """`addresses`: the metrics address of each endpoint. To be used from one event loop."""

    def __init__(self, addresses: Mapping[str, str], seconds: float) -> None:
        self.last: dict[str, Scrape] = {}
        self._addresses = addresses
        self._seconds = seconds
        self._looking: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """Ask all of them at once. Who comes meanwhile waits for the same answers."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        # No proxy, no redirects, nothing compressed: these are addresses that an operator has set.
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=None) as client:
            scrapes = (self._scrape(client, each) for each in self._addresses.values())
            found = await asyncio.gather(*scrapes)
        for endpoint, scrape in zip(self._addresses, found, strict=True):
            before = self.last.get(endpoint)
            if scrape.error and not (before and before.error):
                log.warning("no metrics from %s: %s", self._addresses[endpoint], scrape.error)
            self.last[endpoint] = scrape

    async def _scrape(self, client: httpx.AsyncClient, address: str) -> Scrape:
        began, error = time.monotonic(), ""
        page: Page = {}
        try:
            async with asyncio.timeout(self._seconds):
                page = await asyncio.to_thread(read, await _fetch(client, address))
        except TimeoutError:
            error = f"no answer within {self._seconds:g} s (triton.metrics_timeout_s)"
        except Exception as fault:  # whatever it is: our own metrics do not depend on it
            error = f"{type(fault).__name__}: {fault}"
        return Scrape(page, time.monotonic() - began, error)


async def _fetch(client: httpx.AsyncClient, address: str) -> str:
    """Raises what httpx raises, and `ValueError` for what is no page of metrics."""
    data = bytearray()
    headers = {"Accept": "text/plain", "Accept-Encoding": "identity"}
    async with client.stream("GET", f"http://{address}/metrics", headers=headers) as answer:
        if answer.status_code != httpx.codes.OK:
            raise ValueError(f"it answers {answer.status_code}")
        async for part in answer.aiter_raw():
            data += part
            if len(data) > MAX_BYTES:
                raise ValueError(f"it tells more than {MAX_BYTES} bytes")
    return data.decode()
