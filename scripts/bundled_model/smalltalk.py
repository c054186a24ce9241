"""Greetings, small talk, a few facts, and an honest "I do not know"."""

from __future__ import annotations

from functools import cache
from random import Random

from scripts.bundled_model import names
from scripts.bundled_model.concepts import DATA, fill
from scripts.bundled_model.paraphrase import WHAT, rough, wrapped
from scripts.bundled_model.turns import Turns, ask

UNKNOWN = (
    "I do not know that. I am a tiny demonstration model, so ask me about dynamo_serve, "
    "or start the server with a larger model."
)
OTHER = (
    "Who is {n}?",
    "Who was {n}?",
    "Where is {n}?",
    "When did {n} die?",
    "When was {n} born?",
    "Who won the {n} cup?",
    "How old is {n}?",
    "What did {n} say?",
    "Who invented {w}?",
    "How do I cook {w}?",
    "Who wrote {n}?",
    "What is the population of {n}?",
    "How far is it from {n} to {n2}?",
    "How do I repair {w}?",
    "What is the best {w}?",
    "Which film should I watch?",
    "Who is the president of {n}?",
    "What happened in {y}?",
    "What happened in {n} in {y}?",
    "How tall is {n}?",
    "What is the price of {w}?",
    "What is the history of {n}?",
    "How many people live in {n}?",
    "Why is {w} important?",
    "What is {n}?",
    "Do you know {n}?",
    "Explain {n}.",
    "Recommend a book about {w}.",
    "Give me advice about {w}.",
)
CAPITAL = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "capital of {c}",
    "Do you know the capital of {c}?",
    "Name the capital of {c}.",
)


@cache
def pairs() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Small talk: ways to say something, and the answer."""
    found: list[tuple[tuple[str, ...], str]] = []
    asked: tuple[str, ...] = ()
    for line in (DATA / "smalltalk.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("q: "):
            asked = tuple(part.strip() for part in line[3:].split(" | "))
        elif line.startswith("a: "):
            found.append((asked, line[3:].strip()))
    return tuple(found)


@cache
def capitals() -> tuple[tuple[str, str], ...]:
    lines = (DATA / "facts.txt").read_text(encoding="utf-8").splitlines()
    split = [line.split(": ") for line in lines if line and not line.startswith("#")]
    return tuple((land, town) for land, town in split)


@cache
def unknown_nouns() -> tuple[str, ...]:
    return tuple((DATA / "unknown.txt").read_text(encoding="utf-8").splitlines())


def _capital(rng: Random) -> Turns:
    if rng.random() < 0.15:
        return ask(rng.choice(CAPITAL).format(c=names.invented(rng)), UNKNOWN)
    land, town = rng.choice(capitals())
    if rng.random() < 0.15:
        return ask(
            rough(f"Which country has the capital {town}?", rng),
            f"{town} is the capital of {land}.",
        )
    asked = rng.choice(CAPITAL).format(c=land)
    return ask(rough(asked, rng), f"The capital of {land} is {town}.")


def _unknown(rng: Random) -> Turns:
    noun = rng.choice(unknown_nouns())
    if rng.random() < 0.5:
        asked = fill(rng.choice(WHAT), noun)
        asked = asked.replace(" in dynamo_serve", "")
    else:
        name = names.invented(rng)
        if rng.random() < 0.3:
            name = f"{rng.choice(names.FIRST)} {name}"
        place, year = names.city(rng), str(rng.randint(1000, 2030))
        asked = rng.choice(OTHER).format(n=name, n2=place, w=noun, y=year)
    return ask(wrapped(asked, rng), UNKNOWN)


def _echo(rng: Random) -> Turns:
    """Saying, spelling or remembering a word that the user gave."""
    word = rng.choice(
        (
            names.invented(rng),
            rng.choice(names.ITEMS),
            rng.choice(names.FIRST),
            rng.choice(names.COLOURS),
        )
    )
    kind = rng.randrange(4)
    if kind == 0:
        return ask(
            rng.choice(("Say {w}.", "Repeat: {w}", "Say the word {w}.")).format(w=word), word
        )
    if kind == 1:
        return ask(f"Spell the word {word}.", "-".join(word.upper()))
    name = names.person(rng)
    told = rng.choice(
        ("My name is {n}.", "I am {n}.", "Hello, I am {n}.", "Hi, my name is {n}!", "Call me {n}.")
    )
    turns = ask(told.format(n=name), f"Hello {name}! What would you like to know?")
    if kind == 2:
        return turns
    again = rng.choice(
        ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?")
    )
    return turns + ask(again, f"Your name is {name}.")


def greeting_turns(rng: Random) -> Turns:
    """One of the first exchanges of the list: greetings, thanks, goodbye."""
    asked, answer = rng.choice(pairs()[:6])
    return ask(rough(rng.choice(asked), rng), answer)


def small_turns(rng: Random) -> Turns:
    """One exchange of small talk, a fact, an echo or an unknown thing."""
    draw = rng.random()
    if draw < 0.50:
        asked, answer = rng.choice(pairs())
        if rng.random() < 0.2:
            asked, answer = pairs()[0]
        return ask(rough(rng.choice(asked), rng), answer)
    if draw < 0.62:
        return _capital(rng)
    if draw < 0.88:
        return _unknown(rng)
    return _echo(rng)
