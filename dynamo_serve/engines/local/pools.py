"""From the hidden states of a prompt to one vector, over the chunks that it is run in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dynamo_serve.core.batch import SequenceOutput, Work
from dynamo_serve.core.request import Finish
from dynamo_serve.engines.local.step import num_states

NOT_FINITE = "the model's hidden states were not finite"


class Pools:
    """Sums of what the live sequences have been through, kept from admission to `drop`.

    A step that failed is run again as it was: the sum that a chunk began with stays until the next
    one has begun with its own.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, torch.Tensor]] = {}  # by the position that they reach to

    def see(self, work: Sequence[Work], states: torch.Tensor) -> list[SequenceOutput]:
        """Take in the hidden states [m, hidden] of `work`, as many of each as `num_states` says:
        an output for each that is done, or failed."""
        outputs: list[SequenceOutput] = []
        for w, part in zip(work, states.split([num_states(w) for w in work]), strict=True):
            assert w.pooling is not None
            vector = self._sum(w, part) if w.pooling.reads_all else part.float().sum(dim=0)
            if not bool(torch.isfinite(vector).all()):
                outputs.append(SequenceOutput(w.seq_id, finish=Finish.ERROR, error=NOT_FINITE))
            elif w.samples:
                whole = vector / w.prompt_len if w.pooling.reads_all else vector
                outputs.append(done(w.seq_id, whole))
        return outputs

    def _sum(self, work: Work, part: torch.Tensor) -> torch.Tensor:
        begin, known = work.position, self._sums.get(work.seq_id, {})
        assert begin == 0 or begin in known, f"{work.seq_id}: seen from {begin} on only"
        before = known[begin] if begin else part.new_zeros(part.shape[1], dtype=torch.float32)
        total = before + part.sum(dim=0, dtype=torch.float32)
        self._sums[work.seq_id] = {begin: before, begin + len(work.token_ids): total}
        return total

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._sums.pop(seq_id, None)

    def __len__(self) -> int:
        return len(self._sums)


def done(seq_id: str, vector: torch.Tensor) -> SequenceOutput:
    """The end of a request whose `vector` [n] has come."""
    artifact = vector.float().cpu().contiguous().numpy().tobytes()
    return SequenceOutput(seq_id, finish=Finish.STOP, artifact=artifact)
