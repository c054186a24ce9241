"""One HTTP request, several choices: their streams merged into one, and that one folded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Mark
from dynamo_serve.core.request import Finish, TokenEvent
from dynamo_serve.delivery import nobody
from dynamo_serve.errors import Unavailable
from dynamo_serve.service import Service
from dynamo_serve.text.parts import Parts, joined
from dynamo_serve.text.stream import Delta, Teller, detokenize
from dynamo_serve.text.tokenizer import Tokenizer

Updates = AsyncGenerator[tuple[int, Delta], None]


class Head(NamedTuple):
    """What a client has of a choice: how far it is, what counts of it, and what it was told, but
    for an end."""

    mark: Mark
    counted: Delta
    told: Sequence[Delta]


def run(
    job: Job, service: Service, tokenizer: Tokenizer, on_stuck: Callable[[], None] = nobody
) -> Updates:
    """Start every choice: (index, delta) as they come. Closing this cancels them all, or parks
    them if the job is kept. `on_stuck` is called for a reader that stands still for too long."""
    streams = {}
    for i, request in enumerate(job.requests):
        # Whoever made the job has asked whether new requests are accepted.
        events = service.generate(
            request, keep_seconds=job.keep_seconds, on_stuck=on_stuck, is_begun=True
        )
        streams[i] = _deltas(job, service, i, events, job.transcript(i, tokenizer))
    return _together(streams)


def rejoin(
    job: Job,
    service: Service,
    tokenizer: Tokenizer,
    marks: Sequence[Mark],
    on_stuck: Callable[[], None],
) -> tuple[list[Head], Updates]:
    """Go on behind these marks: what the client has of each choice, and what follows. Raises
    `RequestNotFound`."""
    heads, streams = [], {}
    for i, (request, mark) in enumerate(zip(job.requests, marks, strict=True)):
        head = service.tokens_of(request.id, mark.num_tokens)
        transcript = job.transcript(i, tokenizer)
        known = transcript.deltas(head)  # the text is the client's; a character begun may not be
        heads.append(_head(mark, head, known))
        if mark.is_ended:
            continue
        if known[-1].finish is not None:  # a stop string, of which the client has not been told
            parts = known[-1].parts and Parts(is_calling=known[-1].parts.is_calling)
            last = Delta("", (), finish=known[-1].finish, parts=parts, matched=known[-1].matched)
            streams[i] = _alone(last)
            continue
        events = service.rejoin(request.id, mark.num_tokens, on_stuck=on_stuck)
        streams[i] = _deltas(job, service, i, events, transcript)
    return heads, _together(streams)


def _head(mark: Mark, head: TokenEvent, known: Sequence[Delta]) -> Head:
    thought = sum(delta.parts.num_thought for delta in known if delta.parts is not None)
    parts = Parts(num_thought=thought)
    counted = Delta("", head.token_ids, cached_tokens=head.cached_tokens, parts=parts)
    return Head(mark, counted, [delta._replace(finish=None) for delta in known])


async def _alone(delta: Delta) -> AsyncGenerator[Delta, None]:
    yield delta


def _deltas(
    job: Job,
    service: Service,
    index: int,
    events: AsyncGenerator[TokenEvent, None],
    transcript: Teller,
) -> AsyncGenerator[Delta, None]:
    cancel = partial(service.cancel, job.requests[index].id)
    return detokenize(events, transcript, cancel, waits=job.explain)


def _together(streams: Mapping[int, AsyncGenerator[Delta, None]]) -> Updates:
    if len(streams) == 1:
        return _single(*next(iter(streams.items())))
    return _merged(streams)


async def _single(index: int, stream: AsyncGenerator[Delta, None]) -> Updates:
    async with aclosing(stream):
        async for delta in stream:
            yield index, _checked(delta)


async def _merged(streams: Mapping[int, AsyncGenerator[Delta, None]]) -> Updates:
    # Bounded, so that a slow client is felt by the service, which merges what waits.
    queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(max(1, len(streams)))

    async def pump(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for delta in stream:
                    await queue.put((index, _checked(delta)))
        except Exception as error:  # handed to the reader, who raises it
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(i)) for i in streams]
    try:
        running = len(streams)
        while running:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item.finish is not None
            yield index, item
    finally:  # no await here: it may be running under cancellation
        for task in pumps:
            task.cancel()


def _checked(delta: Delta) -> Delta:
    if delta.finish not in (None, Finish.STOP, Finish.LENGTH, Finish.DEADLINE):
        raise Unavailable(f"The server ended this request early ({delta.finish.value}).")
    return delta


class Tally:
    """Token counts of a job, from its deltas."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._num_output = self._num_thought = 0
        self._cached: dict[int, int] = {}

    def add(self, index: int, delta: Delta) -> None:
        self._num_output += len(delta.token_ids)
        if delta.parts is not None:
            self._num_thought += delta.parts.num_thought
        if delta.cached_tokens is not None:
            self._cached[index] = delta.cached_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. Each prompt counts once, however many choices it has."""
        num_prompt = sum(map(len, self._job.prompts))
        # The first choice of each prompt: the others find what the first has computed.
        firsts = range(0, len(self._job.requests), self._job.n)
        cached = sum(self._cached.get(i, 0) for i in firsts)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({"inferred": True} if "usage" in self._job.infers else {}),
        }
        if self._job.parsing is not None and self._job.parsing.thoughts:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._num_thought}
        return usage


async def fold(updates: Updates, job: Job) -> tuple[list[list[Delta]], Tally]:
    """The deltas of each choice, and the counts."""
    tally = Tally(job)
    parts: list[list[Delta]] = [[] for _ in job.requests]
    async with aclosing(updates):
        async for index, delta in updates:
            tally.add(index, delta)
            parts[index].append(delta)
    return parts, tally


def whole(deltas: Sequence[Delta]) -> Delta:
    """A choice as one delta that has it all."""
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(i for delta in deltas for i in delta.token_ids),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish=deltas[-1].finish,
        summary=deltas[-1].summary,
        parts=None if deltas[-1].parts is None else joined(d.parts for d in deltas if d.parts),
        matched=deltas[-1].matched,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )
