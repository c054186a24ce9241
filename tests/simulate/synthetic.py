"""Traces made up for tests: chats that go on, a shared head, steps with known costs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynamo_serve import trace
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.trace import Arrival, Header, Line, Step

PAGE_SIZE = 16
SPEC = {"num_pages": 512, "max_model_len": 2048, "holds_steps": True}


def header(**changed: Any) -> Header:
    return Header(**{"page_size": PAGE_SIZE, "spec": SPEC, "model": "made-up", **changed})


def write(path: Path, lines: Iterable[Line], head: Header | None = None) -> Path:
    with trace.open_trace(path, "w") as file:
        file.write(trace.dump(head or header()) + "\n")
        file.writelines(trace.dump(line) + "\n" for line in lines)
    return path


def traffic(rng: random.Random, count: int, per_second: float, **changed: Any) -> list[Arrival]:
    """Requests with a shared head of eight pages; every second one goes on with an answer."""
    arrivals: list[Arrival] = []
    number, at = 8, 0.0
    head = ((0, 8),)
    latest: Arrival | None = None
    for i in range(count):
        at += rng.expovariate(per_second)
        if latest is not None and i % 2:
            pages = (*latest.pages, *latest.output_pages)
        else:
            pages = head if rng.random() < 0.7 else ()
        own = rng.randint(0, 12)
        pages = (*pages, (number, own)) if own else pages
        number += own
        prompt = PAGE_SIZE * sum(n for _, n in pages) + rng.randint(1, PAGE_SIZE - 1)
        outputs = rng.randint(1, 80)
        filled = (prompt + outputs - 1) // PAGE_SIZE - prompt // PAGE_SIZE
        latest = Arrival(
            at,
            prompt,
            outputs,
            rng.choice([outputs, 100]),
            pages=pages,
            output_pages=((number, filled),) if filled else (),
            **changed,
        )
        number += filled
        if latest.max_tokens != outputs:
            latest = Arrival(**{**as_dict(latest), "ended": "stop"})
        arrivals.append(latest)
    return arrivals


def as_dict(arrival: Arrival) -> dict[str, Any]:
    return {name: getattr(arrival, name) for name in Arrival.__slots__}


def seconds(shape: StepShape) -> float:
    """A device: what the steps below take."""
    return (
        0.004
        + 0.0001 * shape.tokens
        + 1e-7 * (shape.decode_context + shape.prefill_reads)
        + 1e-8 * shape.prefill_context
    )


def steps(
    rng: random.Random, count: int, *, noise: float = 0.0, between: float = 0.0
) -> list[Step]:
    made, at = [], 0.0
    for i in range(count):
        decoding = rng.randint(1, 40)
        shape = StepShape(decode_sequences=decoding, decode_context=decoding * rng.randint(50, 900))
        if i % 3 == 0:
            shape = shape.with_chunk(rng.randint(1, 256), 16 * rng.randint(0, 40))
        took = seconds(shape) * rng.lognormvariate(0.0, noise)
        made.append(Step(at, took, tuple(shape)))
        at += took + between
    return made
