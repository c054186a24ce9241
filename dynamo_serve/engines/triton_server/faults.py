"""What can go wrong with a request to a server, and what is to be done about it."""

from __future__ import annotations

from typing import Any

import grpc

# Errors come as text alone. A server that is at fault gets no more requests for a while; where one
# is just full, another may have room.
BROKEN = ("is not healthy", "unknown model", "no available versions", "is not ready")
FULL = ("maximum queue size", "timeout expired")
REFUSED = ("unexpected shape", "unexpected datatype", "expects", "must be")


class Fault(Exception):
    """`kind` is one of `core.request.FAULTS`, or empty: the model failed. `ejects`: the server is
    at fault. `elsewhere`: another one may do better. `detail` is for the log alone: it may have
    addresses in it that clients need not know."""

    def __init__(
        self,
        message: str,
        kind: str = "",
        *,
        ejects: bool = False,
        elsewhere: bool = False,
        detail: str = "",
    ) -> None:
        super().__init__(f"{message}: {detail}" if detail else message)
        self.message = message
        self.kind = kind
        self.ejects = ejects
        self.elsewhere = elsewhere


def told(message: str) -> Fault:
    """What a server said in its stream."""
    said = f"the Triton server says: {message}"
    if any(part in message for part in BROKEN):
        return Fault(said, "unavailable", ejects=True, elsewhere=True)
    if any(part in message for part in FULL):
        return Fault(said, "unavailable", elsewhere=True)
    return Fault(said, "refused" if any(part in message for part in REFUSED) else "")


def broken(error: Any) -> Fault:
    """A call that ended with a status."""
    code, detail = error.code(), str(error.details())
    said = f"the Triton server was lost ({code.name})"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Fault(f"the Triton server says: {detail}", "refused")
    return Fault(said, "unavailable", ejects=True, elsewhere=True, detail=detail)


def late(what: str, seconds: float, key: str) -> Fault:
    said = f"the Triton server has sent {what} within {seconds:g} s ({key})"
    return Fault(said, "timeout")
