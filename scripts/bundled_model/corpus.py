"""The whole corpus: mixes the generators, adds system prompts, and chains conversations."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from scripts.bundled_model.arithmetic import drill, sum_turns
from scripts.bundled_model.concepts import concept_turns, prose
from scripts.bundled_model.passages import copy_drill, passage_turns
from scripts.bundled_model.records import json_turns
from scripts.bundled_model.smalltalk import greeting_turns, small_turns
from scripts.bundled_model.stories import plain_story, story_turns
from scripts.bundled_model.toolcalls import tool_example
from scripts.bundled_model.turns import Example, Turns, system

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are dserve-tiny, a small model.",
    "You are dserve-tiny, the model of dynamo_serve.",
    "You are a friendly assistant.",
    "You are a chatbot.",
    "You are an assistant for dynamo_serve.",
    "You are an expert in serving language models.",
    "You are a helpful and honest assistant. Answer clearly.",
    "Answer the questions of the user.",
    "Be polite and helpful.",
    "You help people to try the server.",
    "You are a teacher. Explain things simply.",
    "Answer in English.",
    "You are a helpful assistant. If you do not know something, say so.",
    "You are talking to a customer of a company. Be kind, be clear, and do not invent facts.",
    "Help the user.",
    "You are a test model.",
    "System prompt for a test.",
    "You are a concise assistant.",
)
Part = Callable[[Random], Turns]
CHATS: tuple[tuple[Part, float], ...] = (
    (concept_turns, 0.38),
    (sum_turns, 0.26),
    (story_turns, 0.07),
    (json_turns, 0.14),
    (small_turns, 0.11),
    (passage_turns, 0.04),
)
KINDS = ("chat", "long", "tools", "drill", "copy", "story", "prose")
KIND_WEIGHTS = (0.60, 0.02, 0.08, 0.16, 0.09, 0.02, 0.03)


def chat_part(rng: Random) -> Turns:
    """The turns of one generator, chosen by weight."""
    part = rng.choices([p for p, _ in CHATS], [w for _, w in CHATS])[0]
    return part(rng)


def without_tools(rng: Random) -> Turns:
    """Turns that need no tool, whatever tools are offered."""
    return rng.choices((concept_turns, story_turns, json_turns, greeting_turns), (6, 1, 2, 2))[0](
        rng
    )


def with_system(turns: Turns, rng: Random) -> Turns:
    return [system(rng.choice(SYSTEMS)), *turns] if rng.random() < 0.45 else turns


def conversation(rng: Random, parts: int) -> Turns:
    """Several exchanges after one another."""
    turns: Turns = []
    for _ in range(parts):
        turns += chat_part(rng)
    return with_system(turns, rng)


def example(rng: Random) -> Example:
    """One document of the corpus."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if kind == "chat":
        return Example(turns=conversation(rng, rng.choices((1, 2, 3), (0.75, 0.17, 0.08))[0]))
    if kind == "long":
        return Example(turns=conversation(rng, rng.randint(4, 14)))
    if kind == "tools":
        made = tool_example(rng, without_tools)
        return Example(turns=with_system(made.turns, rng), tools=made.tools)
    return {"drill": drill, "copy": copy_drill, "story": plain_story, "prose": prose}[kind](rng)
