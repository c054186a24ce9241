"""What of prompts was found: counted when they are admitted, taken back if it did not come."""

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
    life.totals["prefix_asked"] += seq.num_tokens
    life.totals["prefix_hit"] += seq.num_computed
    life.totals["prompt"] += seq.num_tokens
    life.shares.account(seq.request.tenant).saved_tokens += seq.num_computed
    life.shares.learn_prompt(seq.request.tenant, seq.num_pending)
    if seq.restoring:
        seq.restoring.counted = seq.num_computed
    life.pins.hit(seq, keys, now)


def take_back(life: Lifecycle, seq: Sequence, counted: int) -> None:
    """So many tokens were counted as found, and could not be restored."""
    life.totals["prefix_asked"] -= seq.num_tokens
    life.totals["prefix_hit"] -= counted
    life.totals["prompt"] -= seq.num_tokens
    life.shares.account(seq.request.tenant).saved_tokens -= counted
    seq.admitted_at = None
