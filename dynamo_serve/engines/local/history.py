"""The tokens a sequence has seen, counted for the penalties."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_serve.core.batch import Work


class History:
    """One sequence's tokens: `counts` maps each to how often it is in the output."""

    __slots__ = ("counts", "length")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.length = 0

    def extend(self, token_ids: Iterable[int], prompt_len: int) -> None:
        """Append tokens; those at positions from `prompt_len` on are output."""
        for token in token_ids:
            is_output = self.length >= prompt_len
            self.counts[token] = self.counts.get(token, 0) + is_output
            self.length += 1

    def retract(self, token_ids: Iterable[int], prompt_len: int) -> None:
        """Take the latest tokens off again, until they are seen again: a new one stays known."""
        for token in reversed(tuple(token_ids)):
            self.length -= 1
            self.counts[token] -= self.length >= prompt_len


class Histories:
    """The histories of the live sequences that need one, kept from admission to `drop`."""

    def __init__(self) -> None:
        self._of: dict[str, History] = {}

    def see(self, work: Work) -> History | None:
        """Take in `work`'s tokens; None when its sampling looks at none."""
        if not work.sampling.needs_history:
            return None
        history = self._of.setdefault(work.seq_id, History())
        history.extend(work.cached_ids, work.prompt_len)
        assert history.length == work.position, f"{work.seq_id}: tokens seen out of order"
        history.extend(work.token_ids, work.prompt_len)
        return history

    def unsee(self, work: Work) -> None:
        """Take back what `see` did, if it did: the step failed, and is run again."""
        history = self._of.get(work.seq_id)
        if history is not None and history.length == work.position + len(work.token_ids):
            history.retract((*work.cached_ids, *work.token_ids), work.prompt_len)

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._of.pop(seq_id, None)

    def __len__(self) -> int:
        return len(self._of)
