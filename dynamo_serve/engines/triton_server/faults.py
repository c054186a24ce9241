"""What can go wrong with a request to a server, and what is to be done about it."""

from __future__ import annotations

from typing import Any, NamedTuple

import grpc

from dynamo_serve.config import TritonSection

# Errors come as text alone. A server that is at fault gets no more requests for a while; where one
# is just full, another may have room.
BROKEN = (
    *("is not healthy", "unknown model", "no available versions", "is not ready"),
    *("unexpected inference input", "inputs but got"),  # it has another model now
)
UNFINISHED = "the Triton server broke off without a word"
FULL = ("maximum queue size", "timeout expired")
OF_KIND = {"timeout": "late", "refused": "refused"}
REFUSED = ("unexpected shape", "unexpected datatype", "expects", "must be")


class Fault(Exception):
    """`kind` is one of `core.request.FAULTS`, or empty: the model failed. `ejects`: the server is
    at fault. `elsewhere`: another one may do better. `is_silence`: it has said nothing for too
    long, which may be a long queue. `detail` is for the log alone: it may have addresses in it that
    clients need not know."""

    def __init__(
        self,
        message: str,
        kind: str = "",
        *,
        ejects: bool = False,
        elsewhere: bool = False,
        is_silence: bool = False,
        detail: str = "",
    ) -> None:
        super().__init__(f"{message}: {detail}" if detail else message)
        self.message = message
        self.kind = kind
        self.ejects = ejects
        self.elsewhere = elsewhere
        self.is_silence = is_silence

    @property
    def outcome(self) -> str:
        """One of `endpoint_counts.OUTCOMES`."""
        if self.kind in OF_KIND:
            return OF_KIND[self.kind]
        if self.ejects:
            return "lost"
        return "full" if self.elsewhere else "failed"


def fault_of(message: str) -> Fault:
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


class Limit(NamedTuple):
    setting: str
    missing: str


FIRST_TOKEN = Limit("first_token_timeout_s", "no token")
IDLE = Limit("idle_timeout_s", "nothing more")
TOTAL = Limit("total_timeout_s", "no end of the answer")


def late(limit: Limit, settings: TritonSection) -> Fault:
    seconds = getattr(settings, limit.setting)
    said = f"has sent {limit.missing} within {seconds:g} s (triton.{limit.setting})"
    return Fault(f"the Triton server {said}", "timeout", is_silence=limit is not TOTAL)
