"""The local engine: load once, then run whatever steps the scheduler plans."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from llguidance import LLTokenizer

from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Sampling
from dynamo_serve.core.tiers import Copied, Copy, Found
from dynamo_serve.engines.local.follower import Follower, Masks
from dynamo_serve.engines.local.history import Histories, History
from dynamo_serve.engines.local.logit_edits import Row
from dynamo_serve.engines.local.matchers import Matchers
from dynamo_serve.engines.local.native_runner import NativeRunner
from dynamo_serve.engines.local.pools import Pools
from dynamo_serve.engines.local.sampler import Choice, choose
from dynamo_serve.engines.local.scores import Scores, score
from dynamo_serve.engines.local.startup import Limits, Ready, Wishes, start_up
from dynamo_serve.engines.local.step import Computed, after_failure, packing_order
from dynamo_serve.engines.local.words import load_words

logger = logging.getLogger(__name__)

UNSEEN = Sampling(temperature=0.0)  # for a token that is picked and thrown away


class LocalEngine:
    """Runs a transformers causal language model over its own paged KV cache.

    Implements `core.engine.Engine`. Not thread-safe: one thread calls all methods.
    """

    def __init__(
        self,
        model: ModelSection,
        engine: EngineSection,
        cache: CacheSection,
        *,
        max_decode_sequences: int,
        max_prefill_tokens: int,
        path: str,
        progress: Callable[[str, float], None],
    ) -> None:
        """`path` is a folder; `progress(stage, fraction)` hears of start-up."""
        limits = Limits(max_decode_sequences, max_prefill_tokens)
        self._wishes = Wishes(model, engine, cache, limits, path)
        self._progress = progress
        self._ready: Ready | None = None
        self._histories = Histories()
        self._matchers = Matchers(self._words)
        self._pools = Pools()

    def start(self) -> EngineSpec:
        """Load, check, warm up. Raises `EngineStartError` with the remedy."""
        assert self._ready is None, "started twice"
        self._ready = start_up(self._wishes, self._progress)
        facts = self._ready.spec.facts
        logger.info(", ".join(f"{key} {value}" for key, value in facts.items()))
        return self._ready.spec

    def step(self, batch: Batch) -> list[SequenceOutput]:
        """Run all of `batch`: tokens for each work that samples, or a vector; an error for any that
        failed."""
        ready = self._ready
        assert ready is not None, "not started"
        every = packing_order(batch.work)
        work = [w for w in every if w.pooling is None]
        pooled = [w for w in every if w.pooling is not None]
        copies = (w.copied(ready.spec.page_size) for w in every)
        histories = [self._histories.see(w) for w in work]
        followers = self._matchers.begin(work)
        # A chunk that samples nothing is looked at too: its pages are shared as soon as it has run,
        # and must not be when they hold NaN.
        try:
            with torch.inference_mode():
                ready.parts.copy(copy for copy in copies if copy)
                work, scores = score(work, lambda part: ready.run(part).logits)
                choices, masks, vectors = self._choose(work, histories, followers, pooled)
        except Exception as error:
            after_failure(error)
            raise
        outputs = [
            self._output(w, choice, scores.get(w.seq_id))
            for w, choice in zip(work, choices, strict=True)
        ]
        if followers:
            outputs = [
                _within(out, followers[out.seq_id], masks) if out.seq_id in followers else out
                for out in outputs
            ]
            self._matchers.go_on(followers)
        told = [
            out
            for w, out in zip(work, outputs, strict=True)
            if w.samples or out.finish or out.prompt_logprobs
        ]
        return told + vectors

    def hold_for(self, between: Callable[[], None], every: float) -> None:
        """See `core.engine.HoldingEngine`; only where the spec says `holds_steps`."""
        assert self._ready is not None and isinstance(self._ready.runner, NativeRunner)
        self._ready.runner.hold_for(between, every)

    def copy(self, copies: Sequence[Copy]) -> None:
        """See `core.engine.CopyingEngine`; only where the spec has tiers."""
        assert self._ready is not None and self._ready.copier is not None
        self._ready.copier.copy(copies)

    def copied(self) -> list[Copied | Found]:
        assert self._ready is not None and self._ready.copier is not None
        return self._ready.copier.copied()

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget what the penalties, the grammars and the sums knew of these sequences; their pages
        are the scheduler's."""
        dropped = tuple(seq_ids)
        self._pools.drop(dropped)
        self._histories.drop(dropped)
        self._matchers.drop(dropped)

    def close(self) -> None:
        """Give the model's memory and the attention function back. Idempotent."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None
            self._histories = Histories()
            self._pools = Pools()
            self._matchers.close()

    def _words(self) -> LLTokenizer:
        assert self._ready is not None
        return load_words(self._wishes.path, self._ready.runner.model, self._ready.spec.vocab_size)

    def _choose(
        self,
        work: Sequence[Work],
        histories: Sequence[History | None],
        followers: dict[str, Follower],
        pooled: Sequence[Work],
    ) -> tuple[list[list[Choice]], dict[str, Masks], list[SequenceOutput]]:
        """For each of `work` what was picked: one token, and one more for each of its draft. What
        has a grammar, and no masks yet, is thrown away later. And what came of those `pooled`."""
        assert self._ready is not None
        looked_at = [*(w._replace(samples=True) for w in work), *pooled]
        computed = self._ready.run(looked_at)
        masks = self._matchers.finish(followers, is_alone=len(followers) == len(work))
        rows = _rows(work, histories, masks)
        choices = choose(computed.logits, rows) if rows else []
        if len(rows) + len(pooled) > 1 and not _is_sound(choices, computed):
            # Rows attended in one call see each other's values times zero, and NaN times zero is
            # NaN: alone and without drafts, only those at fault fail. What the others wrote in
            # this step is written again.
            work = [w.without_draft() for w in work]
            for w in looked_at:
                if w.draft_len:
                    self._ready.cache.scrub(w.page_table)
            computed = self._alone([*(w._replace(samples=True) for w in work), *pooled])
            rows = _rows(work, histories, masks)
            choices = choose(computed.logits, rows) if rows else []
        vectors = [] if computed.states is None else self._pools.see(pooled, computed.states)
        for failed in {out.seq_id for out in vectors if out.finish is Finish.ERROR}:
            self._ready.cache.scrub(next(w.page_table for w in pooled if w.seq_id == failed))
        parts = iter(choices)
        return [list(islice(parts, w.draft_len + 1)) for w in work], masks, vectors

    def _alone(self, work: Sequence[Work]) -> Computed:
        """Each by itself."""
        assert self._ready is not None
        alone = [self._ready.run([w]) for w in work]
        logits, states = [c.logits.clone() for c in alone], [c.states for c in alone]
        found = [part for part in states if part is not None]
        return Computed(torch.cat(logits), torch.cat(found) if found else None)

    def _output(
        self, work: Work, choices: Sequence[Choice], scores: Scores | None
    ) -> SequenceOutput:
        picked = [choice.token_id for choice in choices if choice.token_id is not None]
        if len(picked) < len(choices) or (scores is not None and not scores.are_finite):
            assert self._ready is not None
            self._ready.cache.scrub(work.page_table)
            error = "the model's logits were not finite"
            return SequenceOutput(work.seq_id, finish=Finish.ERROR, error=error)
        told = scores.logprobs if scores is not None else ()
        if not work.samples:
            return SequenceOutput(work.seq_id, prompt_logprobs=told)
        tokens = tuple(picked[: work.kept(picked)])
        logprobs = [c.logprob for c in choices[: len(tokens)] if c.logprob is not None]
        return SequenceOutput(work.seq_id, tokens, tuple(logprobs), prompt_logprobs=told)


def _is_sound(choices: Sequence[Choice], computed: Computed) -> bool:
    """Whether all that a step brought are numbers."""
    states = computed.states
    is_finite = states is None or bool(torch.isfinite(states).all())
    return is_finite and all(choice.token_id is not None for choice in choices)


def _within(out: SequenceOutput, follower: Follower, masks: dict[str, Masks]) -> SequenceOutput:
    """What of `out` a grammar has room for, and the end where nothing can follow."""
    if out.finish is not None:
        return out
    if (made := masks.get(out.seq_id)) is None:
        return SequenceOutput(out.seq_id)  # it has to wait
    if made.is_over:
        return SequenceOutput(out.seq_id, finish=Finish.STOP)
    taken = None if made.error else follower.take(out.token_ids)
    if taken is None or taken.error:
        error = made.error if taken is None else taken.error
        return SequenceOutput(out.seq_id, finish=Finish.ERROR, error=error)
    return out._replace(
        token_ids=out.token_ids[: taken.num_tokens],
        logprobs=out.logprobs[: taken.num_tokens],
        finish=Finish.STOP if taken.is_over else None,
    )


def _rows(
    work: Sequence[Work], histories: Sequence[History | None], masks: dict[str, Masks]
) -> list[Row]:
    """What decides each token that is to be picked, one work after the other."""
    rows: list[Row] = []
    for w, history in zip(work, histories, strict=True):
        assert history is None or not w.draft_len, f"{w.seq_id}: a draft would be taken for seen"
        end = w.position + len(w.token_ids)
        if not w.samples:
            rows.append(Row(UNSEEN, end))
            continue
        positions = range(end - w.draft_len, end + 1)
        if w.grammar is None:
            rows += [Row(w.sampling, at, w.banned_ids, history) for at in positions]
        elif not (made := masks.get(w.seq_id)) or not made.rows:
            rows += [Row(UNSEEN, at) for at in positions]
        else:  # the masks know the banned ids; behind a draft that it forbids nothing counts
            allowed = (*made.rows, *(None,) * len(positions))
            rows += [
                Row(w.sampling, at, history=history, allowed=mask)
                for at, mask in zip(positions, allowed, strict=False)
            ]
    return rows
