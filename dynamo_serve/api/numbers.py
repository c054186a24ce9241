"""Vectors as clients get them: cut, of length 1, as JSON or base64. In plain Python, a vector at a
time: whoever runs on another thread gets on in between."""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Sequence
from operator import mul
from typing import TypeAlias

Vector: TypeAlias = "array[float]"


def vector_of(artifact: bytes, dimensions: int | None = None, *, is_unit: bool = True) -> Vector:
    """The first `dimensions` of the 32-bit floats in `artifact`, made as long as 1 altogether.

    A vector of zeros stays one.
    """
    vector = array("f", artifact)[:dimensions]
    length = math.hypot(*vector) if is_unit else 0.0
    return array("f", [x / length for x in vector]) if length else vector


def cosine(one: Vector, other: Vector) -> float:
    """Of two vectors of length 1."""
    return float(sum(map(mul, one, other)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def to_json(vector: Vector) -> str:
    """As a JSON array; nine digits tell every 32-bit float from its neighbours."""
    return f"[{','.join(['%.9g'] * len(vector)) % tuple(vector)}]"


def to_base64(vector: Vector) -> str:
    """As a JSON string."""
    if sys.byteorder == "big":
        vector = array("f", vector)
        vector.byteswap()
    return f'"{base64.b64encode(vector.tobytes()).decode()}"'


def ranking(scores: Sequence[float], most: int | None) -> list[int]:
    """Places of the best scores, the best first; of equal ones the first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:most]
