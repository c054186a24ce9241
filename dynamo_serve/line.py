"""What two servers say to each other while one takes over from the other.

Old → new   ["socket", PROTOCOL] with the descriptor of the listening socket
New → old   ["go", format of the luggage, identity]: the new one accepts connections
Then, as long as the old one has streams:
New → old   ["want", tenant, id]: somebody asks for this stream
Old → new   ["stream", id, luggage] · ["none", id]: it is not here
New → old   ["taken", id] · ["refused", id, why]
Old → new   ["end"]

This module knows messages; `moving` knows what is in them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from dynamo_serve import wire

log = logging.getLogger(__name__)

PROTOCOL = 1
ANSWER_S = 5.0  # for one stream

Gone = (OSError, EOFError, ValueError)  # what a line breaks with, and what is no message


class Line:
    """Messages to and from the other server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def over(cls, connection: socket.socket) -> Line:
        connection.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=connection))

    def send(self, *message: Any) -> None:
        self._writer.write(wire.pack(*message))

    async def flush(self) -> None:
        await self._writer.drain()

    async def receive(self) -> Any:
        """The next message. Raises one of `Gone`."""
        header = await self._reader.readexactly(wire.HEADER.size)
        return wire.unpack(await self._reader.readexactly(*wire.HEADER.unpack(header)))

    def close(self) -> None:
        self._writer.close()


class Answers:
    """What is waited for, by id."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[str]] = {}

    async def get(self, id: str, otherwise: str) -> str:
        """The answer about `id`, or `otherwise` if there is none in time."""
        future = self._waiting.get(id)
        if future is None:
            future = self._waiting[id] = asyncio.get_running_loop().create_future()
        await asyncio.wait([future], timeout=ANSWER_S)
        if future.done():
            return future.result()
        self._waiting.pop(id, None)
        return otherwise

    def put(self, id: str, answer: str = "") -> None:
        if future := self._waiting.pop(id, None):
            future.set_result(answer)

    def put_all(self, answer: str) -> None:
        for id in list(self._waiting):
            self.put(id, answer)


class Successor:
    """The server that takes over from this one; it accepts connections."""

    def __init__(self, line: Line, format: int, identity: dict[str, Any]) -> None:
        self.format = format
        self.identity = identity
        self._line = line
        self._verdicts = Answers()
        self._is_gone = False

    async def listen(self, on_want: Callable[[str, str], Coroutine[Any, Any, None]]) -> None:
        """Hear it out until it has gone. `on_want` is given tenant and id of a stream."""
        try:
            async with asyncio.TaskGroup() as wants:
                while True:
                    match await self._line.receive():
                        case ("taken", id):
                            self._verdicts.put(id)
                        case ("refused", id, why):
                            self._verdicts.put(id, why)
                        case ("want", tenant, id):
                            wants.create_task(on_want(tenant, id))
                        case other:
                            raise ValueError(f"not a message of a hand-over: {other!r:.80}")
        except* Gone:
            self._is_gone = True
            self._verdicts.put_all("it has gone")

    async def give(self, id: str, luggage: Any) -> str:
        """Why it does not take the stream; empty if it does."""
        if self._is_gone:
            return "it has gone"
        self._line.send("stream", id, luggage)
        return await self._verdicts.get(id, "it does not answer")

    def lacks(self, id: str) -> None:
        self._line.send("none", id)

    def close(self) -> None:
        self._line.send("end")
        self._line.close()


class Predecessor:
    """The server that this one takes over from, with its listening socket."""

    def __init__(self, connection: socket.socket, listener: socket.socket) -> None:
        self.listener = listener
        self.gone = asyncio.Event()
        self._went = asyncio.Event()
        self._connection = connection
        self._line: Line | None = None
        self._answers = Answers()
        self.num_taken = 0

    async def go(self, format: int, identity: Any) -> None:
        """This server accepts connections: the old one may stop."""
        try:
            self._line = await Line.over(self._connection)
            self._line.send("go", format, identity)
        except Gone as error:
            log.warning("the server to take over from has gone: %s", error)
            self.gone.set()
        self._went.set()

    async def listen(self, adopt: Callable[[Any], str]) -> None:
        """Take its streams until it has gone. `adopt` says why it does not take one."""
        try:
            while self._line is not None:
                match await self._line.receive():
                    case ("stream", id, luggage):
                        self._take(self._line, id, adopt(luggage))
                    case ("none", id):
                        self._answers.put(id)
                    case ("end",):
                        break
        except Gone as error:
            log.warning("the server before this one went away before its end: %s", error)
        finally:
            self.close()
            self.gone.set()
            self._answers.put_all("")
        log.info("took over, with %d streams", self.num_taken)

    def _take(self, line: Line, id: str, why_not: str) -> None:
        if why_not:
            log.warning("stream %s is not taken over: %s", id, why_not)
            line.send("refused", id, why_not)
        else:
            self.num_taken += 1
            line.send("taken", id)
        self._answers.put(id)

    async def fetch(self, tenant: str, id: str) -> None:
        """Have it move a stream here, if it has it. It may take some seconds."""
        await self._went.wait()  # it does not listen before
        if self._line is None or self.gone.is_set():
            return
        self._line.send("want", tenant, id)
        await self._answers.get(id, "")

    def close(self) -> None:
        (self._line or self._connection).close()
