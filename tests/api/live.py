"""A real uvicorn on a free port, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from dynamo_serve.api.app import create_app
from dynamo_serve.api.auth import Access
from dynamo_serve.api.edge import Metrics
from dynamo_serve.cli_model import dialect
from dynamo_serve.config import Config, EngineSection, ModelSection, ServerSection
from dynamo_serve.http_server import HttpServer, http_settings
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.patience import PATIENCE_S
from tests.text.tiny import byte_level

NAMES = ("tiny", "tiny-alias")
MAX_MODEL_LEN = 256


class NoMetrics:
    async def refresh(
        self, ask: Callable[[str, float], Awaitable[Any]], *, tenants: bool = True
    ) -> None:
        pass

    def render(self, *, tenants: bool = True) -> tuple[bytes, str]:
        return b"dserve_up 1\n", "text/plain; version=0.0.4"


class Server(HttpServer):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def config(**server: object) -> Config:
    return Config(
        server=ServerSection(**server),  # type: ignore[arg-type]
        engine=EngineSection(kind="fake", process=False),
        model=ModelSection(max_model_len=MAX_MODEL_LEN),
    )


def app_of(
    service: Service, tokenizer: Tokenizer, settings: Config, metrics: Metrics | None = None
) -> FastAPI:
    access = Access(settings.server, service.configure)
    shown = metrics or NoMetrics()
    spoken = dialect(tokenizer, settings.model)
    parts = (service, tokenizer, settings, shown, access)
    return create_app(*parts, model_names=NAMES, dialect=spoken)


def save_model(folder: Path) -> str:
    """A folder with a tokenizer and the facts that the fake engine reads."""
    wrapped = byte_level()
    wrapped.save_pretrained(folder)
    facts = {"vocab_size": len(wrapped) + 10, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return str(folder)


@contextlib.contextmanager
def serving(
    service: Service,
    tokenizer: Tokenizer,
    settings: Config,
    metrics: Metrics | None = None,
    **http_options: Any,
) -> Generator[str]:
    """Start `service` and HTTP in a thread; yields the base URL, stops both at the end.
    `http_options` are of uvicorn's configuration."""
    # With the protocol spelled out asyncio switches Nagle's algorithm off; without it every answer
    # waits 40 ms for an acknowledgement.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, settings.server.stream_buffer_bytes
        )
        listener.bind(("127.0.0.1", 0))
        app = app_of(service, tokenizer, settings, metrics)
        http = http_settings(app, settings.server)
        http.timeout_graceful_shutdown = 2
        for name, value in http_options.items():
            assert hasattr(http, name)
            setattr(http, name, value)
        server = Server(http)

        loops = []

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            if type(service) is Service:
                await service.start()
            try:
                await server.serve(sockets=[listener])
            finally:
                if type(service) is Service:
                    await service.close()

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        try:
            assert server.listening.wait(PATIENCE_S)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"it does not end: {everybody(*loops)}"


def everybody(*loops: asyncio.AbstractEventLoop) -> str:
    """Where every thread is, and every task of these loops."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = io.StringIO()
    for ident, frame in sys._current_frames().items():
        print(f"\n{names.get(ident)}:", *traceback.format_stack(frame), sep="\n", file=told)
    for task in (task for loop in loops for task in asyncio.all_tasks(loop)):
        task.print_stack(file=told)
    return told.getvalue()
