"""A client that costs little: many event streams on one epoll loop, read now and checked later."""

from __future__ import annotations

import itertools
import json
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

RECEIVE_BYTES = 1 << 16
LAST_CHUNK = b"0\r\n\r\n"  # of a chunked body; an event ends in two line feeds instead


@dataclass
class Stream:
    """One answer as it came: seconds on the client's clock, and the bytes of each read."""

    sent: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Until the first read that brought text; a role alone is no token."""
        return next(at for at, data in self.reads if b'"content":' in data or b'"text":' in data)

    @property
    def gaps(self) -> Iterator[float]:
        return (b - a for (a, _), (b, _) in itertools.pairwise(self.reads))

    @property
    def end(self) -> float:
        return self.reads[-1][0]

    def events(self) -> list[dict[str, Any]]:
        """Every event, parsed. Raises `RuntimeError` unless it is a whole stream."""
        head, _, chunked = b"".join(data for _, data in self.reads).partition(b"\r\n\r\n")
        body = b"".join(_chunks(chunked))
        if not head.startswith(b"HTTP/1.1 200") or not body.endswith(b"data: [DONE]\n\n"):
            raise RuntimeError(f"no whole stream: {head[:200]!r} ... {body[-200:]!r}")
        lines = body.decode().split("\n\n")[:-2]
        return [json.loads(line.partition("data: ")[2]) for line in lines if line[0] != ":"]


def _chunks(body: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(body):
        end = body.index(b"\r\n", start)
        size = int(body[start:end], 16)
        yield body[end + 2 : end + 2 + size]
        start = end + 2 + size + 2


def post(path: str, body: dict[str, Any]) -> bytes:
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def drive(port: int, requests: Sequence[bytes], concurrency: int) -> list[Stream]:
    """Send each request, `concurrency` at a time, on connections that are kept."""
    todo = iter(requests)
    epoll, streams = select.epoll(), []
    sockets: dict[int, socket.socket] = {}
    live: dict[int, Stream] = {}

    def begin(fd: int) -> None:
        request = next(todo, None)
        if request is None:
            epoll.unregister(fd)
            return
        live[fd] = Stream(time.perf_counter())
        streams.append(live[fd])
        sockets[fd].sendall(request)

    try:
        for _ in range(min(concurrency, len(requests))):
            sock = socket.create_connection(("127.0.0.1", port))
            sockets[sock.fileno()] = sock
            epoll.register(sock.fileno(), select.EPOLLIN)
        for fd in sockets:
            begin(fd)
        while live:
            for fd, _ in epoll.poll():
                data = sockets[fd].recv(RECEIVE_BYTES)
                live[fd].reads.append((time.perf_counter(), data))
                if not data or data.endswith(LAST_CHUNK):
                    del live[fd]
                    begin(fd)
    finally:
        epoll.close()
        for sock in sockets.values():
            sock.close()
    return streams
