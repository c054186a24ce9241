"""The workloads by name. All are one thing with different numbers: sessions of turns over shared
texts; `docs/load.md` says what each is like."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from dynamo_serve.bench.lengths import lengths
from dynamo_serve.errors import ConfigError

Length = str | float


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens, turns and seconds are lengths: numbers or distributions (`bench.lengths`).

    A session opens with a system prompt that all share, then `picks` of `documents` shared ones,
    the first of them the most popular by Zipf's law with exponent `zipf`; `is_cut` ends the last
    one somewhere in the middle. Then come `turns` of `input` of its own (`later_input` from the
    second on) and `output` in answer, `think` seconds apart. A share of the sessions has
    `long_input` instead. `is_chat`: messages, else completions.
    """

    input: Length = 128
    output: Length = 128
    turns: Length = 1
    think: Length = 0
    later_input: Length | None = None
    system: int = 0
    documents: int = 0
    document: Length = 0
    picks: int = 1
    zipf: float = 1.0
    is_cut: bool = False
    long_share: float = 0.0
    long_input: Length = 0
    is_chat: bool = True


SHAPES: dict[str, Shape] = {
    "plain": Shape(is_chat=False),
    "chat": Shape(
        input="lognormal:40,0.8,600",
        output="lognormal:120,0.7,600",
        turns="uniform:1,7",
        think="exponential:8,60",
        system=120,
    ),
    "rag": Shape(
        input="lognormal:30,0.5,200",
        output="lognormal:90,0.5,400",
        system=150,
        documents=200,
        document="lognormal:350,0.4,900",
        picks=3,
    ),
    "long": Shape(
        input="lognormal:60,0.7,500",
        output="lognormal:100,0.6,400",
        long_share=0.1,
        long_input="uniform:1500,3000",
    ),
    "agentic": Shape(
        input="lognormal:120,0.6,500",
        later_input="lognormal:150,0.8,600",
        output="lognormal:50,0.5,200",
        turns="uniform:3,10",
        think="exponential:1.5,15",
        system=600,
    ),
    "code": Shape(
        input="uniform:5,40",
        output="exponential:30,120",
        system=50,
        documents=60,
        document="lognormal:900,0.5,2500",
        zipf=1.1,
        is_cut=True,
        is_chat=False,
    ),
}
TRACES = ("sharegpt", "mooncake", "burstgpt")


def shape_of(name: str, changes: dict[str, Any]) -> Shape:
    """A workload by name with some of its numbers changed. Raises `ConfigError`."""
    if name not in SHAPES:
        known = ", ".join((*SHAPES, *TRACES))
        raise ConfigError(f"there is no workload {name!r}; allowed: {known}")
    allowed = [item.name for item in fields(Shape)]
    if unknown := changes.keys() - set(allowed):
        raise ConfigError(
            f"workload {name}: unknown key {min(unknown)!r}; allowed: {', '.join(allowed)}"
        )
    shape = replace(SHAPES[name], **changes)
    _check(name, shape)
    return shape


def _check(name: str, shape: Shape) -> None:
    for key in ("input", "output", "turns", "think", "document", "long_input"):
        lengths(getattr(shape, key))
    if shape.later_input is not None:
        lengths(shape.later_input)
    for key in ("system", "documents", "picks"):
        if not isinstance(value := getattr(shape, key), int) or value < 0:
            raise ConfigError(f"workload {name}: {key} is {value!r}; allowed: whole numbers from 0")
    if not 0 <= shape.long_share <= 1:
        raise ConfigError(f"workload {name}: long_share is {shape.long_share}; allowed: 0 to 1")
    if shape.zipf < 0:
        raise ConfigError(f"workload {name}: zipf is {shape.zipf}; allowed: 0 or more")
    for key in ("is_cut", "is_chat"):
        if not isinstance(value := getattr(shape, key), bool):
            raise ConfigError(f"workload {name}: {key} is {value!r}; allowed: true or false")
