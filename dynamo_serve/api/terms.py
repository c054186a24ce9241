"""What a request asks of the scheduler: its class, its deadline, its place in the queue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from dynamo_serve.api.schema_base import DAY_MS, Scheduled
from dynamo_serve.core.tenant import Class, Tenancy
from dynamo_serve.errors import Forbidden, InvalidRequest

HEADER = "X-Request-Deadline-Ms"
MILLISECONDS = re.compile(r"0{0,20}[1-9]\d{0,7}", re.ASCII)


class Terms(NamedTuple):
    """`deadline` is in seconds after arrival, inf without one; `class_name` None is the
    tenant's own. `has_class_deadline`: the client named none, so it is that of the class."""

    class_name: str | None
    deadline: float
    priority: int
    has_class_deadline: bool = False


def terms_of(
    body: Scheduled, header: str | None, tenant: str, tenancy: Tenancy, max_queue_delay: float
) -> Terms:
    """What a request asks for, within what its tenant may ask for.

    Its class may be no better than the tenant's in any respect: see `better`. Its deadline may be
    longer than the one its class has for requests that bring none: a deadline says when to give
    up and gets nobody served sooner. `max_queue_delay` is the server's, in seconds. Raises
    `InvalidRequest`, and `Forbidden` for a class that promises more than the tenant's.
    """
    asked = _class(body.class_name, tenancy.class_of(tenant), tenancy.classes, max_queue_delay)
    given = [ms for ms in (body.deadline_ms, _milliseconds(header)) if ms is not None]
    deadline = min(given) / 1000 if given else asked.deadline
    return Terms(body.class_name, deadline, body.priority, has_class_deadline=not given)


def _milliseconds(header: str | None) -> int | None:
    if header is None:
        return None
    if not MILLISECONDS.fullmatch(header) or int(header) > DAY_MS:
        raise InvalidRequest(
            f"The header {HEADER} must be a whole number from 1 to {DAY_MS}, not {header[:40]!r}.",
            param=HEADER,
        )
    return int(header)


def better(asked: Class, own: Class, max_queue_delay: float) -> list[str]:
    """In what `asked` promises more than `own`, as the tenants file calls it.

    A shorter merge window counts, because it starts a prefill sooner; a class without one has the
    server's, `max_queue_delay`. Deadlines do not count: see `terms_of`.
    """

    def delay(of: Class) -> float:
        return max_queue_delay if of.max_queue_delay is None else of.max_queue_delay

    promises = {
        "rank": asked.rank < own.rank,
        "ttft_ms": asked.ttft < own.ttft,
        "itl_ms": asked.itl < own.itl,
        "max_queue_delay_ms": delay(asked) < delay(own),
        "strict": asked.strict and not own.strict,
    }
    return [name for name, is_better in promises.items() if is_better]


def _class(
    name: str | None, own: Class, classes: Mapping[str, Class], max_queue_delay: float
) -> Class:
    if name is None or name == own.name:
        return own
    found = {key: better(asked, own, max_queue_delay) for key, asked in classes.items()}
    choice = f"allowed here: {', '.join(repr(key) for key, more in found.items() if not more)}"
    if name not in classes:
        raise InvalidRequest(f"'class': there is no class {name[:64]!r}; {choice}.", param="class")
    if more := found[name]:
        raise Forbidden(
            f"'class': {name!r} promises more than this tenant's class {own.name!r} "
            f"({', '.join(more)}); {choice}.",
            param="class",
        )
    return classes[name]
