"""Single steps of the local engine, and how near they come to what the machine could do.

    python -m bench.steps MODEL [--set model.quantization=int8] [--stages]

Decode steps against the memory's speed: the weights and the KV of all sequences, read once, over
the bandwidth that torch's own sum of a large tensor reaches. Prefill against 2 operations per
weight and token, in operations per second, and against what torch's own product of so many tokens
reaches. Medians of `--repeat`; a JSON line last. `--stages` says what the time of each step goes
to, and how fast each stage reads what it has to read and multiplies; native kernels only.
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
from bench.step_stages import show, stages, watchable
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


def product_rate(engine: LocalEngine, tokens: int, repeat: int) -> float:
    """Operations a second of torch's own product, bfloat16, of the shape of the MLP's first."""
    assert engine._ready is not None
    config = engine._ready.runner.model.config.get_text_config()
    x = torch.randn(tokens, config.hidden_size).bfloat16()
    weights = torch.randn(2 * config.intermediate_size, config.hidden_size).bfloat16()
    times = []
    for _ in range(2 * repeat):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weights)
        times.append(time.perf_counter() - begin)
    operations: float = 2.0 * weights.numel() * tokens
    return operations / statistics.median(times)


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
    if args.stages:
        watchable(engine)
    settle()
    weights = float(spec.facts["weights_read_bytes"])
    token = float(spec.facts["kv_bytes_per_token"])
    rows = []
    for count, context in map(_pair, args.decode) if args.decode else DECODES:
        work = work_of(count, context, 1, spec.page_size)
        took = seconds(engine, work, args.repeat)
        bound = (weights + count * context * token) / speed
        rows.append({"step": f"decode {count} at {context}", "ms": round(took * 1e3, 1),
                     "of_the_bound": round(bound / took, 2),
                     **_stages(args, engine, work)})  # fmt: skip
    for length, position in () if args.decode else PREFILLS:
        work = work_of(1, position, length, spec.page_size)
        took = seconds(engine, work, args.repeat)
        rate = 2 * float(spec.facts["num_parameters"]) * length / took
        of_torch = rate / product_rate(engine, length, args.repeat)
        rows.append({"step": f"prefill {length} at {position}", "ms": round(took * 1e3, 1),
                     "tera_per_second": round(rate / 1e12, 2), "of_torch": round(of_torch, 2),
                     **_stages(args, engine, work)})  # fmt: skip
    engine.close()
    return rows


def _stages(
    args: argparse.Namespace, engine: LocalEngine, work: tuple[Work, ...]
) -> dict[str, Any]:
    return {"stages": stages(engine, work, args.repeat)} if args.stages else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    parser.add_argument("--decode", nargs="+", metavar="COUNT:CONTEXT", help="only these decodes")
    parser.add_argument("--stages", action="store_true", help="what the time of each goes to")
    rows = measure(parser.parse_args())
    for row in rows:
        print(" | ".join(f"{key} {value}" for key, value in row.items() if key != "stages"))
        show(row.get("stages", ()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
