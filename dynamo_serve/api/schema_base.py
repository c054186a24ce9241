"""What the models of requests have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

MAX_NAME = 256


class Model(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def one_or_several(value: Any) -> str:
    """Which of the two a value is. The '#' keeps the tag out of error paths."""
    return "#several" if isinstance(value, list) else "#one"
