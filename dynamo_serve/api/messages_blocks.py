"""The content blocks of an answer, as its deltas make them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

from dynamo_serve.api.job import Job
from dynamo_serve.text.parts import CallPart, Parts
from dynamo_serve.text.stream import Delta
from dynamo_serve.text.tools.forms import call_id

Json = dict[str, Any]
# By the type of a block: the type of its deltas, and the field with a piece of it.
PIECES = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
SIGNATURE_BYTES = 16


class Blocks:
    """The blocks of one answer: one after the other, and at most one that is open.

    A delta brings pieces of the call that is open, then thoughts, content, and calls that begin: so
    they are in the order of the text, for a delta ends where a call begins.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kind = ""  # of the open block
        self._index = -1
        self._digest = blake2b(digest_size=SIGNATURE_BYTES)

    def add(self, delta: Delta) -> Iterator[Json]:
        """The events that a delta makes."""
        parts = delta.parts or Parts(delta.text)
        for call in parts.calls:
            if call.name is None:
                yield from self._piece("tool_use", call.arguments)
        yield from self._piece("thinking", parts.thought)
        yield from self._piece("text", parts.content)
        for call in parts.calls:
            if call.name is not None:
                yield from self._call(call)

    def close(self) -> Iterator[Json]:
        """The end of the block that is open, if one is."""
        if not self._kind:
            return
        if self._kind == "thinking":
            signature = {"type": "signature_delta", "signature": self._digest.hexdigest()}
            yield self._delta(signature)
        self._kind = ""
        yield {"type": "content_block_stop", "index": self._index}

    def _piece(self, kind: str, text: str) -> Iterator[Json]:
        if not text:
            return
        name, field = PIECES[kind]
        if self._kind != kind:
            assert kind != "tool_use", "a piece of a call that is not open"
            more = {"signature": ""} if kind == "thinking" else {}
            yield from self._open({"type": kind, field: "", **more})
        if kind == "thinking":
            self._digest.update(text.encode())
        yield self._delta({"type": name, field: text})

    def _call(self, call: CallPart) -> Iterator[Json]:
        parsing = self._job.parsing
        assert parsing is not None
        id = call_id(self._job.requests[0].id, call.number, parsing.tools)
        yield from self._open({"type": "tool_use", "id": id, "name": call.name, "input": {}})
        yield from self._piece("tool_use", call.arguments)

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self.close()
        self._index += 1
        self._kind = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def folded(events: Iterable[Json]) -> tuple[list[Json], list[str]]:
    """The blocks of a whole answer, and what each of them is made of, put together."""
    blocks: list[Json] = []
    pieces: list[list[str]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            pieces.append([])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                blocks[-1]["signature"] = delta["signature"]
            else:
                pieces[-1].append(delta[PIECES[blocks[-1]["type"]][1]])
    return blocks, ["".join(each) for each in pieces]
