"""Whether answers of /v1/responses are kept, how many and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_serve.config_field import setting


@dataclass(frozen=True, slots=True)
class ResponsesSection:
    store: Literal["none", "asked", "default"] = setting(
        "none",
        "Which answers of /v1/responses are kept, in memory: none, those of requests with store: "
        "true, or all but those with store: false.",
    )
    max_bytes: int = setting(
        67_108_864,
        "Most bytes of JSON to keep in all; beyond, the oldest of the tenant with most goes.",
        low=1024,
    )
    max_tenant_bytes: int = setting(
        16_777_216, "Most bytes of one tenant; beyond, its oldest goes.", low=1024
    )
    ttl_s: float = setting(3600.0, "Seconds for which an answer is kept.", low=1)
