"""One HTTP request, several choices: their streams merged into one, and that one folded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from dynamo_serve.api.job import Job
from dynamo_serve.core.request import Finish, Request
from dynamo_serve.errors import Unavailable
from dynamo_serve.service import Service
from dynamo_serve.text.stream import Delta, detokenize
from dynamo_serve.text.tokenizer import Tokenizer

Updates = AsyncGenerator[tuple[int, Delta], None]


def run(job: Job, service: Service, tokenizer: Tokenizer) -> Updates:
    """Start every choice: (index, delta) as they come. Closing this cancels them all."""

    def cancel(request: Request) -> Callable[[], None] | None:
        return partial(service.cancel, request.id) if job.explain else None

    streams = [
        detokenize(service.generate(request), job.transcript(i, tokenizer), cancel(request))
        for i, request in enumerate(job.requests)
    ]
    return _single(streams[0]) if len(streams) == 1 else _merged(streams)


async def _single(stream: AsyncGenerator[Delta, None]) -> Updates:
    async with aclosing(stream):
        async for delta in stream:
            yield 0, _checked(delta)


async def _merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> Updates:
    # Bounded, so that a slow client is felt by the service, which merges what waits.
    queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(len(streams))

    async def pump(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for delta in stream:
                    await queue.put((index, _checked(delta)))
        except Exception as error:  # handed to the reader, who raises it
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(i)) for i in range(len(streams))]
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
        self._num_output = 0
        self._cached: dict[int, int] = {}

    def add(self, index: int, delta: Delta) -> None:
        self._num_output += len(delta.token_ids)
        if delta.cached_tokens is not None:
            self._cached[index] = delta.cached_tokens

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. Each prompt counts once, however many choices it has."""
        num_prompt = sum(map(len, self._job.prompts))
        # The first choice of each prompt: the others find what the first has computed.
        firsts = range(0, len(self._job.requests), self._job.n)
        cached = sum(self._cached.get(i, 0) for i in firsts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


async def fold(updates: Updates, job: Job) -> tuple[list[Delta], Tally]:
    """Each choice as one delta that has it all, and the counts."""
    tally = Tally(job)
    parts: list[list[Delta]] = [[] for _ in job.requests]
    async with aclosing(updates):
        async for index, delta in updates:
            tally.add(index, delta)
            parts[index].append(delta)
    return [_whole(deltas) for deltas in parts], tally


def _whole(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(i for delta in deltas for i in delta.token_ids),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish=deltas[-1].finish,
        summary=deltas[-1].summary,
    )
