"""What of prompts was found: counted when they are admitted, or when what was found has come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_serve.core.sequence import Sequence

if TYPE_CHECKING:
    from dynamo_serve.core.lifecycle import Lifecycle


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
    life.pins.hit(seq, keys, now)


def add(life: Lifecycle, seq: Sequence, found: int) -> None:
    """So much of a prompt was found; for good, for who counts a fall takes it for a new engine."""
    life.totals["prefix_asked"] += seq.num_tokens
    life.totals["prefix_hit"] += found
    life.totals["prompt"] += seq.num_tokens
    life.shares.account(seq.request.tenant).saved_tokens += found
