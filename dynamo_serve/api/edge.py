"""What every endpoint needs, handed to it instead of looked up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request as Http
from pydantic import BaseModel

from dynamo_serve.api import parse
from dynamo_serve.api.auth import Access
from dynamo_serve.api.encoding import LongTexts, TextEncoder
from dynamo_serve.api.grammar import Compilers, Grammars
from dynamo_serve.api.lookup import Lookup
from dynamo_serve.api.marks import Streams
from dynamo_serve.config import ServerSection
from dynamo_serve.core.request import Request
from dynamo_serve.directory import Caller
from dynamo_serve.errors import ModelNotFound, Unavailable
from dynamo_serve.service import Service
from dynamo_serve.text.dialect import Dialect
from dynamo_serve.text.tokenizer import Tokenizer

T = TypeVar("T", bound=BaseModel)


class Metrics(Protocol):
    async def refresh(
        self, ask: Callable[[str, float], Awaitable[Any]], *, tenants: bool = True
    ) -> None:
        """Get what is not known here; `ask` asks the engine, for so many seconds."""
        ...

    def render(self, *, tenants: bool = True) -> tuple[bytes, str]:
        """The Prometheus page, with or without what is told by tenant, and its content type."""
        ...


@dataclass(frozen=True, slots=True)
class Edge:
    """The app's parts. `model_names` are what clients may call the model; the first is reported.
    `max_queue_delay` is the scheduler's, in seconds."""

    service: Service
    tokenizer: Tokenizer
    server: ServerSection
    access: Access
    lookup: Lookup
    streams: Streams
    compilers: Compilers
    long_texts: LongTexts
    model_names: tuple[str, ...]
    started: int
    max_queue_delay: float
    recording: Callable[[], Mapping[str, Any]]  # what clients may know of it
    dialect: Dialect  # the model's

    async def body(self, http: Http, model: type[T]) -> T:
        """The checked body of a request. Raises `InvalidRequest` (and its kind)."""
        raw = await parse.read_object(http, self.server.max_body_bytes)
        return parse.to_model(model, raw, self.server.unknown_fields)

    def check_open(self, unread: Request) -> None:
        """Raise `Unavailable` unless new requests are accepted, before anything is done for this
        one; whoever watches hears of it."""
        try:
            self.service.check_open()
        except Unavailable as error:
            self.service.turn_away(unread, error)

    def grammars_of(self, caller: Caller) -> Grammars:
        """What makes grammars of the caller's requests."""
        return Grammars(self.compilers, caller.tenant)

    def encoder(self, http: Http) -> TextEncoder:
        """What makes ids of a request's texts."""
        return TextEncoder(self.tokenizer, self.long_texts, self.service.preparing, http)

    def model_name(self, asked: str | None) -> str:
        """The name to report in the answer. Raises `ModelNotFound`."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            raise ModelNotFound(
                f"The model {asked[:100]!r} is not served here, only {served}.", param="model"
            )
        return asked
