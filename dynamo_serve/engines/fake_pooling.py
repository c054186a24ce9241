"""The vectors of the fake engine: nonsense, the same nonsense for the same text every time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from dynamo_serve.core.batch import SequenceOutput, Work
from dynamo_serve.core.request import Finish

SIZE = 16


def vector(context: Sequence[int], kind: str) -> bytes:
    """`SIZE` numbers between -1 and 1, a pure function of every token."""
    told = blake2b(array("q", context).tobytes(), digest_size=2 * SIZE, person=kind.encode())
    parts = array("h", told.digest())
    return array("f", [part / 32768 for part in parts]).tobytes()


class FakePools:
    """What of each prompt was shown, chunk by chunk: of what takes more than the last token, what
    is in the pages does not count."""

    def __init__(self) -> None:
        self._seen: dict[str, list[int]] = {}

    def see(self, work: Work, context: Sequence[int]) -> SequenceOutput | None:
        """Its end, if its prompt is; `context` is what its pages hold."""
        assert work.pooling is not None
        if work.pooling.reads_all:
            seen = self._seen.setdefault(work.seq_id, [])
            assert len(seen) >= work.position, f"{work.seq_id}: seen from {work.position} on only"
            seen[work.position :] = work.token_ids
            context = seen
        if not work.samples:
            return None
        artifact = vector(context, work.pooling.kind)
        return SequenceOutput(work.seq_id, finish=Finish.STOP, artifact=artifact)

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._seen.pop(seq_id, None)
