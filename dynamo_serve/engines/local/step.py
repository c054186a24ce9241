"""One step's input, packed: the tokens of all its sequences end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dynamo_serve.core.batch import Work
from dynamo_serve.core.engine import EngineBroken


class Row(NamedTuple):
    """One sequence of a step: `length` new tokens, the first of them at `position`."""

    length: int
    position: int
    page_table: tuple[int, ...]

    @property
    def kv_length(self) -> int:
        """Tokens whose KV the sequence has once this step's are written."""
        return self.position + self.length


class PackedStep(NamedTuple):
    """A step as tensors: T tokens of `rows`, one row after the other, n of them sampling.

    `input_ids` and `position_ids` are [1, T]; `slots` [T] says where each token's KV goes in the
    flattened pool; `sample_index` [n] picks the tokens whose logits are wanted:
    the last of a sampling row, and with a draft also those before it that the draft follows.
    `state_index` [m] picks those whose hidden states are wanted, if any are: of work that pools, as
    many as `num_states` says.
    """

    rows: tuple[Row, ...]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    slots: torch.Tensor
    sample_index: torch.Tensor
    state_index: torch.Tensor | None = None


class Computed(NamedTuple):
    """What a forward brought: `logits` [n, vocab], and, if any were wanted, the hidden `states`
    [m, hidden] behind the last norm."""

    logits: torch.Tensor
    states: torch.Tensor | None = None


def num_states(work: Work) -> int:
    """Of how many of its last tokens the hidden states are wanted: also of a chunk that is not the
    last one, to see whether they are numbers."""
    if work.pooling is None:
        return 0
    return len(work.token_ids) if work.pooling.reads_all else 1


def packing_order(work: Sequence[Work]) -> list[Work]:
    """`work` with like beside like, so that attention can take neighbours in one call.

    Those that share their first page come together, the others by length.
    """
    holders = Counter(w.page_table[0] for w in work)
    return sorted(
        work,
        key=lambda w: (
            w.page_table[0] if holders[w.page_table[0]] > 1 else -1,
            len(w.token_ids),
            w.position,
        ),
    )


def pack(work: Sequence[Work], page_size: int, device: torch.device) -> PackedStep:
    """Lay `work` end to end, in the order given."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampling: list[int] = []
    states: list[int] = []
    for w in work:
        end = w.position + len(w.token_ids)
        assert w.token_ids, f"{w.seq_id}: nothing to run"
        assert len(w.page_table) * page_size >= end, f"{w.seq_id}: the page table is too short"
        ids += w.token_ids
        positions += range(w.position, end)
        slots += _slots(w.page_table, w.position, end, page_size)
        if w.pooling is not None:
            states += range(len(ids) - num_states(w), len(ids))
        elif w.samples:
            sampling += range(len(ids) - 1 - w.draft_len, len(ids))
    whole = torch.tensor([ids, positions, slots], dtype=torch.int64).to(device)
    return PackedStep(
        rows=tuple(Row(len(w.token_ids), w.position, w.page_table) for w in work),
        input_ids=whole[0:1],
        position_ids=whole[1:2],
        slots=whole[2],
        sample_index=torch.tensor(sampling, dtype=torch.int64, device=device),
        state_index=torch.tensor(states, dtype=torch.int64, device=device) if states else None,
    )


def _slots(page_table: tuple[int, ...], start: int, end: int, page_size: int) -> list[int]:
    if end - start == 1:
        return [page_table[start // page_size] * page_size + start % page_size]
    first, last = start // page_size, (end - 1) // page_size
    slots = [
        slot
        for page in page_table[first : last + 1]
        for slot in range(page * page_size, (page + 1) * page_size)
    ]
    return slots[start - first * page_size : end - first * page_size]


def after_failure(error: Exception) -> None:
    """A step has failed, and is run again in parts. Raises `EngineBroken` if the device takes no
    more work."""
    if isinstance(error, torch.AcceleratorError):  # of CUDA it is the last word
        raise EngineBroken(str(error)) from error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
