"""Answers that are kept for a while, so that a client can fetch them or go on from them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dynamo_serve.config import ResponsesSection
from dynamo_serve.errors import InvalidRequest, PreviousNotFound, ResponseNotFound

Json = dict[str, Any]
MAX_SHOWN = 100
OFF = "No answers are kept here (responses.store is none)"


class Kept(NamedTuple):
    """An answer as JSON text: the response, and the items of the conversation up to its end, of
    which so many were there before."""

    tenant: str
    expires: float
    response: bytes
    items: bytes
    num_before: int

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """In memory, bounded in bytes and time; a tenant finds its own and nobody else's.

    Each answer is kept with all that went before it, so that one that is gone takes no other
    along. `clock` is in seconds and never goes back.
    """

    def __init__(
        self, section: ResponsesSection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._section = section
        self._clock = clock
        self._kept: dict[str, Kept] = {}  # oldest first, and so the first to expire
        self._ids: dict[str, dict[str, None]] = {}  # of each tenant, oldest first
        self._held: dict[str, int] = {}  # bytes of each tenant that has any

    @property
    def num_bytes(self) -> int:
        return sum(self._held.values())

    def wants(self, asked: bool | None) -> bool:
        """Whether an answer is to be kept for which `store` was asked, refused or not spoken of.

        Raises `InvalidRequest` if it cannot be.
        """
        if self._section.store == "none" and asked:
            raise InvalidRequest(
                f"'store': {OFF}. Leave it out, and send the whole conversation as 'input'; or the "
                "operator sets responses.store.",
                param="store",
            )
        by_itself = self._section.store == "default"
        return by_itself if asked is None else asked

    def keep(self, tenant: str, id: str, items: list[Json], response: Json) -> bool:
        """Keep an answer, unless it is too large for this; older ones make room."""
        expires = self._clock() + self._section.ttl_s
        everything = [*items, *map(_without_scores, response["output"])]
        kept = Kept(tenant, expires, encoded(response), encoded(everything), len(items))
        most = min(self._section.max_tenant_bytes, self._section.max_bytes)
        if kept.num_bytes > most:
            return False
        self._expire()
        while self._held.get(tenant, 0) + kept.num_bytes > self._section.max_tenant_bytes:
            self._drop_oldest(tenant)
        while self.num_bytes + kept.num_bytes > self._section.max_bytes:
            self._drop_oldest(max(self._held, key=self._held.__getitem__))
        self._kept[id] = kept
        self._ids.setdefault(tenant, {})[id] = None
        self._held[tenant] = self._held.get(tenant, 0) + kept.num_bytes
        return True

    def response(self, tenant: str, id: str) -> bytes:
        """The JSON of an answer. Raises `ResponseNotFound`."""
        return self._find(tenant, id).response

    def items(self, tenant: str, id: str) -> list[Json]:
        """The conversation that an answer was given to, oldest item first. Raises
        `ResponseNotFound`."""
        kept = self._find(tenant, id)
        return _items(kept)[: kept.num_before]

    def everything(self, tenant: str, id: str) -> list[Json]:
        """The conversation with the answer. Raises `ResponseNotFound`."""
        return _items(self._find(tenant, id))

    def delete(self, tenant: str, id: str) -> None:
        """Forget an answer. Raises `ResponseNotFound`."""
        self._find(tenant, id)
        self._drop(id)

    def conversation(self, tenant: str, id: str) -> list[Json]:
        """The items up to the end of an answer. Raises `PreviousNotFound`."""
        return _items(self._previous(tenant, id))

    def conversation_bytes(self, tenant: str, id: str) -> int:
        """How long these are as JSON. Raises `PreviousNotFound`."""
        return len(self._previous(tenant, id).items)

    def _previous(self, tenant: str, id: str) -> Kept:
        try:
            return self._find(tenant, id)
        except ResponseNotFound as error:
            raise PreviousNotFound(
                f"{error.message} Send the whole conversation as 'input'.",
                param="previous_response_id",
            ) from None

    def _find(self, tenant: str, id: str) -> Kept:
        """The same error for another tenant's answer as for one that never was."""
        self._expire()
        kept = self._kept.get(id)
        if kept is None or kept.tenant != tenant:
            why = (
                f"{OFF}." if self._section.store == "none" else "Its time is over, or it never was."
            )
            raise ResponseNotFound(f"There is no response {id[:MAX_SHOWN]!r}. {why}")
        return kept

    def _expire(self) -> None:
        now = self._clock()
        for id in [*_while(self._kept, lambda kept: kept.expires <= now)]:
            self._drop(id)

    def _drop_oldest(self, tenant: str) -> None:
        self._drop(next(iter(self._ids[tenant])))

    def _drop(self, id: str) -> None:
        kept = self._kept.pop(id)
        self._held[kept.tenant] -= kept.num_bytes
        del self._ids[kept.tenant][id]
        if not self._ids[kept.tenant]:
            del self._ids[kept.tenant], self._held[kept.tenant]


def _while(kept: dict[str, Kept], holds: Callable[[Kept], bool]) -> Iterator[str]:
    for id, each in kept.items():
        if not holds(each):
            return
        yield id


def encoded(value: Json | list[Json]) -> bytes:
    """As JSON text, the way it is kept."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _items(kept: Kept) -> list[Json]:
    items: list[Json] = json.loads(kept.items)
    return items


def _without_scores(item: Json) -> Json:
    """An item as one goes on from it: log probabilities can be a hundred times as long."""
    if item["type"] != "message":
        return item
    return {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}
