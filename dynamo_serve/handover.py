"""One server hands its port to the next: the listening socket itself, over a unix socket.

There is one queue of connections that wait to be accepted, in the system, and it is never closed:
so nobody is refused. Until the new server says "go" (see `line`) the old one serves as ever, and
goes on serving if the new one goes away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path

from dynamo_serve import wire
from dynamo_serve.config import ServerSection
from dynamo_serve.errors import ConfigError
from dynamo_serve.line import PROTOCOL, Gone, Line, Predecessor, Successor

log = logging.getLogger(__name__)

MAX_PATH_BYTES = 90  # the system's limit is 107 or less, and our own suffix comes behind
AGAIN_S = 1.0  # between two tries to accept, where the system refuses
PATIENCE_S = 60.0  # for a server that is itself still taking over


def check_path(path: str) -> None:
    """Raise `ConfigError` unless a socket can be made there, or is there."""
    where = f"server.handover = {path!r}"
    folder = Path(path).parent
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"{where}: a socket's path may have {MAX_PATH_BYTES} bytes")
    if not folder.is_dir():
        raise ConfigError(f"{where}: there is no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: cannot write to the folder {str(folder)!r}")
    try:
        is_free = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        is_free = True
    if not is_free:
        raise ConfigError(f"{where}: something else is there; allowed: a path for a socket")


def take_over(server: ServerSection) -> Predecessor | None:
    """The server that answers at `server.handover`, with its listening socket; None if nobody
    does. Raises `ConfigError`."""
    if not server.handover:
        return None
    check_path(server.handover)
    where = f"server.handover = {server.handover!r}"
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(PATIENCE_S)
    try:
        line.connect(server.handover)
    except (FileNotFoundError, ConnectionRefusedError):  # nobody; the file may be a dead one's
        line.close()
        return None
    except OSError as error:
        line.close()
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    try:
        listener = _received(line, where)
        try:
            check_address(listener, server)
            # Of the connections to come; as `cli_serve.listen` does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, server.stream_buffer_bytes)
        except ConfigError:
            listener.close()
            raise
    except BaseException:
        line.close()
        raise
    return Predecessor(line, listener)


def _received(line: socket.socket, where: str) -> socket.socket:
    try:
        data, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
        messages = wire.Frames().feed(data)
    except TimeoutError:
        raise ConfigError(
            f"{where}: the server there does not answer; another one may be taking over from it"
        ) from None
    except Gone as error:
        raise ConfigError(f"{where}: the server there went away ({error})") from error
    if not descriptors or [tuple(message) for message in messages] != [("socket", PROTOCOL)]:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConfigError(
            f"{where}: the server there gave no listening socket: it is stopping, or its version "
            "hands over in another way; stop it first"
        )
    os.set_inheritable(descriptors[0], False)  # the engine process must not hold the port
    return socket.socket(fileno=descriptors[0])


def check_address(listener: socket.socket, server: ServerSection) -> None:
    """Raise `ConfigError` unless the socket listens where the settings say."""
    host, port = listener.getsockname()[:2]
    if server.port not in (0, port):
        raise ConfigError(
            f"server.port = {server.port}: the server at server.handover listens on {port}; "
            "take that port, or another server.handover"
        )
    try:
        found = socket.getaddrinfo(server.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"server.host = {server.host!r}: {error}") from error
    if host not in {address[0] for *_, address in found}:
        raise ConfigError(
            f"server.host = {server.host!r}: the server at server.handover listens on {host}; "
            "take that host, or another server.handover"
        )


class Door:
    """Where the next server finds this one: a socket at `path`, for whoever may open its file."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        self._path = path
        self._listener = listener
        self._socket: socket.socket | None = None
        self._file = 0  # its inode

    def open(self) -> None:
        """From now on; a file that is there, of a server before this one or a dead one's, gives
        way in one step."""
        fresh = f"{self._path}.{os.getpid()}"
        Path(fresh).unlink(missing_ok=True)
        door = self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        door.bind(fresh)
        os.chmod(fresh, 0o600)  # nobody can connect yet
        door.listen()
        door.setblocking(False)
        self._file = os.stat(fresh).st_ino
        os.rename(fresh, self._path)

    async def successor(self) -> Successor:
        """The next server, when it is ready to accept connections."""
        assert self._socket is not None, "the door is shut"
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            except OSError as error:  # no descriptors left, say, for now
                log.warning("server.handover: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                return await self._greet(connection)
            except Gone:
                log.warning("the server that was to take over has gone; this one goes on")

    async def _greet(self, connection: socket.socket) -> Successor:
        line: Line | None = None
        try:
            message = wire.pack("socket", PROTOCOL)
            socket.send_fds(connection, [message], [self._listener.fileno()])
            log.info("another server is starting, to take over")
            line = await Line.over(connection)
            match await line.receive():
                case ("go", int(format), dict(identity)):
                    return Successor(line, format, identity)
            raise ValueError("this is not a server that takes over")
        except BaseException:
            (line or connection).close()
            raise

    def close(self) -> None:
        """The file goes, too, unless it is the next server's by now."""
        if self._socket is None:
            return
        self._socket.close()
        try:
            if os.stat(self._path).st_ino == self._file:
                os.unlink(self._path)
        except OSError as error:
            log.warning("server.handover: %s", error)
