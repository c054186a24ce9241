"""The engine of models that read whole texts: embeddings and cross-encoders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish
from dynamo_serve.engines.local.encoder_runner import Text
from dynamo_serve.engines.local.encoder_start import SCORE, ReadyEncoder, start_encoder
from dynamo_serve.engines.local.pools import NOT_FINITE, done
from dynamo_serve.engines.local.startup import Wishes
from dynamo_serve.engines.local.step import after_failure

logger = logging.getLogger(__name__)


class EncoderEngine:
    """Runs a transformers encoder over texts end to end; each is done when it has run.

    Implements `core.engine.Engine`. Nothing is kept between steps. Not thread-safe.
    """

    def __init__(self, wishes: Wishes, progress: Callable[[str, float], None]) -> None:
        self._wishes = wishes
        self._progress = progress
        self._ready: ReadyEncoder | None = None

    def start(self) -> EngineSpec:
        """Load and check. Raises `EngineStartError` with the remedy."""
        assert self._ready is None, "started twice"
        self._ready = start_encoder(self._wishes, self._progress)
        facts = self._ready.spec.facts
        logger.info(", ".join(f"{key} {value}" for key, value in facts.items()))
        return self._ready.spec

    def step(self, batch: Batch) -> list[SequenceOutput]:
        """A vector for each work, or an error for one that failed, or wants something else."""
        assert self._ready is not None, "not started"
        makes = self._ready.spec.pooling
        able = [w for w in batch.work if _can(w, makes)]
        able.sort(key=lambda w: len(w.token_ids))
        others = [_refused(w) for w in batch.work if not _can(w, makes)]
        return [*self._run(able), *others]

    def _run(self, work: list[Work]) -> list[SequenceOutput]:
        assert self._ready is not None
        if not work:
            return []
        try:
            with torch.inference_mode():
                vectors = self._ready.loaded.runner.vectors([_text(w) for w in work])
                are_numbers = [bool(torch.isfinite(vector).all()) for vector in vectors]
        except Exception as error:
            after_failure(error)
            raise
        return [
            done(w.seq_id, vector)
            if is_number
            else SequenceOutput(w.seq_id, finish=Finish.ERROR, error=NOT_FINITE)
            for w, vector, is_number in zip(work, vectors, are_numbers, strict=True)
        ]

    def drop(self, seq_ids: Iterable[str]) -> None:
        pass  # there is nothing to forget

    def close(self) -> None:
        """Give the model's memory and the attention function back. Idempotent."""
        if self._ready is not None:
            self._ready.loaded.close()
            self._ready = None


def _can(work: Work, makes: str) -> bool:
    return work.pooling is not None and (work.pooling.kind == SCORE) == (makes == SCORE)


def _refused(work: Work) -> SequenceOutput:
    wish = "text" if work.pooling is None else f"the pooling {work.pooling.kind!r}"
    error = f"{wish} is not what this model makes"
    return SequenceOutput(work.seq_id, finish=Finish.ERROR, error=error, fault="refused")


def _text(work: Work) -> Text:
    assert work.pooling is not None
    assert work.position == 0 and work.samples, f"{work.seq_id}: only a part of it"
    return Text(work.token_ids, work.pooling.second_at, work.pooling.kind)
