"""Every Prometheus metric by name: what `metrics.py` feeds and the reference page lists."""

from __future__ import annotations

from typing import NamedTuple

from dynamo_serve.core.stats import Stats

TOKENS = tuple(float(2**power) for power in range(15))
RATIOS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)


class Declared(NamedTuple):
    """One metric: `kind` is counter, gauge or histogram."""

    kind: str
    name: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def wire_name(self) -> str:
        return self.name + "_total" if self.kind == "counter" else self.name


# The key is the attribute of Stats it reads, or the name this module knows it by.
DECLARED = {
    "ttft": Declared("histogram", "dserve_ttft_seconds", "Arrival to first token."),
    "itl": Declared("histogram", "dserve_itl_seconds", "Gap between events that carry tokens."),
    "e2e": Declared(
        "histogram", "dserve_e2e_seconds", "Arrival to finish, of requests that ran to their end."
    ),
    "queue": Declared("histogram", "dserve_queue_seconds", "Arrival to first admission."),
    "step": Declared("histogram", "dserve_step_seconds", "Duration of an engine step.", ("phase",)),
    "batch": Declared("histogram", "dserve_batch_tokens", "Tokens run in one step.", ("phase",)),
    "num_running": Declared("gauge", "dserve_sequences_live", "Admitted, unfinished sequences."),
    "num_waiting": Declared("gauge", "dserve_sequences_waiting", "Sequences not yet admitted."),
    "pages": Declared(
        "gauge",
        "dserve_pages",
        "KV pages: used by live sequences, cached for reuse, or free.",
        ("state",),
    ),
    "prefix_asked_tokens_total": Declared(
        "counter", "dserve_prefix_asked_tokens", "Prompt tokens looked up in the prefix cache."
    ),
    "prefix_hit_tokens_total": Declared(
        "counter", "dserve_prefix_hit_tokens", "Prompt tokens found in the prefix cache."
    ),
    "prefix_copied_tokens_total": Declared(
        "counter",
        "dserve_prefix_copied_tokens",
        "Of these, tokens of pages that match in part, and were copied.",
    ),
    "preemptions_total": Declared(
        "counter", "dserve_preemptions", "Sequences that lost their pages, for others."
    ),
    "prompt_tokens_total": Declared(
        "counter", "dserve_prompt_tokens", "Prompt tokens of admitted requests."
    ),
    "output_tokens_total": Declared("counter", "dserve_output_tokens", "Tokens generated."),
    "draft_tokens_total": Declared(
        "counter", "dserve_draft_tokens", "Guessed tokens verified beside the next one."
    ),
    "draft_accepted_tokens_total": Declared(
        "counter", "dserve_draft_accepted_tokens", "Guessed tokens that were right."
    ),
    "pages_pinned": Declared(
        "gauge", "dserve_pinned_pages", "KV pages that pinned prefixes hold; they are used ones."
    ),
    "evicted": Declared(
        "counter",
        "dserve_evicted_pages",
        "Cached KV pages that had to leave the device: for a page of the tenant whose they were"
        " (own), of another one (others), or because nobody had used them for long (stale).",
        ("cause",),
    ),
    "admission_evicted_pages_total": Declared(
        "counter",
        "dserve_admission_evicted_pages",
        "Of these, pages evicted to admit a request; the others because running ones grew.",
    ),
    "lost_pages_total": Declared(
        "counter", "dserve_lost_pages", "Of the evicted, pages that were in no tier below."
    ),
    "restored_tokens_total": Declared(
        "counter", "dserve_restored_tokens", "Tokens whose KV came back from a tier below."
    ),
    "saved_seconds_total": Declared(
        "counter", "dserve_restore_saved_seconds", "What restoring saved, as predicted."
    ),
    "kv_events_total": Declared(
        "counter", "dserve_kv_events", "Pages stored and removed that routers were told of."
    ),
    "kv_events_anew_total": Declared(
        "counter",
        "dserve_kv_events_anew",
        "Times all pages were told anew: an engine began, a subscriber came, or one was too slow.",
    ),
    "tier_pages": Declared(
        "gauge", "dserve_tier_pages", "KV pages in a tier below the device.", ("tier",)
    ),
    "tier_slots": Declared("gauge", "dserve_tier_slots", "Room for pages in a tier.", ("tier",)),
    "tier_copies": Declared(
        "counter",
        "dserve_tier_copies",
        "Pages stored in a tier, restored from it, that failed to be copied, and lost: forgotten"
        " with no tier below that has them.",
        ("tier", "what"),
    ),
    "finishes": Declared("counter", "dserve_finishes", "Requests by how they ended.", ("finish",)),
    "refusals": Declared(
        "counter",
        "dserve_refusals",
        "Requests refused on arrival instead of queued.",
        ("reason",),
    ),
    "prediction": Declared(
        "histogram",
        "dserve_step_prediction_error_ratio",
        "How far a step's predicted duration was off, as a share of the real one.",
    ),
    "tenant_device_seconds": Declared(
        "counter", "dserve_tenant_device_seconds", "A tenant's share of the steps.", ("tenant",)
    ),
    "tenant_page_seconds": Declared(
        "counter", "dserve_tenant_page_seconds", "KV pages times how long held.", ("tenant",)
    ),
    "tenant_saved_tokens": Declared(
        "counter", "dserve_tenant_saved_tokens", "Prompt tokens found in the cache.", ("tenant",)
    ),
    "tenant_output_tokens": Declared(
        "counter", "dserve_tenant_output_tokens", "Tokens generated.", ("tenant",)
    ),
    "tenant_promises": Declared(
        "counter",
        "dserve_tenant_promises",
        "First tokens (ttft) and gaps between tokens (itl) for which the class has a target: kept,"
        " late, refused on arrival because they would be late, never come, paused for another"
        " engine. Not those that the tenant's own quota held up.",
        ("tenant", "class", "promise", "outcome"),
    ),
    "tenant_sequences": Declared(
        "gauge",
        "dserve_tenant_sequences",
        "Sequences: live (admitted) or waiting.",
        ("tenant", "state"),
    ),
    "tenant_refusals": Declared(
        "counter",
        "dserve_tenant_refusals",
        "Of each tenant: requests refused on arrival.",
        ("tenant", "reason"),
    ),
    "streams": Declared(
        "counter",
        "dserve_stream_changes",
        "Requests parked (reader_gone, reader_slow, handed_over), resumed, given up on, forgotten,"
        " taken over from the server before.",
        ("what",),
    ),
    "parked": Declared("gauge", "dserve_sequences_parked", "Sequences kept for a reader."),
    "lag": Declared(
        "gauge", "dserve_stream_lag_seconds", "Age of the oldest token that waits for its reader."
    ),
    "stalled": Declared(
        "gauge", "dserve_engine_stalled", "1 while the engine makes no progress, or is not there."
    ),
    "rung": Declared(
        "gauge", "dserve_ladder_rung", "Level of a rung of the ladder; 0: not taken.", ("rung",)
    ),
    "rung_changes": Declared(
        "counter",
        "dserve_ladder_changes",
        "Rungs taken (up) and undone (down), level by level.",
        ("rung", "direction"),
    ),
    "restarts": Declared(
        "counter",
        "dserve_engine_restarts",
        "Starts of another engine, after a loss or for the ladder.",
    ),
    "recorded": Declared(
        "counter", "dserve_record_lines", "Lines written to traces (record.path)."
    ),
    "record_dropped": Declared(
        "counter",
        "dserve_record_dropped",
        "Lines not written to traces: the writer could not keep up, or has had to stop.",
    ),
    "build": Declared("gauge", "dserve_build_info", "Always 1.", ("version", "model")),
}


def _alias(key: str, name: str) -> Declared:
    original = DECLARED[key]
    return Declared(original.kind, name, f"Same as {original.name}.", ("model_name",))


# What gateways and dashboards made for vLLM scrape: the same numbers under the names they know.
ALIASES = {
    "num_running": _alias("num_running", "vllm:num_requests_running"),
    "num_waiting": _alias("num_waiting", "vllm:num_requests_waiting"),
    "usage": Declared(
        "gauge",
        "vllm:kv_cache_usage_perc",
        "Share of the KV pages held by live sequences; 1 is full.",
        ("model_name",),
    ),
    "prefix_asked_tokens_total": _alias("prefix_asked_tokens_total", "vllm:prefix_cache_queries"),
    "prefix_hit_tokens_total": _alias("prefix_hit_tokens_total", "vllm:prefix_cache_hits"),
    "prompt_tokens_total": _alias("prompt_tokens_total", "vllm:prompt_tokens"),
    "output_tokens_total": _alias("output_tokens_total", "vllm:generation_tokens"),
}
COUNTED = tuple(field for field in Stats._fields if field.endswith("_total"))

# Only with engine.kind triton.
FORWARDED = {
    "endpoint_requests": Declared(
        "counter",
        "dserve_triton_requests",
        "Tries by server and by how they ended: done, cancelled, no room in its queue (full), "
        "nothing in time (late), server lost, request refused, model failed.",
        ("endpoint", "outcome"),
    ),
    "endpoint_retries": Declared(
        "counter",
        "dserve_triton_retries",
        "Of these, tries that were followed by another one, on this server or another.",
        ("endpoint",),
    ),
    "endpoint_ejections": Declared(
        "counter", "dserve_triton_ejections", "Times a server lost its requests.", ("endpoint",)
    ),
    "endpoint_open": Declared(
        "gauge", "dserve_triton_open", "1 while a server gets requests.", ("endpoint",)
    ),
    "endpoint_in_flight": Declared(
        "gauge", "dserve_triton_in_flight", "Requests that a server has of ours.", ("endpoint",)
    ),
    "endpoint_ttft": Declared(
        "histogram",
        "dserve_triton_ttft_seconds",
        "From asking a server to its first token.",
        ("endpoint",),
    ),
}
# … and triton.metrics_endpoints.
SCRAPED = {
    "scrape_ok": Declared(
        "gauge",
        "dserve_triton_scrape_ok",
        "1 if a server's own metrics were to be had just now; else there are none of it here.",
        ("endpoint",),
    ),
    "scrape_seconds": Declared(
        "gauge", "dserve_triton_scrape_seconds", "What it took to get them.", ("endpoint",)
    ),
    "mean_batch": Declared(
        "gauge",
        "dserve_triton_mean_batch",
        "Requests in a batch of a server's model, since it was loaded: nv_inference_count divided "
        "by nv_inference_exec_count.",
        ("endpoint", "model", "version"),
    ),
}
