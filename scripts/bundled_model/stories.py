"""Short stories from a grammar: hero, place, wish, trouble, help, end."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random

from scripts.bundled_model.paraphrase import rough
from scripts.bundled_model.turns import Example, Turns, ask

ASKED = (
    "Tell me a short story about {h}.",
    "Tell me a short story about {h}.",
    "Tell me a story about {h}.",
    "Write a short story about {h}.",
    "Write a story about {h}.",
    "Can you tell me a story about {h}?",
    "Please tell me a short story about {h}.",
    "I want a story about {h}.",
    "Give me a short story about {h}.",
    "Make up a story about {h}.",
    "A story about {h}, please.",
    "Tell my child a story about {h}.",
    "Could you write a little story about {h}?",
    "Story about {h}",
    "Now tell me a story about {h}.",
)
ANY = (
    "Tell me a story.",
    "Write a story.",
    "Tell me a short story.",
    "Can you tell a story?",
    "Story time!",
)


@cache
def words() -> dict[str, list[str]]:
    path = Path(__file__).parent / "data" / "stories.json"
    loaded: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _slots(hero: str, name: str, rng: Random) -> dict[str, str]:
    table = words()
    helper = rng.choice([h for h in table["heroes"] if h != hero])
    trait, trait2 = rng.sample(table["traits"], 2)
    pronoun = rng.choice((("he", "him", "his"), ("she", "her", "her")))
    return {
        "hero": hero,
        "a_trait_hero": with_article(f"{trait} {hero}"),
        "name": name,
        "trait": trait,
        "trait2": trait2,
        "place": rng.choice(table["places"]),
        "thing": rng.choice(table["things"]),
        "weather": rng.choice(table["weather"]),
        "helper": helper,
        "a_helper": with_article(helper),
        "food": rng.choice(table["foods"]),
        "he": pronoun[0],
        "him": pronoun[1],
        "his": pronoun[2],
        "He": pronoun[0].capitalize(),
    }


def story(hero: str, rng: Random, opening: str | None = None, name: str | None = None) -> str:
    """One story of five to eight sentences about a hero."""
    table = words()
    slots = _slots(hero, name or rng.choice(table["names"]), rng)
    parts = ["opening", "habit", "wish", "trouble", "meeting", "speech", "solution", "ending"]
    if rng.random() < 0.4:
        parts.remove("habit")
    if rng.random() < 0.3:
        parts.remove("speech")
    chosen = [rng.choice(table[part]) for part in parts]
    if opening is not None:
        chosen[0] = opening
    return " ".join(sentence.format(**slots) for sentence in chosen)


def _hero(rng: Random) -> str:
    table = words()
    return rng.choice(table["heroes"] if rng.random() < 0.75 else table["odd_heroes"])


def story_turns(rng: Random) -> Turns:
    """A request for a story and the story."""
    if rng.random() < 0.08:
        return ask(rough(rng.choice(ANY), rng), story(_hero(rng), rng))
    if rng.random() < 0.06:
        return poem_turns(rng)
    hero = _hero(rng)
    shown, name = with_article(hero), None
    if rng.random() < 0.15:
        name = rng.choice(words()["names"])
        shown += f" called {name}"
    elif rng.random() < 0.1:
        shown = with_article(f"{rng.choice(words()['traits'])} {hero}")
    asked = rng.choice(ASKED).format(h=shown)
    return ask(rough(asked, rng) if rng.random() < 0.5 else asked, story(hero, rng, name=name))


def poem_turns(rng: Random) -> Turns:
    """Four short lines about a hero."""
    hero = _hero(rng)
    asked = rng.choice(
        ("Write a poem about {h}.", "Write a short poem about {h}.", "A poem about {h}, please.")
    )
    pairs = rng.sample(words()["rhymes"], 2)
    filled = [pair.format(hero=hero, a_hero=with_article(hero)) for pair in pairs]
    lines = "\n".join(pair[0].upper() + pair[1:] for pair in filled)
    return ask(rough(asked.format(h=with_article(hero)), rng), lines)


def plain_story(rng: Random) -> Example:
    """A story without a chat, for plain completions."""
    table = words()
    opening = rng.choice(table["plain_openings"]) if rng.random() < 0.7 else None
    return Example(text=story(_hero(rng), rng, opening))
