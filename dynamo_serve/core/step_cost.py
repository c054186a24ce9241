"""How long a step takes, learned from the steps themselves; sizes chunks and shares out costs.

    seconds = pace · (fixed + pairs + sequences + reads + curve(tokens)), each with its price

`curve` is piecewise linear in the tokens of the step, with jumps where matrix kernels take another
tile: flat where reading the weights takes the time and steep where computing does, or any other
way round. No price is below zero, so more work
is never predicted to be faster. `pace` is how busy the machine is at the moment.

Sources. Exponentially weighted recursive least squares: S. Haykin, "Adaptive Filter Theory"; here
in its information form, solved by coordinate descent, which keeps prices at zero or above:
V. Franc, V. Hlaváč, M. Navara, "Sequential coordinate-wise algorithm for the non-negative least
squares problem", CAIP 2005. What a step does not exercise is not forgotten: R. Kulhavý,
"Restricted exponential forgetting in real-time identification", Automatica 23, 1987. Surprises
count up to a bound: P. J. Huber, "Robust estimation of a location parameter", 1964. A token costs
what the tokens of its step cost on average: R. J. Aumann, L. S. Shapley, "Values of Non-Atomic
Games", 1974.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import exp, inf, log
from operator import gt, mul
from statistics import median

from dynamo_serve.core.step_shape import (
    CURVE,
    JUMPS,
    KNOTS,
    NEAR_WIDTHS,
    PAIRS,
    PIECES,
    READS,
    SEQUENCES,
    TILES,
    WIDTHS,
    Item,
    StepShape,
    features_of,
)

__all__ = ["Item", "StepCost", "StepShape"]

FORGET = 0.5 ** (1 / 800)  # once per row and per column of a product: its half life is 400 steps
SMOOTHING = 0.5  # steps' worth of belief that neighbouring pieces of the curve are equally steep
DAMPING = 1.0  # steps' worth of reluctance to change a price at once
PACE_GAIN = 0.15  # of a surprise is put down to the machine being busy, or idle again
PACE_KEPT = 0.995  # per step: what lasts for hundreds of steps becomes part of the prices
MAX_SURPRISE = 0.3  # of log(actual / predicted); anything more counts as this much
FIRST_SURPRISE = 1.0  # the same, until a kind is learned
LEARNED_STEPS = 16  # of a kind, with prompt tokens or without
FIRST_REACH = 32  # prompt tokens in a step that are risked without having seen any
FIRST_DRAFTS = 2  # draft tokens
SHOWN_STEPS = 3  # with prompt tokens: as many in a row were hardly quick by chance
MORE = 2.0  # times the work of each of these are tried, if that is to take
SURE_PART = 0.9  # of the time: so much faster than the next may they have been
LEAST_SECONDS = 1e-6
ERRORS_KEPT = 256  # steps that the reported error looks back on


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))


class _Fit:
    """seconds = prices · features, learned; neither is ever below zero.

    Most steps have few of the features, so what is learned is kept of those only that some step
    had (`_known`): of the others there is nothing but zeros.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self.prices = list(prior)
        self.count = 0
        self._known: list[int] = []  # places of features, in order
        self._at: list[int | None] = [None] * len(prior)  # where among those
        self._information: list[list[float]] = []
        self._pull: list[float] = []  # where the errors so far want each price to go

    def __call__(self, features: Sequence[float]) -> float:
        return max(_dot(self.prices, features), LEAST_SECONDS)

    def scale(self, factor: float) -> None:
        self.prices = [factor * price for price in self.prices]

    def learn(self, features: Sequence[float], predicted: float, error: float) -> None:
        """Take in a step that took about 1 + `error` times the `predicted` seconds.

        Steps weigh the same, short or long: a row is divided by its prediction.
        """
        for i, feature in enumerate(features):
            if feature and self._at[i] is None:
                self._meet(i)
        row = [features[i] / predicted for i in self._known]
        kept = [FORGET if x else 1.0 for x in row]
        self._information = [
            [FORGET * k * a + x * y for a, k, y in zip(line, kept, row, strict=True)]
            if x
            else [k * a for a, k in zip(line, kept, strict=True)]
            for x, line in zip(row, self._information, strict=True)
        ]
        self._pull = [k * p + error * x for p, k, x in zip(self._pull, kept, row, strict=True)]
        self._descend(row, predicted)
        self.count += 1

    def _meet(self, i: int) -> None:
        """A step has a feature that none had before."""
        at = bisect_right(self._known, i)
        self._known.insert(at, i)
        self._pull.insert(at, 0.0)
        for line in self._information:
            line.insert(at, 0.0)
        self._information.insert(at, [0.0] * len(self._known))
        for at, known in enumerate(self._known):
            self._at[known] = at

    def _descend(self, row: Sequence[float], predicted: float) -> None:
        """One price after the other to where it explains most, the others being as they are."""
        prices, last = self.prices, len(self.prices) - 1
        for i, at in enumerate(self._at):
            belief = pull = 0.0
            if at is not None:
                line, x = self._information[at], row[at]
                belief, pull = line[at] + DAMPING * x * x, self._pull[at]
            if i >= CURVE:
                likeness = SMOOTHING * (NEAR_WIDTHS[i - CURVE] / predicted) ** 2
                near = prices[i - 1] if i > CURVE else prices[CURVE]
                near = (near + prices[i + 1]) / 2 if i < last else near
                belief += likeness
                pull += likeness * (near - prices[i])
            if not belief:
                continue
            change = pull / belief
            change = change if change > -prices[i] else -prices[i]
            if change:
                prices[i] += change
                if at is not None:
                    self._pull = [p - change * a for p, a in zip(self._pull, line, strict=True)]


class StepCost:
    """Learns online what steps cost. Deterministic: equal observations, equal predictions.

    The arguments are what is believed before the first observation: a fixed time, and more per
    prompt token and per decoding sequence, in seconds. Steps with prompt tokens, with drafts, and
    with neither are learned apart, because they run different kernels; the pace of the machine is
    common to all. Until it is known better, a draft token costs what a sequence does.
    """

    def __init__(
        self, step_s: float = 0.010, token_s: float = 0.0002, sequence_s: float = 0.001
    ) -> None:
        unknown = [0.0] * (1 + len(TILES))  # reads and jumps
        self._prefill = _Fit([step_s, 0.0, sequence_s, *unknown, *[token_s] * len(PIECES)])
        self._decode = _Fit([step_s, 0.0, 0.0, *unknown, *[sequence_s] * len(PIECES)])
        self._drafts: _Fit | None = None
        self._log_pace = 0.0
        self._most_seen = 0  # prompt tokens in one step
        self._latest = deque([(StepShape(), inf)] * SHOWN_STEPS, SHOWN_STEPS)  # with prompts
        self._most_drafts = 0
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step has run. One that took no measurable time teaches nothing."""
        if seconds <= 0:
            return
        if shape.draft_tokens and not shape.prefill_tokens and self._drafts is None:
            self._drafts = _Fit(self._decode.prices)
        fit, features = self._fit(shape), features_of(shape, bool(shape.prefill_tokens))
        pace, expected = exp(self._log_pace), fit(features)
        predicted = self._at_least(pace * expected, shape)
        self._errors.append(abs(predicted - seconds) / seconds)
        self._most_seen = max(self._most_seen, shape.prefill_tokens)
        if shape.prefill_tokens:
            self._latest.append((shape, seconds))
        self._most_drafts = max(self._most_drafts, shape.draft_tokens)
        if not fit.count:  # a prior knows how costs relate, but not how fast the machine is
            for other in (self._prefill, self._decode):
                if not other.count:
                    other.scale(seconds / (pace * expected))
            expected = seconds / pace
        is_learned = fit.count >= LEARNED_STEPS
        bound = MAX_SURPRISE if is_learned else FIRST_SURPRISE
        surprise = max(-bound, min(bound, log(seconds / expected) - self._log_pace))
        if is_learned:
            self._log_pace = PACE_KEPT * self._log_pace + PACE_GAIN * surprise
        fit.learn(features, expected, surprise)

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step of this shape will take; never falls with more of anything."""
        fit = self._fit(shape)
        predicted = exp(self._log_pace) * fit(features_of(shape, bool(shape.prefill_tokens)))
        return self._at_least(predicted, shape)

    def largest_chunk(self, base: StepShape, position: int, budget_s: float, cap: int) -> int:
        """How many tokens of one more prompt, at `position`, fit a step of `budget_s` seconds.

        Between 0 and `cap`. The model is never trusted far beyond what it has seen: with the
        chunk, the step has at most `reach` prompt tokens. Nor is it against what it sees: smaller
        steps would never tell it that it has learned from some that were slow for other reasons.
        """
        most = min(cap, self.reach - base.prefill_tokens)
        if most < 1 or self._floor(base) > budget_s:
            return 0
        prices = self._prefill.prices
        slopes, tokens = prices[CURVE:], base.tokens
        heights = [0.0, *accumulate(a * b for a, b in zip(slopes, WIDTHS, strict=True))]
        features = features_of(base, is_prefill=True)[:JUMPS]
        features[READS] += position
        rest = _dot(prices[:JUMPS], features)

        def seconds(count: int) -> float:
            piece = bisect_right(KNOTS, tokens + count) - 1
            curve = heights[piece] + slopes[piece] * (tokens + count - KNOTS[piece])
            curve += sum(prices[JUMPS + i] for i, tile in enumerate(TILES) if tokens + count > tile)
            pairs = count * (position + count / 2)
            return rest + prices[PAIRS] * pairs + prices[READS] * count + curve

        found = bisect_right(range(1, most + 1), budget_s / exp(self._log_pace), key=seconds)
        return max(found, self._shown(base, position, budget_s, most))

    def _shown(self, base: StepShape, position: int, budget_s: float, most: int) -> int:
        """The same, but by the latest steps with prompt tokens alone, each of them: a step that has
        at most so many times as much of everything takes at most as many times as long."""
        room = [inf] * len(base)
        for shape, took in self._latest:
            times = min(MORE, SURE_PART * budget_s / took)
            if times < 1:  # less than once of it need not take less: some of the time is fixed
                return 0
            room = [min(pair) for pair in zip(room, (times * n for n in shape), strict=True)]
        return bisect_left(
            range(1, most + 1), True, key=lambda n: any(map(gt, base.with_chunk(n, position), room))
        )

    def shares(self, works: Sequence[Item], shape: StepShape | None = None) -> list[float]:
        """Which part of its step's time each of `works` is to pay for; they add up to 1. `shape` is
        theirs, where somebody knows it.

        Everybody pays for their own attention, and for the rest by tokens.
        """
        shape = shape or StepShape.of(works)
        prices, features = self._fit(shape).prices, features_of(shape, bool(shape.prefill_tokens))
        common = prices[0] + _dot(prices[JUMPS:], features[JUMPS:])
        per_token = max(common, LEAST_SECONDS) / shape.tokens
        per_read, per_pair = prices[READS], prices[PAIRS]
        apart = prices[SEQUENCES] if shape.prefill_tokens or shape.draft_tokens else 0.0
        costs = [
            per_token * count
            + per_read * (position + count)
            + (per_pair * count * (position + count / 2) if is_prefill else apart)
            for count, position, is_prefill in works
        ]
        whole = sum(costs)
        return [cost / whole for cost in costs]

    @property
    def reach(self) -> int:
        """Prompt tokens that a step may have: twice the most seen in one, and at least 32."""
        return max(FIRST_REACH, 2 * self._most_seen)

    @property
    def draft_reach(self) -> int:
        """The same for draft tokens."""
        return max(FIRST_DRAFTS, 2 * self._most_drafts)

    @property
    def knows_drafts(self) -> bool:
        return self._drafts is not None and self._drafts.count >= LEARNED_STEPS

    @property
    def error(self) -> float:
        """Median of |predicted - actual| / actual over the latest steps, each predicted before."""
        return median(self._errors) if self._errors else 0.0

    @property
    def knows_decoding(self) -> bool:
        """Whether plain decode steps have been seen often enough to compare others with."""
        return self._decode.count >= LEARNED_STEPS

    def _fit(self, shape: StepShape) -> _Fit:
        if shape.prefill_tokens:
            return self._prefill
        return self._drafts or self._decode if shape.draft_tokens else self._decode

    def _at_least(self, predicted: float, shape: StepShape) -> float:
        """A step that only decodes is its own floor."""
        if not shape.prefill_tokens and not shape.draft_tokens:
            return predicted
        return max(predicted, self._floor(shape))

    def _floor(self, shape: StepShape) -> float:
        """What the decoding sequences of a step take without its prompt tokens, once known."""
        if not shape.decode_sequences or not self.knows_decoding:
            return 0.0
        alone = StepShape(0, 0.0, shape.decode_sequences, shape.decode_context)
        return exp(self._log_pace) * self._decode(features_of(alone, is_prefill=False))
