"""Random JSON schemas of the kinds that people send, and whether a text is what one allows."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

from dynamo_serve.text.tokenizer import Tokenizer

NAMES = ("id", "name", "when", "größe", "a b", "is_ok", "items", "x", "notes", "kind")
WORDS = ("red", "green", "blue", "Ümlaut", 'say "no"', "two\nlines", "", "0")
PATTERNS = ("^[a-z]{1,8}$", "^\\d{4}-\\d{2}$", "^(yes|no)$", "[A-Z]", "^[^@ ]+@[a-z]+\\.com$")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4")
DEEPEST = 4


def random_schema(rng: random.Random) -> dict[str, Any]:
    """Some refer to definitions, a few to themselves."""
    schema = _value(rng, 1)
    if rng.random() < 0.2:
        schema = {
            "type": "object",
            "properties": {"one": {"$ref": "#/$defs/part"}, "rest": schema},
            "required": ["one"],
            "$defs": {"part": _value(rng, 2)},
        }
    elif rng.random() < 0.1:
        schema = {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": _value(rng, DEEPEST),
                        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    },
                    "required": ["value", "next"],
                    "additionalProperties": False,
                }
            },
        }
    return schema


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_text, _text, _number, _number, _plain]
    if depth < DEEPEST:
        kinds += [_object] * 4 + [_array] * 2 + [_choice]
    return rng.choice(kinds)(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _value(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = _value(rng, DEEPEST)
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array", "items": _value(rng, depth + 1)}
    if rng.random() < 0.8:
        schema["maxItems"] = rng.randint(1, 4)
    if rng.random() < 0.4:
        schema["minItems"] = rng.randint(0, 1)
    if rng.random() < 0.2:
        schema["prefixItems"] = [_value(rng, DEEPEST)]
    return schema


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(rng, depth + 1) for _ in range(rng.randint(2, 3))]}


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    match rng.randrange(5):
        case 0:
            schema["pattern"] = rng.choice(PATTERNS)
        case 1:
            schema["format"] = rng.choice(FORMATS)
        case 2:
            return {"enum": rng.sample(WORDS, rng.randint(1, 4))}
        case _:
            schema["maxLength"] = rng.randint(1, 12)
            if rng.random() < 0.3:
                schema["minLength"] = 1
    return schema


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
    if rng.random() < 0.6:
        schema["minimum"] = rng.randint(-1000, 10)
    if rng.random() < 0.6:
        schema["maximum"] = rng.randint(11, 5000)
    if schema["type"] == "integer" and rng.random() < 0.1:
        schema["multipleOf"] = rng.choice([2, 5, 10])
    return schema


def _plain(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": rng.choice(WORDS)}])


def fault_of(text: str, schema: dict[str, Any]) -> str:
    """Why a text is not what the schema allows; empty if it is."""
    try:
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def allowed_by(mask: bytes) -> list[int]:
    """The tokens whose bits are set."""
    some = [(8 * i, byte) for i, byte in enumerate(mask) if byte]
    return [at + bit for at, byte in some for bit in range(8) if byte >> bit & 1]


def closing_token(
    tokenizer: Tokenizer, mask: bytes, ids: list[int], rng: random.Random
) -> int | None:
    """One of the allowed tokens that helps a JSON text to come to an end; None if none is."""
    allowed = allowed_by(mask)
    if not allowed:
        return None
    if end := tokenizer.eos_ids.intersection(allowed):
        return min(end)
    written = b"".join(map(tokenizer.token_bytes, ids))
    quotes = written.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"')
    order = b'"' if quotes % 2 else b'}],:ntf0123456789"{['

    def rank(token: int) -> tuple[int, float]:
        text = tokenizer.token_bytes(token)
        at = order.find(text[:1]) if text else -1
        return (at if at >= 0 else 999 if text.isspace() else 99), rng.random()

    return min(allowed, key=rank)
