"""Sessions of a workload, and a plan made of several of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dynamo_serve.bench.lengths import lengths, whole
from dynamo_serve.bench.plan import Behaviour, Call, Planned
from dynamo_serve.bench.shapes import Shape
from dynamo_serve.bench.texts import Library, Text, Texts, join
from dynamo_serve.errors import ConfigError

ROOM = 0.95  # of the context: a chat template and the real lengths of answers need some


@dataclass(frozen=True, slots=True)
class Turn:
    """A call of a session and how long its user thought before it."""

    call: Call
    think: float = 0.0


@dataclass(frozen=True, slots=True)
class Visit:
    """A session; `at` is when it began in a trace."""

    turns: tuple[Turn, ...]
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Odd:
    """A share of the calls that do not behave; `deadline` in seconds."""

    name: str
    share: float
    behaviour: Behaviour
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Who sends a share of the sessions: `call` has what all of its calls have in common."""

    name: str
    share: float
    call: Call
    odd: Sequence[Odd] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a plan ends (a number of calls, or seconds), and the longest context, in tokens."""

    calls: int | None = None
    seconds: float | None = None
    context: int | None = None


@dataclass(slots=True)
class Visits:
    """Endless sessions of one shape."""

    shape: Shape
    call: Call
    texts: Texts
    library: Library
    rng: random.Random
    limits: Limits = field(default_factory=Limits)

    def __iter__(self) -> Iterator[Visit]:
        turns = lengths(self.shape.turns)
        while True:
            yield Visit(tuple(self._turns(whole(turns, self.rng))))

    def _turns(self, count: int) -> Iterator[Turn]:
        shape, rng = self.shape, self.rng
        system, documents = self._system(), self._documents()
        is_long = rng.random() < shape.long_share
        first = lengths(shape.long_input if is_long else shape.input)
        later = first if shape.later_input is None else lengths(shape.later_input)
        output, think = lengths(shape.output), lengths(shape.think)
        used = shape.system + sum(number for _, number in documents)
        for turn in range(count):
            answer = whole(output, rng)
            own = whole(later if turn else first, rng)
            own = min(own, self._room() - used - answer)
            if own < 1 and turn:
                return  # the context is full
            if own < 1:
                raise ConfigError(
                    f"{self.call.kind}: its system prompt, documents and answer leave no room in a "
                    f"context of {self.limits.context} tokens; make them shorter"
                )
            used += own
            opening = () if turn else (system, *(text for text, _ in documents))
            text = self.texts.make(own, rng)
            yield Turn(self._call(opening, text, used, answer), think(rng) if turn else 0.0)
            used += answer

    def _call(self, opening: Sequence[Text], text: Text, used: int, answer: int) -> Call:
        call = replace(self.call, max_tokens=answer, prompt_tokens=used)
        if not self.shape.is_chat:
            return replace(call, prompt=join((*opening, text)))
        system, documents = opening[:1], opening[1:]
        messages = [{"role": "system", "content": said} for said in system if said]
        messages.append({"role": "user", "content": join((*documents, text))})
        return replace(call, messages=tuple(messages))

    def _room(self) -> int:
        context = self.limits.context
        return 1 << 40 if context is None else int(context * ROOM)

    def _system(self) -> Text:
        size = self.shape.system
        return self.library.get(f"{self.call.kind} system", size) if size else join(())

    def _documents(self) -> list[tuple[Text, int]]:
        shape, rng = self.shape, self.rng
        if not shape.documents:
            return []
        size = lengths(shape.document)
        found: dict[int, tuple[Text, int]] = {}
        while len(found) < min(shape.picks, shape.documents):
            (number,) = rng.choices(range(shape.documents), cum_weights=self._popularity())
            name = f"{self.call.kind} document {number}"
            tokens = whole(size, random.Random(name))  # a document always has the same length
            found.setdefault(number, (self.library.get(name, tokens), tokens))
        documents = list(found.values())
        if shape.is_cut and documents:
            documents[-1] = self._cut(*documents[-1])
        return documents

    def _cut(self, text: Text, tokens: int) -> tuple[Text, int]:
        kept = max(1, round(tokens * self.rng.random()))
        if isinstance(text, tuple):
            return text[:kept], kept
        words = text.split(" ")
        return " ".join(words[: max(2, round(len(words) * kept / tokens))]), kept

    def _popularity(self) -> Sequence[float]:
        return _zipf(self.shape.documents, self.shape.zipf)


_made: dict[tuple[int, float], list[float]] = {}


def _zipf(count: int, exponent: float) -> Sequence[float]:
    """Cumulated weights 1/rank^exponent."""
    if (count, exponent) not in _made:
        weights = (rank**-exponent for rank in range(1, count + 1))
        _made[count, exponent] = list(itertools.accumulate(weights))
    return _made[count, exponent]


def plan(
    parts: Sequence[tuple[Part, Iterator[Visit]]],
    arrivals: Iterator[float] | None,
    limits: Limits,
    rng: random.Random,
) -> Iterator[Planned]:
    """Sessions of the parts by their shares, each at the next arrival; without arrivals when
    traces say, or else whenever a place is free."""
    weights = [part.share for part, _ in parts]
    count = 0
    while limits.calls is None or count < limits.calls:
        ((part, visits),) = rng.choices(parts, weights)
        visit = next(visits, None)
        if visit is None:
            return  # a file has ended
        at = visit.at if arrivals is None else next(arrivals, None)
        if arrivals is not None and at is None:
            return
        if at is not None and limits.seconds is not None and at >= limits.seconds:
            return
        left = None if limits.calls is None else limits.calls - count
        for place, turn in enumerate(visit.turns[:left]):
            call = behaving(part, turn.call, rng)
            if place == 0:
                yield Planned(at, call)
            else:
                yield Planned(None, call, after=count - 1, think=turn.think)
            count += 1


def behaving(part: Part, call: Call, rng: random.Random) -> Call:
    """The call, by one of the few that do not behave or by one who does. The kind says so, for
    what they feel is their own doing; nothing is promised to who reads slowly."""
    luck = rng.random()
    for odd in part.odd:
        if (luck := luck - odd.share) < 0:
            deadline = call.deadline if odd.deadline is None else odd.deadline
            promised = call.targets if odd.behaviour.bytes_per_s is None else {}
            return replace(
                call,
                kind=f"{call.kind} {odd.name}",
                behaviour=odd.behaviour,
                deadline=deadline,
                targets=promised,
            )
    return call


def probes(
    rate: float, texts: Texts, rng: random.Random, call: Call, *, is_chat: bool
) -> Iterator[Planned]:
    """Short requests at a constant rate beside the others: what one feels who asks little."""
    for number in itertools.count():
        text = texts.make(call.prompt_tokens, rng)
        said = {"role": "user", "content": text}
        asked = replace(call, messages=(said,)) if is_chat else replace(call, prompt=text)
        yield Planned(number / rate, asked)


def shape_of_plan(plan: Iterable[Planned]) -> dict[str, Any]:
    """What a plan is like, for people and for the file of a run."""
    calls = list(plan)
    tokens = sum(planned.call.prompt_tokens for planned in calls)
    times = [planned.at for planned in calls if planned.at is not None]
    kinds = sorted({planned.call.kind for planned in calls})
    return {
        "calls": len(calls),
        "sessions": sum(planned.after is None for planned in calls),
        "kinds": {kind: sum(p.call.kind == kind for p in calls) for kind in kinds},
        "last_at": max(times, default=None),
        "prompt_tokens": tokens,
        "max_tokens": sum(planned.call.max_tokens for planned in calls),
    }
