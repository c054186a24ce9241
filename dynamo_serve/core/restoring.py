"""What becomes of sequences that wait for pages from a tier below."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_serve.core.hits import add
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.tiers import Copied, Found


def take_copies(life: Lifecycle, ended: Iterable[Copied | Found], now: float) -> None:
    """Take in what became of copies. Who waited for one in vain waits for its turn again, and
    counts as if it had not been admitted."""
    for over in life.spill.settle(ended, now):
        seq = over.seq
        if not over.left:
            if over.counted is not None:
                add(life, seq, over.counted)
            continue
        seq.may_restore = False
        life.preempt(seq, Reason.NOT_RESTORED, now)
