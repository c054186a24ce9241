"""Who goes next, who must go, and what a step is for: pure functions of state and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_serve.core.batch import Phase
from dynamo_serve.core.sequence import Sequence as Seq


def phase_order(last: Phase) -> tuple[Phase, Phase]:
    """Which phase to try first: they alternate, so that neither can starve the other."""
    if last is Phase.DECODE:
        return Phase.PREFILL, Phase.DECODE
    return Phase.DECODE, Phase.PREFILL


def victim(running: Sequence[Seq]) -> Seq:
    """The sequence to preempt: the newest admission, which has the least to lose."""
    return running[-1]


def merge_until(waiting: Iterable[Seq], *, delay: float, tokens: int, sequences: int) -> float:
    """When arrivals stop being merged and the prefill starts; -inf means now.

    The window opens with the oldest arrival and closes after `delay` seconds, or at once when
    a full step (`tokens`) or every free place (`sequences`) is already spoken for. It is only
    asked about while nothing else could run.
    """
    opened = float("inf")
    for seq in waiting:
        opened = min(opened, seq.request.arrival)
        tokens -= seq.num_pending
        sequences -= 1
        if tokens <= 0 or sequences <= 0 or seq.num_preemptions:
            return float("-inf")
    return opened + delay
