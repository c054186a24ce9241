"""Every filter and penalty against a slow reference that handles one row in plain Python."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch

from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import sampler
from dynamo_serve.engines.local.draws import uniform
from dynamo_serve.engines.local.history import History
from dynamo_serve.engines.local.logit_edits import Row
from dynamo_serve.engines.local.sampler import choose

VOCAB_SIZE = 60


def random_logits(count: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def slow_edits(logits: list[float], row: Row) -> list[float]:
    out = list(logits)
    for token, bias in row.sampling.logit_bias:
        out[token] += bias
    for token, count in (row.history.counts if row.history else {}).items():
        penalty = row.sampling.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        out[token] -= row.sampling.frequency_penalty * count
        out[token] -= row.sampling.presence_penalty * (count > 0)
    for token in row.banned_ids:
        out[token] = -math.inf
    return out


def slow_distribution(logits: list[float], row: Row) -> dict[int, float]:
    """token -> probability after all edits and filters."""
    s = row.sampling
    edited = slow_edits(logits, row)
    if s.temperature == 0:
        return {max(range(len(edited)), key=edited.__getitem__): 1.0}
    top = max(edited)
    weights = {t: math.exp((x - top) / s.temperature) for t, x in enumerate(edited)}
    weights = {t: w for t, w in weights.items() if w >= s.min_p and w > 0}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    ranked = ranked[: s.top_k or None]
    total, before = sum(weights[t] for t in ranked), 0.0
    kept: list[int] = []
    for token in ranked:
        if kept and before >= s.top_p * total:
            break
        kept.append(token)
        before += weights[token]
    return {t: weights[t] / before for t in kept}


def history_of(prompt: list[int], output: list[int]) -> History:
    history = History()
    history.extend(prompt, len(prompt))
    history.extend(output, len(prompt))
    return history


SETTINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.5, top_k=5),
    Sampling(top_k=1),
    Sampling(top_p=0.6),
    Sampling(top_p=0.0),
    Sampling(temperature=2.0, top_p=0.9, top_k=12),
    Sampling(min_p=0.1),
    Sampling(temperature=1.3, min_p=0.02, top_p=0.8, top_k=20),
    Sampling(repetition_penalty=1.8),
    Sampling(presence_penalty=1.5, frequency_penalty=0.7),
    Sampling(repetition_penalty=0.6, presence_penalty=-1.0, top_p=0.9),
    Sampling(logit_bias=((3, 8.0), (7, -100.0), (9, 2.5))),
    Sampling(temperature=0.0, logit_bias=((11, 100.0),)),
    Sampling(temperature=0.0, frequency_penalty=2.0),
    Sampling(top_k=10_000, top_p=0.95),
]


def some_row(sampling: Sampling, position: int) -> Row:
    rng = random.Random(position)
    history = None
    if sampling.needs_history:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
        history = history_of(prompt, [rng.randrange(VOCAB_SIZE) for _ in range(20)])
    banned = frozenset(rng.sample(range(VOCAB_SIZE), 3)) if position % 3 == 0 else frozenset()
    return Row(sampling, position, banned, history)


@pytest.mark.parametrize("candidates", [1024, 8])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_match_the_slow_reference(
    sampling: Sampling, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "CANDIDATES", candidates)
    logits = random_logits(1)[0]
    row = some_row(sampling, 0)
    expected = slow_distribution(logits.tolist(), row)
    draws = 4000
    rows = [Row(sampling, i, row.banned_ids, row.history) for i in range(draws)]
    found = [c.token_id for c in choose(logits.repeat(draws, 1), rows)]
    assert set(found) <= set(expected), "a token that a filter had removed"
    for token, probability in expected.items():
        # five standard deviations: one false alarm in a million tokens
        slack = 5 * math.sqrt(draws * probability * (1 - probability)) + 1e-9
        assert abs(found.count(token) - draws * probability) <= max(slack, 1), token


def test_a_row_is_decided_alone_whatever_its_neighbours() -> None:
    rows = [some_row(s, i) for i, s in enumerate(SETTINGS * 2)]
    logits = random_logits(len(rows), seed=5)
    together = choose(logits.clone(), rows)
    for i, row in enumerate(rows):
        assert choose(logits[i : i + 1].clone(), [row])[0] == together[i]
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    shuffled = choose(logits[order], [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_a_wide_vocabulary_is_cut_as_a_small_one() -> None:
    # Flat logits: the 0.9 mass lies far beyond the candidates that are sorted first.
    vocab_size, count = 5000, 300
    logits = random_logits(1, vocab_size)[0] * 0.01
    sampling = Sampling(top_p=0.9, seed=4)
    ranked = logits.sort(descending=True).indices.tolist()
    probs = torch.softmax(logits.double(), 0)[ranked].cumsum(0)
    allowed = set(ranked[: int((probs < 0.9).sum()) + 1])
    found = choose(logits.repeat(count, 1), [Row(sampling, i) for i in range(count)])
    tokens = {c.token_id for c in found}
    assert tokens <= allowed
    assert len(tokens & set(ranked[sampler.CANDIDATES :])) > count / 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3)
    expected = torch.log_softmax(logits.double(), -1)
    rows = [
        Row(Sampling(temperature=0.0, logprobs=0, logit_bias=((4, 50.0),)), 1),
        Row(Sampling(temperature=0.0), 1),
        Row(Sampling(temperature=3.0, top_k=2, logprobs=5), 1),
    ]
    first, second, third = choose(logits.clone(), rows)
    assert second.logprob is None
    assert first.logprob is not None and first.token_id == first.logprob.token_id == 4
    assert first.logprob.top == ()
    assert first.logprob.logprob == pytest.approx(float(expected[0, 4]), abs=1e-5)
    assert third.logprob is not None and third.token_id is not None
    assert third.logprob.logprob == pytest.approx(float(expected[2, third.token_id]), abs=1e-5)
    ranked = expected[2].sort(descending=True)
    assert [t for t, _ in third.logprob.top] == ranked.indices[:5].tolist()
    assert [p for _, p in third.logprob.top] == pytest.approx(ranked.values[:5].tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_spoil_only_their_own_row(bad: float) -> None:
    logits = random_logits(3)
    rows = [Row(Sampling(seed=i, top_p=0.9, logprobs=2), 9) for i in range(3)]
    expected = choose(logits.clone(), rows)
    logits[1, 17] = bad
    found = choose(logits, rows)
    assert found[1].token_id is None and found[1].logprob is None
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_half_precision_logits_are_accepted() -> None:
    logits = random_logits(2).bfloat16()
    rows = [Row(Sampling(temperature=0.0), 1), Row(Sampling(top_k=1), 1)]
    assert [c.token_id for c in choose(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [40, 1500])
def test_among_equal_logits_the_lower_id_comes_first(vocab_size: int) -> None:
    # Half precision makes equals common; each filter that leaves one token agrees with greedy.
    logits = (random_logits(1, vocab_size)[0] / 12).round().bfloat16().repeat(4, 1)
    rows = [
        Row(Sampling(temperature=0.0, logprobs=2), 1),
        Row(Sampling(top_k=1, logprobs=3), 1),
        Row(Sampling(top_p=1e-9, logprobs=20), 1),
        Row(Sampling(top_p=1e-9, top_k=vocab_size - 1), 1),
    ]
    found = choose(logits.clone(), rows)
    likeliest = (logits[0] == logits[0].max()).nonzero()[:, 0].tolist()
    assert len(likeliest) > 3
    assert [choice.token_id for choice in found] == [likeliest[0]] * 4
    for choice, row in zip(found[:3], rows, strict=False):
        assert choice.logprob is not None
        count = row.sampling.logprobs or 0
        assert [t for t, _ in choice.logprob.top][: len(likeliest)] == likeliest[:count]
        assert choose(logits[:1].clone(), [row]) == [choice]


def test_draws_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (
        [uniform(123, position) for position in range(20_000)],
        [uniform(seed, 7) for seed in range(20_000)],
    ):
        assert all(0 <= x < 1 for x in numbers)
        counts = [0] * 50
        for x in numbers:
            counts[int(x * 50)] += 1
        expected = len(numbers) / 50
        chi_square = sum((c - expected) ** 2 / expected for c in counts)
        assert chi_square < 85.4, chi_square  # 49 degrees of freedom, 0.1 %
        pairs = sum(a * b for a, b in pairwise(numbers)) / (len(numbers) - 1)
        assert abs(pairs - 0.25) < 0.01  # neighbours are independent


def test_neighbouring_seeds_do_not_repeat_each_other_shifted() -> None:
    seen = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(seen) == 2500


def test_a_draw_just_below_one_stays_within_what_was_kept() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    almost_one = torch.tensor([1.0 - 2.0**-48], dtype=torch.float64)
    assert sampler._invert(weights, almost_one).tolist() == [1]
    assert sampler._invert(weights.flip(1), torch.zeros(1, dtype=torch.float64)).tolist() == [2]
