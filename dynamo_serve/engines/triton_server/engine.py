"""Forwards requests to NVIDIA Triton servers, behind the same seam as an engine of our own.

Every sequence has one very large page, so the scheduler's queues, shares and caps apply before
anything is forwarded. Prompts are collected chunk by chunk and sent when the last one is here; from
then on a step takes what has arrived. It never waits for long: whoever comes or goes is only heard
between two steps.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dynamo_serve.config import ModelSection, TritonSection
from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.engines.triton_server.dialects import Ask
from dynamo_serve.engines.triton_server.faults import Fault
from dynamo_serve.engines.triton_server.marks import refused_for
from dynamo_serve.engines.triton_server.prompts import text_of
from dynamo_serve.engines.triton_server.remote import Remote
from dynamo_serve.engines.triton_server.server import CANARY
from dynamo_serve.engines.triton_server.stream import Stream
from dynamo_serve.errors import EngineStartError
from dynamo_serve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.005  # in a step, while nothing has arrived


class TritonEngine:
    """`path` is the model's folder: its tokenizer, and how long a text may be."""

    def __init__(
        self, settings: TritonSection, model: ModelSection, path: str, *, num_slots: int
    ) -> None:
        self._settings = settings
        self._model = model
        self._num_slots = num_slots
        self._path = path
        self._remote = Remote(settings)
        self._streams: dict[str, Stream] = {}
        self._ids: dict[str, list[int]] = {}  # of prompts of which more is to come
        self._arrived = threading.Event()

    def start(self) -> EngineSpec:
        self._tokenizer = Tokenizer.load(self._path)
        max_model_len = self._model.max_model_len or _context_of(self._path)
        self._remote.start()
        self._compare()
        spoken = self._remote.spoken
        refused = dict(spoken.dialect.refused)
        if not spoken.dialect.takes_ids:
            refused.update(refused_for(self._tokenizer, self._model))
        return EngineSpec(
            max_model_len=max_model_len,
            page_size=max_model_len,
            num_pages=self._num_slots,
            vocab_size=self._tokenizer.vocab_size,
            facts={
                "architecture": "triton",
                "device": "remote",
                "dialect": spoken.dialect.name,
                "triton_model": self._settings.model,
                "triton_endpoints": ", ".join(self._settings.endpoints),
            },
            refused=refused,
            infers=spoken.dialect.infers,
        )

    def _compare(self) -> None:
        """Warn of a tokenizer that cannot be the server's."""
        ours = len(self._tokenizer.encode(CANARY.prompt, add_special_tokens=True))
        theirs = self._remote.canary_count
        if theirs not in (None, ours):
            what = "model.path: %r has %d tokens for its tokenizer, %d for the Triton server's"
            log.warning(what, CANARY.prompt, ours, theirs)

    def step(self, batch: Batch) -> list[SequenceOutput]:
        has_begun = False
        for work in batch.work:
            if work.seq_id not in self._streams:
                self._gather(work)
                has_begun = True
        outputs = self._collect(batch)
        if not outputs and not has_begun:
            self._arrived.wait(WAIT_SECONDS)
            self._arrived.clear()
            outputs = self._collect(batch)
        return outputs

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._ids.pop(seq_id, None)
            if (stream := self._streams.pop(seq_id, None)) is not None:
                self._remote.cancel(stream)

    def close(self) -> None:
        self._remote.close()

    def endpoints(self) -> dict[str, Any]:
        """See `core.engine.ForwardingEngine`; `began` tells this engine from the next."""
        return self._remote.told()

    def _collect(self, batch: Batch) -> list[SequenceOutput]:
        streams = (self._streams.get(work.seq_id) for work in batch.work if work.samples)
        taken = (stream.take() for stream in streams if stream is not None)
        return [output for output in taken if output is not None]

    def _gather(self, work: Work) -> None:
        """Put a chunk to those before it; the last one sends the request on."""
        ids = self._ids.setdefault(work.seq_id, [])
        del ids[work.position :]  # of a chunk that is run again
        ids += work.token_ids
        if work.samples:
            self._begin(work, tuple(self._ids.pop(work.seq_id)))

    def _begin(self, work: Work, ids: tuple[int, ...]) -> None:
        """What is wrong with a request comes as its output."""
        request = work.request
        assert request is not None, "the scheduler tells whose work it is"
        num_prompt = len(request.prompt_ids)
        num_output = len(ids) - num_prompt
        eos_ids = self._tokenizer.eos_ids
        ask = Ask(
            prompt="",
            max_tokens=request.max_tokens - num_output,
            min_tokens=max(0, request.min_tokens - num_output),
            sampling=request.sampling,
            ignore_eos=not eos_ids <= request.stop_ids,
            stop_token_ids=tuple(sorted(request.stop_ids - eos_ids)),
            ids=ids,
            num_prompt=num_prompt,
            stop_ids=tuple(sorted(request.stop_ids)),
        )
        stream = Stream(work.seq_id, ask, request.priority, self._arrived.set)
        self._streams[work.seq_id] = stream
        try:
            if not self._remote.spoken.dialect.takes_ids:
                prompt = text_of(self._tokenizer, request.prompt_ids) + work.said
                stream.ask = ask._replace(prompt=prompt)
            self._remote.begin(stream)
        except Fault as fault:
            stream.fail(fault)


def _context_of(path: str) -> int:
    try:
        facts = json.loads((Path(path) / "config.json").read_text())
        return int(facts["max_position_embeddings"])
    except (OSError, KeyError, ValueError) as error:
        raise EngineStartError(
            f"model.max_model_len: {path}/config.json does not tell how long a text may be "
            f"({type(error).__name__}: {error}); set it to what the Triton server's model takes"
        ) from None
