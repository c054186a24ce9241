"""Conversations with tools: a call, its result, and the sentence made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from scripts.bundled_model import names
from scripts.bundled_model.arithmetic import random_sum
from scripts.bundled_model.paraphrase import rough
from scripts.bundled_model.turns import Example, Message, Turns, assistant, user

Values = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A family of tools: its names, arguments, ways to ask, and how a result reads."""

    names: tuple[str, ...]
    about: str
    args: dict[str, tuple[str, ...]]
    draw: Callable[[Random], Values]
    asks: tuple[str, ...]
    result: Callable[[Values, Random], Values]
    says: str


def _kind(value: Any) -> str:
    return {int: "integer", float: "number"}.get(type(value), "string")


def _sum(rng: Random) -> Values:
    found = random_sum(rng)
    return {"a": found.a, "b": found.b}


def _weather(_: Values, rng: Random) -> Values:
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear"))
    return {"temperature": rng.randint(-10, 38), "condition": sky}


def _topic(rng: Random) -> Values:
    words = (*names.ITEMS, *names.ANIMALS, *names.LANGUAGES, *names.JOBS)
    return {
        "query": " ".join(rng.sample(words, rng.randint(1, 2)))
        if rng.random() < 0.7
        else names.invented(rng)
    }


def _minutes(rng: Random) -> Values:
    return {"minutes": rng.randint(1, 90)}


def _mail(rng: Random) -> Values:
    text = rng.choice(
        ("I am late", "See you soon", "Thank you", "Call me", "The meeting is over", "Good morning")
    )
    return {"to": names.person(rng), "text": text}


def _amount(rng: Random) -> Values:
    a, b = rng.sample(("EUR", "USD", "GBP", "JPY", "CHF", "SEK"), 2)
    return {"amount": rng.randint(1, 500), "from": a, "to": b}


TOOLS = (
    Tool(
        ("get_weather", "weather", "get_current_weather", "weather_lookup", "fetch_weather"),
        "Get the weather in a city.",
        {"city": ("city", "city", "location", "place")},
        lambda rng: {"city": names.city(rng)},
        (
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city}?",
            "Is it raining in {city}?",
            "Tell me the weather in {city}.",
            "Weather in {city}, please.",
            "How warm is it in {city}?",
            "What is the weather in {city} today?",
            "Do I need a coat in {city}?",
            "weather {city}",
        ),
        _weather,
        "It is {temperature} degrees and {condition} in {city}.",
    ),
    Tool(
        ("add", "add_numbers", "sum", "plus", "calculator_add"),
        "Add two numbers.",
        {"a": ("a", "x", "first"), "b": ("b", "y", "second")},
        _sum,
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "Please add {a} and {b}.",
            "How much is {a} + {b}?",
            "Use the tool to add {a} and {b}.",
            "{a} + {b}",
        ),
        lambda v, _: {"result": v["a"] + v["b"]},
        "{a} + {b} = {result}.",
    ),
    Tool(
        ("search", "web_search", "find", "search_docs", "lookup"),
        "Search for a text.",
        {"query": ("query", "q", "text", "term")},
        _topic,
        (
            "Search for {query}.",
            "Find something about {query}.",
            "Look up {query}.",
            "Can you search for {query}?",
            "Please search the web for {query}.",
        ),
        lambda v, rng: {"hits": rng.randint(1, 90), "title": f"All about {v['query']}"},
        'I found {hits} results for {query}. The first is "{title}".',
    ),
    Tool(
        ("get_time", "current_time", "time_in", "clock"),
        "Get the time in a city.",
        {"timezone": ("timezone", "city", "zone", "place")},
        lambda rng: {"timezone": names.city(rng)},
        (
            "What time is it in {timezone}?",
            "What is the time in {timezone}?",
            "Tell me the time in {timezone}.",
            "How late is it in {timezone}?",
            "Time in {timezone}?",
        ),
        lambda _, rng: {"time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"},
        "It is {time} in {timezone}.",
    ),
    Tool(
        ("set_timer", "start_timer", "timer"),
        "Start a timer.",
        {"minutes": ("minutes", "min", "duration")},
        _minutes,
        (
            "Set a timer for {minutes} minutes.",
            "Start a timer of {minutes} minutes.",
            "Timer: {minutes} minutes, please.",
            "Wake me in {minutes} minutes.",
        ),
        lambda _, rng: {"status": "ok"},
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        ("send_message", "send_mail", "send_text", "notify"),
        "Send a message to a person.",
        {"to": ("to", "recipient", "name"), "text": ("text", "body", "message")},
        _mail,
        (
            'Send "{text}" to {to}.',
            'Tell {to}: "{text}".',
            'Write a message to {to}: "{text}".',
            'Please send {to} the message "{text}".',
        ),
        lambda _, rng: {"status": "sent"},
        "I have sent your message to {to}.",
    ),
    Tool(
        ("convert", "convert_currency", "exchange"),
        "Convert money.",
        {"amount": ("amount", "value"), "from": ("from", "source"), "to": ("to", "target")},
        _amount,
        (
            "Convert {amount} {from} to {to}.",
            "How much is {amount} {from} in {to}?",
            "Change {amount} {from} into {to}.",
        ),
        lambda v, rng: {"result": rng.randint(1, 900)},
        "{amount} {from} are {result} {to}.",
    ),
    Tool(
        ("get_stock", "stock_price", "get_price", "quote"),
        "Get the price of a share.",
        {"symbol": ("symbol", "company", "name")},
        lambda rng: {"symbol": names.invented(rng)},
        (
            "What is the price of {symbol}?",
            "How much is a share of {symbol}?",
            "Price of {symbol}, please.",
        ),
        lambda v, rng: {"price": rng.randint(1, 900)},
        "The price of {symbol} is {price}.",
    ),
    Tool(
        ("get_user", "find_person", "lookup_user", "user_info"),
        "Get facts about a user.",
        {"name": ("name", "user", "username")},
        lambda rng: {"name": names.person(rng)},
        (
            "Who is the user {name}?",
            "Look up the user {name}.",
            "Find the user {name}.",
            "Show me the user {name}.",
        ),
        lambda v, rng: {"age": rng.randint(18, 90), "city": names.city(rng)},
        "{name} is {age} years old and lives in {city}.",
    ),
    Tool(
        ("turn_on", "switch_on", "light_on"),
        "Turn on a light.",
        {"room": ("room", "place", "where")},
        lambda rng: {
            "room": rng.choice(
                ("kitchen", "bedroom", "garden", "office", "cellar", "hall", "bathroom")
            )
        },
        (
            "Turn on the light in the {room}.",
            "Light in the {room}, please.",
            "Switch on the {room} light.",
        ),
        lambda _, rng: {"status": "on"},
        "The light in the {room} is on.",
    ),
)


@dataclass(frozen=True)
class Bound:
    """A tool as one conversation knows it: with a name and names of its arguments."""

    tool: Tool
    name: str
    keys: dict[str, str]


def bind(tool: Tool, rng: Random) -> Bound:
    keys = {arg: rng.choice(options) for arg, options in tool.args.items()}
    name = rng.choice(tool.names)
    if rng.random() < 0.06:
        name = f"{names.invented(rng).lower()}_{name}"
    return Bound(tool, name, keys)


def schema(bound: Bound, rng: Random) -> dict[str, Any]:
    """The tool as a client sends it, with the small differences that clients have."""
    sample = bound.tool.draw(rng)
    properties: dict[str, Any] = {}
    for arg, key in bound.keys.items():
        properties[key] = {"type": _kind(sample[arg])}
        if rng.random() < 0.15:
            properties[key]["description"] = f"The {key}"
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        parameters["required"] = list(properties)
    if rng.random() < 0.1:
        parameters["additionalProperties"] = False
    function: dict[str, Any] = {"name": bound.name}
    if rng.random() < 0.8:
        function["description"] = bound.tool.about
    function["parameters"] = parameters
    return {"type": "function", "function": function}


def call_message(bound: Bound, values: Values) -> Message:
    arguments = {key: values[arg] for arg, key in bound.keys.items()}
    call = {"type": "function", "function": {"name": bound.name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def use(bound: Bound, rng: Random) -> Turns:
    """A question, the call, and mostly also its result and the answer."""
    values = bound.tool.draw(rng)
    asked = rng.choice(bound.tool.asks).format(**values)
    turns: Turns = [
        user(rough(asked, rng) if rng.random() < 0.1 else asked),
        call_message(bound, values),
    ]
    if rng.random() < 0.7:
        result = bound.tool.result(values, rng)
        turns.append({"role": "tool", "content": json.dumps(result, ensure_ascii=False)})
        turns.append(assistant(bound.tool.says.format(**{**values, **result})))
    return turns


def tool_example(rng: Random, plain: Callable[[Random], Turns]) -> Example:
    """One to three tools, with a question that needs one of them or, at times, none."""
    count = rng.choices((1, 2, 3), (0.5, 0.35, 0.15))[0]
    bound = [bind(tool, rng) for tool in rng.sample(TOOLS, count)]
    turns: Turns = []
    for _ in range(rng.choices((1, 2), (0.75, 0.25))[0]):
        turns += plain(rng) if rng.random() < 0.2 else use(rng.choice(bound), rng)
        if turns[-1].get("tool_calls"):
            break
    return Example(turns=turns, tools=[schema(one, rng) for one in bound])
