"""What a run asks a server before it begins: its model, its limits, how it counts words."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dynamo_serve.bench import answers, bodies
from dynamo_serve.bench.client import LATE, Answer, Client, Reading
from dynamo_serve.bench.plan import Call
from dynamo_serve.bench.texts import WordTexts
from dynamo_serve.errors import DynamoServeError

SOON_S = 1.0  # whoever waits for longer is told for what
MOST_BYTES = 1 << 26  # of an answer
FIRST = "/v1/models"  # without an answer to it there is nothing to do
FEW, MANY = 16, 144  # words of the two calls that say how many tokens a word has


class EndpointError(DynamoServeError):
    """There is no server to measure, or it does not answer as one; the message says what to do."""


def on_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds for each answer; `say` is told what is waited for if it is not there soon."""

    seconds: float = 30.0
    say: Callable[[str], None] = on_stderr


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


async def facts(client: Client, model: str, api_key: str, patience: Patience) -> Facts:
    """What the server says of itself. Raises `EndpointError` if nobody answers."""
    listed = await _get(client, FIRST, api_key, patience)
    if listed.error.startswith(LATE):
        raise EndpointError(f"GET {FIRST}: {listed.error}; is it busy? wait longer with --wait")
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
    own = await _get(client, "/v1/server", api_key, patience)
    try:
        server = _json(own) if own.status == 200 else {}
    except ValueError:
        server = {}
    metrics = await _get(client, "/metrics", api_key, patience)
    has_metrics = metrics.status == 200 and any(b"# TYPE" in data for _, data in metrics.reads)
    is_ours = isinstance(server, dict) and "limits" in server
    return Facts(model, server if is_ours else {}, has_metrics)


async def calibrated(
    client: Client, call: Call, extras: bodies.BodyExtras, patience: Patience
) -> WordTexts:
    """How many tokens a word has by this server's count, from two short calls: their difference
    is free of what a chat template adds. Raises `EndpointError`."""
    few, many = [await _count(client, call, extras, words, patience) for words in (FEW, MANY)]
    return WordTexts(max(0.1, (many - few) / (MANY - FEW)))


async def _count(
    client: Client, call: Call, extras: bodies.BodyExtras, words: int, patience: Patience
) -> int:
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
    raw = client.request("POST", bodies.path_of(asked), bodies.body_of(asked, extras), call.api_key)
    answer = await _answer(client, raw, "a first short request", patience)
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


async def _get(client: Client, path: str, api_key: str, patience: Patience) -> Answer:
    raw = client.request("GET", path, api_key=api_key)
    answer = await _answer(client, raw, f"GET {path}", patience)
    if answer.error and path != FIRST:
        patience.say(f"GET {path}: {answer.error}; done without it")
    return answer


async def _answer(client: Client, raw: bytes, what: str, patience: Patience) -> Answer:
    reading = Reading(timeout_s=patience.seconds, most_bytes=MOST_BYTES)
    asking = asyncio.ensure_future(client.send(raw, reading))
    try:
        if not (await asyncio.wait([asking], timeout=SOON_S))[0]:
            patience.say(f"waiting for the answer to {what}, up to {patience.seconds:g} s (--wait)")
        return await asking
    finally:
        asking.cancel()


def _json(answer: Answer) -> Any:
    return json.loads(b"".join(data for _, data in answer.reads))
