"""Recorded traffic as a plan: the same requests at the same times, with texts of nobody.

A page number becomes token ids, always the same; what fills no page is unlike anything else. A
prompt that goes on with an earlier answer does so with the answer that came in the replay, so that
the cache finds what it would have found.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dynamo_serve.bench.plan import Behaviour, Call, Planned
from dynamo_serve.bench.recorded import Recording, numbers_of, seed_of
from dynamo_serve.errors import ConfigError
from dynamo_serve.trace import Arrival

SCORE = "score"  # the pooling of pairs of texts
LEFT_OUT_REFUSED = "left out, for they were refused before anybody looked at their prompt"
LEFT_OUT_PAIRS = "left out, for they scored pairs of texts, which are not sent as token ids"


@dataclass(frozen=True, slots=True)
class Wishes:
    """How to replay. `keys`: the key of each tenant; None: all are sent with `api_key`. Of another
    server (`is_ours` false) nothing is asked that only ours knows. `with_texts`: prompts are the
    recorded texts, where there are any."""

    vocab_size: int
    speed: float = 1.0
    requests: int | None = None
    keys: Mapping[str, str] | None = None
    api_key: str = ""
    is_ours: bool = True
    context: int | None = None
    with_texts: bool = False


@dataclass(slots=True)
class Notes:
    """What is not as it was recorded, counted by a sentence."""

    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, what: str) -> None:
        self.counts[what] += 1

    def lines(self) -> list[str]:
        return [f"{count}: {what}" for what, count in self.counts.most_common()]


class Tokens:
    """The token ids of pages, by their numbers; those of answers once they have come."""

    def __init__(self, page_size: int, vocab_size: int, wanted: set[int]) -> None:
        self._size = page_size
        # The first and the last of a vocabulary often mean something special.
        self._ids = range(vocab_size // 8, max(vocab_size // 8 + 2, 7 * vocab_size // 8))
        self._wanted = wanted  # pages of answers that later prompts begin with
        self._answered: dict[int, tuple[int, ...]] = {}
        self._coming: dict[int, asyncio.Event] = {}

    def prompt(self, arrival: Arrival) -> tuple[int, ...]:
        tokens: list[int] = []
        for number in numbers_of(arrival.pages):
            tokens += self._answered.get(number) or self._make(self._size, number)
        rest = arrival.prompt_tokens - len(tokens)
        return (*tokens, *self._make(rest, "rest", arrival.at, arrival.call, arrival.output_pages))

    def expect(self, choices: Sequence[Arrival]) -> bool:
        """Whether later prompts go on with these answers: they then wait for them."""
        found = {number for c in choices for number in numbers_of(c.output_pages)} & self._wanted
        event = asyncio.Event()
        for number in found - self._answered.keys():
            self._coming.setdefault(number, event)  # of several equal answers the first will do
        return bool(found)

    def waits(self, arrival: Arrival) -> Callable[[], Awaitable[None]] | None:
        """Returns when the answers are there that it goes on with."""
        events = {self._coming[n] for n in numbers_of(arrival.pages) if n in self._coming}

        async def ready() -> None:
            for event in events:
                await event.wait()

        return ready if events else None

    def answered(
        self,
        choices: Sequence[Arrival],
        prompt: Sequence[int],
        answers: Sequence[Sequence[int]],
    ) -> None:
        """What has come, however little that is."""
        for arrival, answer in zip(choices, answers, strict=False):
            self._learn(arrival, prompt, answer)
        for arrival in choices:
            for number in numbers_of(arrival.output_pages):
                if event := self._coming.pop(number, None):
                    event.set()

    def _learn(self, arrival: Arrival, prompt: Sequence[int], answer: Sequence[int]) -> None:
        size = self._size
        tokens = (*prompt, *answer)
        start = len(prompt) // size * size
        for number in numbers_of(arrival.output_pages):
            page = tokens[start : start + size]
            if len(page) == size and number in self._wanted:
                self._answered.setdefault(number, page)
            start += size

    def _make(self, count: int, *seed: object) -> tuple[int, ...]:
        return tuple(random.Random(seed_of(*seed)).choices(self._ids, k=count))


def plan_of(recording: Recording, wishes: Wishes, notes: Notes) -> Iterator[Planned]:
    """The calls of a recording; `notes` has what could not be as it was. Raises `ConfigError` for a
    tenant without a key."""
    check_keys(recording, wishes)
    arrivals = recording.arrivals
    produced = {n for arrival in arrivals for n in numbers_of(arrival.output_pages)}
    wanted = produced.intersection(n for arrival in arrivals for n in numbers_of(arrival.pages))
    if not wishes.is_ours:
        wanted = set()
    tokens = Tokens(recording.header.page_size, wishes.vocab_size, wanted)
    finished = [a.output_tokens for a in arrivals if a.ended in ("stop", "length")]
    usual = int(median(finished)) if finished else 1
    return _planned(calls_of(arrivals), arrivals[0].at, tokens, wishes, notes, usual)


def check_keys(recording: Recording, wishes: Wishes) -> None:
    if wishes.keys is None:
        return
    missing = {arrival.tenant for arrival in recording.arrivals} - wishes.keys.keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise ConfigError(f"no key for {names}: give one for each tenant, as 'NAME: KEY'")


def calls_of(arrivals: Sequence[Arrival]) -> Iterator[list[Arrival]]:
    """Arrivals by call, in the order of the first of each."""
    calls: dict[object, list[Arrival]] = defaultdict(list)
    for place, arrival in enumerate(arrivals):
        calls[("alone", place) if arrival.call is None else arrival.call].append(arrival)
    yield from calls.values()


def is_sent(choices: Sequence[Arrival]) -> bool:
    return bool(choices[0].prompt_tokens) and choices[0].pooling != SCORE


def _planned(
    calls: Iterator[list[Arrival]],
    began: float,
    tokens: Tokens,
    wishes: Wishes,
    notes: Notes,
    usual: int,
) -> Iterator[Planned]:
    count = 0
    for choices in calls:
        if not is_sent(choices):
            notes(LEFT_OUT_PAIRS if choices[0].pooling == SCORE else LEFT_OUT_REFUSED)
            continue
        is_one = len({(c.pages, c.prompt_tokens) for c in choices}) == 1
        is_one = is_one and not (choices[0].pooling and len(choices) > 1)
        if not is_one:
            notes("calls with several prompts are sent as calls of their own")
        for group in [choices] if is_one else [[choice] for choice in choices]:
            if count == wishes.requests:
                return
            count += 1
            call = call_of(group, tokens, wishes, notes, usual)
            yield Planned((group[0].at - began) / wishes.speed, call)


def call_of(
    choices: Sequence[Arrival], tokens: Tokens, wishes: Wishes, notes: Notes, usual: int
) -> Call:
    first = choices[0]
    is_embedding = bool(first.pooling)
    max_tokens = 0 if is_embedding else output_tokens(choices, notes, usual)
    if wishes.context is not None and first.prompt_tokens + max_tokens > wishes.context:
        notes(f"are longer than the {wishes.context} tokens of this server, and will be refused")
    has_text = wishes.with_texts and first.text is not None
    extra = _extra(choices, wishes, has_text=has_text)
    if wishes.with_texts and not has_text:
        notes("have no recorded text, and are sent with a made one")
    ready = None if has_text else tokens.waits(first)
    prompt, on_answer = (first.text or "", None) if has_text else _texts(choices, tokens)
    if on_answer is not None:
        extra["return_token_ids"] = True
    has_terms = wishes.is_ours and wishes.keys is not None
    return Call(
        kind="replay",
        prompt=prompt,
        max_tokens=max_tokens,
        prompt_tokens=first.prompt_tokens,
        tenant=first.tenant,
        api_key=wishes.api_key if wishes.keys is None else wishes.keys[first.tenant],
        class_name=first.class_name if has_terms else "",
        priority=first.priority if wishes.is_ours else 0,
        deadline=first.deadline if wishes.is_ours and not first.has_class_deadline else None,
        is_stream=first.is_stream and not is_embedding,
        is_embedding=is_embedding,
        extra=extra,
        behaviour=behaviour_of(choices),
        ready=ready,
        on_answer=on_answer,
    )


def _extra(choices: Sequence[Arrival], wishes: Wishes, *, has_text: bool) -> dict[str, Any]:
    first = choices[0]
    extra: dict[str, Any] = {"n": len(choices)} if len(choices) > 1 else {}
    if wishes.is_ours:
        if not first.pooling:
            extra["ignore_eos"] = True
        if first.group and not first.pooling:
            extra["prompt_cache_key"] = first.group
        if first.salt and has_text:  # made texts are apart where pages were
            extra["cache_salt"] = first.salt
    return extra


def output_tokens(choices: Sequence[Arrival], notes: Notes, usual: int) -> int:
    """How long an answer is to be."""
    ended = [c.output_tokens for c in choices if c.ended in ("stop", "length")]
    if len(set(ended)) > 1:
        notes("calls have choices as long as theirs were on average")
    if ended:
        return max(1, round(sum(ended) / len(ended)))
    most = max(c.max_tokens for c in choices)
    if all(c.ended in ("cancelled", "deadline") for c in choices):
        return max(1, most)  # they end as they did
    if any(c.ended == "refused" for c in choices):
        notes(f"were refused, and ask for as much as is usual here: {usual} tokens")
    return max(1, min(most, usual))


def behaviour_of(choices: Sequence[Arrival]) -> Behaviour:
    """Who hung up does so after as many seconds, who was slow reads as slowly. Retries are requests
    of their own in a trace."""
    gone = [c.gone_at for c in choices if c.gone_at is not None]
    reading = [c.reading for c in choices if c.reading is not None]
    leaves = len(gone) == len(choices)
    return Behaviour(
        bytes_per_s=max(1.0, sum(reading)) if reading else None,
        leaves_after_s=max(gone) if leaves else None,
    )


def _texts(
    choices: Sequence[Arrival], tokens: Tokens
) -> tuple[Callable[[], tuple[int, ...]], Callable[[Sequence[Sequence[int]]], None] | None]:
    """The prompt, when it is sent; and who is told of the answers, if a later prompt goes on."""
    first = choices[0]
    if not tokens.expect(choices):
        return lambda: tokens.prompt(first), None
    sent: tuple[int, ...] = ()

    def prompt() -> tuple[int, ...]:
        nonlocal sent
        sent = tokens.prompt(first)
        return sent

    return prompt, lambda answers: tokens.answered(choices, sent, answers)
