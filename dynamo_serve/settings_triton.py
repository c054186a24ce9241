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
    *("cache.host_gib", "cache.disk_gib", "cache.kv_events", "cache.kv_dtype"),
    *("scheduler.hold_steps", "scheduler.max_draft_tokens"),
)
TLS = tuple(f"triton.tls_{part}" for part in ("ca_file", "cert_file", "key_file", "server_name"))
MAX_PORT = 65_535
ADDRESSES = ("triton.endpoints", "triton.metrics_endpoints")


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
    for key in ADDRESSES:
        yield from _address_faults(key, values[key])
    num_servers, num_pages = (len(values[key]) for key in ADDRESSES)
    if num_pages not in (0, num_servers):
        key = "triton.metrics_endpoints"
        yield key, f"{key}: {num_pages} for {num_servers} triton.endpoints: one for each, or none"
    yield from _tls_faults(values)
    for key in NOT_OURS:
        if is_set(key):
            yield key, f"{key}: the Triton server decides that; leave it out with kind triton"


def _tls_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in TLS:
        if values[key] and not values["triton.tls"]:
            yield key, f"{key}: nothing is encrypted; set triton.tls to true"
    pair = "triton.tls_cert_file", "triton.tls_key_file"
    for key, other in (pair, pair[::-1]):
        if values[key] and not values[other]:
            yield key, f"{key}: a certificate and its key go together; set {other}, too"


def _address_faults(key: str, addresses: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for each in addresses:
        if not 1 <= int(each.rpartition(":")[2]) <= MAX_PORT:
            yield key, f"{key}: {each!r}: allowed: ports from 1 to {MAX_PORT}"
    if len(set(addresses)) < len(addresses):
        yield key, f"{key}: one of them is there twice; name each once"
