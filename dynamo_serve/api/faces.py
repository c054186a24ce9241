"""How the answers of an endpoint look, as a stream and as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dynamo_serve.api.choices import Tally, whole
from dynamo_serve.api.echo import told
from dynamo_serve.api.frames import PING, EventWriter, Writer
from dynamo_serve.api.job import Job
from dynamo_serve.api.messages_frames import PING as MESSAGES_PING
from dynamo_serve.api.messages_frames import MessageWriter
from dynamo_serve.api.messages_render import whole_message
from dynamo_serve.api.render import Envelope, renderer_of
from dynamo_serve.text.stream import Delta
from dynamo_serve.text.tokenizer import Tokenizer


class Face(Protocol):
    ping: bytes  # what an idle stream shows that it is alive with

    def writer(self, *, shows_ids: bool) -> EventWriter:
        """For one stream."""
        ...

    def whole(self, answers: Sequence[Sequence[Delta]], tally: Tally) -> dict[str, Any]:
        """The JSON body, from the deltas of each choice."""
        ...


class OpenAIFace:
    ping = PING

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._renderer = renderer_of(job, tokenizer)

    def writer(self, *, shows_ids: bool) -> EventWriter:
        return Writer(self._job, self._renderer, shows_ids=shows_ids)

    def whole(self, answers: Sequence[Sequence[Delta]], tally: Tally) -> dict[str, Any]:
        choices = [
            self._renderer.choice(i, whole(deltas), streamed=False)
            for i, deltas in enumerate(answers)
        ]
        body = Envelope(self._job, self._renderer).whole(choices, tally.usage())
        if self._job.prompt_logprobs is not None and not self._job.continues_text:
            scores = answers[0][0].prompt_logprobs
            body["prompt_logprobs"] = told(self._job, 0, scores, self._tokenizer)
        return body


class MessagesFace:
    ping = MESSAGES_PING

    def __init__(self, job: Job) -> None:
        self._job = job

    def writer(self, *, shows_ids: bool) -> EventWriter:
        return MessageWriter(self._job, shows_ids=shows_ids)

    def whole(self, answers: Sequence[Sequence[Delta]], tally: Tally) -> dict[str, Any]:
        (deltas,) = answers
        return whole_message(self._job, deltas, tally)


def face_of(job: Job, tokenizer: Tokenizer) -> Face:
    """By the endpoint that the request came to."""
    return MessagesFace(job) if job.endpoint == "messages" else OpenAIFace(job, tokenizer)
