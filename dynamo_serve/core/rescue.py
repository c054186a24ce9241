"""Steps that raise: run again in halves, until the culprit alone is left."""

from __future__ import annotations

import logging
from typing import NamedTuple

from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.engine import Engine, EngineBroken
from dynamo_serve.core.request import Finish

log = logging.getLogger(__name__)

MAX_TRIES = 3  # of one sequence alone
MAX_FAILED_STEPS = 3  # in a row, with nobody that worked; then the engine is beyond helping itself


class Rescued(NamedTuple):
    """What a step brought; `is_smooth`: at the first try, so that its time tells something."""

    outputs: list[SequenceOutput]
    is_smooth: bool


class Rescue:
    """Runs steps. One bad sequence, or a batch too large for the memory, takes nobody else down.

    A step writes nothing but the KV of its own tokens, and copies of pages that nobody writes to;
    and all of it again when it is repeated; so whatever a failed one has left behind does no harm.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._num_failed = 0

    def step(self, batch: Batch) -> Rescued:
        """Run a batch. Raises `EngineBroken`, or what the engine raised if nothing works."""
        try:
            outputs = self.engine.step(batch)
            self._num_failed = 0
            return Rescued(outputs, is_smooth=True)
        except EngineBroken:
            raise
        except Exception as error:
            log.exception("a %s step of %d failed", batch.phase.value, len(batch.work))
            return Rescued(self._in_parts(batch, error), is_smooth=False)

    def _in_parts(self, batch: Batch, error: Exception) -> list[SequenceOutput]:
        outputs, failed = [], 0
        todo = _halves(batch.work)
        while todo:
            part = todo.pop(0)
            found = self._try(part)
            if isinstance(found, list):
                outputs += found
            elif len(part) > 1:
                todo[:0] = _halves(part)
            else:
                failed += 1
                error = found
                outputs.append(_failure(part[0], found))
        self._num_failed = 0 if failed < len(batch.work) else self._num_failed + 1
        if self._num_failed and (failed > 1 or self._num_failed >= MAX_FAILED_STEPS):
            raise error
        return outputs

    def _try(self, works: tuple[Work, ...]) -> list[SequenceOutput] | Exception:
        tries = MAX_TRIES - 1 if len(works) == 1 else 1
        for _ in range(tries):
            try:
                return self.engine.step(_batch(works))
            except EngineBroken:
                raise
            except Exception as failure:  # whatever it was: the caller decides
                error = failure
        return error


def _halves(works: tuple[Work, ...]) -> list[tuple[Work, ...]]:
    middle = len(works) // 2
    return [half for half in (works[:middle], works[middle:]) if half]


def _batch(works: tuple[Work, ...]) -> Batch:
    decoding = [work.is_decode for work in works]
    phase = Phase.DECODE if all(decoding) else Phase.MIXED if any(decoding) else Phase.PREFILL
    return Batch(phase, works)


def _failure(work: Work, error: Exception) -> SequenceOutput:
    count, end = len(work.token_ids), work.position + len(work.token_ids)
    sizes = f"{count} tokens up to position {end}, {len(work.page_table)} pages, alone in its step"
    message = f"the step failed with {sizes}: {type(error).__name__}: {error}"
    return SequenceOutput(work.seq_id, finish=Finish.ERROR, error=message)
