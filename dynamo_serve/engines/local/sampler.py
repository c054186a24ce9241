"""From logits to tokens, all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dynamo_serve.core.request import TokenLogprob
from dynamo_serve.engines.local.draws import uniform
from dynamo_serve.engines.local.logit_edits import Row, edit

GREEDY_BELOW = 1e-5  # a temperature this small is 0: dividing by it would overflow
CANDIDATES = 1024  # sorted first; a row whose cut lies beyond them has all its tokens sorted


class Choice(NamedTuple):
    """The token picked for one row; None when its logits were not numbers."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Pick one token for each of `rows` from `logits` [n, vocab].

    Every row is decided by its own logits, settings, seed and position alone, whatever the other
    rows are. Logprobs are those of the model: before bias, penalties, bans, temperature, filters.
    `logits` may be overwritten.
    """
    raw = logits.float()
    wants = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    logprobs = torch.log_softmax(raw[wants], dim=-1) if wants else None
    edit(raw, rows)
    best, tokens = raw.max(dim=-1)
    sampled = [i for i, row in enumerate(rows) if row.sampling.temperature >= GREEDY_BELOW]
    if sampled:
        index = torch.tensor(sampled, device=logits.device)
        # NaN would be an index error inside; such rows fail below, whatever is picked for them.
        subset = torch.nan_to_num(raw[index], neginf=float("-inf"))
        tokens = tokens.index_copy(0, index, sample(subset, [rows[i] for i in sampled]))
    found: list[int] = tokens.tolist()
    sound: list[bool] = torch.isfinite(best).tolist()
    reports = dict(zip(wants, _report(logprobs, wants, rows, found), strict=True))
    return [
        Choice(token, reports.get(i)) if sound[i] else Choice(None) for i, token in enumerate(found)
    ]


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Tokens [n] drawn from edited `logits` [n, vocab] at each row's temperature.

    Filters apply in this order, as in vLLM: min-p, top-k, top-p (of what the others left).
    """
    device = logits.device
    temperature = torch.tensor([row.sampling.temperature for row in rows], device=device)
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    if any(row.sampling.min_p > 0 for row in rows):
        least = torch.tensor([row.sampling.min_p for row in rows], device=device)
        floor = probs.amax(dim=-1, keepdim=True) * least[:, None]
        probs = probs.masked_fill(probs < floor, 0.0)
    draws = torch.tensor(
        [uniform(row.sampling.seed, row.position) for row in rows],
        dtype=torch.float64,
        device=device,
    )
    vocab_size = logits.shape[-1]
    cut = [i for i, row in enumerate(rows) if _cuts(row, vocab_size)]
    if not cut:
        return _invert(probs, draws)
    index = torch.tensor(cut, device=device)
    picked = _sample_cut(probs[index], draws[index], [rows[i] for i in cut])
    if len(cut) == len(rows):
        return picked
    whole = torch.tensor([i for i in range(len(rows)) if i not in set(cut)], device=device)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    tokens[whole] = _invert(probs[whole], draws[whole])
    tokens[index] = picked
    return tokens


def _cuts(row: Row, vocab_size: int) -> bool:
    return row.sampling.top_p < 1.0 or 0 < row.sampling.top_k < vocab_size


def _sample_cut(probs: torch.Tensor, draws: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """For rows with top-k or top-p: [n, vocab] and [n] in, tokens [n] out."""
    vocab_size = probs.shape[-1]
    settings = [
        (min(row.sampling.top_k or vocab_size, vocab_size), row.sampling.top_p) for row in rows
    ]
    top_k, top_p = torch.tensor(settings, dtype=torch.float64, device=probs.device).T
    total = probs.sum(dim=-1, dtype=torch.float64)
    values, ids = _ties_by_id(*probs.topk(min(CANDIDATES, vocab_size), dim=-1))
    kept, enough = _keep(values, total, top_k, top_p)
    enough |= (top_k == vocab_size) & (kept[:, -1] == 0)
    tokens = ids.gather(1, _invert(kept, draws)[:, None])[:, 0]
    rest = (~enough).nonzero()[:, 0]
    if len(rest):
        values, ids = probs[rest].sort(dim=-1, descending=True, stable=True)
        kept, _ = _keep(values, total[rest], top_k[rest], top_p[rest])
        tokens[rest] = ids.gather(1, _invert(kept, draws[rest])[:, None])[:, 0]
    return tokens


def _ties_by_id(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [n, m], sorted by value, the lower id first among equals: as a greedy row picks."""
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _keep(
    values: torch.Tensor, total: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero the sorted probabilities `values` [n, m] beyond top-k and top-p.

    Also says which rows [n] have their top-k within these m; the others are cut by the mass of
    all their tokens, `total` [n].
    """
    rank = torch.arange(values.shape[1], device=values.device)
    kept = values.double().masked_fill_(rank >= top_k[:, None], 0.0)
    running = kept.cumsum(dim=-1)
    within_k = top_k <= values.shape[1]
    mass = torch.where(within_k, running[:, -1], total)
    target = (top_p * mass)[:, None]
    # A token stays while those before it have not reached the target; the first always stays.
    before = running - kept
    beyond = (before >= target) & (rank > 0)
    return kept.masked_fill_(beyond, 0.0), within_k


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The index [n] at which each row's running sum of `weights` [n, m] passes its draw [n]."""
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    passed = torch.searchsorted(running, draws[:, None] * running[:, -1:], right=True)
    return passed[:, 0].clamp_(max=weights.shape[1] - 1)


def _report(
    logprobs: torch.Tensor | None, wants: Sequence[int], rows: Sequence[Row], tokens: list[int]
) -> list[TokenLogprob]:
    """What the rows at `wants` asked to know about their tokens; `logprobs` is [wants, vocab]."""
    if logprobs is None:
        return []
    chosen = torch.tensor([[tokens[i]] for i in wants], device=logprobs.device)
    own: list[float] = logprobs.gather(1, chosen)[:, 0].tolist()
    tops = [
        likeliest(row, rows[i].sampling.logprobs or 0)
        for i, row in zip(wants, logprobs, strict=True)
    ]
    return [
        TokenLogprob(tokens[i], logprob, top)
        for i, logprob, top in zip(wants, own, tops, strict=True)
    ]


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` largest of `logprobs` [vocab], the lower id first among equals.

    Half precision has many equals. topk alone would choose among them by its own k, and so by
    what the other rows of a batch asked for.
    """
    if count == 0:
        return ()
    least = logprobs.topk(min(count, len(logprobs))).values[-1]
    ids = (logprobs >= least).nonzero()[:, 0]
    values, order = logprobs[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order][:count].tolist(), values[:count].tolist(), strict=True))
