"""What a load generator is to send, and when: plain data, made by workloads or from a trace.

A plan is an iterable of `Planned`, in the order of their times; the place of each in it, counted
from 0, is its number. `bench.run.execute` sends it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RETRIES = ("none", "obey", "storm")
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a client is unlike one that reads everything at once and asks once.

    It reads so many bytes per second; it hangs up after so many tokens, or seconds since it sent.
    When refused (429, 503) it gives up ("none"), comes again after Retry-After ("obey"), or at
    once ("storm"), until it has tried `max_attempts` times.
    """

    bytes_per_s: float | None = None
    leaves_after_tokens: int | None = None
    leaves_after_s: float | None = None
    retry: str = "none"
    max_attempts: int = 10

    def __post_init__(self) -> None:
        assert self.retry in RETRIES, self.retry


@dataclass(frozen=True, slots=True)
class Call:
    """One request. With `messages` it is a chat, else a completion of `prompt`, text or token ids,
    or what `is_embedding` says: the vector of it.

    `deadline` (seconds) and `class_name` are told to the server where they are given, and so is
    `priority` unless 0; `extra` are further fields of the body. `prompt_tokens` is how long the
    prompt is meant to be: the record has what the server counted, if it says so. `targets` (ttft,
    itl, e2e; seconds) are copied into the record.

    A `prompt` that depends on earlier answers is a function, called when the request is sent, which
    is not before `ready` has returned, however late that is; `on_answer` is told the token ids of
    each choice, if `extra` asks for them (`return_token_ids`).
    """

    kind: str = ""
    prompt: str | tuple[int, ...] | Callable[[], tuple[int, ...]] = ""
    messages: tuple[Message, ...] = ()
    max_tokens: int = 128
    prompt_tokens: int = 0
    tenant: str = ""
    api_key: str = ""
    class_name: str = ""
    priority: int = 0
    deadline: float | None = None
    is_stream: bool = True
    is_embedding: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    behaviour: Behaviour = Behaviour()
    targets: Mapping[str, float] = field(default_factory=dict)
    ready: Callable[[], Awaitable[None]] | None = None
    on_answer: Callable[[Sequence[Sequence[int]]], None] | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A call and its time.

    `at`: seconds since the run began; None: as soon as one of the places of a closed loop is free.
    With `after`, the number of the call just before it, it is a later call of a session instead:
    due `think` seconds after that one has ended, with that one's messages (or prompt) and its real
    answer before its own. If that one was not answered in full, the session is over, and the rest
    of it is not sent.
    """

    at: float | None
    call: Call
    after: int | None = None
    think: float = 0.0
