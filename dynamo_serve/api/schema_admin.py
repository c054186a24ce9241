"""What operators may send."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dynamo_serve.api.schema_base import Model


class SteerRequest(Model):
    rung: Literal[
        "shrink_chunks",
        "widen_window",
        "cap_batch",
        "spill",
        "shed_batch",
        "lighter_weights",
        "restart_engine",
    ] = Field(description="One of the ladder's.")
    mode: Literal["auto", "pin", "forbid"] = Field(
        description="pin: taken, and stays so. forbid: never taken. auto: as the evidence says."
    )
