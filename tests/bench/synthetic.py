"""Made-up runs of a made-up server: how reports are tried, and nothing that is ever shipped."""

from __future__ import annotations

import random
from typing import Any

from dynamo_serve.bench.record import Record, Run, Sample

TENANTS = {"acme": 2.0, "globex": 1.0, "initech": 1.0}
CLASSES = {"interactive": {"ttft": 0.4, "itl": 0.06}, "batch": {"e2e": 20.0}}
NUM_PAGES = 4096


def made_run(
    rate: float = 8.0, seconds: float = 60.0, seed: int = 1, step_ms: float = 12.0, **about: Any
) -> Run:
    """A server whose latencies rise as its load nears 20 requests per second."""
    rng = random.Random(seed)
    slow = 1 / max(0.06, 1 - rate / 20)
    records: list[Record] = []
    at = -3.0
    while (at := at + rng.expovariate(rate)) < seconds:
        records.append(_record(rng, len(records), at, slow, step_ms / 1000))
    told = {
        "command": "bench run",
        "loop": "open",
        "plan": "chat",
        "rate": rate,
        "url": "http://127.0.0.1:8000",
        "model": "dserve-tiny",
        "seed": seed,
        "began_at": 1_700_000_000 + seed * 1000,
        "commit": "0123abcd",
        "machine": {"cpu": "example", "cores": 8},
        "versions": {"dynamo_serve": "0.1.0", "python": "3.11"},
        "settings": {"scheduler.max_prefill_tokens": 2048},
        "weights": TENANTS,
        "bytes_per_step": 1.2e9,
        "bandwidth": 2.0e11,
        **about,
    }
    measured = [_shifted(record) for record in records]
    return Run(told, seconds, measured, _samples(measured, seconds, rng))


def _shifted(record: Record) -> Record:
    """Times from the run's begin, three seconds of warm-up first."""
    from dataclasses import replace

    first = None if record.first is None else record.first + 3
    end = None if record.end is None else record.end + 3
    times = {"due": record.due + 3, "sent": record.sent + 3, "first": first, "end": end}
    return replace(record, is_warm_up=record.due < 0, **times)  # type: ignore[arg-type]


def _record(rng: random.Random, number: int, at: float, slow: float, step: float) -> Record:
    tenant = rng.choice(tuple(TENANTS))
    class_name = rng.choice(tuple(CLASSES))
    sent = at + rng.expovariate(1 / 0.0004)
    shared: dict[str, Any] = {
        "number": number,
        "due": at,
        "sent": sent,
        "tenant": tenant,
        "class_name": class_name,
        "kind": rng.choice(("chat", "rag", "probe")),
        "prompt_tokens": rng.choice((128, 256, 512)),
        "targets": CLASSES[class_name],
    }
    fate = rng.random()
    if fate < 0.02 * slow:
        end = sent + 0.003
        return Record(**shared, outcome="refused", status=429, retry_after=2.0, end=end)
    waited = 0.03 * slow + rng.expovariate(1 / (0.05 * slow))
    if fate > 0.995:
        return Record(**shared, outcome="failed", status=500, error="engine_error", end=sent + 1)
    tokens = rng.randint(20, 120)
    gaps = tuple(max(0.0005, rng.gauss(step * slow**0.5, step / 4)) for _ in range(tokens - 1))
    is_cancelled = fate > 0.98
    return Record(
        **shared,
        outcome="cancelled" if is_cancelled else "ok",
        output_tokens=tokens,
        cached_tokens=rng.choice((0, 64, 128)),
        first=sent + waited,
        end=sent + waited + sum(gaps) + 0.001,
        gaps=gaps,
        finish="cancelled" if is_cancelled else "length",
        server={"ttft": waited - 0.002},
    )


def _samples(records: list[Record], seconds: float, rng: random.Random) -> list[Sample]:
    samples = []
    totals = dict.fromkeys(TENANTS, 0.0)
    for second in range(int(seconds) + 4):
        live = [r for r in records if r.first and r.end and r.first <= second < r.end]
        waiting = [r for r in records if r.first and r.sent <= second < r.first]
        done = [r for r in records if r.end and r.end <= second]
        prompts = sum(r.prompt_tokens - r.cached_tokens for r in done)
        output = sum(r.output_tokens for r in done)
        for record in live:
            totals[record.tenant] += 0.9 / len(live)
        used = min(NUM_PAGES, 30 * len(live) + rng.randint(0, 10))
        cached = min(NUM_PAGES - used, 40 * second)
        values = {
            "dserve_sequences_live": len(live),
            "dserve_sequences_waiting": len(waiting),
            'dserve_pages{state="used"}': used,
            'dserve_pages{state="cached"}': cached,
            'dserve_pages{state="free"}': NUM_PAGES - used - cached,
            'dserve_batch_tokens_sum{phase="prefill"}': prompts,
            'dserve_batch_tokens_sum{phase="decode"}': output,
            'dserve_step_seconds_sum{phase="decode"}': 0.012 * second * 50,
            'dserve_step_seconds_count{phase="decode"}': second * 50,
            "dserve_prefix_asked_tokens_total": sum(r.prompt_tokens for r in done),
            "dserve_prefix_hit_tokens_total": sum(r.cached_tokens for r in done),
            "dserve_preemptions_total": second // 20,
        }
        for tenant, cost in totals.items():
            values[f'dserve_tenant_device_seconds_total{{tenant="{tenant}"}}'] = cost
            values[f'dserve_tenant_page_seconds_total{{tenant="{tenant}"}}'] = cost * 300
        samples.append(Sample(float(second), {name: float(v) for name, v in values.items()}))
    return samples
