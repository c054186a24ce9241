"""JSON objects: made from a description, or taken out of a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from scripts.bundled_model import names
from scripts.bundled_model.paraphrase import rough
from scripts.bundled_model.turns import Turns, ask

Record = dict[str, Any]
GIVE = (
    "Give me a JSON object for {d}.",
    "Give me a JSON object for {d}.",
    "Give me JSON for {d}.",
    "Make a JSON object for {d}.",
    "Write a JSON object for {d}.",
    "Create a JSON object for {d}.",
    "Can you write JSON for {d}?",
    "I need a JSON object for {d}.",
    "Please write {d} as JSON.",
    "Return a JSON object for {d}.",
    "Show {d} as JSON.",
    "JSON for {d}",
    "Output only JSON: {d}.",
    "Turn this into JSON: {d}.",
)
TAKE = (
    "Extract {k} as JSON: {s}",
    "Extract the fields {k} from this text as JSON. {s}",
    "{s} Return JSON with {k}.",
    "{s} Give me a JSON object with the keys {k}.",
    "Read the text and answer in JSON with {k}.\n\n{s}",
    "Turn the text into JSON with {k}: {s}",
)


def _person(rng: Random) -> tuple[Record, str, str]:
    name, age = names.person(rng), rng.randint(1, 99)
    record: Record = {"name": name, "age": age}
    noun = rng.choice(("a person", "a person", "a person", "someone", "a customer", "a user"))
    said = f"{noun} {rng.choice(('called', 'named'))} {name} who is {age} years old"
    told = f"{name} is {age} years old"
    if rng.random() < 0.35:
        record["city"] = names.city(rng)
        said += f" and lives in {record['city']}"
        told += f" and lives in {record['city']}"
    elif rng.random() < 0.3:
        record["job"] = rng.choice(names.JOBS)
        said += f" and works as a {record['job']}"
        told += f" and works as a {record['job']}"
    return record, said, told + "."


def _item(rng: Random) -> tuple[Record, str, str]:
    item, colour, price = rng.choice(names.ITEMS), rng.choice(names.COLOURS), rng.randint(1, 300)
    record: Record = {"item": item, "color": colour, "price": price}
    return (
        record,
        f"a {colour} {item} that costs {price} euros",
        f"The {colour} {item} costs {price} euros.",
    )


def _city(rng: Random) -> tuple[Record, str, str]:
    town, land = names.city(rng), names.invented(rng)
    record: Record = {"city": town, "country": land}
    return record, f"the city {town} in {land}", f"{town} is a city in {land}."


def _book(rng: Random) -> tuple[Record, str, str]:
    title, author, year = names.invented(rng), names.person(rng), rng.randint(1900, 2025)
    record: Record = {"title": title, "author": author, "year": year}
    return (
        record,
        f"the book {title} by {author} from {year}",
        f"{author} wrote the book {title} in {year}.",
    )


def _pet(rng: Random) -> tuple[Record, str, str]:
    name, kind = names.person(rng), rng.choice(names.ANIMALS)
    record: Record = {"name": name, "animal": kind}
    return record, f"a {kind} called {name}", f"{name} is a {kind}."


def _order(rng: Random) -> tuple[Record, str, str]:
    who, count, item = names.person(rng), rng.randint(2, 50), rng.choice(names.ITEMS)
    record: Record = {"customer": who, "item": item, "quantity": count}
    said = f"an order of {count} {item}s by {who}"
    return record, said, f"{who} orders {count} {item}s."


def _meeting(rng: Random) -> tuple[Record, str, str]:
    day = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    hour, town = rng.randint(8, 18), names.city(rng)
    record: Record = {"day": day, "hour": hour, "place": town}
    return (
        record,
        f"a meeting on {day} at {hour} in {town}",
        f"The meeting is on {day} at {hour} in {town}.",
    )


Maker = Callable[[Random], tuple[Record, str, str]]
MAKERS: tuple[Maker, ...] = (_person, _person, _person, _item, _city, _book, _pet, _order, _meeting)


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def json_turns(rng: Random) -> Turns:
    """A request for JSON and the object, on one line."""
    draw = rng.random()
    if draw < 0.12:
        return _several(rng)
    record, said, told = rng.choice(MAKERS)(rng)
    if draw < 0.55:
        asked = rng.choice(GIVE).format(d=said)
    else:
        keys = list(record)
        if rng.random() < 0.4:
            keys = rng.sample(keys, rng.randint(1, len(keys)))
            record = {key: record[key] for key in keys}
        asked = rng.choice(TAKE).format(k=_listed(keys), s=told)
    return ask(
        rough(asked, rng) if rng.random() < 0.1 and "\n" not in asked else asked, _dump(record)
    )


def _several(rng: Random) -> Turns:
    """A list of plain values."""
    pool = rng.choice(
        (names.COLOURS, names.ANIMALS, names.CITIES, names.FIRST, names.ITEMS, names.JOBS)
    )
    chosen = rng.sample(pool, rng.randint(2, 4))
    asked = rng.choice(
        ("Give me a JSON list of {d}.", "Write {d} as a JSON list.", "JSON array of {d}, please.")
    )
    return ask(asked.format(d=_listed(chosen)), _dump(chosen))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
