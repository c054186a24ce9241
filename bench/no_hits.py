"""What the prefix cache and the tiers cost traffic that never hits: CPU time of the scheduler.

    python -m bench.no_hits [--requests 400] [--rounds 5] [--step-ms 25] [--token-us 330]

The scheduler alone, under a virtual clock, with an engine that computes nothing: so many requests
of 500 new prompt and 32 output tokens, 8 at a time. Without prefix sharing, with it, with parts of
pages looked for, too, with a host tier that idles, and with one that is written to all the time
because the pool is small; they alternate. `--step-ms` and `--token-us` say how long a step and a
token would take: the share is of that time, of one core of which the scheduler takes its own. A
table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from statistics import median

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Command, Loop, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, Sampling, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tiers import HOST, Copied, Copy, Found
from dynamo_serve.engines.fake import FakeEngine

PROMPT, OUTPUT, TOGETHER, PAGE = 500, 32, 8, 16
VOCABULARY = 30_000
ROOMY, TIGHT = 40_000, 600  # pages
KINDS = {
    "no sharing": (ROOMY, False, 0),
    "sharing": (ROOMY, True, 0),
    "parts of pages": (ROOMY, True, 0),
    "idle tier": (ROOMY, True, 1000),
    "tight, no sharing": (TIGHT, False, 0),
    "tight": (TIGHT, True, 0),
    "tight, spilling": (TIGHT, True, 40_000),
}


class Nothing(FakeEngine):
    """Computes and copies nothing; its steps take virtual time."""

    def __init__(self, pages: int, slots: int, step: float, token: float) -> None:
        super().__init__(vocab_size=VOCABULARY, max_model_len=2 * PROMPT, page_size=PAGE,
                         num_pages=pages, below={HOST: slots} if slots else {})  # fmt: skip
        self.step_s, self.token_s, self.now = step, token, 0.0
        self.copies: list[Copy] = []

    def step(self, batch: Batch) -> list[SequenceOutput]:
        tokens = sum(len(work.token_ids) for work in batch.work)
        self.now += self.step_s + self.token_s * tokens
        return [SequenceOutput(work.seq_id, (7,)) for work in batch.work if work.samples]

    def copy(self, copies: list[Copy]) -> None:  # type: ignore[override]
        self.copies += copies

    def copied(self) -> list[Copied | Found]:
        ended: list[Copied | Found] = [Copied(copy.ticket, 0.001) for copy in self.copies]
        self.copies = []
        return ended


def run(kind: str, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """CPU seconds of the whole loop, and the virtual seconds that the steps took."""
    pages, sharing, slots = KINDS[kind]
    engine = Nothing(pages, slots, args.step_ms / 1000, args.token_us / 1e6)
    spec = engine.start()
    pool = PagePool(spec.num_pages, spec.page_size, prefix_sharing=sharing)
    copying = spec.copy_seconds if kind == "parts of pages" else None
    limits = Limits(mix_phases=True, copy_seconds=copying)
    scheduler = Scheduler(pool, limits, tiers=spec.tiers)
    rng = random.Random(seed)
    todo = [tuple(rng.randrange(VOCABULARY) for _ in range(PROMPT)) for _ in range(args.requests)]
    sent = finished = 0

    def inbox(_: float | None) -> list[Command]:
        nonlocal sent
        new: list[Command] = []
        while sent < args.requests and sent - finished < TOGETHER:
            greedy = Sampling(temperature=0.0)
            new.append(Submit(Request(str(sent), todo[sent], OUTPUT, greedy, arrival=engine.now)))
            sent += 1
        return new

    def publish(events: list[TokenEvent], _: Stats) -> None:
        nonlocal finished
        finished += sum(event.finish is not None for event in events)

    loop = Loop(scheduler, engine, inbox=inbox, publish=publish, clock=lambda: engine.now)
    began = time.thread_time()
    while finished < args.requests:
        loop.turn()
    return time.thread_time() - began, engine.now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--token-us", type=float, default=330.0)
    args = parser.parse_args()
    cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps: dict[str, float] = {}
    for seed in range(args.rounds):
        for kind in KINDS:
            seconds, steps[kind] = run(kind, args, seed)
            cpu[kind].append(1e6 * seconds / args.requests)
    rows = {}
    for kind, times in cpu.items():
        base = cpu["tight, no sharing" if kind.startswith("tight") else "no sharing"]
        more = median(time - none for time, none in zip(times, base, strict=True))
        per_request = 1e6 * steps[kind] / args.requests
        rows[kind] = {"cpu_us": median(times), "more_us": more, "share": more / per_request}
        print(f"{kind:18} {median(times):7.0f} µs of CPU for a request, {more:+6.0f} "
              f"= {100 * more / per_request:+.2f} % of its steps")  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
