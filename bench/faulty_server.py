"""A server whose engine raises in some steps: `dynamo-serve` with the same arguments.

    python -m bench.faulty_server serve ...

From the first SIGUSR1 to the engine process on, every step raises with the probability in
FAULTY_STEPS (default 0.05), before it has begun or after it has run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

from dynamo_serve import building, cli, process, template, worker
from dynamo_serve.core.batch import Batch, SequenceOutput

RATE = float(os.environ.get("FAULTY_STEPS", "0.05"))


class Faulty:
    """An engine in front of another one."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._rng = random.Random(1)
        self._rate = 0.0
        signal.signal(signal.SIGUSR1, self._begin)

    def _begin(self, number: int, frame: object) -> None:
        self._rate = RATE

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Batch) -> list[SequenceOutput]:
        is_faulty, is_late = self._rng.random() < self._rate, self._rng.random() < 0.5
        if is_faulty and not is_late:
            raise RuntimeError("a fault, before the step")
        outputs: list[SequenceOutput] = self._engine.step(batch)
        if is_faulty:
            raise RuntimeError("a fault, after the step")
        return outputs


def work(main: Callable[..., int]) -> int:
    build = building.build_engine
    building.build_engine = lambda *args: Faulty(build(*args))
    return main(*map(int, sys.argv[2:]))


if __name__ == "__main__":
    mains = {"worker": worker.main, "template": template.main}
    if sys.argv[1] in mains:
        sys.exit(work(mains[sys.argv[1]]))
    process.WORKER = ("-m", "bench.faulty_server", "worker")
    process.TEMPLATE = ("-m", "bench.faulty_server", "template")
    sys.exit(cli.main(sys.argv[1:]))
