"""What the models of requests have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MAX_NAME = 256
MAX_SALT = 512
DAY_MS = 86_400_000
MAX_PRIORITY = 100


class Model(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Salted(Model):
    """What any request may say of the cache."""

    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_SALT,
        description="Only requests of the tenant with an equal one share what is cached of their "
        "prompts: for end users who must not learn from timing what others have sent. Best random; "
        "kept, logged and told nowhere.",
    )


class Scheduled(Salted):
    """What any request may ask of the scheduler."""

    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=DAY_MS,
        description="Milliseconds after which the answer ends with finish_reason deadline; the "
        "header X-Request-Deadline-Ms says the same, the smaller counts. Default: the class's.",
    )
    priority: int = Field(
        0,
        ge=0,
        le=MAX_PRIORITY,
        description="Over 0: behind the tenant's other requests. Nothing puts one before them.",
    )
    class_name: str | None = Field(
        None,
        alias="class",
        max_length=64,
        description="Another class than the tenant's, one that promises no more in any respect.",
    )


def one_or_several(value: Any) -> str:
    """Which of the two a value is. The '#' keeps the tag out of error paths."""
    return "#several" if isinstance(value, list) else "#one"
