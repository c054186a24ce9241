"""Single steps of the local engine, and how near they come to what the machine could do.

    python -m bench.steps MODEL [--set model.quantization=int8]

Decode steps against the memory's speed: the weights and the KV of all sequences, read once, over
the bandwidth that torch's own sum of a large tensor reaches. Prefill against 2 operations per
weight and token, in operations per second. Medians of `--repeat`; a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.server import settle
from dynamo_serve import settings
from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import LocalEngine

GREEDY = Sampling(temperature=0.0)
DECODES = ((1, 128), (8, 160), (32, 160), (8, 1024))  # sequences, tokens of each
PREFILLS = ((128, 0), (512, 0), (512, 512))  # tokens, position of the first
PAGES = 2400


def engine_of(args: argparse.Namespace) -> LocalEngine:
    wanted = ["model.dtype=bfloat16", f"cache.num_pages={PAGES}", *args.set]
    flags = [settings.from_set(setting) for setting in wanted]
    config = settings.load(flags=flags).config
    return LocalEngine(
        config.model,
        config.engine,
        config.cache,
        max_decode_sequences=256,
        max_prefill_tokens=512,
        path=str(args.model),
        progress=lambda stage, fraction: None,
    )


def bandwidth(repeat: int) -> float:
    """Bytes a second that all cores read together from memory."""
    numbers = torch.ones(1 << 28, dtype=torch.float32)
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - begin)
    return float(numbers.numel() * 4 / min(times))


def work_of(count: int, position: int, length: int, page_size: int) -> tuple[Work, ...]:
    pages = -(-(position + length) // page_size)
    return tuple(
        Work(
            str(i),
            tuple((7 * i + j) % 30_000 for j in range(length)),
            position,
            tuple(range(i * pages, (i + 1) * pages)),
            True,
            GREEDY,
            position + length,
        )
        for i in range(count)
    )


def seconds(engine: LocalEngine, work: tuple[Work, ...], repeat: int) -> float:
    times = []
    for _ in range(repeat + 1):
        begin = time.perf_counter()
        engine.step(Batch(Phase.DECODE, work))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _pair(text: str) -> tuple[int, int]:
    count, _, context = text.partition(":")
    return int(count), int(context)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    speed = bandwidth(args.repeat)
    print(f"memory reads at {speed / 1e9:.1f} GB/s")
    engine = engine_of(args)
    spec = engine.start()
    settle()
    weights = float(spec.facts["weights_read_bytes"])
    token = float(spec.facts["kv_bytes_per_token"])
    rows = []
    for count, context in map(_pair, args.decode) if args.decode else DECODES:
        took = seconds(engine, work_of(count, context, 1, spec.page_size), args.repeat)
        bound = (weights + count * context * token) / speed
        rows.append({"step": f"decode {count} at {context}", "ms": round(took * 1e3, 1),
                     "of_the_bound": round(bound / took, 2)})  # fmt: skip
    for length, position in () if args.decode else PREFILLS:
        took = seconds(engine, work_of(1, position, length, spec.page_size), args.repeat)
        rate = 2 * float(spec.facts["num_parameters"]) * length / took
        rows.append({"step": f"prefill {length} at {position}", "ms": round(took * 1e3, 1),
                     "tera_per_second": round(rate / 1e12, 2)})  # fmt: skip
    engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    parser.add_argument("--decode", nargs="+", metavar="COUNT:CONTEXT", help="only these decodes")
    rows = measure(parser.parse_args())
    for row in rows:
        print(" | ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
