"""Log probabilities of the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import TokenLogprob
from dynamo_serve.engines.local.sampler import likeliest

SLICE = 64  # tokens at once: there are logits of the whole vocabulary for each


class Scores(NamedTuple):
    """Those of `Work.scored_ids`, unless the model's logits were not numbers."""

    logprobs: tuple[TokenLogprob, ...]
    are_finite: bool = True


def score(
    work: Sequence[Work], run: Callable[[Sequence[Work]], torch.Tensor]
) -> tuple[list[Work], dict[str, Scores]]:
    """Run what is to be scored, a slice after the other, by `run` (logits [n, vocab] of works that
    sample, one for each place of a draft). Also returns what is left to run: of these the last
    token once more, among the others."""
    scores: dict[str, Scores] = {}
    left: list[Work] = []
    for w in work:
        if w.scores:
            scores[w.seq_id] = _score(w, run)
        left.append(_last(w) if w.scores else w)
    return left, scores


def _last(work: Work) -> Work:
    end = work.position + len(work.token_ids) - 1
    return work._replace(token_ids=work.token_ids[-1:], position=end, cached_ids=())


def _score(work: Work, run: Callable[[Sequence[Work]], torch.Tensor]) -> Scores:
    wanted, found = work.scored_ids, []
    for begin in range(0, len(work.token_ids), SLICE):
        ids = work.token_ids[begin : begin + SLICE]
        # Said to be a draft behind its first token: so there are logits of every place.
        part = work._replace(
            token_ids=ids, position=work.position + begin, samples=True, draft_len=len(ids) - 1
        )
        logits = run([part])
        targets = wanted[begin : begin + SLICE]
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            return Scores((), are_finite=False)
        if targets:
            logprobs = torch.log_softmax(logits[: len(targets)].float(), dim=-1)
            found += _told(logprobs, targets, work.sampling.prompt_logprobs or 0)
    return Scores(tuple(found))


def _told(logprobs: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of `targets` [n], by `logprobs` [n, vocab]."""
    index = torch.tensor(targets, device=logprobs.device)[:, None]
    own = logprobs.gather(1, index)
    ranks: list[int] = ((logprobs > own).sum(dim=-1) + 1).tolist()
    values: list[float] = own[:, 0].tolist()
    return [
        TokenLogprob(token, value, likeliest(row, num_top), rank)
        for token, value, rank, row in zip(targets, values, ranks, logprobs, strict=True)
    ]
