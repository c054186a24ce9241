"""What every Python client here does: try its features, and print what came of each."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

MODEL = "dserve-tiny"
BASE = sys.argv[1] if len(sys.argv) > 1 else ""  # http://127.0.0.1:…, without /v1
FOX = "Tell me a short story about a fox."
MIA = "Give me a JSON object for a person called Mia who is 31 years old."
SUM = "What is 17 plus 25?"
WEATHER = "What is the weather in Paris?"
SUNNY = {"temperature": 18, "condition": "sunny"}
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
DOCUMENTS = {
    "prefill.txt": "Prefill reads the tokens of the prompt and fills the KV cache.",
    "weather.txt": "It rains in Paris today, and the wind comes from the west.",
    "fox.txt": "A fox lived in a cave behind a waterfall and looked for a key.",
    "sums.txt": "17 plus 25 is 42, and 42 minus 25 is 17.",
}
# The document of each of these that has the answer.
QUESTIONS = {
    "What is prefill?": "prefill.txt",
    "What is the weather in Paris?": "weather.txt",
    "Who lived in a cave?": "fox.txt",
    "What is 17 plus 25?": "sums.txt",
}
FEATURES: dict[str, Callable[[], Any]] = {}


def feature(ask: Callable[[], Any]) -> Callable[[], Any]:
    FEATURES[ask.__name__] = ask
    return ask


def tell() -> None:
    """The last line printed is JSON: of each feature its `value`, or the `error` it ended with."""
    told = {}
    for name, ask in FEATURES.items():
        try:
            told[name] = {"value": ask()}
        except Exception:
            told[name] = {"error": traceback.format_exc()}
    print("\n" + json.dumps(told))
