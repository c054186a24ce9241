"""Servers that tell of themselves what they should not, too much of it, or nothing at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from dynamo_serve.errors import Unavailable
from dynamo_serve.metrics import Metrics
from dynamo_serve.scrape import MAX_BYTES, Scraper
from tests.patience import PATIENCE_S

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def page(said: str | bytes, head: str = "HTTP/1.1 200 OK") -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        data = said.encode() if isinstance(said, str) else said
        writer.write(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    return answer


async def says_nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)  # until the end of the loop


async def drips(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        writer.write(b"# x\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def floods(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(200):
        writer.write(b"x 1\n" * (MAX_BYTES // 100))
        await writer.drain()


async def hangs_up(writer: asyncio.StreamWriter) -> None:
    pass


async def is_no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x16\x03\x01" * 100)


async def scraped(*answers: Answer, seconds: float = PATIENCE_S) -> list[str]:
    """What is made of servers that answer so; their endpoints are "0:1", "1:1", …"""
    servers = []
    for answer in answers:

        async def handle(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer = answer
        ) -> None:
            try:
                await reader.readuntil(b"\r\n\r\n")
                await answer(writer)
            except (ConnectionError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
    addresses = {
        f"{number}:1": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for number, server in enumerate(servers)
    }
    scraper = Scraper(addresses, seconds)
    metrics = Metrics(model="m", version="1", endpoints=list(addresses), scraper=scraper)
    await asyncio.gather(*(metrics.refresh(nobody_answers) for _ in range(3)))
    for server in servers:
        server.close()
    lines = metrics.render()[0].decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


async def nobody_answers(what: str, seconds: float) -> object:
    raise Unavailable("the engine is not up")


def test_a_good_page_is_shown_with_its_mean_batch() -> None:
    good = page('nv_inference_count{model="m"} 6\nnv_inference_exec_count{model="m"} 4\n')
    lines = asyncio.run(scraped(good, hangs_up))
    assert 'nv_inference_count{endpoint="0:1",model="m"} 6' in lines
    assert 'dserve_triton_mean_batch{endpoint="0:1",model="m",version=""} 1.5' in lines
    assert 'dserve_triton_scrape_ok{endpoint="0:1"} 1.0' in lines
    assert 'dserve_triton_scrape_ok{endpoint="1:1"} 0.0' in lines
    assert 'dserve_triton_requests_total{endpoint="1:1",outcome="done"} 0.0' in lines


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (page("<html>sorry</html>"), "line 1 is no metric"),
        (page("x 1", "HTTP/1.1 503 No"), "it answers 503"),
        (page("", "HTTP/1.1 302 Go\r\nLocation: http://127.0.0.1:9/"), "it answers 302"),
        (floods, "more than"),
        (hangs_up, "RemoteProtocolError"),
        (is_no_http, "RemoteProtocolError"),
        (page(b"x\xff 1"), "UnicodeDecodeError"),
    ],
)
def test_a_bad_page_costs_nothing_but_itself_and_is_told_once(
    answer: Answer, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        lines = asyncio.run(scraped(answer, page("fine 1")))
    assert 'dserve_triton_scrape_ok{endpoint="0:1"} 0.0' in lines
    assert 'fine{endpoint="1:1"} 1' in lines
    assert any(line.startswith("dserve_sequences_live") for line in lines)
    (said,) = [record.getMessage() for record in caplog.records]
    assert told in said


@pytest.mark.parametrize("answer", [says_nothing, drips])
def test_a_server_that_takes_for_ever_is_not_waited_for(answer: Answer) -> None:
    async def soon() -> list[str]:
        async with asyncio.timeout(PATIENCE_S):
            return await scraped(answer, page("fine 1"), seconds=1.0)

    lines = asyncio.run(soon())
    assert 'dserve_triton_scrape_ok{endpoint="0:1"} 0.0' in lines
    assert 'fine{endpoint="1:1"} 1' in lines
