"""What a run asks a server before it begins: its model, its limits, how it counts words."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from dynamo_serve.bench import answers, bodies
from dynamo_serve.bench.client import Answer, Client, Reading
from dynamo_serve.bench.plan import Call
from dynamo_serve.bench.texts import WordTexts
from dynamo_serve.errors import DynamoServeError

PATIENCE = Reading(timeout_s=120.0)
FEW, MANY = 16, 144  # words of the two calls that say how many tokens a word has


class EndpointError(DynamoServeError):
    """There is no server to measure, or it does not answer as one; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Facts:
    """`server` is what our own says at /v1/server, else empty."""

    model: str
    server: dict[str, Any] = field(default_factory=dict)
    has_metrics: bool = False

    @property
    def context(self) -> int | None:
        return self._limit("max_model_len")

    @property
    def vocab_size(self) -> int | None:
        return self._limit("vocab_size")

    def _limit(self, name: str) -> int | None:
        found = self.server.get("limits", {}).get(name)
        return found if isinstance(found, int) else None


async def facts(client: Client, model: str, api_key: str) -> Facts:
    """What the server says of itself. Raises `EndpointError` if nobody answers."""
    listed = await _get(client, "/v1/models", api_key)
    if listed.error:
        raise EndpointError(
            f"{listed.error}; start a server with 'dynamo-serve serve', or name another URL"
        )
    if listed.status in (401, 403):
        raise EndpointError(f"the server answers {listed.status}; give a key with --api-key")
    if not model:
        if listed.status != 200:
            raise EndpointError(
                f"the server answers {listed.status} to GET /v1/models; check the URL, or name the "
                "model with --model"
            )
        try:
            model = str(_json(listed)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise EndpointError("the server lists no model; name one with --model") from None
    own = await _get(client, "/v1/server", api_key)
    try:
        server = _json(own) if own.status == 200 else {}
    except ValueError:
        server = {}
    metrics = await _get(client, "/metrics", api_key)
    has_metrics = metrics.status == 200 and any(b"# TYPE" in data for _, data in metrics.reads)
    is_ours = isinstance(server, dict) and "limits" in server
    return Facts(model, server if is_ours else {}, has_metrics)


async def calibrated(client: Client, call: Call, dialect: bodies.Dialect) -> WordTexts:
    """How many tokens a word has by this server's count, from two short calls: their difference
    is free of what a chat template adds. Raises `EndpointError`."""
    few, many = [await _count(client, call, dialect, words) for words in (FEW, MANY)]
    return WordTexts(max(0.1, (many - few) / (MANY - FEW)))


async def _count(client: Client, call: Call, dialect: bodies.Dialect, words: int) -> int:
    text = WordTexts().make(words, random.Random(words))
    is_chat = bool(call.messages)
    asked = Call(
        prompt="" if is_chat else text,
        messages=({"role": "user", "content": text},) if is_chat else (),
        max_tokens=1,
        is_stream=False,
        api_key=call.api_key,
        extra=call.extra,
    )
    raw = client.request(
        "POST", bodies.path_of(asked), bodies.body_of(asked, dialect), call.api_key
    )
    answer = await client.send(raw, PATIENCE)
    said = _finished(answer)
    if answer.status != 200 or said.error:
        why = said.error or answer.error or f"HTTP {answer.status}"
        raise EndpointError(f"a first short request failed: {why}")
    if not isinstance(count := said.usage.get("prompt_tokens"), int):
        raise EndpointError("the server counts no prompt tokens; give a folder with --tokenizer")
    return count


def _finished(answer: Answer) -> answers.Said:
    work = answers.parse(answer)
    while True:
        try:
            next(work)
        except StopIteration as end:
            said: answers.Said = end.value
            return said


async def _get(client: Client, path: str, api_key: str) -> Answer:
    return await client.send(client.request("GET", path, api_key=api_key), PATIENCE)


def _json(answer: Answer) -> Any:
    return json.loads(b"".join(data for _, data in answer.reads))
