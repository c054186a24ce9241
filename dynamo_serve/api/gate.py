"""Who may hold a connection: so many guests, a few more to let probes in, and who is leaving."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from dynamo_serve.errors import RequestError, Unavailable

log = logging.getLogger(__name__)

ACCEPTED_AT_ONCE = 32  # connections, before anything else has its turn
# Above the limit so many have their headers read, for one may be a probe: more than come within
# the few turns of the event loop between its connection and its first byte.
RESERVE = 4 * ACCEPTED_AT_ONCE
LEAVING = 256  # connections that have got their refusal and may still be reading it
PROBES = frozenset({"/health", "/ready", "/metrics"})
TELL_EVERY_S = 60.0


class Connection(Protocol):
    @property
    def is_answering(self) -> bool: ...

    def refuse(self, error: RequestError) -> None:
        """Answer with `error` and leave."""
        ...

    def cut(self) -> None:
        """Close at once."""
        ...


class Gate:
    """Every connection of a server is in one of three places, and none of them grows for ever."""

    def __init__(self, max_connections: int) -> None:
        self._max = max_connections
        self._guests: set[Connection] = set()
        self._reserve: dict[Connection, None] = {}  # oldest first, as `_leaving`
        self._leaving: dict[Connection, None] = {}
        self._told = -TELL_EVERY_S

    def enter(self, connection: Connection) -> bool:
        """Whether a new connection is a guest. If not, it or an older one may be refused."""
        if len(self._guests) < self._max:
            self._guests.add(connection)
            return True
        self._tell()
        self._reserve[connection] = None
        if len(self._reserve) > RESERVE:
            # Who has sent nothing yet makes room: a probe says at once what it wants.
            leaver = next((c for c in self._reserve if not c.is_answering), connection)
            leaver.refuse(self.full())
            if leaver in self._reserve:  # it closes already, once its client has read the answer
                self.leave(leaver)
        return False

    def is_guest(self, connection: Connection) -> bool:
        return connection in self._guests

    def admits(self, connection: Connection, path: str) -> bool:
        """Whether a request is answered: every guest's, and a probe's."""
        if connection in self._reserve and path not in PROBES and len(self._guests) < self._max:
            del self._reserve[connection]
            self._guests.add(connection)
        return connection in self._guests or path in PROBES

    def leave(self, connection: Connection) -> None:
        """`connection` has been refused, and closes once the client has read that."""
        self.forget(connection)
        self._leaving[connection] = None
        if len(self._leaving) > LEAVING:
            oldest = next(iter(self._leaving))
            self.forget(oldest)  # it closes later, and each that leaves before then needs a place
            oldest.cut()

    def forget(self, connection: Connection) -> None:
        """`connection` is closed. May be told twice."""
        self._guests.discard(connection)
        self._reserve.pop(connection, None)
        self._leaving.pop(connection, None)

    def full(self) -> Unavailable:
        return Unavailable(f"{self._max} connections are open here, which is the limit.")

    def _tell(self) -> None:
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self._told = time.monotonic()
            log.warning("server.max_connections = %d reached, new ones are refused", self._max)
