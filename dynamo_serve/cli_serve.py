"""`dynamo-serve serve`: the one place that builds the server's parts, starts and stops them."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import time

from dynamo_serve import __version__, garbage, recording
from dynamo_serve.api import middleware
from dynamo_serve.api.app import create_app
from dynamo_serve.api.auth import Access
from dynamo_serve.api.heads import declared_heads
from dynamo_serve.cli_metrics import metrics_of
from dynamo_serve.cli_model import (
    Files,
    dialect,
    first_request,
    load_tokenizer,
    model_path,
    served_names,
)
from dynamo_serve.cli_progress import Progress
from dynamo_serve.config import Config, LogSection, ServerSection
from dynamo_serve.directory import summed_up
from dynamo_serve.errors import ConfigError
from dynamo_serve.fits import check_disk
from dynamo_serve.handover import Door, take_over
from dynamo_serve.http_server import BACKLOG, HttpServer, http_settings
from dynamo_serve.observer import Vitals
from dynamo_serve.recording import Recorder
from dynamo_serve.service import Service
from dynamo_serve.succession import Succession

log = logging.getLogger(__name__)

FACTS = ("device", "dtype", "attention_backend")  # of the engine, worth a look at once


def serve(config: Config) -> int:
    """Serve until a signal; 0 after a drain. Raises `ConfigError` or `EngineStartError`."""
    configure_logging(config.log)
    names = served_names(config.model, config.triton.model)
    named = model_path(config.model.path)
    check_disk(config.cache)
    # Before anything slow: a port in use should be known now, not after minutes of loading.
    predecessor = take_over(config.server)
    with predecessor.listener if predecessor else listen(config.server) as listener:

        def vitals() -> Vitals:
            return service.vitals()._replace(**recording.counts(recorder))

        metrics = metrics_of(config, names[0], vitals)
        files = Files.of(named, config.engine.kind)
        tokenizer = load_tokenizer(files.folder)
        recorder = recording.recorder_of(config, metrics, tokenizer.decode, names[0])
        observer, progress = recorder or metrics, Progress(sys.stderr)
        service = Service(config, model_path=files.folder, observer=observer, progress=progress)
        access = Access(config.server, service.configure)
        service.declare(declared_heads(config.cache, tokenizer))
        told = recorder.facts if recorder else dict
        app = create_app(
            *(service, tokenizer, config, metrics, access),
            model_names=names,
            dialect=dialect(tokenizer, config.model),
            recording=told,
        )
        http = HttpServer(http_settings(app, config.server))
        succession = Succession(
            *(service, app.state.streams, http, observer),
            models=names,
            tokenizer=tokenizer,
            predecessor=predecessor,
            door=Door(config.server.handover, listener) if config.server.handover else None,
        )
        run = Run(files, service, http, listener, config.server, access, succession, recorder)
        return asyncio.run(run.until_signal(names))


class Run:
    """One server from start to exit."""

    def __init__(
        self,
        files: Files,
        service: Service,
        http: HttpServer,
        listener: socket.socket,
        server: ServerSection,
        access: Access,
        succession: Succession,
        recorder: Recorder | None,
    ) -> None:
        self._files = files
        self._service = service
        self._http = http
        self._listener = listener
        self._server = server
        self._access = access
        self._succession = succession
        self._recorder = recorder
        self._stop = asyncio.Event()

    async def until_signal(self, names: tuple[str, ...]) -> int:
        """Start, serve, drain; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if self._access.reloads:  # else SIGHUP ends the server, as a terminal that closes means it
            loop.add_signal_handler(signal.SIGHUP, self._reload)
        stopped = asyncio.create_task(self._stop.wait())
        starting = asyncio.create_task(self._start())
        answering = asyncio.create_task(self._succession.answer(starting, self._listener))
        handed = asyncio.create_task(self._succession.handed())
        tidying = asyncio.create_task(garbage.tidy())
        try:
            await self._first_of(starting, stopped, answering)
            if not self._stop.is_set():
                garbage.settle()
                if self._recorder is not None:
                    heads = self._service.prefixes.shared_keys
                    self._recorder.begin(self._service.spec, self._access.tenancy, heads)
                await self._succession.begin(answering)
                tell(self._what_next(names))
                await self._first_of(stopped, answering, handed)
            await self._drain()
        finally:
            await self._close(answering, starting, stopped, handed, tidying)
        return 0

    async def _start(self) -> None:
        await self._files.bring_weights()  # HTTP answers meanwhile
        await self._service.start()

    @staticmethod
    async def _first_of(*tasks: asyncio.Task[object]) -> None:
        """Wait until one of `tasks` is done, and raise what it raised."""
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            # Asked twice: whoever asks does not want to wait for anything. The engine process
            # sees its pipe close and ends by itself.
            os._exit(128 + number)
        self._stop.set()

    def _reload(self) -> None:
        try:
            log.info("tenants reloaded: %s", summed_up(self._access.reload()))
        except ConfigError as error:
            log.error("tenants not reloaded, the old ones stay: %s", error)

    async def _drain(self) -> None:
        timeout, began = self._server.drain_timeout_s, time.monotonic()
        live = self._num_live()
        log.info(
            "draining: %d requests live, up to %g s; a second signal ends it",
            live,
            timeout,
        )
        await self._succession.let_go(timeout)
        await self._service.drain(max(0.0, began + timeout - time.monotonic()))
        if live := self._num_live():
            log.warning("drain timed out with %d requests live", live)
        await self._succession.leave()

    def _num_live(self) -> int:
        return self._service.num_live + len(self._service.preparing)

    async def _close(self, answering: asyncio.Task[None], *tasks: asyncio.Task[object]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._succession.close()
        await self._service.close()
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)
        self._http.should_exit = True
        await answering

    def _what_next(self, names: tuple[str, ...]) -> str:
        host, port = self._listener.getsockname()[:2]
        return what_next(base_url(host, port), names, self._service, self._access.asks_key)


def tell(text: str) -> None:
    """Write to standard output; that it is full or closed is no reason to stop serving."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        log.warning("cannot write to standard output: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in its buffer


def configure_logging(section: LogSection) -> None:
    """Our own messages from the wished level; of libraries only what needs attention."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("dynamo_serve").setLevel(section.level.upper())
    logging.getLogger("huggingface_hub").handlers.clear()  # its own, beside ours: each line twice
    if section.requests:  # asked for by name, so also where the level is above it
        middleware.logger.setLevel(logging.INFO)


def listen(server: ServerSection) -> socket.socket:
    """A listening socket; connections wait in it until HTTP is up. Raises `ConfigError`."""
    host, port = server.host, server.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name that has both, the IPv4 address: it is what clients of "localhost" try.
        family, kind, protocol, _, address = min(found, key=lambda at: at[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host = {host!r}: {error.strerror or error}") from error
    except UnicodeError as error:  # a label that is empty or longer than a name may have
        raise ConfigError(f"server.host = {host!r}: this is no host name") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Left to itself, the system buffers megabytes for a slow reader.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, server.stream_buffer_bytes)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"server.host = {host!r}: this machine has no such address")
    remedy = "choose another with --port (0 picks a free one)"
    if error.errno == errno.EADDRINUSE:
        remedy = f"stop the program that listens on it, or {remedy}"
    return ConfigError(f"server.port = {port}: {error.strerror} on {host}; {remedy}")


def base_url(host: str, port: int) -> str:
    """A URL that works on this machine, also when the server listens on every address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def what_next(url: str, names: tuple[str, ...], service: Service, asks_key: bool) -> str:
    """The first lines after the start: what runs, and what to try."""
    spec = service.spec
    facts = ", ".join(f"{key} {spec.facts[key]}" for key in FACTS if key in spec.facts)
    path, body = first_request(spec, names[0])
    key = ' -H "Authorization: Bearer $KEY"' if asks_key else ""
    chat_key = ' --api-key "$KEY"' if asks_key else ""
    return (
        f"dynamo-serve {__version__} serves {names[0]} on {url} ({facts}; "
        f"up to {spec.max_model_len} tokens, {spec.num_pages} pages of {spec.page_size})\n"
        "Try:\n"
        f"  curl -N {url}{path}{key} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'\n"
        + (f"  dynamo-serve chat --url {url}{chat_key}\n" if spec.generates else "")
        + f"  {url}/openapi.json describes every endpoint\n"
        + f"  {url}/console shows the scheduler at work to who has an admin key\n"
    )
