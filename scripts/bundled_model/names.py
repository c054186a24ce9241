"""Names and values to fill in. Invented names teach the model to copy what it has never seen."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

_PATH = Path(__file__).parent / "data" / "names.json"
_TABLES: dict[str, list[str]] = json.loads(_PATH.read_text(encoding="utf-8"))
FIRST = tuple(_TABLES["first"])
CITIES = tuple(_TABLES["cities"])
JOBS = tuple(_TABLES["jobs"])
COLOURS = tuple(_TABLES["colours"])
ITEMS = tuple(_TABLES["items"])
ANIMALS = tuple(_TABLES["animals"])
LANGUAGES = tuple(_TABLES["languages"])
_ONSETS = (
    *("b", "br", "c", "ch", "d", "dr", "f", "fr", "g", "gr", "h", "j", "k", "kl", "l", "m", "n"),
    *("p", "pr", "r", "s", "sh", "st", "t", "tr", "v", "w", "y", "z"),
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ia", "io", "oa")
_CODAS = ("", "", "n", "r", "l", "s", "m", "nd", "rk", "th", "x", "ck", "t")


def invented(rng: Random) -> str:
    """A word made of syllables, such as Trindael."""
    made = "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.randint(1, 3))
    )
    return made.capitalize() if len(made) > 2 else made.capitalize() + "lo"


def person(rng: Random) -> str:
    return rng.choice(FIRST) if rng.random() < 0.7 else invented(rng)


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.7 else invented(rng)
