"""What the tiers of KV pages are worth: prefixes that are reused, restored, found after a restart.

    python -m bench.tiers MODEL [--only reuse group …] [--repeat 3]

reuse: 1,024 shared and 64 own tokens, 8 at a time, with prefix sharing and without; group: 8
documents asked about in turn, all at once, on a pool for three, with a `prompt_cache_key` each and
without; restore: the time to a first token of prompts whose head was computed, is still on the
device, or lies in host memory, by length, beside what was predicted; restart: the same after a
restart with a disk tier; preempt: more sequences than pages, with host memory below and without;
overhead: traffic that never hits, without tiers, with idle ones, and with one that is written to
all the time; page: a page of KV gathered, scattered, checked and copied to another one, in this
process. Settings of one scene alternate. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench.sse_client import drive
from bench.tiers_client import cached, serve
from dynamo_serve.core.batch import PageCopy
from dynamo_serve.engines.local.attention import LayerSpec
from dynamo_serve.engines.local.kv_cache import KVCache, PoolSize, bytes_per_token
from dynamo_serve.engines.local.page_bytes import PageBytes
from dynamo_serve.engines.local.page_copies import PageCopier
from dynamo_serve.engines.local.tier_stores import checksum

SHARED, OWN, OUTPUT, TOGETHER = 1024, 64, 16, 8
DOCUMENTS, KEPT_DOCUMENTS = 8, 3
LENGTHS = (64, 128, 256, 512, 1024, 2048, 3584)
PREEMPTED, GROWN = (500, 1000, 2000), 400  # tokens of prompts, and of answers
AT_ONCE = 0.005  # seconds: what comes so soon after another stream's end was in the same step
PAGE = 16
Rows = list[dict[str, Any]]


def reuse(args: argparse.Namespace, folder: Path) -> Rows:
    rows: Rows = []
    for _ in range(args.repeat):
        for sharing in ("true", "false"):
            with serve(args, folder, f"cache.prefix_sharing={sharing}") as client:
                hit = client.metric("dserve_prefix_hit_tokens_total")
                shared = client.tokens(SHARED)
                prompts = [shared + client.tokens(OWN) for _ in range(args.requests)]
                began = time.perf_counter()
                streams = client.ask(prompts, OUTPUT, TOGETHER)
                seconds = time.perf_counter() - began
                found = [cached(stream) for stream in streams]
                rows.append({
                    "sharing": sharing,
                    "requests_per_s": len(prompts) / seconds,
                    "ttft_p50_s": statistics.median(s.ttft - s.sent for s in streams),
                    "computed_once": sorted(found)[1:] == [SHARED] * (len(found) - 1),
                    "hit_tokens": client.metric("dserve_prefix_hit_tokens_total") - hit,
                })  # fmt: skip
    return rows


def group(args: argparse.Namespace, folder: Path) -> Rows:
    """Mixed as they come, so that between two questions about one document are seven others."""
    rows: Rows = []
    pages = (KEPT_DOCUMENTS * (SHARED + OWN + OUTPUT) + TOGETHER * (OWN + OUTPUT)) // PAGE
    settings = f"cache.num_pages={pages}", f"scheduler.max_decode_sequences={KEPT_DOCUMENTS}"
    for _ in range(args.repeat):
        for key in (True, False):
            with serve(args, folder, *settings) as client:
                documents = [client.tokens(SHARED) for _ in range(DOCUMENTS)]
                names = [f"document {i % DOCUMENTS}" for i in range(args.requests)]
                bodies = [
                    client.body(documents[i % DOCUMENTS] + client.tokens(OWN), OUTPUT,
                                **({"prompt_cache_key": name} if key else {}))
                    for i, name in enumerate(names)
                ]  # fmt: skip
                began = time.perf_counter()
                streams = drive(client.port, bodies, len(bodies))
                seconds = time.perf_counter() - began
                ttft = sorted(s.ttft - s.sent for s in streams)
                rows.append({
                    "prompt_cache_key": key,
                    "requests_per_s": len(bodies) / seconds,
                    "ttft_p50_s": statistics.median(ttft),
                    "ttft_last_s": ttft[-1],
                    "cached_share": sum(map(cached, streams)) / (len(bodies) * (SHARED + OWN)),
                })  # fmt: skip
    return rows


def restore(args: argparse.Namespace, folder: Path) -> Rows:
    rows: Rows = []
    pages = 2 * max(LENGTHS) // PAGE
    with serve(args, folder, f"cache.num_pages={pages}", "cache.host_gib=4") as client:
        for length in LENGTHS:
            for _ in range(args.repeat):
                prompt = client.tokens(length)
                cold, none = client.ttft(prompt)
                warm, device = client.ttft(prompt)
                client.quiet()
                client.flush(pages * PAGE)
                foreseen = client.foreseen(prompt)
                restored, host = client.ttft(prompt)
                rows.append({"tokens": length, "computed_s": cold, "device_s": warm,
                             "restored_s": restored, "foreseen_s": foreseen,
                             "cached": [none, device, host]})  # fmt: skip
    return rows


def restart(args: argparse.Namespace, folder: Path) -> Rows:
    rows: Rows = []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as disk:
            settings = ("cache.disk_gib=2", f"cache.disk_path={disk}")
            with serve(args, folder, *settings) as client:
                prompt = client.tokens(SHARED) + client.tokens(OWN)
                cold, _ = client.ttft(prompt)
                client.ttft(prompt)
                client.wait(lambda: client.metric("dserve_tier_pages") >= SHARED // PAGE)
            with serve(args, folder, *settings) as client:
                client.wait(lambda: client.metric("dserve_tier_pages") >= SHARED // PAGE)
                warm, found = client.ttft(prompt)
                rows.append({"cold_s": cold, "after_restart_s": warm, "cached": found})
    return rows


def preempt(args: argparse.Namespace, folder: Path) -> Rows:
    """Two sequences that grow beyond the pool, so that one of them loses its pages, and gets them
    again when the other one ends: seconds from then to its next token. Beside it what was foreseen
    (the server's own journal)."""
    rows: Rows = []
    for length in PREEMPTED:
        pages = (2 * length + GROWN * 6 // 5) // PAGE
        for _ in range(args.repeat):
            for host in ("0", "2"):
                settings = (f"cache.num_pages={pages}", f"cache.host_gib={host}")
                with serve(args, folder, *settings) as client:
                    streams = client.ask([client.tokens(length) for _ in range(2)], GROWN, 2)
                    first, other = sorted(streams, key=lambda stream: stream.end)
                    after = next(at for at, _ in other.reads if at > first.end + AT_ONCE)
                    rows.append({
                        "tokens": length, "host_gib": host, "again_s": after - first.end,
                        "seconds": other.end - min(s.sent for s in streams),
                        "preemptions": client.metric("dserve_preemptions_total"),
                        "restored_tokens": client.metric("dserve_restored_tokens_total"),
                        "foreseen_saved_s": client.metric("dserve_restore_saved_seconds_total"),
                    })  # fmt: skip
    return rows


def overhead(args: argparse.Namespace, folder: Path) -> Rows:
    rows: Rows = []
    roomy, tight = "cache.num_pages=4000", "cache.num_pages=1000"
    kinds = {
        "no sharing": (roomy, "cache.prefix_sharing=false"),
        "sharing": (roomy,),
        "idle tier": (roomy, "cache.host_gib=2"),
        "tight": (tight,),
        "tight, spilling": (tight, "cache.host_gib=2"),
    }
    for _ in range(args.repeat):
        for kind, settings in kinds.items():
            with serve(args, folder, *settings) as client:
                prompts = [client.tokens(500) for _ in range(args.requests)]
                began = time.perf_counter()
                client.ask(prompts, 32, TOGETHER)
                rows.append({"kind": kind, "seconds": time.perf_counter() - began,
                             "copies": client.metric("dserve_tier_copies_total")})  # fmt: skip
    return rows


def page(args: argparse.Namespace, _: Path) -> Rows:
    """Milliseconds for one page, the median of 200; as many pages as fit no cache."""
    model = AutoConfig.from_pretrained(args.model)
    heads, dim = model.num_key_value_heads, model.head_dim
    layers = [LayerSpec(model.num_attention_heads, heads, dim, dim, 1.0)] * model.num_hidden_layers
    dtype = torch.bfloat16
    size = PoolSize(200, PAGE, bytes_per_token(layers, dtype))
    cache = KVCache(layers, size, dtype, torch.device("cpu"))
    for pages in cache.layers:
        for tensor in pages:
            tensor.uniform_()
    bytes_of, within = PageBytes(cache), PageCopier(cache)
    rows = torch.empty(size.num_pages, bytes_of.num_bytes, dtype=torch.uint8)

    def timed(work: Callable[[int], object]) -> float:
        seconds = []
        for i in range(size.num_pages):
            began = time.perf_counter()
            work(i)
            seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds)

    return [
        {
            "mib": bytes_of.num_bytes / 2**20,
            "gather_ms": timed(lambda i: bytes_of.gather(i, rows[i])),
            "scatter_ms": timed(lambda i: bytes_of.scatter(rows[i], i)),
            "checksum_ms": timed(lambda i: checksum(rows[i])),
            "copy_4_tokens_ms": timed(lambda i: within.copy([PageCopy(i, size.num_pages, 4)])),
            "copy_page_ms": timed(lambda i: within.copy([PageCopy(i, size.num_pages, PAGE)])),
        }
        for _ in range(args.repeat)
    ]


SCENES = {f.__name__: f for f in (reuse, group, restore, restart, preempt, overhead, page)}


def shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    results: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            rows = results[name] = SCENES[name](args, Path(folder))
            print(f"\n{name}")
            for row in rows:
                print("   ", "  ".join(f"{key} {shown(value)}" for key, value in row.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
