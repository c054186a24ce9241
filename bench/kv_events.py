"""What KV events cost: steps of the fake engine in a second with nobody told, and with a router.

    python -m bench.kv_events [--seconds 3] [--rounds 5]

Steps of the fake engine take next to no time, so this is all bookkeeping: the worst case. Rounds
alternate; on a busy machine the CPU time of the loop's thread tells more than steps do. Prompts are
new and the pool is small, so that pages are stored and removed all the time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import statistics
import time
from typing import Any

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Command, Loop, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.kv_events import Publisher

LIVE, PROMPT, ANSWER = 16, 128, 64


class Traffic:
    """Keeps so many requests live."""

    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.num_sent = 0
        self.num_steps = 0
        self.pending = [self.request() for _ in range(LIVE)]

    def request(self) -> Command:
        self.num_sent += 1
        prompt = tuple(self.rng.randrange(50_000) for _ in range(PROMPT))
        return Submit(Request(f"r{self.num_sent}", prompt, ANSWER, arrival=time.monotonic()))

    def inbox(self, patience: float | None) -> list[Command]:
        pending, self.pending = self.pending, []
        return pending

    def publish(self, events: list[TokenEvent], stats: Stats) -> None:
        self.num_steps += stats.step is not None
        self.pending += [self.request() for event in events if event.finish]


def listen(endpoint: str) -> None:
    """A router that reads and throws away, until it is ended."""
    zmq: Any = importlib.import_module("zmq")
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(endpoint)
        while True:
            sub.recv_multipart()


def measure(seconds: float, is_told: bool) -> dict[str, float]:
    traffic = Traffic()
    engine = FakeEngine(vocab_size=50_000, max_model_len=512, page_size=16, num_pages=400)
    spec = engine.start()
    scheduler = Scheduler(PagePool(spec.num_pages, spec.page_size), Limits())
    loop = Loop(
        scheduler, engine, inbox=traffic.inbox, publish=traffic.publish, clock=time.monotonic
    )
    publisher = Publisher("tcp://127.0.0.1:*") if is_told else None
    listener = None
    if publisher:
        spawn = multiprocessing.get_context("spawn")
        listener = spawn.Process(target=listen, args=(publisher.endpoints[0],))
        listener.start()
        publisher.follow(scheduler)
    try:
        for warm in (True, False):  # by then the listener has come, too
            began, before = time.perf_counter(), traffic.num_steps
            loop_cpu, all_cpu = time.thread_time(), time.process_time()
            while time.perf_counter() < began + (1.0 if warm else seconds):
                loop.turn()
        loop_cpu, all_cpu = time.thread_time() - loop_cpu, time.process_time() - all_cpu
        took = time.perf_counter() - began
    finally:
        if publisher and listener:
            listener.kill()
            listener.join()
            publisher.close()
    num_steps = traffic.num_steps - before
    return {
        "steps_per_s": num_steps / took,
        "events_per_s": scheduler.stats().kv_events_total / (took + 1.0),
        "loop_cpu_us_per_step": 1e6 * loop_cpu / num_steps,
        "other_cpu_us_per_step": 1e6 * (all_cpu - loop_cpu) / num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for i in range(2 * arguments.rounds):
        rounds[bool(i % 2)].append(measure(arguments.seconds, bool(i % 2)))
    found = {
        "on" if is_told else "off": {
            name: round(statistics.median(result[name] for result in results), 1)
            for name in results[0]
        }
        for is_told, results in rounds.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
