"""What a request asks of the scheduler: its class, its deadline, its place in the queue."""

from __future__ import annotations

import re
from typing import NamedTuple

from dynamo_serve.api.schema import DAY_MS, Generation
from dynamo_serve.core.tenant import Class, Tenancy
from dynamo_serve.errors import Forbidden, InvalidRequest

HEADER = "X-Request-Deadline-Ms"
MILLISECONDS = re.compile(r"0*[1-9]\d{0,7}", re.ASCII)


class Terms(NamedTuple):
    """`deadline` is in seconds after arrival, inf without one; `class_name` None is the
    tenant's own."""

    class_name: str | None
    deadline: float
    priority: int


def terms_of(body: Generation, header: str | None, tenant: str, tenancy: Tenancy) -> Terms:
    """Raises `InvalidRequest`, and `Forbidden` for a class that is above the tenant's."""
    asked = _class(body.class_name, tenant, tenancy)
    given = [ms for ms in (body.deadline_ms, _milliseconds(header)) if ms is not None]
    deadline = min(given) / 1000 if given else asked.deadline
    return Terms(body.class_name, deadline, body.priority)


def _milliseconds(header: str | None) -> int | None:
    if header is None:
        return None
    if not MILLISECONDS.fullmatch(header) or int(header) > DAY_MS:
        raise InvalidRequest(
            f"The header {HEADER} must be a whole number from 1 to {DAY_MS}, not {header[:40]!r}.",
            param=HEADER,
        )
    return int(header)


def _class(asked: str | None, tenant: str, tenancy: Tenancy) -> Class:
    own = tenancy.class_of(tenant)
    if asked is None:
        return own
    allowed = [name for name, other in tenancy.classes.items() if other.rank >= own.rank]
    if asked in allowed:
        return tenancy.classes[asked]
    choice = f"allowed here: {', '.join(map(repr, allowed))}"
    if asked in tenancy.classes:
        raise Forbidden(
            f"'class': {asked!r} is above this tenant's class {own.name!r}; {choice}.",
            param="class",
        )
    raise InvalidRequest(f"'class': there is no class {asked[:64]!r}; {choice}.", param="class")
