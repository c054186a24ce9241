"""A model without a model: deterministic tokens, read from real pages, no torch."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType

from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import TokenLogprob
from dynamo_serve.core.tiers import DEVICE, Copied, Copy, Found, Place, TierSpec
from dynamo_serve.engines.fake_pooling import SIZE, FakePools

EMPTY = -1
PAGE_SECONDS = 1e-6  # what a copy is said to take
MAX_PARTS = 28  # of a step that takes time: between them it can be held


def next_token(
    context: Sequence[int], vocab_size: int, banned: frozenset[int], copying: float = 0.0
) -> int:
    """The 'model': a pure function of every token so far, never a banned one.

    In so large a part of cases as `copying` says, it is what came after the latest token the last
    time: the text repeats itself, as answers do that quote their prompt.
    """
    state = _hash(array("q", context).tobytes())
    if copying and int.from_bytes(state[:4]) % 1000 < 1000 * copying:
        for i in range(len(context) - 2, -1, -1):
            if context[i] == context[-1] and context[i + 1] not in banned:
                return context[i + 1]
    while (token := int.from_bytes(state) % vocab_size) in banned:
        state = _hash(state)
    return token


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


class FakeEngine:
    """Answers nonsense, the same nonsense every time; for tests, load and simulation.

    Its 'KV cache' holds the token of each slot, and the next token depends on all of the context
    as it stands in the pages, so a wrong page table gives a wrong answer. Temperature, filters and
    penalties have no meaning here: the token is a function of the context alone; log-probabilities
    are invented. `step_seconds` is slept in every step, `copying` is how much of its text is
    copied. `below`: the pages of each lower tier, by its number; copies take no time.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 97,
        max_model_len: int = 256,
        page_size: int = 4,
        num_pages: int = 64,
        below: Mapping[int, int] = MappingProxyType({}),
        copying: float = 0.0,
        step_seconds: float = 0.0,
        quantization: str = "none",
    ) -> None:
        self.spec = EngineSpec(
            max_model_len=min(max_model_len, page_size * num_pages),
            page_size=page_size,
            num_pages=num_pages,
            vocab_size=vocab_size,
            facts={
                **{"architecture": "fake", "device": "none", "attention_backend": "none"},
                "quantization": quantization,
            },
            verifies_drafts=True,
            holds_steps=True,
            copy_seconds=0.0,
            tiers=tuple(TierSpec(n, size, PAGE_SECONDS) for n, size in below.items() if size),
            pooling="last",
            vector_size=SIZE,
        )
        self._pools = FakePools()
        self.slots = array("q")
        self.lower: dict[Place, array[int]] = {}  # pages in lower tiers
        self._copied: list[Copied | Found] = []
        self._copying = copying
        self._step_seconds = step_seconds
        self._sleep = time.sleep
        self._between: Callable[[], None] = lambda: None
        self._parts = 1

    def start(self) -> EngineSpec:
        self.slots = array("q", [EMPTY]) * (self.spec.page_size * self.spec.num_pages)
        return self.spec

    def step(self, batch: Batch) -> list[SequenceOutput]:
        for work in batch.work:
            self._copy_part(work)
        if self._step_seconds:
            for _ in range(self._parts):
                self._sleep(self._step_seconds / self._parts)
                self._between()
        for work in batch.work:
            self._write(work)
        pooled = [self._pools.see(w, self._read(w)) for w in batch.work if w.pooling]
        answers = [self._answer(w) for w in batch.work if w.samples and not w.pooling]
        return answers + [out for out in pooled if out]

    def hold_for(self, between: Callable[[], None], every: float) -> None:
        self._between = between
        self._parts = max(1, min(MAX_PARTS, int(self._step_seconds / max(every, 1e-6))))

    def drop(self, seq_ids: Iterable[str]) -> None:
        self._pools.drop(seq_ids)  # pages are the pool's business

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._put(copy.target, self._get(copy.source))
            self._copied.append(Copied(copy.ticket, PAGE_SECONDS))

    def copied(self) -> list[Copied | Found]:
        copied, self._copied = self._copied, []
        return copied

    def _get(self, place: Place) -> array[int]:
        start = place.slot * self.spec.page_size
        is_above = place.tier == DEVICE
        return self.slots[start : start + self.spec.page_size] if is_above else self.lower[place]

    def _put(self, place: Place, tokens: array[int]) -> None:
        start = place.slot * self.spec.page_size
        if place.tier == DEVICE:
            self.slots[start : start + self.spec.page_size] = tokens
        else:
            self.lower[place] = tokens

    def close(self) -> None:
        self.slots = array("q")

    def _copy_part(self, work: Work) -> None:
        if copied := work.copied(self.spec.page_size):
            part = self._get(Place(DEVICE, copied.source))[: copied.num_tokens]
            start = copied.target * self.spec.page_size
            self.slots[start : start + copied.num_tokens] = part

    def _write(self, work: Work) -> None:
        size = self.spec.page_size
        for position, token in enumerate(work.token_ids, start=work.position):
            self.slots[work.page_table[position // size] * size + position % size] = token

    def _read(self, work: Work) -> array[int]:
        size = self.spec.page_size
        length = work.position + len(work.token_ids)
        context = array("q")
        for page_id in work.page_table[: -(-length // size)]:
            context += self.slots[page_id * size : (page_id + 1) * size]
        return context[:length]

    def _answer(self, work: Work) -> SequenceOutput:
        context = self._read(work)
        picked = [
            next_token(context[:end], self.spec.vocab_size, work.banned_ids, self._copying)
            for end in range(len(context) - work.draft_len, len(context) + 1)
        ]
        tokens = tuple(picked[: work.kept(picked)])
        wanted = work.sampling.logprobs
        logprobs = () if wanted is None else tuple(self._logprob(t, wanted) for t in tokens)
        return SequenceOutput(work.seq_id, tokens, logprobs)

    def _logprob(self, token: int, num_top: int) -> TokenLogprob:
        """Half the mass on the chosen token, half of the rest on the next one, and so on."""
        vocab_size = self.spec.vocab_size
        top: Sequence[tuple[int, float]] = [
            ((token + i) % vocab_size, (i + 1) * math.log(0.5)) for i in range(num_top)
        ]
        return TokenLogprob(token, math.log(0.5), tuple(top))
