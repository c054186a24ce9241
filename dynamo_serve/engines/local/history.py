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


class Histories:
    """The histories of the live sequences that need one, kept from admission to `drop`."""

    def __init__(self) -> None:
        self._of: dict[str, History] = {}

    def see(self, work: Work) -> History | None:
        """Take in `work`'s tokens, once, however often it is run; None when its sampling looks at
        none."""
        if not work.sampling.needs_history:
            return None
        history = self._of.setdefault(work.seq_id, History())
        if history.length == work.position + len(work.token_ids):
            return history  # its step failed, and is run again
        history.extend(work.cached_ids, work.prompt_len)
        assert history.length == work.position, f"{work.seq_id}: tokens seen out of order"
        history.extend(work.token_ids, work.prompt_len)
        return history

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._of.pop(seq_id, None)

    def __len__(self) -> int:
        return len(self._of)
