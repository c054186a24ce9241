"""What of prompts is found: taken when they are admitted; counted then, or when it has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_serve.core.sequence import Sequence

if TYPE_CHECKING:
    from dynamo_serve.core.lifecycle import Lifecycle


def attach(life: Lifecycle, seq: Sequence, keys: list[bytes], now: float) -> None:
    """Take the head that somebody has, and begin to restore what of it lies below, or to copy what
    of the page after it is the same."""
    pool = life.pool
    seq.page_table, missing = pool.attach(keys, seq.owner)
    seq.shown = ()
    seq.prompt_logprobs = ()  # if they are still wanted, all is computed again
    seq.page_part = pool.part_of(seq.page_table)
    seq.num_sealed = len(seq.page_table)
    seq.num_computed = seq.num_unseen = seq.num_sealed * pool.page_size
    if missing:
        life.spill.restore(seq, missing, now)
    else:
        life.parts.take(seq, life.running.values())
    pool.index.claim([keys[i] for i in missing] + keys[seq.num_sealed :], seq.id)
    life.spill.asked(keys[: seq.num_sealed])


def count_in(life: Lifecycle, seq: Sequence, keys: list[bytes], now: float) -> None:
    """It is admitted for the first time, with so much of the prompt found."""
    seq.admitted_at = now
    seq.cached_tokens = seq.num_computed
    if seq.num_sealed:
        life.pool.tree.found(seq.chain(keys[: seq.num_sealed]), now)
    life.shares.learn_prompt(seq.request.tenant, seq.num_pending)
    if seq.restoring:
        seq.restoring.counted = seq.num_computed
    else:
        add(life, seq, seq.num_computed)
    life.parts.num_copied += seq.num_computed % life.pool.page_size
    life.pins.hit(seq, keys, now)


def add(life: Lifecycle, seq: Sequence, found: int) -> None:
    """So much of a prompt was found; for good, for who counts a fall takes it for a new engine."""
    life.totals["prefix_asked"] += seq.num_tokens
    life.totals["prefix_hit"] += found
    life.totals["prompt"] += seq.num_tokens
    life.shares.account(seq.request.tenant).saved_tokens += found
