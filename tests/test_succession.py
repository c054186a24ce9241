"""A server that stops accepting loses nobody whom it has accepted."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from dynamo_serve.succession import empty, end_after_next_answer, stop_accepting
from tests.patience import PATIENCE_S
from tests.test_service import run

CLIENTS = 20
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("here")(scope, receive, send)


def server() -> uvicorn.Server:
    """Loaded, as `serve` would leave it before `startup`."""
    http = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    http.config.load()
    http.lifespan = http.config.lifespan_class(http.config)
    return http


async def answer_to(client: socket.socket) -> bytes:
    """All that the server sends, until it closes."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, ASK)
    said = b""
    while part := await loop.sock_recv(client, 4096):
        said += part
    return said


@pytest.mark.parametrize("num_turns", range(6))
def test_whoever_is_in_the_queue_is_served_by_one_or_the_other(num_turns: int) -> None:
    """However far the event loop is with accepting them when the server stops."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            old, new = server(), server()
            copy = listener.dup()  # as in another process
            address = listener.getsockname()
            await old.startup([listener])
            clients = [socket.create_connection(address) for _ in range(CLIENTS)]
            for client in clients:
                client.setblocking(False)
            for _ in range(num_turns):
                await asyncio.sleep(0)
            await stop_accepting(old)
            end_after_next_answer(old)
            assert listener.fileno() == -1
            await new.startup([copy])
            end_after_next_answer(new)
            answers = await asyncio.gather(*map(answer_to, clients))
            for said in answers:
                assert said.startswith(b"HTTP/1.1 200 ")
                assert b"\r\nconnection: close\r\n" in said
            await empty(old, seconds=PATIENCE_S)
            await stop_accepting(new)
            await empty(new, seconds=PATIENCE_S)
            for client in clients:
                client.close()

    run(main)


def test_a_connection_without_a_request_is_closed_in_the_end() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            http = server()
            await http.startup([listener])
            with socket.create_connection(listener.getsockname()) as client:
                client.setblocking(False)
                while not http.server_state.connections:
                    await asyncio.sleep(0)
                await stop_accepting(http)
                await empty(http, seconds=0)
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""

    run(main)
