"""Speculation on and off in turn, on one engine: how much faster, and how many drafts were right.

    python -m bench.random_model --out MODEL_DIR --chain
    python -m bench.speculation MODEL_DIR

The model says a fixed order of tokens. `quotes`: a document of 1,024 tokens, whose passages of 32
are parts of that order; the answer goes through one passage and then 16 tokens further. `edits`: a
file of 512 tokens that follows the order but for every 16th token; the answer is the file without
those slips. `nothing`: no part of the order stands in the prompt. Greedy, but for `quotes, sampled`
(temperature 1.6). Scheduler and engine without HTTP; a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.random_model import chain
from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, Sampling
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.engines.local import LocalEngine

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.6)
PASSAGE, EVERY = 32, 16


class Prompts:
    def __init__(self, order: list[int], seed: int) -> None:
        self.order, self.rng = order, random.Random(seed)

    def part(self, count: int) -> list[int]:
        start = self.rng.randrange(len(self.order) - count)
        return self.order[start : start + count]

    def noise(self, count: int) -> list[int]:
        return self.rng.choices(self.order, k=count)

    def quotes(self) -> list[int]:
        passages = [self.part(PASSAGE) for _ in range(1024 // PASSAGE)]
        flat = [token for passage in passages for token in passage]
        return [*flat, *self.noise(16), *self.rng.choice(passages)[:2]]

    def edits(self) -> list[int]:
        file = self.part(512)
        start = file[:2]
        for i in range(EVERY, len(file), EVERY):
            file[i] = self.rng.choice(self.order)
        return [*file, *self.noise(16), *start]

    def nothing(self) -> list[int]:
        return self.noise(512)


@dataclass(frozen=True)
class Workload:
    name: str
    prompt: Callable[[Prompts], list[int]]
    output: int
    sampling: Sampling = GREEDY


WORKLOADS = (
    Workload("quotes", Prompts.quotes, PASSAGE - 2 + 16),
    Workload("quotes, sampled", Prompts.quotes, PASSAGE - 2 + 16, SAMPLED),
    Workload("edits", Prompts.edits, 128),
    Workload("nothing", Prompts.nothing, 64),
)


@dataclass
class Run:
    decode_seconds: float
    tokens: dict[str, tuple[int, ...]]
    drafted: int
    accepted: int
    steps: int

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token of each answer is the prefill's."""
        return sum(len(t) - 1 for t in self.tokens.values()) / self.decode_seconds


def make_scheduler(num_pages: int, max_draft_tokens: int) -> Scheduler:
    """Used for all runs of one kind: it learns on, as in a server that runs on."""
    limits = Limits(max_queue_delay=0.0, mix_phases=True, max_draft_tokens=max_draft_tokens)
    return Scheduler(PagePool(num_pages, 16, prefix_sharing=False), limits)


def run(engine: LocalEngine, scheduler: Scheduler, requests: list[Request]) -> Run:
    """All requests at once; decoding is timed from when all have their first token."""
    before = scheduler.stats()
    tokens: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
    for request in requests:
        scheduler.add(request, time.monotonic())
    began, steps = 0.0, 0
    while True:
        if not began and all(tokens.values()):
            began = time.monotonic()
        batch = scheduler.schedule(time.monotonic())
        engine.drop(scheduler.take_dropped())
        if batch is None:
            break
        steps += bool(began)
        for event in scheduler.update(batch, engine.step(batch), time.monotonic()):
            tokens[event.request_id] += event.token_ids
    stats = scheduler.stats()
    return Run(
        time.monotonic() - began,
        tokens,
        stats.draft_tokens_total - before.draft_tokens_total,
        stats.draft_accepted_tokens_total - before.draft_accepted_tokens_total,
        steps,
    )


def compare(
    engine: LocalEngine, args: argparse.Namespace, order: list[int], modes: dict[str, Scheduler]
) -> list[dict[str, Any]]:
    rows = []
    for workload in WORKLOADS:
        if args.only and workload.name not in args.only:
            continue
        for concurrency in args.concurrency:
            rows.append(measure(engine, args, order, modes, workload, concurrency))
            print(" | ".join(map(str, rows[-1].values())), flush=True)
    return rows


def measure(
    engine: LocalEngine,
    args: argparse.Namespace,
    order: list[int],
    modes: dict[str, Scheduler],
    workload: Workload,
    concurrency: int,
) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {"off": [], "on": []}
    same = 0
    for seed in range(args.repeat):
        prompts = Prompts(order, seed)
        requests = [
            Request(
                str(i),
                tuple(workload.prompt(prompts)),
                workload.output,
                replace(workload.sampling, seed=i),
            )
            for i in range(concurrency)
        ]
        for name in ("off", "on") if seed % 2 else ("on", "off"):
            runs[name].append(run(engine, modes[name], requests))
        same += runs["on"][-1].tokens == runs["off"][-1].tokens
    rates = {n: statistics.median(r.tokens_per_second for r in rs) for n, rs in runs.items()}
    drafted = sum(r.drafted for r in runs["on"])
    return {
        "workload": workload.name,
        "sequences": concurrency,
        "off_tokens_per_second": round(rates["off"], 1),
        "on_tokens_per_second": round(rates["on"], 1),
        "speed_up": round(rates["on"] / rates["off"], 2),
        "accepted": round(sum(r.accepted for r in runs["on"]) / drafted, 2) if drafted else None,
        "drafted_per_step": round(drafted / sum(r.steps for r in runs["on"]), 2),
        "same_tokens": f"{same}/{args.repeat}",
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--max-draft-tokens", type=int, default=8)
    parser.add_argument("--pages", type=int, default=1600)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return parser.parse_args()


def main() -> None:
    args = parse()
    engine = LocalEngine(
        ModelSection(dtype=args.dtype),
        EngineSection(device="cpu"),
        CacheSection(num_pages=args.pages),
        max_decode_sequences=64,
        max_prefill_tokens=512,
        path=str(args.model),
        progress=lambda stage, fraction: None,
    )
    engine.start()
    order = chain(AutoTokenizer.from_pretrained(args.model))
    lengths = {"off": 0, "on": args.max_draft_tokens}
    modes = {name: make_scheduler(args.pages, most) for name, most in lengths.items()}
    for scheduler in modes.values():  # until the step times are known
        prompt = tuple(Prompts(order, 99).edits())
        run(engine, scheduler, [Request("first", prompt, 48, GREEDY)])
    rows = compare(engine, args, order, modes)
    engine.close()
    print(json.dumps({"speculation": rows}))


if __name__ == "__main__":
    main()
