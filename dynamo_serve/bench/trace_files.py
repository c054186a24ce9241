"""Sessions from files that others publish: ShareGPT, Mooncake and BurstGPT format."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamo_serve.bench.plan import Call
from dynamo_serve.bench.texts import Library, Text, Texts, join
from dynamo_serve.bench.workloads import Turn, Visit
from dynamo_serve.errors import ConfigError
from dynamo_serve.json_lines import parse

MOONCAKE_BLOCK = 512  # tokens behind each of its hashes
HUMANS, MODELS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")
Maker = tuple[Call, Texts, Library, random.Random]


def visits(kind: str, path: Path, make: Maker, *, is_chat: bool = True) -> Iterator[Visit]:
    """The sessions of a file, in its order. Raises `ConfigError` that names what is wrong."""
    readers: dict[str, Callable[..., Iterator[Visit]]] = {
        "sharegpt": _sharegpt,
        "mooncake": _mooncake,
        "burstgpt": _burstgpt,
    }
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return readers[kind](path, make, is_chat)


def _sharegpt(path: Path, make: Maker, is_chat: bool) -> Iterator[Visit]:
    """Each person's words with an answer as long as the one in the file; the server's own answers
    make the history. Conversations that no person begins are left out."""
    if not is_chat:
        raise ConfigError(f"{path}: conversations need the chat endpoint; leave out --completions")
    call, texts, _, _ = make
    try:
        talks = json.loads(path.read_text())
        assert isinstance(talks, list), "not a list"
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{path} is not in ShareGPT format: {error}") from None
    for number, talk in enumerate(talks):
        try:
            turns = tuple(_turns(talk.get("conversations") or talk.get("messages"), call, texts))
        except (AttributeError, TypeError, KeyError):
            raise ConfigError(f"{path}, conversation {number}: not in ShareGPT format") from None
        if turns:
            yield Visit(turns)


def _turns(said: list[dict[str, str]] | None, call: Call, texts: Texts) -> Iterator[Turn]:
    used = 0
    for asked, answered in zip(said or (), (said or ())[1:], strict=False):
        role, text = _role(asked), _words(asked)
        if role in HUMANS and _role(answered) in MODELS and text:
            used += texts.count(text)
            answer = texts.count(_words(answered) or ".")
            messages = ({"role": "user", "content": text},)
            yield Turn(replace(call, messages=messages, max_tokens=answer, prompt_tokens=used), 0.0)
            used += answer


def _role(said: dict[str, str]) -> str:
    return (said.get("from") or said["role"]).lower()


def _words(said: dict[str, str]) -> str:
    return said.get("value") or said.get("content") or ""


def _mooncake(path: Path, make: Maker, is_chat: bool) -> Iterator[Visit]:
    """Prompts that begin alike where their hashes do, at the times of the file."""
    call, texts, library, rng = make
    with path.open() as file:
        for number, line in enumerate(file, 1):
            plain = parse(path, number, line)
            try:
                size, answer = int(plain["input_length"]), int(plain["output_length"])
                at, hashes = float(plain["timestamp"]) / 1e3, plain.get("hash_ids", ())
                text = _blocks(size, hashes, texts, library, rng)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not in Mooncake format: {error}"
                ) from None
            yield _single(call, text, size, answer, at, is_chat)


def _blocks(
    size: int, hashes: list[Any], texts: Texts, library: Library, rng: random.Random
) -> Text:
    """The last block may be a part of one; what no hash is given for is nobody else's."""
    parts: list[Text] = []
    left = size
    for number in hashes:
        if left > 0:
            parts.append(library.get(f"block {number}", min(left, MOONCAKE_BLOCK)))
            left -= MOONCAKE_BLOCK
    if left > 0 or not parts:
        parts.append(texts.make(max(1, left), rng))
    return join(parts)


def _burstgpt(path: Path, make: Maker, is_chat: bool) -> Iterator[Visit]:
    """Random prompts as long as in the file, at its times. Lines with no answer had failed there,
    and are left out."""
    call, texts, _, rng = make
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at = float(row["Timestamp"])
                size, answer = int(row["Request tokens"]), int(row["Response tokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not in BurstGPT format: {error}"
                ) from None
            if answer > 0 and size > 0:
                yield _single(call, texts.make(size, rng), size, answer, at, is_chat)


def _single(call: Call, text: Text, size: int, answer: int, at: float, is_chat: bool) -> Visit:
    asked = replace(call, max_tokens=max(1, answer), prompt_tokens=size)
    if is_chat:
        asked = replace(asked, messages=({"role": "user", "content": text},))
    else:
        asked = replace(asked, prompt=text)
    return Visit((Turn(asked),), at)


def timed(visits: Iterator[Visit], speed: float) -> Iterator[Visit]:
    """The same with times since the first one, `speed` times as fast."""
    first: float | None = None
    for visit in visits:
        if visit.at is None:
            yield visit
            continue
        first = visit.at if first is None else first
        yield replace(visit, at=(visit.at - first) / speed)
