"""The limits of structured output: what may be sent to be followed."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_serve.config_field import setting


@dataclass(frozen=True, slots=True)
class StructuredSection:
    max_bytes: int = setting(
        131_072, "Largest schema, regular expression, list of choices or grammar, in bytes.", low=64
    )
    max_depth: int = setting(
        24, "Levels that a JSON schema may be nested; references count from the definition.", low=1
    )
    compile_timeout_s: float = setting(
        5.0, "Seconds after which a grammar is refused that has not been compiled.", low=0.05
    )
