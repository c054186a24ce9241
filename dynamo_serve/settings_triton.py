"""Settings that contradict each other where an engine forwards to Triton servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# What there is nothing of here: the servers have the weights, the device and the pages.
NOT_OURS = (
    *("model.dtype", "model.quantization", "model.lighter", "model.pooling"),
    *("engine.device", "engine.attention", "engine.kernels", "engine.cuda_graphs"),
    *("engine.threads", "engine.fake_step_ms"),
    *("cache.page_size", "cache.num_pages", "cache.memory_fraction", "cache.shared_prefixes"),
    *("cache.pinned_fraction", "cache.pinned_ttl_max_s", "cache.partial_pages", "cache.stale_s"),
    *("cache.host_gib", "cache.disk_gib", "cache.kv_events"),
    *("scheduler.hold_steps", "scheduler.max_draft_tokens"),
)
MAX_PORT = 65_535


def triton_contradictions(
    values: Mapping[str, Any], is_set: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """The key of a setting, and what to do."""
    if values["engine.kind"] != "triton":
        for key in values:
            if key.startswith("triton.") and is_set(key):
                yield key, f"{key}: nothing is forwarded; set engine.kind to triton"
        return
    for key in ("triton.endpoints", "triton.model"):
        if not values[key]:
            yield "engine.kind", f"engine.kind = 'triton': set {key}, too"
    yield from _endpoint_faults(values["triton.endpoints"])
    for key in NOT_OURS:
        if is_set(key):
            yield key, f"{key}: the Triton server decides that; leave it out with kind triton"


def _endpoint_faults(endpoints: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    key = "triton.endpoints"
    for each in endpoints:
        if not 1 <= int(each.rpartition(":")[2]) <= MAX_PORT:
            yield key, f"{key}: {each!r}: allowed: ports from 1 to {MAX_PORT}"
    if len(set(endpoints)) < len(endpoints):
        yield key, f"{key}: one of them is there twice; name each once"
