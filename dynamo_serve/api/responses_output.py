"""The items of an answer as they grow, and the events that tell of it."""

from __future__ import annotations

import json
from typing import Any

from dynamo_serve.api.job import Job
from dynamo_serve.api.render import scored
from dynamo_serve.api.responses_items import item_id
from dynamo_serve.core.request import Finish
from dynamo_serve.text.parts import CallPart, Parts
from dynamo_serve.text.stream import Delta, ScoredToken
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.forms import call_id

Json = dict[str, Any]
Event = tuple[str, Json]  # its type, and what it says besides

DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class Growing:
    """One item: an event for each thing that becomes of it."""

    def __init__(self, item: Json, number: int) -> None:
        self.item = item
        self.kind: str = item["type"]
        self.place: Json = {"item_id": item["id"], "output_index": number}
        if self.kind in PARTS:
            self.place["content_index"] = 0
        self._pieces: list[str] = []
        self._scores: list[Json] = []

    def begun(self) -> list[Event]:
        number = self.place["output_index"]
        events = [("response.output_item.added", {"output_index": number, "item": {**self.item}})]
        if self.kind in PARTS:
            events.append(("response.content_part.added", {**self.place, "part": self._part("")}))
        return events

    def grown(self, text: str, scores: list[Json]) -> list[Event]:
        self._pieces.append(text)
        self._scores += scores
        return [(f"{DELTAS[self.kind]}.delta", {**self.place, "delta": text, **self._told(scores)})]

    def done(self, scores: list[Json], *, is_cut: bool) -> list[Event]:
        """`scores` are of tokens that added no text. `is_cut`: the answer was cut off here."""
        text, name = "".join(self._pieces), DELTAS[self.kind]
        self._scores += scores
        self.item["status"] = "incomplete" if is_cut else "completed"
        if self.kind == "function_call":
            self.item["arguments"] = text
            if not _is_json(text):
                self.item["status"] = "incomplete"
            events: list[Event] = [(f"{name}.done", {**self.place, "arguments": text})]
        else:
            part = self._part(text)
            self.item["content"] = [part]
            events = [
                (f"{name}.done", {**self.place, "text": text, **self._told(self._scores)}),
                ("response.content_part.done", {**self.place, "part": part}),
            ]
        number = self.place["output_index"]
        return [*events, ("response.output_item.done", {"output_index": number, "item": self.item})]

    def _part(self, text: str) -> Json:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        scores = [*self._scores]
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def _told(self, scores: list[Json]) -> Json:
        return {"logprobs": [*scores]} if self.kind == "message" else {}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class Output:
    """The items of an answer, oldest first."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._growing: Growing | None = None
        self._waiting: list[ScoredToken] = []  # tokens of which no text has been told
        self.items: list[Json] = []

    def push(self, delta: Delta) -> list[Event]:
        """What a delta comes to; after the last one every item is done."""
        parts = delta.parts or Parts(delta.text)
        self._waiting += delta.tokens
        events: list[Event] = []
        if parts.thought:
            events += self._text("reasoning", parts.thought, [])
        # A delta may end one call, have text, and begin another.
        for call in (call for call in parts.calls if call.name is None):
            events += self._arguments(call)
        if parts.content:
            events += self._text("message", parts.content, self._scores(parts.content))
        elif parts.thought or parts.calls:
            self._waiting.clear()  # their tokens are in no message
        for call in (call for call in parts.calls if call.name is not None):
            events += self._open("function_call", self._call(call)) + self._arguments(call)
        if delta.finish is not None:
            if not self.items:
                events += self._open("message", {})
            events += self._close(self._scores(""), is_cut=delta.finish is not Finish.STOP)
        return events

    def cut(self) -> list[Event]:
        """Nothing more comes: what is told of the item that was growing."""
        return self._close(self._scores(""), is_cut=True)

    def _text(self, kind: str, text: str, scores: list[Json]) -> list[Event]:
        events: list[Event] = []
        if self._growing is None or self._growing.kind != kind:
            events = self._open(kind, {})
        assert self._growing is not None
        return events + self._growing.grown(text, scores)

    def _arguments(self, call: CallPart) -> list[Event]:
        if not call.arguments:
            return []
        assert self._growing is not None
        return self._growing.grown(call.arguments, [])

    def _call(self, call: CallPart) -> Json:
        assert self._job.parsing is not None
        id = call_id(self._job.requests[0].id, call.number, self._job.parsing.tools)
        return {"call_id": id, "name": call.name, "arguments": ""}

    def _open(self, kind: str, fields: Json) -> list[Event]:
        events = self._close([], is_cut=False)
        number = len(self.items)
        item: Json = {"type": kind, "id": item_id(self._job.id, kind, str(number))}
        item["status"] = "in_progress"
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self.items.append(item | fields)
        self._growing = Growing(self.items[-1], number)
        return events + self._growing.begun()

    def _close(self, scores: list[Json], *, is_cut: bool) -> list[Event]:
        growing, self._growing = self._growing, None
        return [] if growing is None else growing.done(scores, is_cut=is_cut)

    def _scores(self, text: str) -> list[Json]:
        """Those of the tokens of `text`, the newest that waited; all of them if nothing is told
        apart. The others were of tags."""
        tokens, self._waiting = self._waiting, []
        start = len(tokens) if self._job.parsing is not None else 0
        missing = len(text.encode())
        while start and missing > 0:
            start -= 1
            missing -= len(self._tokenizer.token_bytes(tokens[start].logprob.token_id))
        return scored(tokens[start:], self._tokenizer)
