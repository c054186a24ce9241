"""How near decoding comes to the shortest time in which the memory can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_serve.bench.latency import Distribution
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.served import growth, histogram


@dataclass(frozen=True, slots=True)
class Bound:
    """`fraction` of the memory's bandwidth that decoding used; 1 is what the machine can do, more
    means that part of what is read lies in its caches. `source` says where the seconds of a step
    are from, `bytes_per_step` what it reads at least."""

    fraction: float
    step_seconds: float
    source: str
    bytes_per_step: float


def bound(
    run: Run, samples: list[Sample], load: Sequence[Record], itl: Distribution
) -> Bound | str:
    """The bound, or why there is none.

    `about` has `bandwidth` (bytes per second). What a step reads is `bytes_per_step` there, or
    follows from what our own server says of its weights and of the KV of a token.
    """
    speed = _positive(run.about, "bandwidth")
    if speed is None:
        return "nobody said how fast the memory is (bench run --bandwidth, or --measure-bandwidth)"
    read = _positive(run.about, "bytes_per_step") or bytes_per_step(run.about, samples, load)
    if isinstance(read, str):
        return read
    steps = histogram(samples, "dserve_step_seconds", phase="decode")
    seconds = steps.total / steps.count if steps else itl.value("p50")
    if not seconds:
        return "no decode step was seen, and too few gaps between tokens"
    source = "mean decode step, by the server" if steps else "ITL p50, by the client"
    return Bound(read / speed / seconds, seconds, source, read)


def bytes_per_step(
    about: Mapping[str, Any], samples: list[Sample], load: Sequence[Record]
) -> float | str:
    """What the mean decode step reads at least: the weights once, and the KV of its sequences."""
    settings = about.get("settings")
    engine = settings.get("engine") if isinstance(settings, dict) else None
    facts = engine if isinstance(engine, dict) else {}
    weights, token = (_positive(facts, key) for key in ("weights_read_bytes", "kv_bytes_per_token"))
    if weights is None or token is None:
        return "the server does not say how many bytes its weights and the KV of a token have"
    fed = histogram(samples, "dserve_batch_tokens", phase="decode")
    if fed is None:
        return "the server's metrics tell of no decode step"
    drafts = growth(samples, "dserve_draft_tokens_total") or 0.0
    sequences = max(1.0, (fed.total - drafts) / fed.count)
    return weights + sequences * mean_context(load) * token


def mean_context(load: Sequence[Record]) -> float:
    """Tokens that a sequence has behind it when one more is computed, over all tokens."""
    tokens = math.fsum(record.output_tokens for record in load)
    read = math.fsum(
        record.output_tokens * (record.prompt_tokens + record.output_tokens / record.choices / 2)
        for record in load
    )
    return read / tokens if tokens else 0.0


def _positive(of: Mapping[str, Any], key: str) -> float | None:
    value = of.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < math.inf else None
