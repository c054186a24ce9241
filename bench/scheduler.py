"""What the scheduler costs: the plan of a step and its update, with long queues, without an engine.

    python -m bench.scheduler [--steps 400] [--short]

Every case keeps its number of live sequences and of waiting requests: whoever ends is replaced. A
quarter of the requests begin with one of eight heads that others have computed. Times are CPU
time of this process, per step: plan is `schedule`, update is `update`, add is `add` of those who
came meanwhile.
A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import count

from dynamo_serve import garbage
from dynamo_serve.config import Config, SchedulerSection
from dynamo_serve.core.batch import SequenceOutput
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Request
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.tenant import Tenancy, Tenant
from dynamo_serve.scheduling import build_scheduler

STEP_SECONDS = 0.02  # of virtual time
PROMPTS, ANSWERS = (32, 128), (128, 512)  # tokens: least and most
HEADS, HEAD_TOKENS, SHARED = 8, 256, 0.25
VOCAB_SIZE = 50_000
MOST_STEPS = 10_000  # until the batch is full, and those measured
TARGET_MS = 0.3  # per step, at 256 live sequences
CASES = [(live, tenants) for tenants in (1, 100) for live in (32, 64, 128, 256)]


@dataclass(frozen=True)
class Result:
    """Milliseconds of a step: means, and of plan and update together the median and p99."""

    live: int
    tenants: int
    waiting: int
    plan: float
    update: float
    both_p50: float
    both_p99: float
    add: float

    @property
    def both(self) -> float:
        return self.plan + self.update


class Traffic:
    """Requests without end; every tenant gets the next one in turn."""

    def __init__(self, rng: random.Random, tenants: int) -> None:
        self._rng = rng
        self._names = [f"t{i}" for i in range(tenants)]
        self._heads = [
            [rng.randrange(VOCAB_SIZE) for _ in range(HEAD_TOKENS)] for _ in range(HEADS)
        ]
        self._number = count()

    def next(self, now: float) -> Request:
        rng, number = self._rng, next(self._number)
        head = rng.choice(self._heads) if rng.random() < SHARED else []
        own = rng.choices(range(VOCAB_SIZE), k=rng.randint(*PROMPTS))
        return Request(
            id=f"r{number}-0",
            prompt_ids=(*head, *own),
            max_tokens=rng.randint(*ANSWERS),
            tenant=self._names[number % len(self._names)],
            arrival=now,
        )


def built(live: int, tenants: int) -> Scheduler:
    config = Config(scheduler=SchedulerSection(max_decode_sequences=live, max_waiting=1 << 30))
    named = {f"t{i}": Tenant(f"t{i}") for i in range(tenants)}
    longest = HEAD_TOKENS + PROMPTS[1] + ANSWERS[1]
    spec = EngineSpec(longest, 16, live * (longest // 16 + 1), VOCAB_SIZE)
    return build_scheduler(config, Tenancy(tenants=named), spec)


def measure(live: int, tenants: int, waiting: int, steps: int) -> Result:
    rng = random.Random(f"{live}/{tenants}")
    scheduler, traffic, now = built(live, tenants), Traffic(rng, tenants), 0.0
    for _ in range(live + waiting):
        scheduler.add(traffic.next(now), now)
    garbage.settle()  # as in an engine process
    plans: list[float] = []
    updates: list[float] = []
    adds: list[float] = []
    for _ in range(MOST_STEPS):
        if len(plans) >= steps:
            break
        begin = time.process_time()
        batch = scheduler.schedule(now)
        planned = time.process_time()
        assert batch is not None, "there is work for everybody"
        outputs = [
            SequenceOutput(work.seq_id, (rng.randrange(VOCAB_SIZE),))
            for work in batch.work
            if work.samples
        ]
        now += STEP_SECONDS
        ran = time.process_time()
        events = scheduler.update(batch, outputs, now)
        updated = time.process_time()
        new = [traffic.next(now) for event in events if event.finish]
        scheduler.take_dropped()
        coming = time.process_time()
        for request in new:
            scheduler.add(request, now)
        if len(scheduler.running) >= 0.9 * live and batch.phase.value != "prefill":  # it is full
            plans.append(planned - begin)
            updates.append(updated - ran)
            adds.append(time.process_time() - coming)
    both = sorted(1000 * (a + b) for a, b in zip(plans, updates, strict=True))
    return Result(
        live,
        tenants,
        waiting,
        plan=1000 * statistics.fmean(plans),
        update=1000 * statistics.fmean(updates),
        both_p50=statistics.median(both),
        both_p99=both[int(0.99 * (len(both) - 1))],
        add=1000 * statistics.fmean(adds),
    )


def row(result: Result) -> str:
    return (
        f"{result.live:>5} {result.tenants:>8} {result.waiting:>8} {result.plan:>8.3f} "
        f"{result.update:>8.3f} {result.both:>8.3f} {result.both_p50:>8.3f} "
        f"{result.both_p99:>8.3f} {result.add:>8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="steps that are measured")
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--short", action="store_true", help="few steps of the largest cases")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case[0] == 256] if arguments.short else CASES
    steps = min(arguments.steps, 100) if arguments.short else arguments.steps
    print(f"milliseconds per step; wanted: plan + update under {TARGET_MS} at 256 live sequences")
    print(" live  tenants  waiting     plan   update     both      p50      p99      add")
    results = []
    for live, tenants in cases:
        results.append(measure(live, tenants, arguments.waiting, steps))
        print(row(results[-1]), flush=True)
    print(json.dumps({"scheduler_ms": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
