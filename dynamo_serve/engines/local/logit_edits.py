"""Changes to the logits before a token is picked: biases, penalties, bans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch

from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local.history import History


@dataclass(frozen=True, slots=True)
class Row:
    """What decides the token of one row of logits, to stand at sequence position `position`.

    `allowed`: the tokens that a grammar allows there, a bit for each.
    """

    sampling: Sampling
    position: int
    banned_ids: frozenset[int] = frozenset()
    history: History | None = None
    allowed: bytes | None = None


def edit(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    """Apply to `logits` [n, vocab] in place what each of its `rows` asks for.

    In this order: logit_bias, repetition, frequency and presence penalty, bans, what a grammar
    allows. Only the entries that change are touched, and whole rows that have a grammar.
    """
    _add_biases(logits, rows)
    for i, row in enumerate(rows):
        if row.history is not None and row.history.counts:
            _penalize(logits[i], row.sampling, row.history)
    _ban(logits, rows)
    _keep_allowed(logits, rows)


def _add_biases(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    entries = [(i, t, bias) for i, row in enumerate(rows) for t, bias in row.sampling.logit_bias]
    if entries:
        at_row, at_token, bias = zip(*entries, strict=True)
        index = torch.tensor([at_row, at_token], device=logits.device)
        values = torch.tensor(bias, dtype=logits.dtype, device=logits.device)
        logits.index_put_((index[0], index[1]), values, accumulate=True)


def _penalize(logits: torch.Tensor, sampling: Sampling, history: History) -> None:
    """One row [vocab]. Repetition looks at prompt and output, the other two at the output only."""
    seen = torch.tensor([*history.counts], device=logits.device)
    counts = torch.tensor([*history.counts.values()], device=logits.device).to(logits.dtype)
    values = logits[seen]
    penalty = sampling.repetition_penalty
    values = torch.where(values > 0, values / penalty, values * penalty)
    values -= sampling.frequency_penalty * counts
    values -= sampling.presence_penalty * (counts > 0)
    logits[seen] = values


def _ban(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    entries = [(i, token) for i, row in enumerate(rows) for token in row.banned_ids]
    if entries:
        index = torch.tensor(entries, device=logits.device).T
        logits[index[0], index[1]] = float("-inf")


def _keep_allowed(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    """Neighbours that have a grammar at once."""
    masks = [row.allowed for row in rows if row.allowed is not None]
    if not masks:
        return
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8)
    forbidden = _forbidding(logits.device)[packed.to(logits.device).int()]
    forbidden = forbidden.view(len(masks), -1)[:, : logits.shape[1]]
    done = 0
    for has_grammar, some in groupby(range(len(rows)), lambda i: rows[i].allowed is not None):
        if has_grammar:
            at = [*some]
            part = forbidden[done : done + len(at)]
            logits[at[0] : at[-1] + 1].masked_fill_(part, float("-inf"))
            done += len(at)


@cache
def _forbidding(device: torch.device) -> torch.Tensor:
    """[256, 8]: of a byte of a mask, the tokens that it does not allow."""
    bytes_ = torch.arange(256, device=device)
    return bytes_[:, None] >> torch.arange(8, device=device) & 1 == 0
